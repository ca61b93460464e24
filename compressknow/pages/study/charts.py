"""The paper's figures from a study's own data: as means over the probes, and with a plot for each probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from compressknow.base.format import plain
from compressknow.comparison.intervals import mean
from compressknow.comparison.records import Estimate
from compressknow.pages import drawing
from compressknow.pages.card.method import find_rounding_kept, mark_rounding
from compressknow.pages.drawing import Bar, Level, Line
from compressknow.pages.records import Comparison
from compressknow.pages.study.records import (
    AMOUNT,
    ATTENTION_KINDS,
    IN_WORDS,
    MODULES,
    STRUCTURED,
    UNSTRUCTURED,
    Axis,
    Study,
    StudyProbe,
    axes,
    called,
    methods,
    percent,
    pruned,
    pruned_and_quantized,
    quantized,
    schemes,
)

_GPQ_AMOUNTS = (20, 40)
_METHODS = (UNSTRUCTURED, STRUCTURED)
_MOST = 6  # lines and colours that can be told apart
_MOST_BARS = 40


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


def marks(study: Study) -> tuple[Level, ...]:
    """What kept knowledge is measured by: guessing, and what rounding alone keeps of what the original knows."""
    return guessing(study) + mark_rounding(_by_rounding(study))


def _by_rounding(study: Study) -> float | None:
    """The mean over the probes of which the original knows anything, where it was found for each."""
    probes = {probe.probe: probe for cell in study.cells for probe in cell.comparison.probes}.values()
    shares = [find_rounding_kept([probe]) for probe in probes if probe.counts.known_before]
    found = [each for each in shares if each is not None]
    return sum(found) / len(found) if found and len(found) == len(shares) else None


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


def by_amount(study: Study, scopes: Iterable[str], of: Callable[[Comparison], Estimate]) -> tuple[Line, ...]:
    """A line for each scope that was pruned by at least two amounts."""
    values = {scope: [(a, of(cell.comparison)) for a, cell in pruned(study, scope).items()] for scope in scopes}
    points = {scope: tuple((a, y) for a, y in each if y.value is not None) for scope, each in values.items()}
    return tuple(Line(scope, each) for scope, each in points.items() if len(each) > 1)


def when_quantized(study: Study, scopes: Iterable[str]) -> tuple[Bar, ...]:
    """A group for each scheme, a bar for each scope."""
    return _known(
        Bar(scope, mean_drop(cell.comparison), series, plain(scheme, 60))
        for scheme in schemes(study)
        for series, scope in enumerate(scopes)
        if (cell := quantized(study, scope).get(scheme))
    )


def when_both(study: Study, scopes: Iterable[str]) -> tuple[Bar, ...]:
    """A group for each scheme and amount, a bar for each scope."""
    return _known(
        Bar(scope, mean_drop(cell.comparison), series, f"{amount} % and {plain(scheme, 60)}")
        for scheme in schemes(study)
        for amount in _GPQ_AMOUNTS
        for series, scope in enumerate(scopes)
        if (cell := pruned_and_quantized(study, scope, scheme).get(amount))
    )


def by_method(study: Study, scope: str) -> tuple[Line, ...]:
    """A line for each method that pruned the scope by at least two amounts, where there are several."""
    cells = {method: pruned(study, scope, method) for method in methods(study)}
    points = {
        method: tuple((a, y) for a, cell in of.items() if (y := mean_kept(cell.comparison)).value is not None)
        for method, of in cells.items()
    }
    lines = tuple(Line(called(method), each) for method, each in points.items() if len(each) > 1)
    return lines[:_MOST] if len(lines) > 1 else ()


def when_pruned_by_method(study: Study) -> tuple[Bar, ...]:
    """A group for each scope that has no such lines and each amount, a bar for each method, where there are several."""
    several = methods(study)[:_MOST]
    return _known(
        Bar(called(method), mean_drop(cell.comparison), series, f"{scope} {amount:g} %")
        for scope in MODULES
        if len(several) > 1 and not by_method(study, scope)
        for amount in sorted({a for method in several for a in pruned(study, scope, method)})
        for series, method in enumerate(several)
        if (cell := pruned(study, scope, method).get(amount))
    )


def when_both_by_method(study: Study) -> tuple[Bar, ...]:
    """A group for each scope, amount and scheme, a bar for each method, where there are several."""
    several = methods(study)[:_MOST]
    return _known(
        Bar(called(method), mean_drop(cell.comparison), series, f"{scope} {amount:g} %, {plain(scheme, 60)}")
        for scheme in schemes(study)
        for scope in MODULES
        for amount in sorted({a for m in several for a in pruned_and_quantized(study, scope, scheme, m)})
        for series, method in enumerate(several)
        if len(several) > 1 and (cell := pruned_and_quantized(study, scope, scheme, method).get(amount))
    )


def of_attention_kinds(study: Study) -> tuple[Bar, ...]:
    """The four kinds of attention of encoder-decoder models: quantized, then pruned and quantized."""
    return when_quantized(study, ATTENTION_KINDS) + when_both(study, ATTENTION_KINDS)


def of_final_layer(study: Study) -> tuple[Bar, ...]:
    """A group for each amount, a bar for each method."""
    by_method = {method: pruned(study, "final", method) for method in _METHODS}
    return _known(
        Bar(called(method), mean_drop(cells[amount].comparison), series, f"{amount:g} %")
        for amount in sorted({amount for cells in by_method.values() for amount in cells})
        for series, (method, cells) in enumerate(by_method.items())
        if amount in cells
    )


def along(axis: Axis) -> tuple[Bar, ...]:
    """A group for each group of an axis, a bar for each value; as many whole groups as a reader looks at."""
    drawn: tuple[Bar, ...] = ()
    for group in axis.groups:
        bars = _known(
            Bar(value, mean_kept(cell.comparison), series % _MOST, group.name)
            for series, (value, cell) in enumerate(group.cells.items())
        )
        if drawn and len(drawn) + len(bars) > _MOST_BARS:
            break
        drawn += bars
    return drawn


def along_amounts(axis: Axis) -> tuple[Line, ...]:
    """A line for each group of an axis of amounts."""
    points = {
        group.name or "kept": tuple((percent(c), mean_kept(c.comparison)) for c in group.cells.values())
        for group in axis.groups
    }
    known = {name: tuple((a, y) for a, y in each if y.value is not None) for name, each in points.items()}
    return tuple(Line(name, each) for name, each in known.items() if len(each) > 1)[:_MOST]


def _known(bars: Iterable[Bar]) -> tuple[Bar, ...]:
    return tuple(bar for bar in bars if bar.value.value is not None)


_BY_PROBE = "-by-probe"  # how the names of charts end that have a plot for each probe


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a chart: the probe that it is of, or "" for all, and the element, fit to stand in the page."""

    probe: str
    svg: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: `name` of letters and hyphens, of its file; one panel, or one for each probe.

    Charts of means that have the same `scale` have the same axis; so have the panels of a chart by probe.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    scale: str

    @property
    def by_probe(self) -> bool:
        return self.name.endswith(_BY_PROBE)


