"""What an export of a given size needs beside its types: who chooses them, and what GPTQ runs over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compressknow.base.errors import CompressknowError
from compressknow.base.format import size
from compressknow.compress.calibrate.walk import Batches
from compressknow.gguf.tensors import Tensors

# Of a file, beside what the one in between has: what llama.cpp adds of its own, and our keys.
_METADATA, _RULE = 4096, 48

Rounding = Literal["nearest", "gptq"]


ALIGNMENT = 32


@dataclass(frozen=True)
class Fitted:
    """Type of each matrix of a file, and what a record says of the choice."""

    types: Mapping[str, str]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """Way to bring a file to a size.

    Attributes
    ----------
    label : ``90.0 MB by facts and text, gptq``.
    budget : the bytes that the file may have.
    choose : takes what the file holds in 32 or 16 bits, and the bytes of all that is no matrix, and gives types.
    rounding : ``gptq``, or ``nearest``: llama.cpp's own, with the importance matrix of the export, if it has one.
    texts : what GPTQ runs over; each counts as much as the others.
    """

    label: str
    budget: int
    choose: Callable[[Tensors, int], Fitted]
    rounding: Rounding = "nearest"
    texts: Sequence[Batches] = ()

    def check(self, nbytes: int) -> None:
        """Raise CompressknowError where a file came out larger than its budget."""
        if nbytes > self.budget:
            raise CompressknowError(
                f"The file has {size(nbytes)}, and {size(self.budget)} were given: nothing was written.",
                "llama.cpp has kept a tensor in another type than the one chosen, or has written more metadata.",
                "Give a little more, and report this.",
            )


def padded(nbytes: int) -> int:
    """Return the bytes that a tensor takes in a file.

    >>> padded(18), padded(64)
    (32, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def is_matrix(tensors: Tensors, name: str) -> bool:
    """Return whether llama.cpp rounds a tensor: the Linear weights, and the embedding of tokens."""
    return name in tensors.weights or name == "token_embd.weight"


def overhead_of(exact: Path, tensors: Tensors) -> int:
    """Return bytes of a file beside its matrices, no fewer than they will be: vocabulary, norms and metadata, which
    includes the rules for its types."""
    import gguf

    names = [name for name in tensors.tensors if is_matrix(tensors, name)]
    others = sum(padded(each.nbytes) for name, each in tensors.tensors.items() if name not in names)
    rules = sum(len(name) + _RULE for name in names)
    return int(gguf.GGUFReader(exact).data_offset) + others + rules + _METADATA
