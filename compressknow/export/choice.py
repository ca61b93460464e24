"""The types of an export, as they are asked for: checked before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressknow.export.types import DEFAULT, check_file_type, check_tensor_type
from compressknow.model.scopes import SCOPES, Pattern


@dataclass(frozen=True)
class Choice:
    """The types of an export: `type` of the file, and `types` of some tensors of it, rules (scope or regular
    expression, tensor type) of which the last that names a tensor holds.

    Raises UsageError for a type that llama.cpp does not have.
    """

    type: str = DEFAULT
    types: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", check_file_type(self.type))
        object.__setattr__(self, "types", check_types(self.types))

    @property
    def label(self) -> str:
        """``q4_k_m``, ``q4_k_m (attention q8_0)``."""
        told = ", ".join(f"{which} {chosen}" for which, chosen in self.types)
        return f"{self.type} ({told})" if told else self.type


def check_types(types: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Rules ``(scope or regular expression, tensor type)`` with the types in small letters.

    Raises UsageError for a type that is none of a tensor, and for a pattern that is none.
    """
    for which, _ in types:
        if which not in SCOPES:
            Pattern("--type-of", which)
    return tuple((which, check_tensor_type(chosen)) for which, chosen in types)