@dataclass(frozen=True, slots=True)
class _Look:
    """How figures of a kind are drawn, and by what levels they are measured; `scale` is its name."""

    scale: str
    draw: Callable[..., str]
    levels: Callable[[Study], tuple[Level, ...]]


_DROP = _Look("drop", partial(drawing.draw_lines, start=0, unit=drawing.POINTS), baselines)
_KEPT = _Look("kept", partial(drawing.draw_lines, start=1), marks)
_BARS = _Look("bars", partial(drawing.draw_bars, high=10, unit=drawing.POINTS), baselines)
_KEPT_BARS = _Look("kept-bars", drawing.draw_bars, marks)


@dataclass(frozen=True, slots=True)
class _Figure:
    """What a chart is called and shows, and where the paper has it, by family.

    Attributes
    ----------
    plotted : its lines or bars of a study, means over the probes.
    means : the figures of the paper that are means over the data sets.
    by_probe : those that have a plot for each data set; None where there is no such chart.
    """

    name: str
    title: str
    look: _Look
    plotted: Callable[[Study], Sequence[Any]]
    means: Mapping[str, str]
    by_probe: Mapping[str, str] | None = None


# The captions of figures 20 to 24 name data sets and no setup. They are taken for those of pruned models, which have no
# table: what is quantized has tables 3 to 5, a row a data set. Its charts by probe have no number.
_FIGURES = (
    _Figure(
        "pruning-drop",
        "Accuracy lost by how much was pruned, in points",
        _DROP,
        lambda study: by_amount(study, MODULES, mean_drop),
        {"masked": "figures 2 and 19", "causal": "figure 5", "seq2seq": "figures 6 and 12"},
        {"masked": "figures 20 to 22", "causal": "figure 23", "seq2seq": "figure 24"},
    ),
    _Figure(
        "pruning-kept",
        "Knowledge kept by how much was pruned",
        _KEPT,
        lambda study: by_amount(study, MODULES, mean_kept),
        {},
    ),
    *(
        _Figure(
            f"methods-{scope}",
            f"Knowledge kept by how much of {IN_WORDS[scope]} was pruned, by method",
            _KEPT,
            partial(by_method, scope=scope),
            {},
        )
        for scope in MODULES
    ),
    _Figure("methods-pruned", "Accuracy lost to pruning by method, in points", _BARS, when_pruned_by_method, {}),
    _Figure(
        "quantization",
        "Accuracy lost to quantization, in points",
        _BARS,
        lambda study: when_quantized(study, MODULES),
        {"masked": "figure 3", "causal": "figure 14", "seq2seq": "figure 15"},
        {},
    ),
    _Figure(
        "pruning-quantization",
        "Accuracy lost to pruning and quantization, in points",
        _BARS,
        lambda study: when_both(study, MODULES),
        {"masked": "figure 7", "causal": "figure 16", "seq2seq": "figure 17"},
        {},
    ),
    _Figure(
        "methods-quantized",
        "Accuracy lost to pruning and quantization by method, in points",
        _BARS,
        when_both_by_method,
        {},
    ),
    _Figure(
        "attention-kinds-drop",
        "Accuracy lost by kind of attention pruned, in points",
        _DROP,
        lambda study: by_amount(study, ATTENTION_KINDS, mean_drop),
        {"seq2seq": "figures 8 and 11"},
        {"seq2seq": "figure 18"},
    ),
    _Figure(
        "attention-kinds-kept",
        "Knowledge kept by kind of attention pruned",
        _KEPT,
        lambda study: by_amount(study, ATTENTION_KINDS, mean_kept),
        {},
    ),
    _Figure(
        "attention-kinds",
        "Accuracy lost by kind of attention compressed, in points",
        _BARS,
        of_attention_kinds,
        {"seq2seq": "figures 8 and 11"},
        {"seq2seq": "figure 18"},
    ),
    _Figure(
        "final-layer",
        "Accuracy lost to pruning the final layer, in points",
        _BARS,
        of_final_layer,
        {"masked": "figure 9", "causal": "figure 10", "seq2seq": "figure 13"},
        {"masked": "figure 25", "causal": "figure 26", "seq2seq": "figure 27"},
    ),
)
_AXIS = "axis-"  # how the names of charts of a grid's own axes begin
_NAMES = {figure.name + ending for figure in _FIGURES for ending in ("", _BY_PROBE)}


