"""What is left of the original's knowledge, held against a limit by its whole interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressknow.report.records import Estimate
from compressknow.report.statistics import paired_difference, proportion, tally
from compressknow.report.study.cell_contrasts import CANNOT_TELL, DOES_NOT_HOLD, HOLDS, is_known, together
from compressknow.report.study.grid import floor
from compressknow.report.study.records import Study, StudyCell


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


def judge_below(bounds: Sequence[Bound]) -> str:
    """The answer to "all of these are below their limits".

    It holds where every interval lies below its limit, does not hold where any strict interval lies above.

    >>> low, wide, high = Estimate(0.1, 0.05, 0.15), Estimate(0.1, 0.0, 0.3), Estimate(0.5, 0.4, 0.6)
    >>> [judge_below([Bound("x", each, each, 0.2)]) for each in (low, wide, high)]
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
    asked = [probe for probe in study.probes if probe.name in cell.correct]
    counts = tally(together([p.correct for p in asked]), together([cell.correct[p.name] for p in asked]))
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
    asked = [probe for probe in study.probes if probe.name in cell.correct and is_known(probe)]
    n, nothing = sum(probe.n for probe in asked), sum(probe.n * floor(probe) for probe in asked)
    known = sum(sum(probe.correct) for probe in asked) - nothing
    after = proportion(sum(sum(cell.correct[probe.name]) for probe in asked), n, level)
    if not n or after.value is None or after.low is None or after.high is None:
        return Estimate(None)
    return Estimate(*((n * share - nothing) / known for share in (after.value, after.low, after.high)))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of figures of the same facts: they move together, so their intervals' ends are averaged too."""
    parts = list(zip(*((e.value, e.low, e.high) for e in estimates), strict=True))
    if not parts or any(number is None for part in parts for number in part):
        return Estimate(None)
    return Estimate(*(sum(number or 0.0 for number in part) / len(part) for part in parts))
