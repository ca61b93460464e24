"""Claims about a study's cells, decided by paired comparisons of cells and by figures that have limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np

from compressknow.base.format import SIGNIFICANT
from compressknow.comparison import intervals
from compressknow.comparison.records import Counts, Estimate
from compressknow.pages.study.records import Study, StudyCell, StudyProbe

HOLDS, DOES_NOT_HOLD, CANNOT_TELL = "holds", "does not hold", "cannot tell"
# Start and number of bisections of the search for a p-value.
_LEAST_P, _STEPS = 1e-9, 20

# Returns a figure with its interval at a confidence level.
Figure = Callable[[float], Estimate]


@dataclass(frozen=True, slots=True)
class CellComparison:
    """Comparison of two cells by fact, over all probes that both have; a claim says that `less` hurts less than `more`.
    It is `at_floor`, and does not count, if neither cell is clearly better than a model that has forgotten everything.
    `rate` is how much more accuracy `more` loses, per million parameters that each changed (quantized, or else
    pruned)."""

    less: str  # the cells' keys
    more: str
    part: str  # part of the claim, if it has several that must all be shown ("at 20 %")
    counts: Counts  # `both` right, `lost` only `less` right, `gained` only `more` right, `neither`
    p: float | None  # of the paired test by relation, two-sided
    at_floor: bool
    rate: Estimate
    rate_p: float | None
    p_holm: float | None = None  # adjusted over all claims of the table
    rate_p_holm: float | None = None

    @property
    def direction(self) -> int:
        """1 if the comparison agrees with the claim significantly, -1 if it contradicts it, else 0."""
        return _get_direction(self.counts.lost - self.counts.gained, self.p_holm)

    @property
    def rate_direction(self) -> int:
        """Direction per million parameters."""
        return _get_direction(self.rate.value or 0.0, self.rate_p_holm)


def _get_direction(change: float, p: float | None) -> int:
    if p is None or p >= SIGNIFICANT or not change:
        return 0
    return 1 if change > 0 else -1


@dataclass(frozen=True, slots=True)
class Bound:
    """Figure that a claim says is below a limit. `p` is the two-sided p-value for a figure equal to the limit: the
    interval of level 1 - p ends there. None if the figure has no interval."""

    of: str  # subject of the figure: a cell's key, or words
    value: Estimate
    limit: float
    p: float | None

    @property
    def is_below(self) -> bool:
        return self.value.value is not None and self.value.value < self.limit


@dataclass(frozen=True, slots=True)
class Claim:
    """Evidence for one claim: comparisons of cells in all of its `parts`, or figures that must be below limits, with
    the joint p-value `p_holm`. It cannot hold if a cell is `missing`: the one most likely to contradict it."""

    comparisons: tuple[CellComparison, ...] = ()
    parts: tuple[str, ...] = ("",)
    bounds: tuple[Bound, ...] = ()
    missing: str = ""
    p_holm: float | None = None

    @property
    def answer(self) -> str:
        if self.bounds:
            if self.p_holm is None or self.p_holm >= SIGNIFICANT:
                return CANNOT_TELL
            if not all(bound.is_below for bound in self.bounds):
                return DOES_NOT_HOLD
            return CANNOT_TELL if self.missing else HOLDS
        return answer_claim([(each.part, each.direction) for each in self.comparisons], self.parts)


def answer_claim(directions: Sequence[tuple[str, int]], parts: Sequence[str]) -> str:
    """Return the answer to a claim from its comparisons, given as pairs of part and direction.

    It does not hold if any comparison contradicts it. It holds if none does and, in each part of the claim, at least
    one agrees. Otherwise, the study cannot tell.

    >>> answer_claim([("", 1), ("", 0)], [""]), answer_claim([("", 1), ("", -1)], [""])
    ('holds', 'does not hold')
    >>> answer_claim([("20", 1), ("40", 0)], ["20", "40"])
    'cannot tell'
    """
    if any(direction < 0 for _, direction in directions):
        return DOES_NOT_HOLD
    shown = {part for part, direction in directions if direction > 0}
    return HOLDS if parts and shown >= set(parts) else CANNOT_TELL


def adjust_claims(claims: Sequence[Claim]) -> list[Claim]:
    """Return all claims of a table with p-values adjusted together (Holm), and those of rates separately."""
    pairs = {(each.less, each.more): each for claim in claims for each in claim.comparisons if not each.at_floor}
    limits = {place: _test_limits(claim.bounds) for place, claim in enumerate(claims) if claim.bounds}
    by_count = intervals.adjust_holm([*(each.p for each in pairs.values()), *limits.values()])
    p_holm = dict(zip([*pairs, *limits], by_count, strict=True))
    rate_p_holm = dict(zip(pairs, intervals.adjust_holm([each.rate_p for each in pairs.values()]), strict=True))

    def adjust(pair: CellComparison) -> CellComparison:
        key = pair.less, pair.more
        return pair if pair.at_floor else replace(pair, p_holm=p_holm[key], rate_p_holm=rate_p_holm[key])

    return [
        replace(claim, comparisons=tuple(map(adjust, claim.comparisons)), p_holm=p_holm.get(place))
        for place, claim in enumerate(claims)
    ]


def _test_limits(bounds: Sequence[Bound]) -> float | None:
    """Return the p-value of "all are below their limits" if all are, else that of "one is above" (Bonferroni)."""
    known = [bound.p for bound in bounds if bound.p is not None]
    if len(known) < len(bounds):
        return None
    if all(bound.is_below for bound in bounds):
        return max(known)
    return min(1.0, len(bounds) * min(p for bound, p in zip(bounds, known, strict=True) if not bound.is_below))


def compare_cells(study: Study, less: StudyCell, more: StudyCell, part: str = "") -> CellComparison:
    """Compare two cells of the study fact by fact."""
    probes = tuple(probe for probe in study.probes if probe.name in less.correct and probe.name in more.correct)
    original, cluster = _join([probe.correct for probe in probes]), _number_clusters(probes)
    first, second = (_join([cell.correct[probe.name] for probe in probes]) for cell in (less, more))
    lost_first, lost_second = (original.astype(np.int8) - right for right in (first, second))
    rate, rate_p = intervals.compare_rates(lost_first, lost_second, cluster, (less.changed / 1e6, more.changed / 1e6))
    clusters = intervals.tally(first, second, cluster)
    known = [probe for probe in probes if _is_known(probe)]
    at_floor = not any(_is_above_floor([(p, cell.correct[p.name]) for p in known]) for cell in (less, more))
    counts, p = sum(clusters, Counts()), intervals.run_paired_test(clusters)
    return CellComparison(less.key, more.key, part, counts, p, at_floor, rate, rate_p)


# Cached, because all comparisons of a study use the same few probes.
@lru_cache(maxsize=64)
def _is_known(probe: StudyProbe) -> bool:
    """Return whether the original knows clearly more of the probe than a model that has forgotten everything."""
    return _is_above_floor([(probe, probe.correct)])


def _is_above_floor(evaluated: Sequence[tuple[StudyProbe, Sequence[bool]]]) -> bool:
    """Return whether the whole interval of right answers, over all these probes, is above their floors."""
    n, low = sum(probe.n for probe, _ in evaluated), _estimate_accuracy(evaluated, 0.95).low
    return low is not None and low * n > sum(probe.n * probe.floor for probe, _ in evaluated)


def _estimate_accuracy(evaluated: Sequence[tuple[StudyProbe, Sequence[bool]]], level: float) -> Estimate:
    cluster, right = _number_clusters(tuple(p for p, _ in evaluated)), _join([correct for _, correct in evaluated])
    parts, wholes = np.bincount(cluster, weights=right).astype(int).tolist(), np.bincount(cluster).tolist()
    simple = intervals.estimate_proportion(int(right.sum()), len(right), level)
    return simple.or_by_relation(intervals.share_by_cluster(parts, wholes, level))


@lru_cache(maxsize=8)
def _number_clusters(probes: tuple[StudyProbe, ...]) -> np.ndarray:
    """Return the cluster number of each fact, for the concatenated facts of several probes."""
    return intervals.number_clusters([(probe.name, relation) for probe in probes for relation in probe.relations])


def _join(right: Sequence[Sequence[bool]]) -> np.ndarray:
    """Return the concatenated facts of several probes."""
    return np.fromiter(chain.from_iterable(right), dtype=bool)


def hold_to_limit(of: str, figure: Figure, limit: float) -> Bound:
    """Return the figure with its limit, and the p-value at which its interval just reaches the limit."""
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


def measure_decline(study: Study, cell: StudyCell) -> Figure:
    """Return the fall of accuracy over all probes' facts relative to the original's measured accuracy; negative if it
    rose. The interval is Newcombe's, or the one over relations."""
    probes = tuple(probe for probe in study.probes if probe.name in cell.correct)
    right = _join([cell.correct[probe.name] for probe in probes])
    clusters = intervals.tally(_join([probe.correct for probe in probes]), right, _number_clusters(probes))
    counts = sum(clusters, Counts())

    def decline(level: float) -> Estimate:
        change = intervals.estimate_difference(counts, level).or_by_relation(
            intervals.estimate_difference_by_cluster(clusters, level)
        )
        if change.value is None or change.low is None or change.high is None or not counts.known_before:
            return Estimate(None)
        scale = counts.known_before / counts.n
        # 0.0 minus the value, to avoid negative zero.
        return Estimate(*((0.0 - end) / scale for end in (change.value, change.high, change.low)))

    return decline


