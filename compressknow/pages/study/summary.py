"""Conclusions of a study in sentences: headline, verdict and findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, pairwise, starmap
from typing import TypeVar

from compressknow.base.format import clean, count, share, share_against, write_points
from compressknow.base.reading import group_by
from compressknow.pages.card.verdict import join_words
from compressknow.pages.records import write_range
from compressknow.pages.study.charts import draw_by_method
from compressknow.pages.study.claims import CANNOT_TELL, HOLDS, CellComparison, Claim, adjust_claims, compare_cells
from compressknow.pages.study.findings import HIGH, LOW, MEDIUM, NOT_EVALUATED, Finding, limit_amounts
from compressknow.pages.study.records import IN_WORDS, MODULES, UNSTRUCTURED, Axis, Study, StudyCell, label_method

LEVELS = {"10 to 30 %": LOW, "30 to 50 %": MEDIUM, "more than 50 %": HIGH}
CLIFF = 0.90  # the cliff is at the first amount that keeps less than this share of the knowledge


@dataclass(frozen=True, slots=True)
class LossRanking:
    """Order of what hurts least: modules at a level of pruning, or the methods that prune a module. It is `clear` if
    the first is significantly better than each of the others at one amount or more, and never worse (a paired test by
    relation at each amount, Holm over all such claims); likewise, `clear_worst` for the last, which is only stated of
    methods."""

    level: str  # "10 to 30 %", "30 to 50 %" (30 itself belongs to the level below), "more than 50 %"; or the module
    amounts: tuple[float, ...]  # in percent, those by which all of them were pruned; empty for quantized ones
    kept: Mapping[str, float]  # by name, knowledge kept over all probes' facts, averaged over the amounts; best first
    clear: bool
    clear_worst: bool = False

    @property
    def best(self) -> str:
        return next(iter(self.kept))

    @property
    def claim(self) -> str:
        """Claim that the last hurts most if only that is clear, else that the first hurts least."""
        return f"{[*self.kept][-1]} hurts most" if self.clear_worst and not self.clear else f"{self.best} hurts least"


@dataclass(frozen=True, slots=True)
class Cliff:
    """Point where knowledge kept falls off as a module is pruned; amounts are those of the grid, in percent. It is
    `clear` if the interval at `below` lies below `CLIFF` or, if no amount is so low, all lie above (95 % over all
    cliffs)."""

    module: str
    below: float | None  # the first amount at which less than `CLIFF` is kept; None if none is so low
    kept: float | None  # what is kept there
    before: float  # the last amount before it; 0 is the original, or what is quantized alone
    steepest: tuple[float, float]  # the neighbouring amounts with the largest loss per point pruned
    fall: float  # that loss (0 to 1)
    clear: bool
    lasts: bool = False  # whether every larger amount keeps less than `CLIFF` too


_Key = TypeVar("_Key")
# A comparison: its level, its amounts, and cells by name, paired by position.
_Compared = tuple[str, tuple[float, ...], Mapping[str, Sequence[StudyCell]]]


def rank_cells(study: Study) -> dict[str, tuple[LossRanking, ...]]:
    """Return all rankings of what hurts least with at least two entries, tested together.

    ``modules``: overall, attention and feed-forward, pruned by the same amounts. ``methods``: those that prune a module
    by the same amounts; `level` is the module. ``schemes``: modules quantized by the same scheme, which is the `level`.
    For each axis, under the name of its chart: its values; `level` is the axis.
    """
    by_module = {scope: _index_cells(study.select_pruned(scope)) for scope in MODULES}
    quantized = {scope: _index_cells(study.select_quantized(scope)) for scope in MODULES}
    compared: dict[str, list[_Compared]] = {
        "modules": [
            _limit_to_same_amounts(level, {scope: limit_amounts(cells, limits) for scope, cells in by_module.items()})
            for level, limits in LEVELS.items()
        ],
        "methods": [
            _limit_to_same_amounts(
                module, {label_method(m): _index_cells(study.select_pruned(module, m)) for m in study.list_methods()}
            )
            for module in MODULES
        ],
        "schemes": [
            (scheme, (), {module: [of[scheme]] for module, of in quantized.items() if scheme in of})
            for scheme in study.list_schemes()
        ],
        **{axis.chart: [(axis.name, (), cells) for _, cells in axis.pair_groups()] for axis in study.find_axes()},
    }
    compared = {kind: [each for each in of_kind if len(each[2]) > 1] for kind, of_kind in compared.items()}
    claims = [claim for of_kind in compared.values() for *_, cells in of_kind for claim in _claim_ends(study, cells)]
    clear = (claim.answer == HOLDS for claim in adjust_claims(claims))
    return {
        kind: tuple(
            LossRanking(level, amounts, _average_kept(cells), next(clear), next(clear))
            for level, amounts, cells in of_kind
        )
        for kind, of_kind in compared.items()
    }


def _limit_to_same_amounts(level: str, cells: Mapping[str, Mapping[float, StudyCell]]) -> _Compared:
    some = {name: by for name, by in cells.items() if by}
    amounts = tuple(sorted(set.intersection(*map(set, some.values())))) if some else ()
    return level, amounts, {name: [by[amount] for amount in amounts] for name, by in some.items() if amounts}


def _average_kept(cells: Mapping[str, Sequence[StudyCell]]) -> dict[str, float]:
    """Return the mean share kept of each name's cells, best first."""
    kept = {name: sum(c.comparison.kept.value or 0.0 for c in by) / len(by) for name, by in cells.items()}
    return dict(sorted(kept.items(), key=lambda each: -each[1]))


