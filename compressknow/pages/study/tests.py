"""Paired tests between the cells of a study, and what it is too small to tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compressknow.comparison.clusters import (
    difference_by_cluster,
    number_clusters,
    rate_difference,
    share_by_cluster,
    tally,
)
from compressknow.comparison.clusters import paired_test as clusters_test
from compressknow.comparison.intervals import SIGNIFICANT, holm, paired_difference, proportion
from compressknow.comparison.records import Counts, Estimate
from compressknow.pages.study.records import Study, StudyCell, StudyProbe, floor

HOLDS, DOES_NOT_HOLD, CANNOT_TELL = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True, slots=True)
class CheckpointComparison:
    """Two cells, paired by fact over all probes that both have; `less` is the one that a claim says hurts less.

    Attributes
    ----------
    less, more : the cells' keys.
    part : of the claim, where it has several that must all be shown ("at 20 %").
    counts : `both` right, `lost` only `less` right, `gained` only `more` right, `neither`.
    p : of the paired test by relation, two-sided; `p_holm` over all that the table claims.
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
    original, cluster = together([probe.correct for probe in probes]), clusters_together(probes)
    first, second = (together([cell.correct[probe.name] for probe in probes]) for cell in (less, more))
    lost_first, lost_second = (original.astype(np.int8) - right for right in (first, second))
    rate, rate_p = rate_difference(lost_first, lost_second, cluster, (changed(less) / 1e6, changed(more) / 1e6))
    clusters = tally(first, second, cluster)
    above = [probe for probe in probes if is_known(probe)]
    at_floor = not any(_above_floor([(p, cell.correct[p.name]) for p in above]) for cell in (less, more))
    counts, p = sum(clusters, Counts()), clusters_test(clusters).p
    return CheckpointComparison(less.key, more.key, part, counts, p, at_floor, rate, rate_p)


def adjusted(claims: Sequence[Claim]) -> list[Claim]:
    """Return all claims of a table with their p-values adjusted together (Holm), each comparison counted once. Those
    per million parameters are a table of their own.
    """
    pairs = {(each.less, each.more): each for claim in claims for each in claim.paired_tests if not each.at_floor}
    limits = {claim.key: _p_of_limits(claim.bounds) for claim in claims if claim.bounds}
    together = holm([*(each.p for each in pairs.values()), *limits.values()])
    by_count = dict(zip([*pairs, *limits], together, strict=True))
    by_rate = dict(zip(pairs, holm([each.rate_p for each in pairs.values()]), strict=True))

    def adjust(pair: CheckpointComparison) -> CheckpointComparison:
        key = pair.less, pair.more
        return pair if pair.at_floor else replace(pair, p_holm=by_count[key], rate_p_holm=by_rate[key])

    return [
        replace(claim, paired_tests=tuple(map(adjust, claim.paired_tests)), p_holm=by_count.get(claim.key))
        for claim in claims
    ]


def _p_of_limits(bounds: Sequence[Bound]) -> float | None:
    """Return the p-value of "all are below their limits" where all are, which each must show by itself; else of "one is
    above" (Bonferroni).
    """
    told = [bound.p for bound in bounds if bound.p is not None]
    if len(told) < len(bounds):
        return None
    if all(bound.is_below for bound in bounds):
        return max(told)
    return min(1.0, len(bounds) * min(p for bound, p in zip(bounds, told, strict=True) if not bound.is_below))


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
    """Return whether what is right of all these probes together is above their floors, its whole interval."""
    n, low = sum(probe.n for probe, _ in evaluated), _accuracy(evaluated, 0.95).low
    return low is not None and low * n > sum(probe.n * floor(probe) for probe, _ in evaluated)


def _accuracy(evaluated: Sequence[tuple[StudyProbe, Sequence[bool]]], level: float) -> Estimate:
    cluster = clusters_together([probe for probe, _ in evaluated])
    right = together([correct for _, correct in evaluated])
    parts, wholes = np.bincount(cluster, weights=right).astype(int).tolist(), np.bincount(cluster).tolist()
    simple = proportion(int(right.sum()), len(right), level)
    return simple.or_wider(share_by_cluster(parts, wholes, level))


