"""The charts of the page, as SVG elements to stand inside it. matplotlib is imported by the first that is drawn."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from compressknow.report.figures import share
from compressknow.report.records import Comparison, Estimate, Group
from compressknow.report.svg import COLOURS, inline
from compressknow.report.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 360  # units of the drawing, and pixels on the narrowest screen
_INK, _MUTED, _RULE, _PAPER = (COLOURS[name] for name in ("ink", "muted", "rule", "paper"))
_ACCENT = COLOURS["c1"]
# Lines differ in marker and dashes too: colour alone tells some people nothing.
_MARKERS, _DASHES = "osD^vP", ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MOST_BARS = 15
_AMOUNT = re.compile(r"(?P<scope>.*\S)\s+(?P<amount>\d+(?:\.\d+)?)\s*%")
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: small, and in the page's own font
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that widths are the same everywhere
    "font.size": 11,
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.hashsalt": "compressknow",
}


@dataclass(frozen=True, slots=True)
class Line:
    """Knowledge kept of one scope, by the share of its weights that was pruned (0 to 100)."""

    scope: str
    points: tuple[tuple[float, Estimate], ...]


def popularity(groups: Sequence[Group], id: str, name: str) -> str | None:
    """Knowledge kept by popularity bin, as dots with intervals; None where fewer than two bins have any."""
    bins = [(plain(group.name, 16), group.kept) for group in groups if group.kept.value is not None]
    if len(bins) < 2:
        return None
    told = ", ".join(f"{label} {share(kept.value)}" for label, kept in bins)
    title = f"Knowledge kept by popularity, {plain(name, 60)}"
    with _axes(200, id, title, f"From left to right: {told}.") as (axes, drawn):
        floor = _floor(kept for _, kept in bins)
        for x, (_, kept) in enumerate(bins):
            value, low, high = _percents(kept)
            axes.plot([x, x], [low, high], color=_ACCENT, linewidth=2, solid_capstyle="round")
            axes.plot([x], [value], "o", color=_ACCENT, markersize=8, markeredgecolor=_PAPER)
            axes.annotate(share(kept.value), (x, value), (8, 0), textcoords="offset points", va="center", fontsize=11)
        axes.set_xlim(-0.4, len(bins) - 0.3)
        axes.set_xticks(range(len(bins)), [label for label, _ in bins])
        _percent_axis(axes, floor)
    return drawn()


def setups(comparisons: Sequence[Comparison], names: Sequence[str], id: str) -> tuple[str, ...]:
    """Charts of what several compressed models kept: lines where setups are amounts by scope, bars for the others."""
    lines, others = split(comparisons)
    charts = [_lines(lines, f"{id}-lines")] if lines else []
    # Many bars would repeat the overview's, one below the other.
    bars = (
        []
        if len(others) > _MOST_BARS
        else [(names[i], comparisons[i].kept) for i in others if comparisons[i].kept.value is not None]
    )
    return (*charts, *([_bars(bars, f"{id}-bars")] if bars else []))


def split(comparisons: Sequence[Comparison]) -> tuple[tuple[Line, ...], tuple[int, ...]]:
    """Scopes of which at least two amounts were pruned, and the places of all other comparisons.

    More scopes than there are ways of drawing a line are left to the bars.
    """
    amounts: dict[str, dict[float, int]] = {}
    for place, comparison in enumerate(comparisons):
        match = _AMOUNT.fullmatch(comparison.model.setup or "")
        if match and comparison.kept.value is not None:
            amounts.setdefault(match["scope"], {}).setdefault(float(match["amount"]), place)
    several = [(scope, by_amount) for scope, by_amount in amounts.items() if len(by_amount) > 1][: len(_MARKERS)]
    lines = tuple(
        Line(scope, tuple((amount, comparisons[place].kept) for amount, place in sorted(by_amount.items())))
        for scope, by_amount in several
    )
    drawn = {place for _, by_amount in several for place in by_amount.values()}
    return lines, tuple(place for place in range(len(comparisons)) if place not in drawn)


def _lines(lines: Sequence[Line], id: str) -> str:
    title = "Knowledge kept by how much was pruned"
    told = "; ".join(
        f"{plain(line.scope, 40)}: " + ", ".join(f"{share(kept.value)} at {amount:g} %" for amount, kept in line.points)
        for line in lines
    )
    with _axes(260, id, title, told + ".") as (axes, drawn):
        ends = []
        for i, line in enumerate(lines):
            colour = COLOURS[f"c{i + 1}"]
            # The original itself is at 0 %, where everything is kept.
            amounts = [0.0, *(amount for amount, _ in line.points)]
            shares = [100.0, *(_percents(kept)[0] for _, kept in line.points)]
            axes.plot(amounts, shares, color=colour, linestyle=_DASHES[i], linewidth=1.8)
            axes.plot(amounts[1:], shares[1:], _MARKERS[i], color=colour, markersize=6, markeredgecolor=_PAPER)
            ends.append((amounts[-1], shares[-1], plain(line.scope, 22), colour))
        largest = max(x for x, *_ in ends)
        for (x, y, label, colour), place in zip(ends, _apart([y for _, y, *_ in ends], gap=7), strict=True):
            axes.plot([x + largest * 0.02, largest * 1.06], [y, place], color=_RULE, linewidth=0.8)
            axes.text(largest * 1.08, place, label, va="center", fontsize=11, color=colour)
        ticks = sorted({amount for line in lines for amount, _ in line.points} | {0.0})
        axes.set_xlim(-largest * 0.03, largest * 1.45)
        axes.set_xticks(ticks if len(ticks) < 8 else ticks[::2])
        axes.xaxis.set_major_formatter(lambda amount, _: f"{amount:g} %")
        axes.set_xlabel("weights pruned in the scope", fontsize=11, loc="left")
        _percent_axis(axes, 0)
    return drawn()


def _bars(bars: Sequence[tuple[str, Estimate]], id: str) -> str:
    told = ", ".join(f"{name}: {share(kept.value)}" for name, kept in bars)
    with _axes(40 + 22 * len(bars), id, "Knowledge kept by compressed model", told + ".") as (axes, drawn):
        for y, (_, kept) in enumerate(bars):
            value, low, high = _percents(kept)
            axes.barh([y], [value], height=0.5, color=_ACCENT)
            axes.plot([low, high], [y, y], color=_INK, linewidth=1.4)
            axes.text(max(value, high) + 2, y, share(kept.value), va="center", fontsize=11)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_yticks(range(len(bars)), [plain(name, 24) for name, _ in bars])
        axes.set_xlim(0, 122)
        axes.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["bottom"].set_visible(False)
    return drawn()


@contextmanager
def _axes(height: int, id: str, title: str, description: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on, and the function that gives the SVG once the block has ended."""
    import matplotlib
    from matplotlib.figure import Figure

    written = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name in a script that DejaVu lacks is measured a little wrong; the reader's own font shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        yield figure.add_subplot(), lambda: inline(written.getvalue(), id, title, description)
        figure.savefig(written, format="svg", metadata={"Date": None})


def _percents(kept: Estimate) -> tuple[float, float, float]:
    value = 100 * (kept.value or 0.0)
    low = value if kept.low is None else 100 * kept.low
    return value, low, value if kept.high is None else 100 * kept.high


def _floor(kept: Iterable[Estimate]) -> int:
    """Where the axis begins: at the tens below the lowest interval."""
    return max(0, int(min(_percents(each)[1] for each in kept) // 10) * 10)


def _percent_axis(axes: Axes, floor: int) -> None:
    axes.set_ylim(floor, 102 if floor else 104)
    step = 20 if floor < 60 else 10 if floor < 90 else 5
    axes.set_yticks(range(floor, 101, step))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """The places moved as little as needed for each to be `gap` from the next, downwards from the highest.

    >>> _apart([50, 49, 10], gap=7)
    [50, 43, 10]
    """
    moved = list(places)
    order = sorted(range(len(places)), key=lambda i: -places[i])
    for above, below in pairwise(order):
        moved[below] = min(moved[below], moved[above] - gap)
    # Labels pushed below the axis go up again from its foot.
    for below, above in pairwise(order[::-1]):
        if below == order[-1]:
            moved[below] = max(moved[below], 0)
        moved[above] = max(moved[above], moved[below] + gap)
    return moved