def _claim_ends(study: Study, cells: Mapping[str, Sequence[StudyCell]]) -> tuple[Claim, Claim]:
    """Claim that the best name hurts least, and that the worst hurts most."""

    def compare(less: str, more: str, part: str) -> Iterator[CellComparison]:
        both = zip(cells[less], cells[more], strict=True)
        return (compare_cells(study, one, other, part) for one, other in both)

    first, *others = _average_kept(cells)
    *rivals, last = _average_kept(cells)
    least = tuple(pair for rival in others for pair in compare(first, rival, rival))
    most = tuple(pair for rival in rivals for pair in compare(rival, last, rival))
    return Claim(least, tuple(others)), Claim(most, tuple(rivals))


def _index_cells(cells: Mapping[_Key, StudyCell]) -> dict[_Key, StudyCell]:
    return {key: cell for key, cell in cells.items() if cell.comparison.kept.value is not None}


def find_cliffs(study: Study, amounts: Mapping[str, Mapping[float, StudyCell]] | None = None) -> tuple[Cliff, ...]:
    """Return the cliff of each name with two or more amounts; by default, names are modules."""
    if amounts is None:
        amounts = {module: study.select_pruned(module) for module in MODULES}
    groups = sum(len(axis.groups) for axis in study.find_axes() if axis.is_amount)
    # The level at which all these intervals together hold with 95 % (Bonferroni).
    level = 1 - 0.05 / (len(MODULES) + groups)
    known = {name: _index_cells(cells) for name, cells in amounts.items()}
    return tuple(_find_cliff(name, cells, level) for name, cells in known.items() if len(cells) > 1)


def _find_cliff(module: str, cells: Mapping[float, StudyCell], level: float) -> Cliff:
    kept = {0.0: 1.0} if all(cell.is_pruned_alone for cell in cells.values()) else {}
    kept |= {amount: cell.comparison.kept.value or 0.0 for amount, cell in cells.items()}
    below = next((amount for amount, share in kept.items() if share < CLIFF), None)
    steps = list(pairwise(kept))
    before = max((amount for amount in kept if below is None or amount < below), default=0.0)
    steepest = max(steps, key=lambda step: (kept[step[0]] - kept[step[1]]) / (step[1] - step[0]))
    fall = kept[steepest[0]] - kept[steepest[1]]
    if below is None:
        clear = all((cell.comparison.kept_at(level).low or 0.0) >= CLIFF for cell in cells.values())
    else:
        high = cells[below].comparison.kept_at(level).high
        clear = high is not None and high < CLIFF
    lasts = below is not None and all(share < CLIFF for amount, share in kept.items() if amount >= below)
    return Cliff(module, below, None if below is None else kept[below], before, steepest, fall, clear, lasts)


_NAME = 80


def write_headline(study: Study) -> str:
    """Return the headline: the range of knowledge kept."""
    kept = [cell.comparison.kept.value for cell in study.cells if cell.comparison.kept.value is not None]
    if not kept:
        return "There was no knowledge to keep" if study.cells else "No cell could be evaluated"
    forms = "1 compressed form keeps" if len(kept) == 1 else f"{count(len(kept))} compressed forms keep"
    low, high = min(kept), max(kept)
    return f"{forms} {share(low) if share(low) == share(high) else write_range(low, high)} of the knowledge"


