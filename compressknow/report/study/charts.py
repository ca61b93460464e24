"""The paper's figures from a study's own data. Each is a mean over the probes, as in the paper (section 3).

Charts for which the study has no cells are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from compressknow.report import drawing
from compressknow.report.drawing import Bar, Level, Line
from compressknow.report.records import Comparison, Estimate
from compressknow.report.statistics import mean
from compressknow.report.study.grid import (
    ATTENTION_KINDS,
    MODULES,
    STRUCTURED,
    UNSTRUCTURED,
    pruned,
    pruned_and_quantized,
    quantized,
    schemes,
)
from compressknow.report.study.records import Study, StudyCell
from compressknow.report.text import plain

_GPQ_AMOUNTS = (20, 40)
_METHODS = {UNSTRUCTURED: "L1-unstructured", STRUCTURED: "L1-structured"}


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: `name` of letters and hyphens, of its file and its element; `svg` fit to stand in the page."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class _Figure:
    """What a chart is called, and its number in the paper by family; empty where the paper has none."""

    name: str
    title: str
    numbers: Mapping[str, str]


_PRUNED = {"masked": "2", "causal": "5", "seq2seq": "6, 12"}
_OF_ATTENTION = {"seq2seq": "8, 11"}
_DROP = _Figure("pruning-drop", "Accuracy lost by how much was pruned, in points", _PRUNED)
_KEPT = _Figure("pruning-kept", "Knowledge kept by how much was pruned", {})
_KINDS_DROP = _Figure("attention-kinds-drop", "Accuracy lost by kind of attention pruned, in points", _OF_ATTENTION)
_KINDS_KEPT = _Figure("attention-kinds-kept", "Knowledge kept by kind of attention pruned", {})
_GQ = _Figure(
    "quantization", "Accuracy lost to quantization, in points", {"masked": "3", "causal": "14", "seq2seq": "15"}
)
_GPQ = _Figure(
    "pruning-quantization",
    "Accuracy lost to pruning and quantization, in points",
    {"masked": "7", "causal": "16", "seq2seq": "17"},
)
_KINDS = _Figure("attention-kinds", "Accuracy lost by kind of attention compressed, in points", _OF_ATTENTION)
_FLP = _Figure(
    "final-layer",
    "Accuracy lost to pruning the final layer, in points",
    {"masked": "9", "causal": "10", "seq2seq": "13"},
)
# Every name that a chart may have: of those, what is on disk and not drawn again is of an earlier study.
NAMES = tuple(f.name for f in (_DROP, _KEPT, _GQ, _GPQ, _KINDS_DROP, _KINDS_KEPT, _KINDS, _FLP))


def study_charts(study: Study) -> tuple[Chart, ...]:
    """All figures that the study has cells for."""
    modules, kinds = _pruned(study, MODULES), _pruned(study, ATTENTION_KINDS)
    drawn = [
        _lines(study, _DROP, modules, mean_drop, start=0),
        _lines(study, _KEPT, modules, mean_kept, start=1),
        _bars(study, _GQ, _quantized(study, MODULES)),
        _bars(study, _GPQ, _both(study, MODULES)),
        _lines(study, _KINDS_DROP, kinds, mean_drop, start=0),
        _lines(study, _KINDS_KEPT, kinds, mean_kept, start=1),
        _bars(study, _KINDS, [*_quantized(study, ATTENTION_KINDS), *_both(study, ATTENTION_KINDS)]),
        _bars(study, _FLP, _final(study)),
    ]
    return tuple(chart for chart in drawn if chart)


def mean_drop(comparison: Comparison) -> Estimate:
    """Accuracy before less accuracy after (0 to 1), averaged as each probe's protocol does: the mean over probes."""
    change = mean([p.macro_difference if p.average == "macro" else p.difference for p in comparison.probes])
    return Estimate(*(None if end is None else 0.0 - end for end in (change.value, change.high, change.low)))


def mean_kept(comparison: Comparison) -> Estimate:
    """Knowledge kept: the mean over the probes of which the original knows anything."""
    return mean([probe.kept for probe in comparison.probes if probe.kept.value is not None])


