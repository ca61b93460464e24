"""Charts of a study: the paper's figures from the study's data, and its axes, as means over probes and by probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

from compressknow.base.format import clean
from compressknow.comparison.intervals import average_estimates
from compressknow.comparison.records import Estimate
from compressknow.pages import drawing
from compressknow.pages.card.warnings import estimate_rounding_kept, list_probes, mark_rounding
from compressknow.pages.drawing import Bar, Line
from compressknow.pages.records import Comparison
from compressknow.pages.study.records import (
    ATTENTION_KINDS,
    GPQ_AMOUNTS,
    IN_WORDS,
    MODULES,
    STRUCTURED,
    UNSTRUCTURED,
    Axis,
    Study,
    StudyCell,
    StudyProbe,
    label_method,
)

_MOST = 6  # distinguishable lines and colours
_MOST_BARS = 40


def compute_mean_drop(comparison: Comparison) -> Estimate:
    """Return accuracy before minus accuracy after (0 to 1): the mean over probes, each averaged by its protocol."""
    change = average_estimates(
        [
            p.macro_difference if p.average == "macro" else p.difference.or_by_relation(p.certainty.difference)
            for p in comparison.probes
        ]
    )
    return Estimate(*(None if end is None else 0.0 - end for end in (change.value, change.high, change.low)))


def compute_mean_kept(comparison: Comparison) -> Estimate:
    """Return knowledge kept: the mean over probes with facts that the original knows."""
    return average_estimates([probe.kept for probe in comparison.probes if probe.kept.value is not None])


def find_baselines(study: Study) -> dict[str, float]:
    """Return the drops to the majority baseline and to guessing: means over probes, if all have them."""
    before = _compute_mean([probe.accuracy for probe in study.probes])
    levels = {
        "majority baseline": _compute_mean([probe.majority for probe in study.probes]),
        "guessing": _compute_mean([probe.chance for probe in study.probes]),
    }
    return {name: before - v for name, v in levels.items() if v is not None and before is not None}


def find_marks(study: Study) -> dict[str, float]:
    """Return reference lines for kept knowledge: guessing, and what rounding alone keeps."""
    guessing = _compute_mean([probe.chance for probe in study.probes])
    known = (p for p in list_probes(cell.comparison for cell in study.cells) if p.counts.known_before)
    by_rounding = _compute_mean([estimate_rounding_kept([probe]).value for probe in known])
    return ({} if guessing is None else {"guessing": guessing}) | mark_rounding(by_rounding)


def _compute_mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if there are no values, or one is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def draw_by_amount(study: Study, scopes: Iterable[str], measure: Callable[[Comparison], Estimate]) -> tuple[Line, ...]:
    """Draw a line for each scope that was pruned by at least two amounts."""
    return _draw_lines({scope: study.select_pruned(scope) for scope in scopes}, measure)


def draw_by_method(study: Study, scope: str) -> tuple[Line, ...]:
    """Draw a line for each method that pruned the scope by at least two amounts, if there are several."""
    cells = {label_method(method): study.select_pruned(scope, method) for method in study.list_methods()}
    lines = _draw_lines(cells, compute_mean_kept)
    return lines[:_MOST] if len(lines) > 1 else ()


def _draw_lines(
    cells: Mapping[str, Mapping[float, StudyCell]], measure: Callable[[Comparison], Estimate]
) -> tuple[Line, ...]:
    values = {name: [(a, measure(cell.comparison)) for a, cell in of.items()] for name, of in cells.items()}
    points = {name: tuple((a, y) for a, y in each if y.value is not None) for name, each in values.items()}
    alone = {name: all(cell.is_pruned_alone for cell in of.values()) for name, of in cells.items()}
    return tuple(Line(name, each, alone[name]) for name, each in points.items() if len(each) > 1)


def draw_quantized(study: Study, scopes: Iterable[str]) -> tuple[Bar, ...]:
    """Draw a group for each scheme, a bar for each scope."""
    return _draw_groups(
        (clean(scheme, 60), {scope: study.select_quantized(scope).get(scheme) for scope in scopes})
        for scheme in study.list_schemes()
    )


def draw_pruned_and_quantized(study: Study, scopes: Iterable[str]) -> tuple[Bar, ...]:
    """Draw a group for each scheme and amount, a bar for each scope."""
    return _draw_groups(
        (f"{amount} % and {clean(scheme, 60)}", {s: study.select_pruned(s, scheme=scheme).get(amount) for s in scopes})
        for scheme in study.list_schemes()
        for amount in GPQ_AMOUNTS
    )


def draw_methods(
    study: Study, scopes: Iterable[str], methods: Sequence[str], scheme: str | None = None
) -> tuple[Bar, ...]:
    """Draw a group for each scope and amount, a bar for each method; nothing if there is only one method."""
    groups: list[tuple[str, dict[str, StudyCell | None]]] = []
    for scope in scopes if len(methods) > 1 else ():
        by_method = {label_method(each): study.select_pruned(scope, each, scheme) for each in methods[:_MOST]}
        for amount in sorted({amount for cells in by_method.values() for amount in cells}):
            name = f"{scope} {amount:g} %{f', {clean(scheme, 60)}' if scheme else ''}"
            groups.append((name, {method: cells.get(amount) for method, cells in by_method.items()}))
    return _draw_groups(groups)


def _draw_groups(
    groups: Iterable[tuple[str, Mapping[str, StudyCell | None]]],
    measure: Callable[[Comparison], Estimate] = compute_mean_drop,
) -> tuple[Bar, ...]:
    """Draw a bar for each cell of each group; a name keeps its colour even if a group lacks its cell."""
    bars = (
        Bar(name, measure(cell.comparison), series % _MOST, group)
        for group, cells in groups
        for series, (name, cell) in enumerate(cells.items())
        if cell
    )
    return tuple(bar for bar in bars if bar.value.value is not None)


_BY_PROBE = "-by-probe"  # suffix of the names of charts with a plot for each probe


@dataclass(frozen=True, slots=True)
class Chart:
    """Figure with the `name` of its file, and panels: the probe of each ("" for all) and its SVG element. Charts of
    means with the same `scale` share an axis, as do the panels of a chart by probe."""

    name: str
    title: str
    panels: tuple[tuple[str, str], ...]
    scale: str

    @property
    def by_probe(self) -> bool:
        return self.name.endswith(_BY_PROBE)


# How figures of a kind are drawn, and the function that returns their reference lines.
_DROP, _KEPT, _BARS, _KEPT_BARS = "drop", "kept", "bars", "kept-bars"
_LOOKS: Mapping[str, tuple[Callable[..., str], Callable[[Study], Mapping[str, float]]]] = {
    _DROP: (partial(drawing.draw_lines, start=0, unit=drawing.POINTS), find_baselines),
    _KEPT: (partial(drawing.draw_lines, start=1), find_marks),
    _BARS: (partial(drawing.draw_bars, unit=drawing.POINTS), find_baselines),
    _KEPT_BARS: (drawing.draw_bars, find_marks),
}


@dataclass(frozen=True, slots=True)
class _Figure:
    """Definition of a chart: its name, what it shows, and its numbers in the paper by family."""

    name: str
    title: str
    look: str
    plotted: Callable[[Study], Sequence[Any]]  # its lines or bars, means over the probes
    means: Mapping[str, str] = field(default_factory=dict)  # the paper's figures that are means over the data sets
    by_probe: Mapping[str, str] | None = None  # those with a plot for each data set; None for no chart by probe


# The captions of figures 20 to 24 name data sets but no setup. We assume pruned models, which have no table; quantized
# ones have tables 3 to 5, with a row per data set, and their charts by probe have no number.
_FIGURES = (
    _Figure(
        "pruning-drop",
        "Accuracy lost by how much was pruned, in points",
        _DROP,
        lambda study: draw_by_amount(study, MODULES, compute_mean_drop),
        {"masked": "figures 2 and 19", "causal": "figure 5", "seq2seq": "figures 6 and 12"},
        {"masked": "figures 20 to 22", "causal": "figure 23", "seq2seq": "figure 24"},
    ),
    _Figure(
        "pruning-kept",
        "Knowledge kept by how much was pruned",
        _KEPT,
        lambda study: draw_by_amount(study, MODULES, compute_mean_kept),
    ),
    *(
        _Figure(
            f"methods-{scope}",
            f"Knowledge kept by how much of {IN_WORDS[scope]} was pruned, by method",
            _KEPT,
            partial(draw_by_method, scope=scope),
        )
        for scope in MODULES
    ),
    _Figure(
        "methods-pruned",
        "Accuracy lost to pruning by method, in points",
        _BARS,
        # All other scopes have lines.
        lambda study: draw_methods(study, [s for s in MODULES if not draw_by_method(study, s)], study.list_methods()),
    ),
    _Figure(
        "quantization",
        "Accuracy lost to quantization, in points",
        _BARS,
        lambda study: draw_quantized(study, MODULES),
        {"masked": "figure 3", "causal": "figure 14", "seq2seq": "figure 15"},
        by_probe={},
    ),
    _Figure(
        "pruning-quantization",
        "Accuracy lost to pruning and quantization, in points",
        _BARS,
        lambda study: draw_pruned_and_quantized(study, MODULES),
        {"masked": "figure 7", "causal": "figure 16", "seq2seq": "figure 17"},
        by_probe={},
    ),
    _Figure(
        "methods-quantized",
        "Accuracy lost to pruning and quantization by method, in points",
        _BARS,
        lambda study: [
            bar for scheme in study.list_schemes() for bar in draw_methods(study, MODULES, study.list_methods(), scheme)
        ],
    ),
    _Figure(
        "attention-kinds-drop",
        "Accuracy lost by kind of attention pruned, in points",
        _DROP,
        lambda study: draw_by_amount(study, ATTENTION_KINDS, compute_mean_drop),
        # In the paper's figures each kind is pruned and quantized.
        by_probe={},
    ),
    _Figure(
        "attention-kinds-kept",
        "Knowledge kept by kind of attention pruned",
        _KEPT,
        lambda study: draw_by_amount(study, ATTENTION_KINDS, compute_mean_kept),
    ),
    _Figure(
        "attention-kinds",
        "Accuracy lost by kind of attention compressed, in points",
        _BARS,
        lambda study: draw_quantized(study, ATTENTION_KINDS) + draw_pruned_and_quantized(study, ATTENTION_KINDS),
        {"seq2seq": "figures 8 and 11"},
        {"seq2seq": "figure 18"},
    ),
    _Figure(
        "final-layer",
        "Accuracy lost to pruning the final layer, in points",
        _BARS,
        partial(draw_methods, scopes=("final",), methods=(UNSTRUCTURED, STRUCTURED)),
        {"masked": "figure 9", "causal": "figure 10", "seq2seq": "figure 13"},
        {"masked": "figure 25", "causal": "figure 26", "seq2seq": "figure 27"},
    ),
)
_AXIS = "axis-"  # prefix of the names of charts of axes
_NAMES = {figure.name + ending for figure in _FIGURES for ending in ("", _BY_PROBE)}


def is_chart(name: str) -> bool:
    """Return whether a chart may have this name. If it is not drawn again, its file is from an earlier study."""
    return name in _NAMES or name.startswith(_AXIS)


def draw_charts(study: Study) -> tuple[Chart, ...]:
    """Draw all figures that the study has cells for; those by probe last, if it has several probes."""
    several = len(study.probes) > 1
    charts = [_draw_means(study, figure) for figure in _FIGURES]
    charts += [_draw_means(study, _make_figure(axis)) for axis in study.find_axes()]
    charts += [_draw_by_probe(study, figure) for figure in _FIGURES if several and figure.by_probe is not None]
    return tuple(chart for chart in charts if chart)


def _make_figure(axis: Axis) -> _Figure:
    """Return the figure of an axis: for amounts a line per group, otherwise a group of bars each, up to a maximum."""
    if axis.is_amount:
        by_amount = {name or "kept": {cell.percent: cell for cell in cells.values()} for name, cells in axis.groups}
        lines = _draw_lines(by_amount, compute_mean_kept)[:_MOST]
        return _Figure(axis.chart, "Knowledge kept by how much was pruned", _KEPT, lambda _: lines)
    bars: tuple[Bar, ...] = ()
    for group in axis.groups:
        of_group = _draw_groups([group], compute_mean_kept)
        if bars and len(bars) + len(of_group) > _MOST_BARS:
            break
        bars += of_group
    first = f", the first {len(bars)} forms" if len(bars) < sum(len(cells) for _, cells in axis.groups) else ""
    return _Figure(axis.chart, f"Knowledge kept by {clean(axis.name, 40)}{first}", _KEPT_BARS, lambda _: bars)


def _draw_means(study: Study, figure: _Figure) -> Chart | None:
    over = f"mean over {len(study.probes)} probes" if len(study.probes) > 1 else "one probe"
    title = f"{figure.title}, {over}{_number_in_paper(study, figure.means)}"
    # The chart of an axis has its own scale.
    is_of_axis = figure not in _FIGURES
    of_one_scale = [figure] if is_of_axis else [each for each in _FIGURES if each.look == figure.look]
    svg = _draw(study, figure, figure.name, title, _find_range([study], of_one_scale))
    return Chart(figure.name, title, (("", svg),), figure.name if is_of_axis else figure.look) if svg else None


def _draw_by_probe(study: Study, figure: _Figure) -> Chart | None:
    """Draw a plot for each probe, all on one scale."""
    panels, studies = [], [_limit_to_probe(study, probe) for probe in study.probes]
    within = _find_range(studies, [figure])
    for i, of_probe in enumerate(studies, start=1):
        name = clean(of_probe.probes[0].name, 60)
        svg = _draw(of_probe, figure, f"probe-{i}-{figure.name}", f"{figure.title}, {name}", within)
        panels += [(name, svg)] if svg else []
    title = f"{figure.title}, by probe{_number_in_paper(study, figure.by_probe or {})}"
    return Chart(figure.name + _BY_PROBE, title, tuple(panels), figure.look) if panels else None


def _find_range(studies: Iterable[Study], figures: Iterable[_Figure]) -> tuple[float, float]:
    """Return the ends of the axis that all these figures share."""
    ends = [
        end
        for study, figure in product(studies, figures)
        if (plotted := figure.plotted(study))
        for end in drawing.find_reach(plotted, _LOOKS[figure.look][1](study))
    ]
    return min(ends, default=0.0), max(ends, default=0.0)


def _draw(study: Study, figure: _Figure, id: str, title: str, within: tuple[float, float]) -> str | None:
    plotted, (draw, find_levels) = figure.plotted(study), _LOOKS[figure.look]
    return draw(plotted, id, title, levels=find_levels(study), within=within) if plotted else None


def _limit_to_probe(study: Study, probe: StudyProbe) -> Study:
    """Return the study as if this were the only probe."""

    def limit(comparison: Comparison) -> Comparison:
        return replace(comparison, probes=tuple(p for p in comparison.probes if p.probe == probe.name))

    cells = tuple(replace(cell, comparison=limit(cell.comparison)) for cell in study.cells)
    return replace(study, probes=(probe,), cells=cells)


def _number_in_paper(study: Study, numbers: Mapping[str, str]) -> str:
    number = numbers.get(study.original.family or "")
    return f" ({number} of the paper)" if number else ""
