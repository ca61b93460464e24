"""Choose a type for each tensor of a file, so that the file fits a number of bytes and loses least.

The losses of tensors are independent (`compressknow.study.sensitivity`) and add up. So this is the knapsack problem
with one choice per tensor, which dynamic programming solves: for every number of bytes above the smallest file, it
finds the smallest loss of the tensors so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from compressknow.base.errors import UsageError
from compressknow.base.format import write_size, write_two_sizes
from compressknow.base.reading import group_by
from compressknow.compress.schemes import FUSED
from compressknow.gguf.choice import FLOATS, Fitted, Rounding, check_types, estimate_bytes
from compressknow.gguf.grids import CANDIDATES, get_nbytes, list_legal_types
from compressknow.gguf.tensors import Tensors, align, is_matrix, resolve_types
from compressknow.study.sensitivity import Guidance, Guide, Sensitivity, check_guide, name_guide

# Maximum number of distinct sizes. Those of real models have a large common divisor, and need fewer.
STEPS = 1 << 15
# Number of tensors that a message about the smallest file names.
_NAMED = 3
_MOST_BITS = 16
PIN_LESS = "Leave out one of the --must options."
UNMEASURED = "q8_0"  # the type of weights that were not measured
NONE = "none"  # the type of a weight of a checkpoint that stays as it is


def check_below_whole(budget: int, whole: int, hint: str = "Give less.") -> None:
    """Raise UsageError for a budget that is not less than the unquantized model."""
    if budget >= whole:
        given, all_of_it = write_two_sizes(budget, whole)
        raise UsageError(f"{given} is not less than the whole model, {all_of_it}.", hint=hint)


def check_rounding(rounding: str) -> None:
    """Raise UsageError for a rounding that files of a chosen size do not support."""
    if rounding not in ("gptq", "nearest"):
        raise UsageError(f"--rounding {rounding}: choose gptq or nearest.")


class TypeOption(NamedTuple):
    """Bytes of a tensor stored as one type, and its predicted loss (KL, nats)."""

    nbytes: int
    loss: float


OptionTable = Mapping[str, Mapping[str, TypeOption]]


@dataclass(frozen=True)
class Allocation:
    """Type for each tensor, the bytes of the whole file, and the predicted loss (KL, nats)."""

    types: Mapping[str, str]
    nbytes: int
    loss: float


def allocate(table: OptionTable, budget: int, *, overhead: int = 0) -> Allocation:
    """Choose a type for each tensor, with minimum predicted loss in a file of at most `budget` bytes, `overhead` of
    which are not in these tensors.

    Raises UsageError if no choice is that small.

    >>> q8 = TypeOption(8, 0.1)
    >>> table = {"one": {"q4": TypeOption(4, 0.3), "q8": q8}, "two": {"q4": TypeOption(4, 0.2), "q8": q8}}
    >>> allocate(table, 13, overhead=1).types
    {'one': 'q8', 'two': 'q4'}
    """
    floor = overhead + sum(min(option.nbytes for option in options.values()) for options in table.values())
    if budget < floor:
        given, smallest = write_two_sizes(budget, floor)
        raise UsageError(
            f"{given} is too small: the smallest file has {smallest}.",
            why=_explain_floor(table, overhead),
            hint=f"Give --size {floor} or more. Types that --must sets count too.",
        )
    tensors = list(table.values())
    chosen = _solve(tensors, budget - floor)
    _spend_rest(tensors, chosen, budget - overhead)
    options = [by_type[kind] for by_type, kind in zip(tensors, chosen, strict=True)]
    nbytes = overhead + sum(option.nbytes for option in options)
    return Allocation(dict(zip(table, chosen, strict=True)), nbytes, sum(option.loss for option in options))


def allocate_from(tables: Iterable[OptionTable], budget: int, *, overhead: int = 0) -> Allocation:
    """Choose like `allocate`, from the table that loses least. Raises UsageError if none has a choice that small."""
    possible: list[Allocation] = []
    errors: list[UsageError] = []
    for table in tables:
        try:
            possible.append(allocate(table, budget, overhead=overhead))
        except UsageError as error:
            errors.append(error)
    if not possible:
        raise errors[0]
    return min(possible, key=lambda each: (each.loss, each.nbytes))


def split_by_type(table: OptionTable, types: Iterable[str]) -> list[OptionTable]:
    """Return a table for each type, in which weights have that type or stay as they are; so do those with one option.

    >>> q8, q4, none = TypeOption(8, 0.1), TypeOption(4, 0.3), TypeOption(16, 0.0)
    >>> [list(each["one"]) for each in split_by_type({"one": {"none": none, "q8": q8, "q4": q4}}, ["q8", "q4"])]
    [['none', 'q8'], ['none', 'q4']]
    """
    kinds = [kind for kind in types if any(kind in options for options in table.values())]
    return [
        {
            name: options if len(options) == 1 else {each: options[each] for each in (NONE, kind) if each in options}
            for name, options in table.items()
        }
        for kind in kinds
    ]


def group_fused(modules: Iterable[str]) -> dict[str, list[str]]:
    """Group modules that must share a type, because vLLM fuses them into one matrix; by name of the group.

    >>> group_fused(["0.q_proj", "0.k_proj", "0.o_proj", "1.q_proj"])
    {'0.q_proj, 0.k_proj': ['0.q_proj', '0.k_proj'], '0.o_proj': ['0.o_proj'], '1.q_proj': ['1.q_proj']}
    """

    def find_unit(module: str) -> tuple[str, ...]:
        parent, _, leaf = module.rpartition(".")
        return parent, *next((parts for parts in FUSED if leaf in parts), (leaf,))

    return {", ".join(unit): unit for unit in group_by(modules, find_unit).values()}


def join_options(table: OptionTable, units: Mapping[str, Sequence[str]]) -> OptionTable:
    """Return the options of units whose tensors share a type: those that all have. Raises UsageError for none."""
    joined = {}
    for name, members in units.items():
        of_unit = [table[member] for member in members]
        joined[name] = {
            kind: TypeOption(sum(each[kind].nbytes for each in of_unit), sum(each[kind].loss for each in of_unit))
            for kind in of_unit[0]
            if all(kind in options for options in of_unit)
        }
        if not joined[name]:
            raise UsageError(f"{name} must share a type, but have none in common.", hint=PIN_LESS)
    return joined


def _explain_floor(table: OptionTable, overhead: int) -> str:
    """Return what takes the space in the smallest file, with the largest tensors by name."""
    smallest = [(name, *min((each.nbytes, kind) for kind, each in options.items())) for name, options in table.items()]
    smallest.sort(key=lambda each: -each[1])
    parts = [f"{name} ({kind}) {write_size(nbytes)}" for name, nbytes, kind in smallest[:_NAMED]]
    if rest := smallest[_NAMED:]:
        parts.append(f"{len(rest)} others {write_size(sum(nbytes for _, nbytes, _ in rest))}")
    return f"That is {', '.join(parts)}, and {write_size(overhead)} of vocabulary, norms and metadata."


def _solve(tensors: Sequence[Mapping[str, TypeOption]], spare: int) -> list[str]:
    """Return the best types within `spare` bytes above the smallest; bytes are rounded up to steps."""
    # The bytes of each option above the smallest, ascending; only those that fit.
    extra: list[dict[str, int]] = []
    for options in tensors:
        least = min(option.nbytes for option in options.values())
        sizes = {kind: option.nbytes - least for kind, option in options.items() if option.nbytes - least <= spare}
        extra.append(dict(sorted(sizes.items(), key=lambda each: each[1])))
    divisor = gcd(*(nbytes for sizes in extra for nbytes in sizes.values())) or 1
    step = divisor * max(1, -(-spare // (divisor * STEPS)))
    count = spare // step + 1
    best: npt.NDArray[np.float64] = np.zeros(count)
    picks: list[npt.NDArray[np.int16]] = []
    for options, sizes in zip(tensors, extra, strict=True):
        least_losses, pick = np.full(count, np.inf), np.zeros(count, np.int16)
        for number, (kind, nbytes) in enumerate(sizes.items()):
            cost = -(-nbytes // step)
            losses = best[: count - cost] + options[kind].loss
            better = losses < least_losses[cost:]
            least_losses[cost:][better] = losses[better]
            pick[cost:][better] = number
        best = least_losses
        picks.append(pick)
    budget, chosen = count - 1, []
    for pick, sizes in zip(reversed(picks), reversed(extra), strict=True):
        kind = list(sizes)[pick[budget]]
        budget -= -(-sizes[kind] // step)
        chosen.append(kind)
    return chosen[::-1]


def _spend_rest(tensors: Sequence[Mapping[str, TypeOption]], chosen: list[str], room: int) -> None:
    """Spend the bytes left over by rounding to steps, on the change that saves most per byte while one fits."""
    spare = room - sum(options[kind].nbytes for options, kind in zip(tensors, chosen, strict=True))
    while True:
        changes = [
            ((options[kind].loss - other.loss) / max(other.nbytes - options[kind].nbytes, 1), place, name)
            for place, (options, kind) in enumerate(zip(tensors, chosen, strict=True))
            for name, other in options.items()
            if other.loss < options[kind].loss and other.nbytes - options[kind].nbytes <= spare
        ]
        if not changes:
            return
        _, place, name = max(changes, key=lambda change: change[0])
        spare -= tensors[place][name].nbytes - tensors[place][chosen[place]].nbytes
        chosen[place] = name


@dataclass(frozen=True)
class SizeTarget:
    """Size of a file, and what decides which weights have more bits. Raises UsageError for invalid values."""

    size: int | None = None  # bytes of the file
    bits: float | None = None  # or bits per weight, counting the whole file
    must: tuple[tuple[str, str], ...] = ()  # rules, as for ``--type-of``, for weights with a fixed type
    guide: Guide = "both"
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bits is None):
            raise UsageError("Give either --size or --bits: each sets the size of the file.")
        if self.bits is not None and not 1 <= self.bits < _MOST_BITS:
            raise UsageError(f"--bits {self.bits:g}: give bits per weight, from 1 to less than {_MOST_BITS}.")
        check_guide(self.guide)
        check_rounding(self.rounding)
        object.__setattr__(self, "must", check_must(self.must))

    def budget(self, numel: int) -> int:
        """Return the bytes of a file with `numel` weights."""
        return self.size if self.size is not None else int(numel * (self.bits or 0) / 8)

    @property
    def label(self) -> str:
        """Return ``90.0 MB by facts and text, gptq``, ``4.5 bits by facts, nearest``."""
        amount = write_size(self.size) if self.size is not None else f"{self.bits:g} bits"
        rules = [f"{which} {chosen}" for which, chosen in self.must]
        return f"{amount} by {', '.join([name_guide(self.guide), self.rounding, *rules])}"


def check_must(rules: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the checked rules for types of a GGUF file: candidate types, and floats. Raises as `check_types` does."""
    return check_types(rules, "--must", (*CANDIDATES, *FLOATS.values()))