def baselines(study: Study) -> tuple[Level, ...]:
    """The drops that lead to the majority baseline and to guessing: means over probes, where every probe has them."""
    return _levels(
        study, (("majority baseline", [p.majority for p in study.probes]), _chances(study)), from_original=True
    )


def guessing(study: Study) -> tuple[Level, ...]:
    """What a model that guesses keeps: the mean of chance over probes, where every probe has it."""
    return _levels(study, (_chances(study),), from_original=False)


def _chances(study: Study) -> tuple[str, list[float | None]]:
    return "guessing", [probe.chance for probe in study.probes]


def _levels(
    study: Study, scores: Iterable[tuple[str, list[float | None]]], *, from_original: bool
) -> tuple[Level, ...]:
    before = [probe.accuracy if from_original else 0.0 for probe in study.probes]
    found = []
    for name, values in scores:
        known = [value for value in values if value is not None]
        if known and len(known) == len(values):
            level = sum(known) / len(known)
            found.append(Level(name, sum(before) / len(before) - level if from_original else level))
    return tuple(found)


def _lines(
    study: Study,
    figure: _Figure,
    cells: Mapping[str, Mapping[float, StudyCell]],
    of: Callable[[Comparison], Estimate],
    *,
    start: float,
) -> Chart | None:
    """A line for each scope that was pruned by at least two amounts."""
    values = {scope: [(amount, of(cell.comparison)) for amount, cell in by.items()] for scope, by in cells.items()}
    points = {scope: tuple((a, y) for a, y in each if y.value is not None) for scope, each in values.items()}
    lines = [Line(scope, each) for scope, each in points.items() if len(each) > 1]
    if not lines:
        return None
    levels, unit = (guessing(study), drawing.PERCENT) if start else (baselines(study), drawing.POINTS)
    title = _title(study, figure)
    return Chart(figure.name, title, drawing.lines(lines, figure.name, title, start=start, levels=levels, unit=unit))


def _bars(study: Study, figure: _Figure, bars: Iterable[Bar]) -> Chart | None:
    known = [bar for bar in bars if bar.value.value is not None]
    if not known:
        return None
    title, levels = _title(study, figure), baselines(study)
    drawn = drawing.bars(known, figure.name, title, levels=levels, high=10, unit=drawing.POINTS)
    return Chart(figure.name, title, drawn)


def _title(study: Study, figure: _Figure) -> str:
    number = figure.numbers.get(study.original.family)
    over = f"mean over {len(study.probes)} probes" if len(study.probes) > 1 else "one probe"
    return f"{figure.title}, {over}" + (f" (figure {number} of the paper)" if number else "")


def _pruned(study: Study, scopes: Iterable[str]) -> dict[str, dict[float, StudyCell]]:
    return {scope: pruned(study, scope) for scope in scopes}


def _quantized(study: Study, scopes: tuple[str, ...]) -> Iterator[Bar]:
    """A group for each scheme, a bar for each scope."""
    for scheme in schemes(study):
        for series, scope in enumerate(scopes):
            if cell := quantized(study, scope).get(scheme):
                yield Bar(scope, mean_drop(cell.comparison), series, plain(scheme, 20))


def _both(study: Study, scopes: tuple[str, ...]) -> Iterator[Bar]:
    """A group for each scheme and amount, a bar for each scope."""
    for scheme in schemes(study):
        for amount in _GPQ_AMOUNTS:
            for series, scope in enumerate(scopes):
                if cell := pruned_and_quantized(study, scope, scheme).get(amount):
                    yield Bar(scope, mean_drop(cell.comparison), series, f"{amount} % and {plain(scheme, 20)}")


def _final(study: Study) -> Iterator[Bar]:
    """A group for each amount, a bar for each method."""
    by_method = {method: pruned(study, "final", method) for method in _METHODS}
    for amount in sorted({amount for cells in by_method.values() for amount in cells}):
        for series, (method, cells) in enumerate(by_method.items()):
            if amount in cells:
                yield Bar(_METHODS[method], mean_drop(cells[amount].comparison), series, f"{amount:g} %")