def write_verdict(study: Study) -> str:
    """Say which module and method hurts least and where the cliff is; else, which cells are best and worst."""
    orders, cliffs = rank_cells(study), find_cliffs(study)
    parts = [_summarize_modules(orders["modules"])] if orders["modules"] else []
    if cliffs:
        fallen, limit = [cliff for cliff in cliffs if cliff.below is not None], f"{100 * CLIFF:g} %"
        estimated = f"the estimate is below {limit}, though not clearly,"
        for clear, what in ((True, f"less than {limit} is kept"), (False, estimated)):
            for lasts, where in ((True, "from {} on"), (False, "at {}, but more at a larger amount")):
                own = [f"{c.below:g} % ({c.module})" for c in fallen if (c.clear, c.lasts) == (clear, lasts)]
                parts += [f"{what} {where.format(join_words(own))}"] if own else []
        if not fallen:
            all_clear = all(cliff.clear for cliff in cliffs)
            parts.append(f"no {'amount in the grid keeps less than' if all_clear else 'estimate is below'} {limit}")
    by = f", with {_PAPER_METHOD}" if parts and len(study.list_methods()) > 1 else ""
    parts += [_summarize_methods(orders["methods"])] if orders["methods"] else []
    if not parts:
        return _name_best_and_worst(study)
    return f"{clean(study.original.name, _NAME)}{by}: {'; '.join(parts)}."


def _summarize_modules(least: Sequence[LossRanking]) -> str:
    """Say which module hurts least, grouping levels with the same answer."""
    by_module = group_by(least, lambda each: each.best if each.clear else "no module clearly")
    return "; ".join(
        f"pruned by {join_words([each.level for each in of_module])}, {module} hurts least"
        for module, of_module in by_module.items()
    )


def _summarize_methods(least: Sequence[LossRanking]) -> str:
    """Name the methods that clearly hurt least or most, with their modules."""
    clear = group_by(least, lambda each: clean(each.claim, 80) if each.clear or each.clear_worst else None)
    claims = [f"{claim} ({join_words([IN_WORDS[each.level] for each in of])})" for claim, of in clear.items()]
    return f"of the methods that prune, {join_words(claims) or 'none clearly hurts least'}"


def _name_best_and_worst(study: Study) -> str:
    name, names = clean(study.original.name, _NAME), study.name_cells()
    known = [(c.comparison.kept.value, names[c.key]) for c in study.cells if c.comparison.kept.value is not None]
    if not known:
        why = "it knew none of the facts" if study.cells else "no cell could be evaluated"
        return f"Nothing can be said about what {name} keeps: {why}."
    best, worst = max(known, key=lambda pair: pair[0]), min(known, key=lambda pair: pair[0])
    if len(known) == 1:
        return f"{best[1]} keeps {share(best[0])} of what {name} knew."
    if best[0] == worst[0]:
        return f"Each of the {count(len(known))} compressed forms of {name} keeps {share(best[0])} of what it knew."
    return (
        f"Of {count(len(known))} compressed forms of {name}, {best[1]} keeps most ({share(best[0])}) and {worst[1]} "
        f"least ({share(worst[0])})."
    )


# Names of the charts that show the findings of the study and of the paper.
_KEPT, _QUANTIZED = "pruning-kept", "quantization"
_METHODS = {module: f"methods-{module}" for module in MODULES}
_METHODS_ALONE = "methods-pruned"  # if a module was pruned by one amount
_MOST = 6  # values of an axis that are listed one by one
# Rankings of modules and cliffs are for this method, which is named if the study has others too.
_PAPER_METHOD = label_method(UNSTRUCTURED)
_CHARTS = {
    **dict.fromkeys(("F1", "F2", "F3", "F4", "F5"), "pruning-drop"),
    **dict.fromkeys(("F6", "F7"), _QUANTIZED),
    "F8": "pruning-quantization",
    **dict.fromkeys(("F9", "F10"), "final-layer"),
}


@dataclass(frozen=True, slots=True)
class Conclusion:
    """Finding of the paper, or one from the study itself, whose answer is never "does not hold"."""

    id: str  # F1 to F10 for the paper's; empty for the study's own
    claim: str
    answer: str  # ``holds``, ``does not hold`` or ``cannot tell``
    numbers: str
    chart: str  # the name of the chart that shows it

    def __str__(self) -> str:
        numbers = f" ({self.numbers})" if self.numbers else ""
        return f"{self.answer}: {self.id}{' ' * bool(self.id)}{self.claim}{numbers}"


