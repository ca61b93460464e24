"""Paired tests between the cells of a study, and what it is too small to tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compressknow.report.card.verdict import SIGNIFICANT
from compressknow.report.study.records import Study, StudyCell, StudyProbe, floor
from compressknow.stats.intervals import holm, mcnemar, paired_difference, proportion, rate_difference, tally
from compressknow.stats.records import Counts, Estimate

HOLDS, DOES_NOT_HOLD, CANNOT_TELL = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True, slots=True)
class CheckpointComparison:
    """Two cells, paired by fact over all probes that both have; `less` is the one that a claim says hurts less.

    Attributes
    ----------
    less, more : the cells' keys.
    part : of the claim, where it has several that must all be shown ("at 20 %").
    counts : `both` right, `lost` only `less` right, `gained` only `more` right, `neither`.
    p : exact McNemar test, two-sided; `p_holm` over the contrasts of the claim that count.
    at_floor : neither cell is clearly better than a model that has forgotten everything: there is nothing left to
        compare, and what chance or habit gets right decides nothing. Such a contrast does not count.
    rate : how much more accuracy `more` loses than `less`, by million parameters that each changed (pruned, or
        quantized where it was quantized too), with its interval; `rate_p` and `rate_p_holm` as above.
    """

    less: str
    more: str
    part: str
    counts: Counts
    p: float | None
    at_floor: bool
    rate: Estimate
    rate_p: float | None
    p_holm: float | None = None
    rate_p_holm: float | None = None

    @property
    def direction(self) -> int:
        """1 where it separates the two as claimed, -1 the other way round, 0 where it does not separate them."""
        return _direction(self.counts.lost - self.counts.gained, self.p_holm)

    @property
    def rate_direction(self) -> int:
        """The same per million parameters."""
        return _direction(self.rate.value or 0.0, self.rate_p_holm)


def paired_test(study: Study, less: StudyCell, more: StudyCell, part: str = "") -> CheckpointComparison:
    """Set two cells of the study side by side."""
    probes = [probe for probe in study.probes if probe.name in less.correct and probe.name in more.correct]
    original = together([probe.correct for probe in probes])
    first, second = (together([cell.correct[probe.name] for probe in probes]) for cell in (less, more))
    lost_first, lost_second = (original.astype(np.int8) - right for right in (first, second))
    rate, rate_p = rate_difference(lost_first, lost_second, (changed(less) / 1e6, changed(more) / 1e6))
    counts = tally(first, second)
    above = [probe for probe in probes if is_known(probe)]
    at_floor = not any(_above_floor([(p, cell.correct[p.name]) for p in above]) for cell in (less, more))
    return CheckpointComparison(less.key, more.key, part, counts, mcnemar(counts), at_floor, rate, rate_p)


def adjusted(paired_tests: Iterable[CheckpointComparison]) -> tuple[CheckpointComparison, ...]:
    """The contrasts of one claim with their p-values adjusted over those that count (Holm)."""
    paired_tests = tuple(paired_tests)
    by_count = holm([None if each.at_floor else each.p for each in paired_tests])
    by_rate = holm([None if each.at_floor else each.rate_p for each in paired_tests])
    return tuple(
        replace(each, p_holm=p, rate_p_holm=rate_p)
        for each, p, rate_p in zip(paired_tests, by_count, by_rate, strict=True)
    )


def decide(directions: Sequence[tuple[str, int]], parts: Sequence[str]) -> str:
    """The answer to a claim from its contrasts: a pair of part and direction each.

    It does not hold where any contrast separates its cells the other way round. It holds where none does and, in each
    part of the claim, at least one separates them as claimed. Else nothing can be told.

    >>> decide([("", 1), ("", 0)], [""]), decide([("", 1), ("", -1)], [""])
    ('holds', 'does not hold')
    >>> decide([("20", 1), ("40", 0)], ["20", "40"])
    'cannot tell'
    """
    if any(direction < 0 for _, direction in directions):
        return DOES_NOT_HOLD
    shown = {part for part, direction in directions if direction > 0}
    return HOLDS if parts and shown >= set(parts) else CANNOT_TELL


def changed(cell: StudyCell) -> int:
    """Parameters that the recipe changed: quantized, or pruned where nothing was quantized."""
    return cell.quantized or cell.pruned


def is_known(probe: StudyProbe) -> bool:
    """Whether the original knows clearly more of the probe than a model that has forgotten everything would score."""
    return _above_floor([(probe, probe.correct)])


def _above_floor(evaluated: Sequence[tuple[StudyProbe, Sequence[bool]]]) -> bool:
    """Whether what is right of all these probes together is above their floors, its whole interval."""
    n, right = sum(probe.n for probe, _ in evaluated), sum(sum(correct) for _, correct in evaluated)
    low = proportion(right, n).low
    return low is not None and low * n > sum(probe.n * floor(probe) for probe, _ in evaluated)


def together(right: Sequence[Sequence[bool]]) -> np.ndarray:
    """Several probes' facts one after the other."""
    return np.concatenate([np.array(each, dtype=bool) for each in right]) if right else np.empty(0, dtype=bool)