def is_chart(name: str) -> bool:
    """Whether a chart may have this name: of those, what is on disk and not drawn again is of an earlier study."""
    return name in _NAMES or name.startswith(_AXIS)


def study_charts(study: Study) -> tuple[Chart, ...]:
    """All figures that the study has cells for; those by probe last, where it has several probes."""
    several = len(study.probes) > 1
    drawn = [_means(study, figure) for figure in _FIGURES]
    drawn += [_means(study, _of_axis(axis)) for axis in axes(study)]
    drawn += [_by_probe(study, figure) for figure in _FIGURES if several and figure.by_probe is not None]
    return tuple(chart for chart in drawn if chart)


def _of_axis(axis: Axis) -> _Figure:
    if axis.name == AMOUNT:
        look, lines = replace(_KEPT, scale=axis.chart), along_amounts(axis)
        return _Figure(axis.chart, "Knowledge kept by how much was pruned", look, lambda _: lines, {})
    look, bars = replace(_KEPT_BARS, scale=axis.chart), along(axis)
    of = f", the first {len(bars)} forms" if len(bars) < sum(len(group.cells) for group in axis.groups) else ""
    return _Figure(axis.chart, f"Knowledge kept by {plain(axis.name, 40)}{of}", look, lambda _: bars, {})


def _means(study: Study, figure: _Figure) -> Chart | None:
    over = f"mean over {len(study.probes)} probes" if len(study.probes) > 1 else "one probe"
    title = f"{figure.title}, {over}{_in_paper(study, figure.means)}"
    of_one_scale = [figure, *(each for each in _FIGURES if each.look is figure.look)]
    svg = _drawn(study, figure, figure.name, title, _reach([study], of_one_scale))
    return Chart(figure.name, title, (Panel("", svg),), figure.look.scale) if svg else None


def _by_probe(study: Study, figure: _Figure) -> Chart | None:
    """A plot for each probe, all on the scale of what was lost most."""
    panels, studies = [], [_of_probe(study, probe) for probe in study.probes]
    within = _reach(studies, [figure])
    for i, of_probe in enumerate(studies, start=1):
        name = plain(of_probe.probes[0].name, 60)
        svg = _drawn(of_probe, figure, f"probe-{i}-{figure.name}", f"{figure.title}, {name}", within)
        panels += [Panel(name, svg)] if svg else []
    title = f"{figure.title}, by probe{_in_paper(study, figure.by_probe or {})}"
    return Chart(figure.name + _BY_PROBE, title, tuple(panels), figure.look.scale) if panels else None


def _reach(studies: Iterable[Study], figures: Iterable[_Figure]) -> tuple[float, float]:
    """Over what the one axis of all these reaches."""
    ends = [
        end
        for study, figure in product(studies, figures)
        if (plotted := figure.plotted(study))
        for end in drawing.find_reach(plotted, figure.look.levels(study))
    ]
    return min(ends, default=0.0), max(ends, default=0.0)


def _drawn(study: Study, figure: _Figure, id: str, title: str, within: tuple[float, float]) -> str | None:
    plotted, look = figure.plotted(study), figure.look
    return look.draw(plotted, id, title, levels=look.levels(study), within=within) if plotted else None


def _of_probe(study: Study, probe: StudyProbe) -> Study:
    """The study as if this were the only probe."""
    cells = (
        replace(
            cell,
            comparison=replace(
                cell.comparison, probes=tuple(p for p in cell.comparison.probes if p.probe == probe.name)
            ),
        )
        for cell in study.cells
    )
    return replace(study, probes=(probe,), cells=tuple(cells))


def _in_paper(study: Study, numbers: Mapping[str, str]) -> str:
    number = numbers.get(study.original.family)
    return f" ({number} of the paper)" if number else ""
