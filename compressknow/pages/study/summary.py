"""A study in plain sentences: its headline, its verdict, which module hurts least at each level, where the cliff is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from compressknow.format import count, plain, share
from compressknow.pages.study.axes import AMOUNT, Axis, alike, axes
from compressknow.pages.study.findings import HIGH, LOW, MEDIUM
from compressknow.pages.study.records import (
    IN_WORDS,
    MODULES,
    Study,
    StudyCell,
    called,
    methods,
    names,
    percent,
    pruned,
    quantized,
    schemes,
)
from compressknow.pages.study.tests import HOLDS, CheckpointComparison, Claim, adjusted, paired_test, strict_level
from compressknow.stats.records import Estimate

LEVELS = {"10 to 30 %": LOW, "30 to 50 %": MEDIUM, "more than 50 %": HIGH}
CLIFF = 0.90  # knowledge kept falls off the cliff at the first amount that keeps less


@dataclass(frozen=True, slots=True)
class Least:
    """What hurts least: the module at a level of pruning, or the method of those that prune a module.

    Attributes
    ----------
    level : "10 to 30 %", "30 to 50 %" (30 itself belongs to the level below) or "more than 50 %"; the module.
    amounts : in percent, those that all of them were pruned by; none where they were quantized.
    kept : by module or method, knowledge kept of all probes' facts, the mean over the amounts; best first.
    clear : the first is significantly better than each other at one amount at least, and nowhere worse (a paired test
        by relation at each amount, Holm over all that the study says of what hurts least or most).
    clear_worst : likewise, the last is worse than each other. It is said of methods alone: of modules, the paper's F4
        and F7 ask it.
    """

    level: str
    amounts: tuple[float, ...]
    kept: Mapping[str, float]
    clear: bool
    clear_worst: bool = False

    @property
    def best(self) -> str:
        return next(iter(self.kept))

    @property
    def claim(self) -> str:
        """What can be said of one of them: that it hurts most, where that alone is clear; else that one hurts least."""
        return f"{[*self.kept][-1]} hurts most" if self.clear_worst and not self.clear else f"{self.best} hurts least"


@dataclass(frozen=True, slots=True)
class Cliff:
    """Where knowledge kept falls off as a module is pruned; amounts in percent, of those in the grid.

    Attributes
    ----------
    below : the first amount at which less than `CLIFF` is kept, and what is kept there; None where none is so low.
    before : the last amount before it; 0 is the original itself.
    steepest : the neighbouring amounts between which most is lost for each point pruned; `fall` is that loss (0 to 1).
    clear : the whole interval at `below` lies under `CLIFF`; where none is so low, that of every amount above (95 %
        over all cliffs of the study).
    """

    module: str
    below: float | None
    kept: float | None
    before: float
    steepest: tuple[float, float]
    fall: float
    clear: bool


def module_that_hurts_least(study: Study) -> tuple[Least, ...]:
    """Return, by level, the order of overall, attention and feed-forward, pruned by the same amounts; of levels that
    have at least two modules to compare.
    """
    return _all_least(study)["modules"]


def method_that_hurts_least(study: Study) -> tuple[Least, ...]:
    """Return, by module, the order of the methods that prune it by the same amounts; of modules that at least two
    methods prune so. `level` is the module.
    """
    return _all_least(study)["methods"]


def quantized_that_hurts_least(study: Study) -> tuple[Least, ...]:
    """Return the same by scheme, of those that at least two modules were quantized by; `level` is the scheme."""
    return _all_least(study)["schemes"]


# What is compared: its level, the amounts, and the cells of each by name, paired.
_Compared = tuple[str, tuple[float, ...], Mapping[str, Sequence[StudyCell]]]


def setting_that_hurts_least(study: Study, axis: Axis) -> tuple[Least, ...]:
    """Return the same by setting, over all groups of an axis that have the same values; `level` is the axis."""
    return _all_least(study)[axis.chart]


def _all_least(study: Study) -> dict[str, tuple[Least, ...]]:
    """Return all orders, tested together: of modules, of methods, of schemes, and of each axis by its chart."""
    by_module = {scope: _known(pruned(study, scope)) for scope in MODULES}
    modules = [
        (level, {scope: {a: c for a, c in by.items() if _is_in(a, limits)} for scope, by in by_module.items()})
        for level, limits in LEVELS.items()
    ]
    by_methods = [
        (module, {called(method): _known(pruned(study, module, method)) for method in methods(study)})
        for module in MODULES
    ]
    compared: dict[str, list[_Compared | None]] = {
        "modules": [_of_same_amounts(*each) for each in modules],
        "methods": [_of_same_amounts(*each) for each in by_methods],
        "schemes": [_quantized(study, scheme) for scheme in schemes(study)],
        **{axis.chart: [(axis.name, (), cells) for cells in alike(axis)] for axis in axes(study)},
    }
    orders = {kind: [_Order(*each) for each in there if each] for kind, there in compared.items()}
    claims = [claim for of_kind in orders.values() for order in of_kind for claim in order.claims(study)]
    tested = iter(adjusted(claims))
    return {kind: tuple(order.least(next(tested), next(tested)) for order in each) for kind, each in orders.items()}


def _of_same_amounts(level: str, cells: Mapping[str, Mapping[float, StudyCell]]) -> _Compared | None:
    there = {name: by for name, by in cells.items() if by}
    amounts = tuple(sorted(set.intersection(*(set(by) for by in there.values())))) if len(there) > 1 else ()
    return (level, amounts, {name: [by[a] for a in amounts] for name, by in there.items()}) if amounts else None


def _quantized(study: Study, scheme: str) -> _Compared | None:
    cells = {module: quantized(study, module).get(scheme) for module in MODULES}
    known = {m: [cell] for m, cell in cells.items() if cell and cell.comparison.kept.value is not None}
    return (scheme, (), known) if len(known) > 1 else None


class _Order:
    """Modules or methods by what their cells keep on average, best first."""

    def __init__(self, level: str, amounts: tuple[float, ...], cells: Mapping[str, Sequence[StudyCell]]) -> None:
        kept = {name: sum(c.comparison.kept.value or 0.0 for c in by) / len(by) for name, by in cells.items()}
        self._level, self._amounts, self._cells = level, amounts, cells
        self._kept = {name: kept[name] for name in sorted(kept, key=lambda name: -kept[name])}

    def claims(self, study: Study) -> tuple[Claim, Claim]:
        """Return that the first hurts least, and that the last hurts most."""
        first, *others = self._kept
        *rivals, last = self._kept
        least = [pair for rival in others for pair in self._pairs(study, first, rival, rival)]
        most = [pair for rival in rivals for pair in self._pairs(study, rival, last, rival)]
        return Claim((), tuple(least), tuple(others)), Claim((), tuple(most), tuple(rivals))

    def _pairs(self, study: Study, less: str, more: str, part: str) -> Iterator[CheckpointComparison]:
        cells = zip(self._cells[less], self._cells[more], strict=True)
        return (paired_test(study, one, other, part) for one, other in cells)

    def least(self, first: Claim, last: Claim) -> Least:
        """Return the order, where these are its claims as they were tested."""
        clear, clear_worst = (claim.answer == HOLDS for claim in (first, last))
        return Least(self._level, self._amounts, self._kept, clear, clear_worst)


def _is_in(amount: float, limits: tuple[float, float]) -> bool:
    return (limits[0] <= amount if limits == LOW else limits[0] < amount) and amount <= limits[1]


def _known(cells: Mapping[float, StudyCell]) -> dict[float, StudyCell]:
    return {amount: cell for amount, cell in cells.items() if cell.comparison.kept.value is not None}


def cliffs(study: Study) -> tuple[Cliff, ...]:
    """Return those of overall, attention and feed-forward, each where at least two amounts were pruned."""
    return _cliffs(study, {module: pruned(study, module) for module in MODULES})


def cliffs_of(study: Study, axis: Axis) -> tuple[Cliff, ...]:
    """Return that of each group of an axis of amounts."""
    return _cliffs(study, {group.name: {percent(c): c for c in group.cells.values()} for group in axis.groups})


def _cliffs(study: Study, amounts: Mapping[str, Mapping[float, StudyCell]]) -> tuple[Cliff, ...]:
    groups = sum(len(axis.groups) for axis in axes(study) if axis.name == AMOUNT)
    level = strict_level(len(MODULES) + groups)
    known = {name: _known(cells) for name, cells in amounts.items()}
    return tuple(_cliff(name, cells, level) for name, cells in known.items() if len(cells) > 1)


def _cliff(module: str, cells: Mapping[float, StudyCell], level: float) -> Cliff:
    kept = {0.0: 1.0} | {amount: cell.comparison.kept.value or 0.0 for amount, cell in cells.items()}
    below = next((amount for amount, share in kept.items() if share < CLIFF), None)
    steps = list(pairwise(kept))
    before = max((a for a in kept if below is None or a < below), default=0.0)
    steepest = max(steps, key=lambda step: (kept[step[0]] - kept[step[1]]) / (step[1] - step[0]))
    fall = kept[steepest[0]] - kept[steepest[1]]
    clear = _clear([c.comparison.kept_at(level) for c in (cells.values() if below is None else [cells[below]])])
    return Cliff(module, below, None if below is None else kept[below], before, steepest, fall, clear)


def _clear(kept: Sequence[Estimate]) -> bool:
    """Whether the intervals all lie on one side of `CLIFF`."""
    return all((e.low or 0.0) >= CLIFF for e in kept) or all(e.high is not None and e.high < CLIFF for e in kept)


_NAME = 80


def headline(study: Study) -> str:
    """What stands above everything: the range of what is kept."""
    kept = [cell.comparison.kept.value for cell in study.cells if cell.comparison.kept.value is not None]
    if not kept:
        return "There was no knowledge to keep"
    if len(kept) == 1 or share(min(kept)) == share(max(kept)):
        return f"{_forms(len(kept))} {share(max(kept))} of the knowledge"
    return f"{_forms(len(kept))} {share(min(kept)).removesuffix(' %')} to {share(max(kept))} of the knowledge"


def _forms(number: int) -> str:
    return "1 compressed form keeps" if number == 1 else f"{count(number)} compressed forms keep"


def verdict(study: Study) -> str:
    """Which module and which method hurts least, and where the cliff is; of a study without pruned modules, the best
    and worst cell.
    """
    least, of_methods, edges = module_that_hurts_least(study), method_that_hurts_least(study), cliffs(study)
    parts = [_modules_in_short(least)] if least else []
    parts += [_cliffs_in_short(edges)] if edges else []
    parts += [_methods_in_short(of_methods)] if of_methods else []
    if not parts:
        return _best_and_worst(study)
    return f"{plain(study.original.name, _NAME)}: {'; '.join(parts)}."


def _modules_in_short(least: Sequence[Least]) -> str:
    """Levels with the same answer are said together."""
    by_module: dict[str, list[str]] = {}
    for each in least:
        by_module.setdefault(each.best if each.clear else "", []).append(each.level)
    return "; ".join(
        f"pruned by {listed(levels)}, {f'{module} hurts least' if module else 'no module clearly hurts least'}"
        for module, levels in by_module.items()
    )


def _methods_in_short(least: Sequence[Least]) -> str:
    """The method that is best at each module, or worst, where one is."""
    told: dict[str, list[str]] = {}
    for each in least:
        if each.clear or each.clear_worst:
            told.setdefault(plain(each.claim, 80), []).append(IN_WORDS[each.level])
    claims = [f"{claim} ({listed(modules)})" for claim, modules in told.items()]
    return f"of the methods that prune, {listed(claims) or 'none clearly hurts least'}"


def _cliffs_in_short(edges: Sequence[Cliff]) -> str:
    fallen = [f"{edge.below:g} % ({edge.module})" for edge in edges if edge.below is not None]
    if not fallen:
        return f"no amount in the grid keeps less than {share(CLIFF)}"
    return f"less than {100 * CLIFF:g} % is kept from {listed(fallen)} on"


def _best_and_worst(study: Study) -> str:
    name, called = plain(study.original.name, _NAME), names(study)
    known = [(c.comparison.kept.value, called[c.key]) for c in study.cells if c.comparison.kept.value is not None]
    if not known:
        return f"Nothing can be said of what is left of {name}: it knew none of the facts, or no cell was made."
    best, worst = max(known, key=lambda pair: pair[0]), min(known, key=lambda pair: pair[0])
    if len(known) == 1:
        return f"{best[1]} keeps {share(best[0])} of what {name} knew."
    return (
        f"Of {count(len(known))} compressed forms of {name}, {best[1]} keeps most ({share(best[0])}) and {worst[1]} "
        f"least ({share(worst[0])})."
    )


def listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