def _direction(difference: float, p: float | None) -> int:
    if p is None or p >= SIGNIFICANT or not difference:
        return 0
    return 1 if difference > 0 else -1


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure that a claim says is below a limit.

    Attributes
    ----------
    of : what it is the figure of: a cell's key, or words.
    value : with its 95 % interval, by which "holds" is decided.
    strict : with the interval by which "does not hold" is: 95 % over all figures of the claim together (Bonferroni),
        since one of many may lie beyond by chance.
    """

    of: str
    value: Estimate
    strict: Estimate
    limit: float


def decide_below(bounds: Sequence[Bound]) -> str:
    """The answer to "all of these are below their limits".

    It holds where every interval lies below its limit, does not hold where any strict interval lies above.

    >>> low, wide, high = Estimate(0.1, 0.05, 0.15), Estimate(0.1, 0.0, 0.3), Estimate(0.5, 0.4, 0.6)
    >>> [decide_below([Bound("x", each, each, 0.2)]) for each in (low, wide, high)]
    ['holds', 'cannot tell', 'does not hold']
    """
    if any(b.strict.low is not None and b.strict.low > b.limit for b in bounds):
        return DOES_NOT_HOLD
    if bounds and all(b.value.high is not None and b.value.high < b.limit for b in bounds):
        return HOLDS
    return CANNOT_TELL


def strict_level(number: int) -> float:
    """The level of each of so many intervals that all together hold with 95 %."""
    return 1 - 0.05 / max(1, number)


def decline(study: Study, cell: StudyCell, level: float = 0.95) -> Estimate:
    """How far accuracy fell over all probes' facts, relative to the original's; negative where it rose.

    From the paired difference with Newcombe's interval; the original's accuracy is taken as it was measured.
    """
    evaluated = [probe for probe in study.probes if probe.name in cell.correct]
    counts = tally(together([p.correct for p in evaluated]), together([cell.correct[p.name] for p in evaluated]))
    difference = paired_difference(counts, level)
    if difference.value is None or difference.low is None or difference.high is None or not counts.known_before:
        return Estimate(None)
    scale = counts.known_before / counts.n
    # From zero, since there is a negative zero.
    return Estimate(*((0.0 - end) / scale for end in (difference.value, difference.high, difference.low)))


def left(study: Study, cell: StudyCell, level: float = 0.95) -> Estimate:
    """The share left of what the original knows beyond a model that has forgotten everything (see `study_grid.floor`);
    negative where the cell scores below that.

    Over the probes of which the original knows clearly more than the floor; None where there is no such probe. The
    interval is Wilson's for the cell's accuracy; the original's is taken as it was measured.
    """
    evaluated = [probe for probe in study.probes if probe.name in cell.correct and is_known(probe)]
    n, nothing = sum(probe.n for probe in evaluated), sum(probe.n * floor(probe) for probe in evaluated)
    known = sum(sum(probe.correct) for probe in evaluated) - nothing
    after = proportion(sum(sum(cell.correct[probe.name]) for probe in evaluated), n, level)
    if not n or after.value is None or after.low is None or after.high is None:
        return Estimate(None)
    return Estimate(*((n * share - nothing) / known for share in (after.value, after.low, after.high)))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of figures of the same facts: they move together, so their intervals' ends are averaged too."""
    parts = list(zip(*((e.value, e.low, e.high) for e in estimates), strict=True))
    if not parts or any(number is None for part in parts for number in part):
        return Estimate(None)
    return Estimate(*(sum(number or 0.0 for number in part) / len(part) for part in parts))
