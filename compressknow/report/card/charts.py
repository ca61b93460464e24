"""The charts of a report card, as SVG elements to stand inside the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compressknow.report import drawing
from compressknow.report.drawing import Line, percents
from compressknow.report.format import plain, share
from compressknow.report.records import Comparison
from compressknow.stats.records import Estimate, Group

_MOST_BARS = 15
_AMOUNT = re.compile(r"(?P<scope>.*\S)\s+(?P<amount>\d+(?:\.\d+)?)\s*%")


def popularity(groups: Sequence[Group], id: str, name: str) -> str | None:
    """Knowledge kept by popularity bin, as dots with intervals; None where fewer than two bins have any."""
    bins = [(plain(group.name, 16), group.kept) for group in groups if group.kept.value is not None]
    if len(bins) < 2:
        return None
    told = ", ".join(f"{label} {share(kept.value)}" for label, kept in bins)
    title = f"Knowledge kept by popularity, {plain(name, 60)}"
    with drawing.axes(200, id, title, f"From left to right: {told}.") as (axes, drawn):
        floor = _floor(kept for _, kept in bins)
        for x, (_, kept) in enumerate(bins):
            value, low, high = percents(kept)
            axes.plot([x, x], [low, high], color=drawing.SERIES[0], linewidth=2, solid_capstyle="round")
            axes.plot([x], [value], "o", color=drawing.SERIES[0], markersize=8, markeredgecolor=drawing.PAPER)
            axes.annotate(share(kept.value), (x, value), (8, 0), textcoords="offset points", va="center", fontsize=11)
        axes.set_xlim(-0.4, len(bins) - 0.3)
        axes.set_xticks(range(len(bins)), [label for label, _ in bins])
        drawing.percent_axis(axes, floor)
    return drawn()


def setups(comparisons: Sequence[Comparison], names: Sequence[str], id: str) -> tuple[str, ...]:
    """Charts of what several compressed models kept: lines where setups are amounts by scope, bars for the others."""
    lines, others = split(comparisons)
    title = "Knowledge kept by how much was pruned"
    charts = [drawing.lines(lines, f"{id}-lines", title, start=1)] if lines else []
    # Many bars would repeat the overview's, one below the other.
    bars = (
        []
        if len(others) > _MOST_BARS
        else [drawing.Bar(names[i], comparisons[i].kept) for i in others if comparisons[i].kept.value is not None]
    )
    return (*charts, *([drawing.bars(bars, f"{id}-bars", "Knowledge kept by compressed model")] if bars else []))


def split(comparisons: Sequence[Comparison]) -> tuple[tuple[Line, ...], tuple[int, ...]]:
    """Scopes of which at least two amounts were pruned, and the places of all other comparisons.

    More scopes than there are ways of drawing a line are left to the bars.
    """
    amounts: dict[str, dict[float, int]] = {}
    for place, comparison in enumerate(comparisons):
        match = _AMOUNT.fullmatch(comparison.model.setup or "")
        if match and comparison.kept.value is not None:
            amounts.setdefault(match["scope"], {}).setdefault(float(match["amount"]), place)
    several = [(scope, by_amount) for scope, by_amount in amounts.items() if len(by_amount) > 1][: len(drawing.MARKERS)]
    lines = tuple(
        Line(scope, tuple((amount, comparisons[place].kept) for amount, place in sorted(by_amount.items())))
        for scope, by_amount in several
    )
    drawn = {place for _, by_amount in several for place in by_amount.values()}
    return lines, tuple(place for place in range(len(comparisons)) if place not in drawn)


def _floor(kept: Iterable[Estimate]) -> int:
    """Where the axis begins: at the tens below the lowest interval."""
    return max(0, int(min(percents(each)[1] for each in kept) // 10) * 10)
