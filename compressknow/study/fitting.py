"""The types of a GGUF file of a given size, by what rounding each of its tensors costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compressknow.base.errors import UsageError
from compressknow.base.format import size
from compressknow.gguf.choice import check_types
from compressknow.gguf.fit import Fitted, Rounding, is_matrix, padded
from compressknow.gguf.grids import CANDIDATES, legal_types, type_bytes
from compressknow.gguf.tensors import Tensors, chosen_types
from compressknow.study.allocation import Allocation, Option, OptionTable, allocate, refuse_whole
from compressknow.study.sensitivity import GUIDES, Guidance, Guide, Sensitivity

_MOST_BITS = 16


@dataclass(frozen=True)
class Target:
    """Size of a file, and what decides which weights have more bits.

    Attributes
    ----------
    size : bytes of the file; or `bits`, per weight, all of the file counted.
    must : rules, as of ``--type-of``, for weights that get this type in any case.
    guide : ``facts``, ``text`` or ``both``.
    rounding : ``gptq`` or ``nearest``.

    Raises UsageError for what is none of these.
    """

    size: int | None = None
    bits: float | None = None
    must: tuple[tuple[str, str], ...] = ()
    guide: Guide = "both"
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bits is None):
            raise UsageError("Give --size or --bits, not both: each says how large the file is to be.")
        if self.bits is not None and not 1 <= self.bits < _MOST_BITS:
            raise UsageError(f"--bits {self.bits:g}: give bits per weight, from 1 to less than {_MOST_BITS}.")
        if self.guide not in GUIDES:
            raise UsageError(f"--guide {self.guide}: there is {', '.join(GUIDES)}.")
        object.__setattr__(self, "must", check_types(self.must))

    def budget(self, numel: int) -> int:
        """Return the bytes of a file with so many weights."""
        return self.size if self.size is not None else math.floor(numel * (self.bits or 0) / 8)

    @property
    def label(self) -> str:
        """Return ``90.0 MB by facts and text, gptq``, ``4.5 bits by facts, nearest``."""
        amount = size(self.size) if self.size is not None else f"{self.bits:g} bits"
        told = [f"{which} {chosen}" for which, chosen in self.must]
        by = {"both": "facts and text"}.get(self.guide, self.guide)
        return f"{amount} by {', '.join([by, self.rounding, *told])}"


def check_budget(budget: int, shapes: Iterable[Sequence[int]], whole: int) -> None:
    """Raise UsageError, before anything is measured, for a budget that no file of weights of these `shapes` keeps to,
    or that the model in full, of `whole` bytes, does not pass."""
    matrices = (shape for shape in shapes if len(shape) > 1)
    least = sum(min(type_bytes(kind, shape) for kind in legal_types(shape[-1]) or ("bf16",)) for shape in matrices)
    if budget < least:
        raise UsageError(
            f"{size(budget)} cannot be kept: in the fewest bits that llama.cpp has for them, the weights alone take "
            f"{size(least)}.",
            hint="Give more.",
        )
    refuse_whole(budget, whole)


def fit_types(sensitivity: Sensitivity, tensors: Tensors, overhead: int, target: Target) -> Fitted:
    """Choose a type for each matrix of a file.

    Parameters
    ----------
    tensors : what the file holds in 32 or 16 bits.
    overhead : bytes of the file beside its matrices.

    Raises UsageError where no choice is that small, or all is smaller in full.
    """
    table = table_of(sensitivity, tensors, target.guide)
    budget = target.budget(sum(each.numel for each in tensors.tensors.values()))
    whole = overhead + sum(options[tensors.tensors[name].type].nbytes for name, options in table.items())
    refuse_whole(budget, whole, f"Give less, or export it with --type {tensors.tensors[next(iter(table))].type}.")
    found = allocate(pinned(table, tensors, target.must), budget, overhead=overhead)
    return fitted_of(found, budget, target, sensitivity.guidance)


def fitted_of(found: Allocation, budget: int, target: Target, guidance: Guidance) -> Fitted:
    """Return the types that were chosen, and what a record says of the choice."""
    record = {
        **{"budget": budget, "guide": target.guide, "rounding": target.rounding},
        **{"must": [list(rule) for rule in target.must], "predicted_kl": found.loss},
        **{"facts": guidance.facts, "facts_sha256": guidance.fingerprint},
        **{"tokens": guidance.tokens, "text_sha256": guidance.text},
    }
    return Fitted(found.types, record)


def table_of(sensitivity: Sensitivity | None, tensors: Tensors, guide: Guide) -> OptionTable:
    """Return what each matrix of a file takes and loses by type, its own included, which loses nothing; without a
    sensitivity none does.

    Of a tensor that was made of several weights, what they lose adds up; one of which nothing was measured has 8 bits.
    """
    rows = sensitivity.kl(guide) if sensitivity else {}
    table: dict[str, dict[str, Option]] = {}
    for name, tensor in tensors.tensors.items():
        if not is_matrix(tensors, name):
            continue
        own = [rows[key] for key in _parameters(sensitivity, tensors, name) if key in rows]
        kinds: Sequence[str] = [kind for kind in own[0] if all(kind in each for each in own)] if own else ["q8_0"]
        kinds = kinds if sensitivity else CANDIDATES
        shape = tensor.shape[::-1]
        table[name] = {
            kind: Option(padded(type_bytes(kind, shape)), sum(each[kind] for each in own))
            for kind in legal_types(shape[-1], kinds)
        }
        table[name][tensor.type] = Option(padded(tensor.nbytes), 0.0)
    return table


def _parameters(sensitivity: Sensitivity | None, tensors: Tensors, name: str) -> Iterable[str]:
    """Return the weights that a tensor is made of, by the names of the sensitivity."""
    if name in tensors.weights:
        tied = tensors.side.structure.tied
        own = [weight.parameter for weight in tensors.weights[name]]
        return dict.fromkeys([*own, *(tied[parameter] for parameter in own if parameter in tied)])
    return [row.name for row in (sensitivity.rows if sensitivity else ()) if row.group == "embedding"]


def pinned(table: OptionTable, tensors: Tensors, must: Sequence[tuple[str, str]]) -> OptionTable:
    """Return the table without a choice where rules name a type. Raises UsageError for a type that is not in it."""
    pins: Mapping[str, str] = chosen_types(tensors, must)
    for name, kind in pins.items():
        if name in table and kind not in table[name]:
            raise UsageError(
                f"--must {kind}: {name} cannot be of that type.",
                f"Its rows have {tensors.tensors[name].shape[0]} weights.",
                f"It can be {', '.join(table[name])}.",
            )
    return {name: {pins[name]: options[pins[name]]} if name in pins else options for name, options in table.items()}