def measure_remaining(study: Study, cell: StudyCell) -> Figure:
    """Return the share left of what the original knows beyond a model that has forgotten everything (see
    `StudyProbe.floor`), over the probes of which it knows clearly more; negative if the cell scores below that model,
    None if there is no such probe. The interval covers only the cell's accuracy."""
    probes = [probe for probe in study.probes if probe.name in cell.correct and _is_known(probe)]
    n, nothing = sum(probe.n for probe in probes), sum(probe.n * probe.floor for probe in probes)
    known = sum(sum(probe.correct) for probe in probes) - nothing
    evaluated = [(probe, cell.correct[probe.name]) for probe in probes]

    def remaining(level: float) -> Estimate:
        after = _estimate_accuracy(evaluated, level)
        if not n or after.value is None or after.low is None or after.high is None:
            return Estimate(None)
        return Estimate(*((n * share - nothing) / known for share in (after.value, after.low, after.high)))

    return remaining


def average(figures: Sequence[Figure]) -> Figure:
    """Return the mean of figures of the same facts, which move together, so that interval ends are averaged too."""

    def mean(level: float) -> Estimate:
        estimates = [figure(level) for figure in figures]
        parts = list(zip(*((e.value, e.low, e.high) for e in estimates), strict=True))
        if not parts or any(number is None for part in parts for number in part):
            return Estimate(None)
        return Estimate(*(sum(number or 0.0 for number in part) / len(part) for part in parts))

    return mean