def draw_conclusions(study: Study, findings: Sequence[Finding]) -> tuple[Conclusion, ...]:
    """Return, by chart, the study's own findings, then the paper's findings that it has cells for."""
    orders, axes = rank_cells(study), study.find_axes()
    by = f" ({_PAPER_METHOD})" if len(study.list_methods()) > 1 else ""
    modules = [(f"Pruned by {each.level}{by}", each, _name_kept(each.amounts), _KEPT) for each in orders["modules"]]
    schemes = [(f"Quantized by {clean(each.level, 60)}", each, "kept", _QUANTIZED) for each in orders["schemes"]]
    conclusions = list(starmap(_conclude_modules, modules))
    conclusions += [_conclude_cliff(cliff, _KEPT, by) for cliff in find_cliffs(study)]
    conclusions += [_conclude_method(study, each) for each in orders["methods"]]
    conclusions += starmap(_conclude_modules, schemes)
    tested = [finding for finding in findings if finding.answer != NOT_EVALUATED and finding.has_cells]
    conclusions += [Conclusion(f.id, f.claim, f.answer, f.numbers, _CHARTS[f.id]) for f in tested]
    conclusions += chain.from_iterable(_conclude_axis(study, axis, orders[axis.chart]) for axis in axes)
    order = (_KEPT, "pruning-drop", *_METHODS.values(), _METHODS_ALONE, *_CHARTS.values(), *(a.chart for a in axes))
    return tuple(sorted(conclusions, key=lambda each: order.index(each.chart)))


def _conclude_modules(treated: str, least: LossRanking, what: str, chart: str) -> Conclusion:
    return _conclude_order(least, f"{treated}, {_claim_least(least, 'module')}", least.clear, what, chart)


def _conclude_method(study: Study, least: LossRanking) -> Conclusion:
    """Conclude that a method hurts least or, if only that is clear, that one hurts most."""
    amounts = " to ".join(f"{amount:g}" for amount in dict.fromkeys((least.amounts[0], least.amounts[-1])))
    claim = clean(least.claim, 80) if least.clear_worst else _claim_least(least, "method")
    return _conclude_order(
        least,
        f"With {IN_WORDS[least.level]} pruned by {amounts} %, {claim}",
        least.clear or least.clear_worst,
        _name_kept(least.amounts),
        _METHODS[least.level] if draw_by_method(study, least.level) else _METHODS_ALONE,
    )


def _conclude_axis(study: Study, axis: Axis, orders: Sequence[LossRanking]) -> Iterator[Conclusion]:
    """Yield, for amounts, the cliff of each group; for other axes, which value hurts least, all else equal."""
    if axis.is_amount:
        amounts = {group: {cell.percent: cell for cell in cells.values()} for group, cells in axis.groups}
        yield from (_conclude_cliff(cliff, axis.chart) for cliff in find_cliffs(study, amounts))
        return
    name = clean(axis.name, 40)
    for least, (groups, _) in zip(orders, axis.pair_groups(), strict=True):
        forms = join_words(groups) if len(groups) <= _MOST else f"{count(len(groups))} forms"
        of = f" ({forms})" if len(orders) > 1 else ""
        claim = f"All else equal{of}, {_claim_least(least, f'{name} of these', f'{name} ')}"
        yield _conclude_order(least, claim, least.clear, _name_kept(groups), axis.chart)


def _name_kept(averaged: Sized) -> str:
    return "kept on average" if len(averaged) > 1 else "kept"


def _claim_least(least: LossRanking, kind: str, before: str = "") -> str:
    # If all keep the same, naming the first would be arbitrary.
    return f"{before + clean(least.best, 60) if len(set(least.kept.values())) > 1 else f'one {kind}'} hurts least"


def _conclude_order(least: LossRanking, claim: str, clear: bool, what: str, chart: str) -> Conclusion:
    each = [f"{clean(name, 60)} {share(kept)}" for name, kept in least.kept.items()]
    numbers = join_words(each) if len(each) <= _MOST else f"from {each[0]} to {each[-1]}, of {count(len(each))}"
    return Conclusion("", claim, HOLDS if clear else CANNOT_TELL, f"{what}: {numbers}", chart)


def _conclude_cliff(cliff: Cliff, chart: str, by: str = "") -> Conclusion:
    limit, module = f"{100 * CLIFF:g} %", cliff.module or "each form"
    if cliff.below is None or cliff.kept is None:
        claim, kept = f"Pruned by up to {cliff.before:g} %{by}, {module} keeps at least {limit}", ""
    else:
        pruned = f"Pruned by {cliff.below:g} %{by}" if cliff.below else "Not pruned at all"
        claim, kept = f"{pruned}, {module} keeps less than {limit}", f"{share_against(cliff.kept, [CLIFF])} kept"
    start, end = cliff.steepest
    fall = f"falls fastest from {start:g} to {end:g} %, by {write_points(cliff.fall).removeprefix('+')}"
    numbers = "; ".join(filter(None, (kept, fall if cliff.fall > 0 else "")))
    return Conclusion("", claim, HOLDS if cliff.clear else CANNOT_TELL, numbers, chart)