def check_budget(budget: int, shapes: Iterable[Sequence[int]], whole: int, experts: int = 0) -> None:
    """Raise UsageError, before anything is measured, for a budget that is too small for weights of these `shapes` and
    this many of `experts` (which are not measured), or not less than the `whole` bytes of the model."""
    matrices = (shape for shape in shapes if len(shape) > 1)
    least = sum(min(get_nbytes(kind, shape) for kind in list_legal_types(shape[-1]) or ("bf16",)) for shape in matrices)
    least += (of_experts := estimate_bytes(UNMEASURED, experts))
    if budget < least:
        given, smallest = write_two_sizes(budget, least)
        size = write_size(of_experts)
        why = f"Experts are not measured, and have 8 bits, {size}: --must _exps=q4_k gives them fewer."
        raise UsageError(
            f"{given} is too small: even in llama.cpp's smallest types, the weights alone take {smallest}.",
            why if experts else None,
            "Give more than that, since vocabulary and norms count too, in units: 90MB, 1.5GB.",
        )
    check_below_whole(budget, whole)


def fit_types(sensitivity: Sensitivity, tensors: Tensors, overhead: int, target: SizeTarget) -> Fitted:
    """Choose a type for each matrix of a file with these unquantized tensors and `overhead` other bytes. Raises
    UsageError if no choice is small enough, or the unquantized file already is."""
    table = build_table(sensitivity, tensors, target)
    budget = target.budget(sum(each.numel for each in tensors.tensors.values()))
    whole = overhead + sum(align(tensors.tensors[name].nbytes) for name in table)
    check_below_whole(budget, whole, f"Give less, or export it with --type {tensors.tensors[next(iter(table))].type}.")
    allocation = allocate(table, budget, overhead=overhead)
    return describe_fit(allocation, budget, target, sensitivity.guidance)