def clusters_together(probes: Sequence[StudyProbe]) -> np.ndarray:
    """Return the number of each fact's cluster, of several probes' facts one after the other."""
    return number_clusters([(probe.name, relation) for probe in probes for relation in probe.relations])


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
    value : with its 95 % interval.
    p : two-sided, that it is the limit itself: the interval of level 1 - p ends there. None where there is no interval.
    """

    of: str
    value: Estimate
    limit: float
    p: float | None

    @property
    def is_below(self) -> bool:
        return self.value.value is not None and self.value.value < self.limit


def bound(of: str, figure: Callable[[float], Estimate], limit: float) -> Bound:
    """Hold a figure to a limit; `figure` gives it with its interval of a level."""
    value = figure(0.95)
    if value.value is None or value.low is None:
        return Bound(of, value, limit, None)

    def leaves_out(p: float) -> bool:
        each = figure(1 - p)
        return each.low is not None and each.high is not None and not each.low <= limit <= each.high

    low, high = _LEAST_P, 1.0
    if leaves_out(low):
        return Bound(of, value, limit, low)
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if leaves_out(middle) else (middle, high)
    return Bound(of, value, limit, high)


# Where the search for a p-value begins, and in how many steps it halves what is open.
_LEAST_P, _STEPS = 1e-9, 20


@dataclass(frozen=True, slots=True)
class Claim:
    """What decides one claim: comparisons of cells in all of its `parts`, or figures that are to be below limits.

    `key` tells it from the others of its table; `p_holm` is that of its limits.
    """

    key: tuple[str, ...]
    paired_tests: tuple[CheckpointComparison, ...] = ()
    parts: tuple[str, ...] = ("",)
    bounds: tuple[Bound, ...] = ()
    p_holm: float | None = None

    @property
    def answer(self) -> str:
        if self.bounds:
            clear = self.p_holm is not None and self.p_holm < SIGNIFICANT
            below = HOLDS if all(bound.is_below for bound in self.bounds) else DOES_NOT_HOLD
            return below if clear else CANNOT_TELL
        return decide([(each.part, each.direction) for each in self.paired_tests], self.parts)

    @property
    def answer_per_million(self) -> str:
        return decide([(each.part, each.rate_direction) for each in self.paired_tests], self.parts)


def strict_level(number: int) -> float:
    """Return the level of each of so many intervals that all together hold with 95 % (Bonferroni)."""
    return 1 - 0.05 / max(1, number)


def decline(study: Study, cell: StudyCell) -> Callable[[float], Estimate]:
    """Return how far accuracy fell over all probes' facts, relative to the original's, by the interval's level;
    negative where it rose.

    From the paired difference, with Newcombe's interval or the one over relations; the original's accuracy is taken as
    it was measured.
    """
    evaluated = [probe for probe in study.probes if probe.name in cell.correct]
    right = together([cell.correct[probe.name] for probe in evaluated])
    clusters = tally(together([probe.correct for probe in evaluated]), right, clusters_together(evaluated))
    counts = sum(clusters, Counts())

    def fall(level: float) -> Estimate:
        difference = paired_difference(counts, level).or_wider(difference_by_cluster(clusters, level))
        if difference.value is None or difference.low is None or difference.high is None or not counts.known_before:
            return Estimate(None)
        scale = counts.known_before / counts.n
        # From zero, since there is a negative zero.
        return Estimate(*((0.0 - end) / scale for end in (difference.value, difference.high, difference.low)))

    return fall


def left(study: Study, cell: StudyCell) -> Callable[[float], Estimate]:
    """Return the share left of what the original knows beyond a model that has forgotten everything (see
    `records.floor`), by the interval's level; negative where the cell scores below that.

    Over the probes of which the original knows clearly more than the floor; None where there is no such probe. The
    interval is that of the cell's accuracy; the original's is taken as it was measured.
    """
    evaluated = [probe for probe in study.probes if probe.name in cell.correct and is_known(probe)]
    n, nothing = sum(probe.n for probe in evaluated), sum(probe.n * floor(probe) for probe in evaluated)
    known = sum(sum(probe.correct) for probe in evaluated) - nothing
    right = [(probe, cell.correct[probe.name]) for probe in evaluated]

    def remaining(level: float) -> Estimate:
        after = _accuracy(right, level)
        if not n or after.value is None or after.low is None or after.high is None:
            return Estimate(None)
        return Estimate(*((n * share - nothing) / known for share in (after.value, after.low, after.high)))

    return remaining


def average(figures: Sequence[Callable[[float], Estimate]]) -> Callable[[float], Estimate]:
    """Return the mean of figures of the same facts: they move together, so their intervals' ends are averaged too."""

    def mean(level: float) -> Estimate:
        estimates = [figure(level) for figure in figures]
        parts = list(zip(*((e.value, e.low, e.high) for e in estimates), strict=True))
        if not parts or any(number is None for part in parts for number in part):
            return Estimate(None)
        return Estimate(*(sum(number or 0.0 for number in part) / len(part) for part in parts))

    return mean
