"""A study in plain sentences: its headline, its verdict, what it found, and whether that changes with the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from compressknow.base.format import count, plain, points, share
from compressknow.comparison.records import Estimate
from compressknow.pages.study.charts import by_method
from compressknow.pages.study.findings import (
    HIGH,
    LOW,
    MEDIUM,
    NOT_EVALUATED,
    PRUNING,
    QUANTIZATION,
    Finding,
    MethodFindings,
)
from compressknow.pages.study.records import (
    AMOUNT,
    IN_WORDS,
    MODULES,
    Axis,
    Study,
    StudyCell,
    alike,
    axes,
    called,
    methods,
    names,
    percent,
    pruned,
    quantized,
    schemes,
)
from compressknow.pages.study.tests import (
    CANNOT_TELL,
    DOES_NOT_HOLD,
    HOLDS,
    CheckpointComparison,
    Claim,
    adjusted,
    paired_test,
    strict_level,
)

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


def ids(found: Sequence[MethodFindings]) -> tuple[str, ...]:
    """The findings that any of them has, in order."""
    known = {finding.id for each in found for finding in each.findings}
    return tuple(sorted(known, key=lambda id: int(id.removeprefix("F"))))


def changes(found: Sequence[MethodFindings]) -> tuple[str, ...]:
    """In words, the findings that hold with one method and not with another; that there is none, where none is."""
    told = [
        f"{id} changes with the {'method that prunes' if kind == PRUNING else 'scheme'}: {_answers(id, of_kind)}."
        for kind, of_kind in _by_kind(found)
        for id in ids(of_kind)
        if {HOLDS, DOES_NOT_HOLD} <= {each.answer(id) for each in of_kind}
    ]
    return tuple(told) if told or not found else ("No finding holds with one method and fails with another.",)


def _by_kind(found: Sequence[MethodFindings]) -> Iterator[tuple[str, list[MethodFindings]]]:
    for kind in (PRUNING, QUANTIZATION):
        yield kind, [each for each in found if each.kind == kind]


def _answers(id: str, found: Sequence[MethodFindings]) -> str:
    named = {
        answer: [plain(each.name, 60) for each in found if each.answer(id) == answer]
        for answer in (HOLDS, DOES_NOT_HOLD)
    }
    return f"it holds with {listed(named[HOLDS])}, and does not hold with {listed(named[DOES_NOT_HOLD])}"


# The charts that show the paper's findings; those of the study's own are named below.
_KEPT, _QUANTIZED = "pruning-kept", "quantization"
_METHODS = {module: f"methods-{module}" for module in MODULES}
_MOST = 6  # values of an axis that are told one by one
_METHODS_ALONE = "methods-pruned"  # where a module was pruned by one amount
_CHARTS = {
    **dict.fromkeys(("F1", "F2", "F3", "F4", "F5"), "pruning-drop"),
    **dict.fromkeys(("F6", "F7"), _QUANTIZED),
    "F8": "pruning-quantization",
    **dict.fromkeys(("F9", "F10"), "final-layer"),
}


@dataclass(frozen=True, slots=True)
class Found:
    """One finding.

    Attributes
    ----------
    id : F1 to F10 of the paper's; empty of the study's own.
    answer : ``holds``, ``does not hold`` or ``cannot tell``. What is claimed of the best module or method or of the
        first amount is read off the study itself, and never "does not hold".
    chart : the name of the chart that shows it.
    """

    id: str
    claim: str
    answer: str
    numbers: str
    chart: str

    def __str__(self) -> str:
        numbers = f" ({self.numbers})" if self.numbers else ""
        return f"{self.answer}: {self.id}{' ' * bool(self.id)}{self.claim}{numbers}"


def what_was_found(study: Study, findings: Sequence[Finding]) -> tuple[Found, ...]:
    """By chart: the study's own findings, then the paper's for this family of which the study has cells."""
    own = (*map(_pruned, module_that_hurts_least(study)), *map(_found_cliff, cliffs(study)))
    own += tuple(_method(study, each) for each in method_that_hurts_least(study))
    of_axes = {axis.chart: tuple(_of_axis(study, axis)) for axis in axes(study)}
    found = (
        *own,
        *map(_found_quantized, quantized_that_hurts_least(study)),
        *_paper(findings),
        *chain(*of_axes.values()),
    )
    order = (_KEPT, "pruning-drop", *_METHODS.values(), _METHODS_ALONE, *_CHARTS.values(), *of_axes)
    return tuple(sorted(found, key=lambda each: order.index(each.chart)))


def _pruned(least: Least) -> Found:
    claim = f"Pruned by {least.level}, {_hurts_least(least, 'module')}"
    return _kept(least, claim, least.clear, "kept on average", _KEPT)


def _found_quantized(least: Least) -> Found:
    claim = f"Quantized by {plain(least.level, 60)}, {_hurts_least(least, 'module')}"
    return _kept(least, claim, least.clear, "kept", _QUANTIZED)


def _method(study: Study, least: Least) -> Found:
    """That a method hurts least or, where only that is clear, that one hurts most."""
    amounts = " to ".join(f"{amount:g}" for amount in dict.fromkeys((least.amounts[0], least.amounts[-1])))
    claim = plain(least.claim, 80) if least.clear_worst else _hurts_least(least, "method")
    return _kept(
        least,
        f"With {IN_WORDS[least.level]} pruned by {amounts} %, {claim}",
        least.clear or least.clear_worst,
        "kept on average" if len(least.amounts) > 1 else "kept",
        _METHODS[least.level] if by_method(study, least.level) else _METHODS_ALONE,
    )


def _of_axis(study: Study, axis: Axis) -> Iterator[Found]:
    """Of amounts, where each group falls; of all else, which value hurts least where nothing else differs."""
    if axis.name == AMOUNT:
        yield from (_found_cliff(edge, axis.chart) for edge in cliffs_of(study, axis))
        return
    for least in setting_that_hurts_least(study, axis):
        name = plain(axis.name, 40)
        claim = f"All else equal, {_hurts_least(least, f'{name} of these', f'{name} ')}"
        yield _kept(least, claim, least.clear, "kept on average" if len(axis.groups) > 1 else "kept", axis.chart)


def _hurts_least(least: Least, kind: str, before: str = "") -> str:
    # Where all keep the same, to name the first of them would say what nobody saw.
    return f"{before + plain(least.best, 60) if len(set(least.kept.values())) > 1 else f'one {kind}'} hurts least"


def _kept(least: Least, claim: str, clear: bool, what: str, chart: str) -> Found:
    each = [f"{plain(name, 60)} {share(kept)}" for name, kept in least.kept.items()]
    numbers = listed(each) if len(each) <= _MOST else f"from {each[0]} to {each[-1]}, of {count(len(each))}"
    return Found("", claim, _answer(clear), f"{what}: {numbers}", chart)


def _found_cliff(edge: Cliff, chart: str = _KEPT) -> Found:
    limit, module = f"{100 * CLIFF:g} %", edge.module or "each form"
    if edge.below is None:
        claim, kept = f"Pruned by up to {edge.before:g} %, {module} keeps {limit} at least", ""
    else:
        claim, kept = f"Pruned by {edge.below:g} %, {module} keeps less than {limit}", f"{share(edge.kept)} kept"
    start, end = edge.steepest
    fall = f"falls fastest from {start:g} to {end:g} %, by {points(edge.fall).removeprefix('+')}"
    numbers = "; ".join(filter(None, (kept, fall if edge.fall > 0 else "")))
    return Found("", claim, _answer(edge.clear), numbers, chart)


def _answer(clear: bool) -> str:
    return HOLDS if clear else CANNOT_TELL


def _paper(findings: Sequence[Finding]) -> Iterator[Found]:
    for each in findings:
        if each.answer != NOT_EVALUATED and (each.paired_tests or each.bounds):
            yield Found(each.id, each.claim, each.answer, each.numbers, _CHARTS[each.id])