def describe_fit(allocation: Allocation, budget: int, target: SizeTarget, guidance: Guidance) -> Fitted:
    """Return the chosen types, and the record of the choice."""
    # GPTQ reads the facts even if text alone chooses the types.
    guided_by = guidance.ids if target.guide != "text" or target.rounding == "gptq" else ()
    record = {
        **{"budget": budget, "guide": target.guide, "rounding": target.rounding},
        **{"must": [list(rule) for rule in target.must], "predicted_kl": allocation.loss},
        **{"facts": guidance.facts, "facts_sha256": guidance.fingerprint, "guided_by": guided_by},
        **{"tokens": guidance.text_tokens, "text_sha256": guidance.text},
    }
    return allocation.types, record


def build_table(sensitivity: Sensitivity | None, tensors: Tensors, target: SizeTarget) -> OptionTable:
    """Return the bytes and loss of each matrix of a file by type, including its own, which loses nothing; without a
    sensitivity, no type does. Losses of several weights in one tensor add up. A fixed type is the only option, and a
    tensor that was not measured gets 8 bits or its fixed type."""
    rows, pins = sensitivity.kl(target.guide) if sensitivity else {}, resolve_types(tensors, target.must, "--must")
    table: dict[str, dict[str, TypeOption]] = {}
    for name, tensor in tensors.tensors.items():
        if not is_matrix(tensors, name):
            continue
        losses = [rows[key] for key in _list_parameters(sensitivity, tensors, name) if key in rows]
        fixed = UNMEASURED, pins.get(name, UNMEASURED)
        # The weights of a tensor have rows of the same length, so they were measured with the same types.
        kinds: Sequence[str] = list(losses[0]) if losses else fixed
        if sensitivity is None and not any(weight.is_expert for weight in tensors.weights.get(name, ())):
            kinds = CANDIDATES  # Nothing is measured yet; all but experts will be.
        shape = tensor.shape[::-1]
        table[name] = {
            kind: TypeOption(align(get_nbytes(kind, shape)), sum(each[kind] for each in losses))
            for kind in list_legal_types(shape[-1], kinds)
        }
        table[name][tensor.type] = TypeOption(align(tensor.nbytes), 0.0)
    lengths = {name: tensors.tensors[name].shape[0] for name in table}
    return pin_types(table, pins, lengths)


def _list_parameters(sensitivity: Sensitivity | None, tensors: Tensors, name: str) -> Iterable[str]:
    """Return the names in the sensitivity of the weights that a tensor is made of."""
    if name in tensors.weights:
        tied = tensors.source.structure.tied
        parameters = [weight.parameter for weight in tensors.weights[name]]
        return dict.fromkeys([*parameters, *(tied[parameter] for parameter in parameters if parameter in tied)])
    return [row.name for row in (sensitivity.rows if sensitivity else ()) if row.group == "embedding"]


def pin_types(table: OptionTable, pins: Mapping[str, str], rows: Mapping[str, int]) -> OptionTable:
    """Leave pinned tensors only their type; `rows` has the weights per row. Raises UsageError if it is no option."""
    for name, kind in pins.items():
        if name in table and kind not in table[name]:
            raise UsageError(
                f"--must {kind}: {name} cannot be of that type.",
                f"Blocks must divide its rows of {rows[name]} weights; the only float type is its own.",
                f"It can be {', '.join(table[name])}.",
            )
    return {name: {pins[name]: options[pins[name]]} if name in pins else options for name, options in table.items()}
