"""Which module hurts least when pruned, at each level of pruning, and where the cliff is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from compressknow.report.study.cell_contrasts import HOLDS, adjusted, contrast, judge
from compressknow.report.study.findings import HIGH, LOW, MEDIUM
from compressknow.report.study.grid import MODULES, pruned
from compressknow.report.study.records import Study, StudyCell

LEVELS = {"10 to 30 %": LOW, "30 to 50 %": MEDIUM, "more than 50 %": HIGH}
CLIFF = 0.90  # knowledge kept falls off the cliff at the first amount that keeps less


@dataclass(frozen=True, slots=True)
class Least:
    """The module that hurts least at a level of pruning.

    Attributes
    ----------
    level : "10 to 30 %", "30 to 50 %" (30 itself belongs to the level below) or "more than 50 %".
    amounts : in percent, those that all its modules were pruned by.
    kept : by module, knowledge kept of all probes' facts, the mean over the amounts; best first.
    clear : the first is significantly better than each other at one amount at least, and nowhere worse (exact
        McNemar at each amount, Holm over all).
    """

    level: str
    amounts: tuple[float, ...]
    kept: Mapping[str, float]
    clear: bool

    @property
    def module(self) -> str:
        return next(iter(self.kept))


@dataclass(frozen=True, slots=True)
class Cliff:
    """Where knowledge kept falls off as a module is pruned; amounts in percent, of those that were asked.

    Attributes
    ----------
    below : the first amount at which less than `CLIFF` is kept, and what is kept there; None where none is so low.
    before : the last amount before it; 0 is the original itself.
    steepest : the neighbouring amounts between which most is lost for each point pruned; `fall` is that loss (0 to 1).
    """

    module: str
    below: float | None
    kept: float | None
    before: float
    steepest: tuple[float, float]
    fall: float


def module_that_hurts_least(study: Study) -> tuple[Least, ...]:
    """By level, among overall, attention and feed-forward, pruned by the same amounts; levels that have at least two
    modules to compare.
    """
    cells = {scope: _known(pruned(study, scope)) for scope in MODULES}
    found = (_least(study, level, limits, cells) for level, limits in LEVELS.items())
    return tuple(least for least in found if least)


def _least(
    study: Study, level: str, limits: tuple[float, float], cells: Mapping[str, Mapping[float, StudyCell]]
) -> Least | None:
    there = {scope: {a: c for a, c in by.items() if _is_in(a, limits)} for scope, by in cells.items()}
    there = {scope: by for scope, by in there.items() if by}
    amounts = tuple(sorted(set.intersection(*(set(by) for by in there.values())))) if len(there) > 1 else ()
    if not amounts:
        return None
    kept = {
        scope: sum(by[a].comparison.kept.value or 0.0 for a in amounts) / len(amounts) for scope, by in there.items()
    }
    order = sorted(kept, key=lambda scope: -kept[scope])
    best, rivals = order[0], order[1:]
    pairs = adjusted(contrast(study, there[best][a], there[rival][a], rival) for rival in rivals for a in amounts)
    clear = judge([(pair.part, pair.direction) for pair in pairs], rivals) == HOLDS
    return Least(level, amounts, {scope: kept[scope] for scope in order}, clear)


def _is_in(amount: float, limits: tuple[float, float]) -> bool:
    return (limits[0] <= amount if limits == LOW else limits[0] < amount) and amount <= limits[1]


def _known(cells: Mapping[float, StudyCell]) -> dict[float, StudyCell]:
    return {amount: cell for amount, cell in cells.items() if cell.comparison.kept.value is not None}


def cliffs(study: Study) -> tuple[Cliff, ...]:
    """Of overall, attention and feed-forward, each where at least two amounts were pruned."""
    by_module = {module: _known(pruned(study, module)) for module in MODULES}
    return tuple(_cliff(module, cells) for module, cells in by_module.items() if len(cells) > 1)


def _cliff(module: str, cells: Mapping[float, StudyCell]) -> Cliff:
    kept = {0.0: 1.0} | {amount: cell.comparison.kept.value or 0.0 for amount, cell in cells.items()}
    below = next((amount for amount, share in kept.items() if share < CLIFF), None)
    steps = list(pairwise(kept))
    before = max((a for a in kept if below is None or a < below), default=0.0)
    steepest = max(steps, key=lambda step: (kept[step[0]] - kept[step[1]]) / (step[1] - step[0]))
    fall = kept[steepest[0]] - kept[steepest[1]]
    return Cliff(module, below, None if below is None else kept[below], before, steepest, fall)
