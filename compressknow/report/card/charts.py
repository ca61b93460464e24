"""The charts of several compressed models at a glance, as SVG elements to stand inside the page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compressknow.report import drawing
from compressknow.report.drawing import Line
from compressknow.report.records import Comparison

_MOST_BARS = 15
_AMOUNT = re.compile(r"(?P<scope>.*\S)\s+(?P<amount>\d+(?:\.\d+)?)\s*%")


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
