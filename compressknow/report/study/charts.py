"""The paper's figures from a study's own data: as means over the probes, and with a plot for each probe.

Charts for which the study has no cells are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compressknow.report import drawing
from compressknow.report.drawing import Level
from compressknow.report.study.grid import ATTENTION_KINDS, MODULES
from compressknow.report.study.plotted import (
    baselines,
    by_amount,
    guessing,
    mean_drop,
    mean_kept,
    of_attention_kinds,
    of_final_layer,
    when_both,
    when_quantized,
)
from compressknow.report.study.records import Study, StudyProbe
from compressknow.report.text import plain

_BY_PROBE = "-by-probe"  # how the names of charts end that have a plot for each probe


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a chart: the probe that it is of, or "" for all, and the element, fit to stand in the page."""

    probe: str
    svg: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: `name` of letters and hyphens, of its file; one panel, or one for each probe."""

    name: str
    title: str
    panels: tuple[Panel, ...]

    @property
    def by_probe(self) -> bool:
        return self.name.endswith(_BY_PROBE)


@dataclass(frozen=True, slots=True)
class _Look:
    """How figures of a kind are drawn, and by what levels they are measured."""

    draw: Callable[..., str]
    levels: Callable[[Study], tuple[Level, ...]]


_DROP = _Look(partial(drawing.lines, start=0, unit=drawing.POINTS), baselines)
_KEPT = _Look(partial(drawing.lines, start=1), guessing)
_BARS = _Look(partial(drawing.bars, high=10, unit=drawing.POINTS), baselines)


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
# Every name that a chart may have: of those, what is on disk and not drawn again is of an earlier study.
NAMES = tuple(figure.name + ending for figure in _FIGURES for ending in ("", _BY_PROBE))


def study_charts(study: Study) -> tuple[Chart, ...]:
    """All figures that the study has cells for; those by probe last, where it has several probes."""
    several = len(study.probes) > 1
    drawn = [_means(study, figure) for figure in _FIGURES]
    drawn += [_by_probe(study, figure) for figure in _FIGURES if several and figure.by_probe is not None]
    return tuple(chart for chart in drawn if chart)


def _means(study: Study, figure: _Figure) -> Chart | None:
    over = f"mean over {len(study.probes)} probes" if len(study.probes) > 1 else "one probe"
    title = f"{figure.title}, {over}{_in_paper(study, figure.means)}"
    svg = _drawn(study, figure, figure.name, title)
    return Chart(figure.name, title, (Panel("", svg),)) if svg else None


def _by_probe(study: Study, figure: _Figure) -> Chart | None:
    """A plot for each probe, each over its own range: what is known of one may be a tenth of what is of another."""
    panels = []
    for i, probe in enumerate(study.probes, start=1):
        name = plain(probe.name, 60)
        svg = _drawn(_of_probe(study, probe), figure, f"probe-{i}-{figure.name}", f"{figure.title}, {name}")
        panels += [Panel(name, svg)] if svg else []
    title = f"{figure.title}, by probe{_in_paper(study, figure.by_probe or {})}"
    return Chart(figure.name + _BY_PROBE, title, tuple(panels)) if panels else None


def _drawn(study: Study, figure: _Figure, id: str, title: str) -> str | None:
    plotted = figure.plotted(study)
    return figure.look.draw(plotted, id, title, levels=figure.look.levels(study)) if plotted else None


def _of_probe(study: Study, probe: StudyProbe) -> Study:
    """The study as if this probe alone had been asked."""
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
