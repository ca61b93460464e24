"""Choose a type for each tensor of a file, so that all of them fit a number of bytes and lose the least.

What a tensor's rounding costs is known apart from all others (`compressknow.study.sensitivity`), and adds up. So this
is the knapsack problem with one choice per tensor, which dynamic programming solves: for every number of bytes above
the smallest file, the least loss that the tensors so far can have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from compressknow.base.errors import UsageError
from compressknow.base.format import size

# Numbers of bytes that are told apart. Sizes of real models have a large common divisor, and need fewer.
STEPS = 1 << 15
# Tensors that a message about the smallest file names.
_NAMED = 3


def refuse_whole(budget: int, whole: int, hint: str = "Give less.") -> None:
    """Raise UsageError for a budget that a model does not pass with all weights as they are."""
    if budget >= whole:
        raise UsageError(f"{size(budget)} is no less than the model has in full, {size(whole)}.", hint=hint)


class Option(NamedTuple):
    """Bytes of a tensor in the file, stored as one type, and the loss that is predicted of it (KL, nats)."""

    nbytes: int
    loss: float


OptionTable = Mapping[str, Mapping[str, Option]]


@dataclass(frozen=True)
class Allocation:
    """Type for each tensor, the bytes of the whole file, and the predicted loss (KL, nats)."""

    types: Mapping[str, str]
    nbytes: int
    loss: float


def allocate(
    table: OptionTable, budget: int, *, overhead: int = 0, together: Iterable[Sequence[str]] = ()
) -> Allocation:
    """Choose a type for each tensor, so that the predicted loss is the least within `budget` bytes.

    Parameters
    ----------
    table : by tensor and type, what it takes and loses.
    budget : bytes of the whole file.
    overhead : bytes of what is in the file besides these tensors.
    together : tensors that must be of one type: parts of what a runtime joins.

    Raises UsageError where no choice is that small.

    >>> one, two = {"q4": Option(4, 0.3), "q8": Option(8, 0.1)}, {"q4": Option(4, 0.2), "q8": Option(8, 0.1)}
    >>> allocate({"one": one, "two": two}, 13, overhead=1).types
    {'one': 'q8', 'two': 'q4'}
    """
    units = units_of(table, together)
    floor = overhead + sum(min(option.nbytes for option in options.values()) for _, options in units)
    if budget < floor:
        raise UsageError(
            f"{size(budget)} cannot be kept: the smallest file has {size(floor)}.",
            why=_what_makes(units, overhead),
            hint="Give more, or take back a --must.",
        )
    chosen = _solve([options for _, options in units], budget - floor)
    _fill([options for _, options in units], chosen, budget - overhead)
    found = [(names, kind, options[kind]) for (names, options), kind in zip(units, chosen, strict=True)]
    types = {name: kind for names, kind, _ in found for name in names}
    return Allocation(
        {name: types[name] for name in table},
        overhead + sum(option.nbytes for *_, option in found),
        sum(option.loss for *_, option in found),
    )


_Unit = tuple[tuple[str, ...], dict[str, Option]]


def units_of(table: OptionTable, together: Iterable[Sequence[str]] = ()) -> list[_Unit]:
    """Return what is chosen at once, and its options: those that all its tensors have."""
    joined = {name: tuple(names) for names in together for name in names if name in table}
    units: list[_Unit] = []
    for names in dict.fromkeys(joined.get(name, (name,)) for name in table):
        own = [table[name] for name in names if name in table]
        shared = [kind for kind in own[0] if all(kind in options for options in own)]
        if not shared:
            raise UsageError(
                f"{', '.join(names)} must be of one type, and have none in common.", hint="Take back a --must."
            )
        options = {
            kind: Option(sum(each[kind].nbytes for each in own), sum(each[kind].loss for each in own))
            for kind in shared
        }
        units.append((names, options))
    return units


def _what_makes(units: Sequence[_Unit], overhead: int) -> str:
    """Return what the smallest file is made of, its largest parts by name."""
    smallest = [(names, *min(((each.nbytes, kind) for kind, each in options.items()))) for names, options in units]
    smallest.sort(key=lambda each: -each[1])
    parts = [f"{', '.join(names)} ({kind}) {size(nbytes)}" for names, nbytes, kind in smallest[:_NAMED]]
    if rest := smallest[_NAMED:]:
        parts.append(f"{len(rest)} others {size(sum(nbytes for _, nbytes, _ in rest))}")
    return f"That is {', '.join(parts)}, and {size(overhead)} of vocabulary, norms and metadata."


def _solve(units: Sequence[Mapping[str, Option]], spare: int) -> list[str]:
    """Return the best choice within `spare` bytes above the smallest; bytes are counted in steps, rounded up."""
    least = [min(option.nbytes for option in options.values()) for options in units]
    extra = [
        {kind: option.nbytes - low for kind, option in options.items() if option.nbytes - low <= spare}
        for options, low in zip(units, least, strict=True)
    ]
    divisor = gcd(*(nbytes for options in extra for nbytes in options.values())) or 1
    step = divisor * max(1, -(-spare // (divisor * STEPS)))
    count = spare // step + 1
    best: npt.NDArray[np.float64] = np.zeros(count)
    picks: list[tuple[list[str], npt.NDArray[np.int16]]] = []
    for options, own in zip(units, extra, strict=True):
        kinds = sorted(own, key=lambda kind: own[kind])
        found = np.full(count, np.inf)
        pick = np.zeros(count, np.int16)
        for number, kind in enumerate(kinds):
            cost = -(-own[kind] // step)
            if cost < count:
                losses = best[: count - cost] + options[kind].loss
                better = losses < found[cost:]
                found[cost:][better] = losses[better]
                pick[cost:][better] = number
        best = found
        picks.append((kinds, pick))
    at, chosen = count - 1, []
    for (kinds, pick), own in zip(reversed(picks), reversed(extra), strict=True):
        kind = kinds[pick[at]]
        at -= -(-own[kind] // step)
        chosen.append(kind)
    return chosen[::-1]


def _fill(units: Sequence[Mapping[str, Option]], chosen: list[str], room: int) -> None:
    """Spend what rounding to steps has left over: the change that saves most per byte, as long as one fits."""
    spare = room - sum(options[kind].nbytes for options, kind in zip(units, chosen, strict=True))
    while True:
        changes = [
            ((options[kind].loss - other.loss) / max(other.nbytes - options[kind].nbytes, 1), place, name)
            for place, (options, kind) in enumerate(zip(units, chosen, strict=True))
            for name, other in options.items()
            if other.loss < options[kind].loss and other.nbytes - options[kind].nbytes <= spare
        ]
        if not changes:
            return
        _, place, name = max(changes, key=lambda change: change[0])
        spare -= units[place][name].nbytes - units[place][chosen[place]].nbytes
        chosen[place] = name
