"""What a study found, in short: a line each of what is claimed, whether it holds, and the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from compressknow.format import count, plain, points, share
from compressknow.pages.study.axes import AMOUNT, Axis, axes
from compressknow.pages.study.charts import by_method
from compressknow.pages.study.findings import NOT_EVALUATED, Finding
from compressknow.pages.study.records import IN_WORDS, MODULES, Study
from compressknow.pages.study.summary import (
    CLIFF,
    Cliff,
    Least,
    cliffs,
    cliffs_of,
    listed,
    method_that_hurts_least,
    module_that_hurts_least,
    quantized_that_hurts_least,
    setting_that_hurts_least,
)
from compressknow.pages.study.tests import CANNOT_TELL, HOLDS

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
    own = (*map(_pruned, module_that_hurts_least(study)), *map(_cliff, cliffs(study)))
    own += tuple(_method(study, each) for each in method_that_hurts_least(study))
    of_axes = {axis.chart: tuple(_of_axis(study, axis)) for axis in axes(study)}
    found = (*own, *map(_quantized, quantized_that_hurts_least(study)), *_paper(findings), *chain(*of_axes.values()))
    order = (_KEPT, "pruning-drop", *_METHODS.values(), _METHODS_ALONE, *_CHARTS.values(), *of_axes)
    return tuple(sorted(found, key=lambda each: order.index(each.chart)))


def _pruned(least: Least) -> Found:
    claim = f"Pruned by {least.level}, {_hurts_least(least, 'module')}"
    return _kept(least, claim, least.clear, "kept on average", _KEPT)


def _quantized(least: Least) -> Found:
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
        yield from (_cliff(edge, axis.chart) for edge in cliffs_of(study, axis))
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


def _cliff(edge: Cliff, chart: str = _KEPT) -> Found:
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
