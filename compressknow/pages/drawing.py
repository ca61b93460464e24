"""Draw charts in one style: lines, bars, knowledge kept against a cost. The first chart imports matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from math import inf, nan
from typing import TYPE_CHECKING, Any

from compressknow.base.format import clean, number, share
from compressknow.comparison.records import Estimate
from compressknow.pages.svg import COLOURS, make_inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 328  # units of the drawing; pixels between the page's margins on a 360-pixel screen
INK, MUTED, RULE, PAPER = (COLOURS[name] for name in ("ink", "muted", "rule", "paper"))
SERIES = tuple(COLOURS[f"c{i}"] for i in range(1, 7))
PERCENT, POINTS = " %", ""  # units of the figures: percentages, and differences of percentages
# Lines differ in marker and dashes too, because some people cannot tell colours apart.
MARKERS, DASHES = "osD^vP", ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
_APART = 0.075  # share of a plot's height that keeps two labels of lines from touching
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: smaller, and in the page's font
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that widths are the same everywhere
    "font.size": 11,
    "text.parse_math": False,  # a dollar sign in a name is not a formula
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,  # the grid, under what is drawn
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 8,  # otherwise the first labels of the two axes touch
    "svg.hashsalt": "compressknow",
}


@dataclass(frozen=True, slots=True)
class Line:
    """Figure of one scope by the percentage of its weights that was pruned (0 to 100). `is_from_original` says that
    nothing else was done to the models, so that the original is the point at 0 %."""

    scope: str
    points: tuple[tuple[float, Estimate], ...]
    is_from_original: bool = True


@dataclass(frozen=True, slots=True)
class Bar:
    """Figure with its name; bars of one `series` share a colour, those of a `group` a heading."""

    name: str
    value: Estimate
    series: int = 0
    group: str = ""


@contextmanager
def open_axes(
    height: int, id: str, title: str, description: str, *, width: int = WIDTH, hover: Mapping[str, str] = {}
) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Yield axes, and the function that gives the SVG once the block has ended; `hover` as in `svg.make_inline`."""
    import matplotlib
    from matplotlib.figure import Figure

    written = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Scripts that DejaVu lacks are measured slightly wrong; the reader's own font shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        yield figure.add_subplot(), lambda: make_inline(written.getvalue(), id, title, description, hover)
        figure.savefig(written, format="svg", metadata={"Date": None})


def draw_lines(
    drawn_lines: Sequence[Line],
    id: str,
    title: str,
    *,
    start: float,
    levels: Mapping[str, float] = {},
    unit: str = PERCENT,
    within: tuple[float, float] = (0, 0),
) -> str:
    """Draw a figure against the amount pruned, a line per scope, at most as many as there are markers; lines of pruned
    models begin at 0 % with the original's figure, `start` (0 to 1). `levels` are reference lines across the chart by
    name, such as the majority baseline (0 to 1). `unit` is `PERCENT`, or `POINTS` for differences of percentages. The
    axis covers at least the range `within`, as from `find_reach`, so that charts in a row share a scale."""
    description = "; ".join(
        f"{clean(line.scope, 40)}: "
        + ", ".join(f"{write_value(y.value, unit)} at {amount:g} %" for amount, y in line.points)
        for line in drawn_lines
    )
    with open_axes(260, id, title, f"{description}.{_describe_levels(levels, unit)}") as (plot, drawn):
        ends = [_draw_line(plot, line, i, 100 * start) for i, line in enumerate(drawn_lines)]
        largest = max(x for x, *_ in ends)
        bottom, top = round_range([100 * start, *find_reach(drawn_lines, levels), *within])
        places = move_apart([y for _, y, *_ in ends], _APART * (top - bottom), bottom)
        for (x, y, label, colour), place in zip(ends, places, strict=True):
            plot.plot([x + largest * 0.02, largest * 1.06], [y, place], color=RULE, linewidth=0.8)
            plot.text(largest * 1.08, place, label, va="center", color=colour)
        _draw_levels(plot, levels, largest, (bottom, top), 100 * start)
        amounts = sorted({amount for line in drawn_lines for amount, _ in line.points} | {0.0})
        plot.set_xlim(-largest * 0.03, largest * 1.45)
        plot.set_xticks(_space_out(amounts, 0.18 * largest))
        plot.xaxis.set_major_formatter(lambda amount, _: f"{amount:g} %")
        plot.set_xlabel("weights pruned in the scope", loc="left")
        set_percent_axis(plot, bottom, top, unit)
    return drawn()


def find_reach(plotted: Sequence[Line | Bar], levels: Mapping[str, float] = {}) -> tuple[float, float]:
    """Return the smallest and largest value drawn, in percent; for bars with intervals, for lines without."""
    ends = [100 * level for level in levels.values()]
    for each in plotted:
        ends += to_percents(each.value) if isinstance(each, Bar) else [to_percents(y)[0] for _, y in each.points]
    return min(ends), max(ends)


def _draw_line(plot: Axes, line: Line, place: int, start: float) -> tuple[float, float, str, str]:
    """Draw a line; return where it ends, its name and its colour."""
    colour = SERIES[place]
    amounts = [amount for amount, _ in line.points]
    values = [to_percents(value)[0] for _, value in line.points]
    first = int(line.is_from_original)
    drawn = [0.0] * first + amounts, [start] * first + values
    plot.plot(*drawn, color=colour, linestyle=DASHES[place], linewidth=1.8)
    plot.plot(amounts, values, MARKERS[place], color=colour, markersize=6, markeredgecolor=PAPER)
    return amounts[-1], values[-1], _shorten(line.scope, 22), colour


def _space_out(amounts: Sequence[float], gap: float) -> list[float]:
    """Return the amounts, in ascending order, that are at least `gap` above the last one returned.

    >>> _space_out([0, 10, 15, 20, 40], gap=10)
    [0, 10, 20, 40]
    """
    spaced = list(amounts[:1])
    for amount in amounts[1:]:
        # Allow for rounding: amounts one gap apart in decimal may be slightly closer as floats.
        if amount - spaced[-1] >= gap * (1 - 1e-9):
            spaced.append(amount)
    return spaced


def _draw_levels(
    plot: Axes, levels: Mapping[str, float], largest: float, limits: tuple[float, float], start: float
) -> None:
    gap = _APART * (limits[1] - limits[0])
    places = move_apart([100 * level for level in levels.values()], gap, -inf)
    for (name, level), place in zip(levels.items(), places, strict=True):
        y, label = 100 * level, _shorten(name, 40)
        # On the left, unless the level is near the start, where all lines are.
        x, side = (0.0, "left") if abs(place - start) > gap else (largest * 1.02, "right")
        plot.plot([-largest * 0.03, largest * 1.02], [y, y], color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
        plot.annotate(
            label, (x, place), (0, 3), textcoords="offset points", fontsize=10, color=MUTED, va="bottom", ha=side
        )


def _describe_levels(levels: Mapping[str, float], unit: str) -> str:
    return "".join(f" {clean(name, 40)}: {write_value(level, unit)}." for name, level in levels.items())


def draw_bars(
    drawn_bars: Sequence[Bar],
    id: str,
    title: str,
    *,
    levels: Mapping[str, float] = {},
    unit: str = PERCENT,
    within: tuple[float, float] = (0, 0),
) -> str:
    """Draw figures as bars with names and intervals, on an axis up to at least 100 %, or 10 points; the rest as in
    `draw_lines`."""
    description = ", ".join(
        f"{clean(bar.group, 40)}{' ' * bool(bar.group)}{clean(bar.name, 60)}: {write_value(bar.value.value, unit)}"
        for bar in drawn_bars
    )
    # A named group has a heading above its first bar.
    places = [0.9 if drawn_bars[0].group else 0.0]
    for before, bar in pairwise(drawn_bars):
        places.append(places[-1] + (1.0 if bar.group == before.group else 2.0))
    last = places[-1]
    height = 40 + round(22 * (last + 1 + 0.9 * len(levels)))
    with open_axes(height, id, title, f"{description}.{_describe_levels(levels, unit)}") as (plot, drawn):
        ends = (*find_reach(drawn_bars, levels), *within)
        left, right = min(0, *ends), max(100 if unit == PERCENT else 10, *ends)
        for y, bar in zip(places, drawn_bars, strict=True):
            value, lowest, highest = to_percents(bar.value)
            plot.barh([y], [value], height=0.5, color=SERIES[bar.series])
            plot.plot([lowest, highest], [y, y], color=INK, linewidth=1.4)
            edge = max(value, highest, 0) + 0.02 * (right - left)
            plot.text(edge, y, write_value(bar.value.value, unit), va="center")
        for group, bars in groupby(zip(places, drawn_bars, strict=True), lambda each: each[1].group):
            if group:
                # At the left edge, above the names of its bars, where most headings fit.
                place = 0.01, next(bars)[0] - 0.85
                at: Any = {"xycoords": ("figure fraction", "data"), "va": "center"}
                plot.annotate(_shorten(group, 48), place, color=MUTED, **at)
        for i, (name, level) in enumerate(levels.items()):
            x = 100 * level
            plot.plot([x, x], [-0.7 - 0.9 * i, last + 0.5], color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
            plot.text(x, -0.75 - 0.9 * i, _shorten(name, 40), fontsize=10, color=MUTED, ha="center", va="bottom")
        plot.set_ylim(last + 0.6, -0.6 - 0.9 * len(levels))
        plot.set_yticks(places, [_shorten(bar.name, 24) for bar in drawn_bars])
        plot.set_xlim(left, right + 0.22 * (right - left))
        # The longest names leave room for three labels such as 100 %, or for six of two digits.
        ticks = _list_ticks(left, right, most=3 if unit == PERCENT else 6)
        plot.set_xticks(ticks, [_write_tick(tick, unit) for tick in ticks])
        plot.grid(axis="x")
        plot.spines["bottom"].set_visible(False)
    return drawn()


def write_value(value: float | None, unit: str) -> str:
    """Write a share in percent, or in percentage points with one digit."""
    return share(value) if unit == PERCENT or value is None else number(round(100 * value, 1), 1)


def to_percents(value: Estimate) -> tuple[float, float, float]:
    """Return the figure and the ends of its interval, in percent; without an interval, the figure itself."""
    middle = 100 * (value.value or 0.0)
    low = middle if value.low is None else 100 * value.low
    return middle, low, middle if value.high is None else 100 * value.high


def set_percent_axis(plot: Axes, bottom: float, top: float = 100, unit: str = PERCENT) -> None:
    """Make the vertical axis one of percent, with a little room above."""
    room = 0.02 * (top - bottom) * (1 if bottom else 2)
    plot.set_ylim(bottom, top + room)
    plot.set_yticks(_list_ticks(bottom, top))
    plot.yaxis.set_major_formatter(lambda value, _: _write_tick(value, unit))
    plot.grid(axis="y")


def round_range(values: Sequence[float], low: float = 0.0) -> tuple[float, float]:
    """Return the range of the values and `low`, rounded outwards to tens, or to fives if it is small."""
    low, high = min(low, *values), max(10.0, *values)
    step = 5 if high - low <= 20 else 10
    return step * (low // step), -step * (-high // step)


def _list_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return multiples of a round step between the two, at most about `most`."""
    step = next((s for s in (5, 10, 20, 50) if (high - low) / s <= most), 50)
    first = -(-low // step) * step
    return [first + step * i for i in range(int((high - first) // step) + 1)]


def _shorten(name: str, limit: int) -> str:
    # Twice, because `clean` may write one character as eight.
    return clean(clean(name, limit), limit)


def _write_tick(value: float, unit: str) -> str:
    return f"{value:g}{unit}".replace("-", "\N{MINUS SIGN}")


def move_apart(places: Sequence[float], gap: float, bottom: float = 0) -> list[float]:
    """Return the places, moved down from the highest as little as needed for each to be `gap` from the next.

    >>> move_apart([50, 49, 10], gap=7)
    [50, 43, 10]
    """
    moved, order = list(places), sorted(range(len(places)), key=lambda i: -places[i])
    highest, lowest = inf, bottom
    for i in order:
        moved[i] = min(moved[i], highest)
        highest = moved[i] - gap
    # Labels pushed below the axis move up again.
    for i in reversed(order):
        moved[i] = max(moved[i], lowest)
        lowest = moved[i] + gap
    return moved


# Units of a chart for a narrow screen, and of one that fills the page.
_NARROW, _BROAD = (300, WIDTH), (380, 1080)
_SPAN = 20  # minimum span of an axis of kept knowledge in points, so that similar models stay close
_LONG = 32  # longer names in the legend of a narrow chart get a line each
# Width of a digit, height of a line, and distances of a label from its mark, in units of the drawing.
_DIGIT, _LINE, _STEPS = 6.6, 11.0, (9, 14, 20)
_WAYS = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


@dataclass(frozen=True, slots=True)
class Mark:
    """Model on the chart."""

    cost: float  # in the unit of the axis
    kept: Estimate  # a share of 1
    kind: str
    tooltip: str
    label: str = ""  # written next to it if there is room

    @property
    def share(self) -> float:
        """Return the share kept, without its interval."""
        return self.kept.value or 0.0


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Chart of knowledge kept against a cost."""

    title: str
    cost: str  # what the horizontal axis shows, with its unit
    marks: Sequence[Mark]
    looks: Mapping[str, tuple[str, str, float]]  # by kind, in the legend's order: matplotlib's marker, colour, size
    edge: Sequence[str]  # kinds whose marks may be on the line of unbeaten ones
    more_is_better: bool = False  # if the axis shows a benefit, such as speed
    keep: float | None = None  # share to keep (0 to 1), a dashed line across
    rounding: float | None = None  # share that rounding alone keeps, a dotted line across


def find_unbeaten(marks: Sequence[Mark], *, more_is_better: bool = False) -> list[Mark]:
    """Return the marks that no other beats at the same cost or less, the cheapest first.

    >>> marks = [Mark(cost, Estimate(kept), "", "") for cost, kept in ((3, 0.9), (1, 0.5), (2, 0.4))]
    >>> [mark.cost for mark in find_unbeaten(marks)]
    [1, 3]
    """
    sign = -1 if more_is_better else 1
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda each: (sign * each.cost, -each.share)):
        if not best or mark.share > best[-1].share:
            best.append(mark)
    return best


def draw_tradeoff(chart: Tradeoff, id: str, broad: bool = False) -> str:
    """Return the SVG element for a narrow screen, or for the full width if `broad`; each mark has a tooltip."""
    height, width = _BROAD if broad else _NARROW
    hover = {f"mark{i}": mark.tooltip for i, mark in enumerate(chart.marks)}
    able = [mark for mark in chart.marks if mark.kind in chart.edge]
    best = find_unbeaten(able, more_is_better=chart.more_is_better)
    description = f"The best: {'; '.join(mark.tooltip for mark in best)}."
    with open_axes(height, id, chart.title, description, width=width, hover=hover) as (plot, drawn):
        if best:
            # The share is available at every higher cost, or at every lower speed.
            style = "steps-pre" if chart.more_is_better else "steps-post"
            places = sorted((mark.cost, 100 * mark.share) for mark in best)
            plot.plot(*zip(*places, strict=True), "-", color=SERIES[0], linewidth=1.2, drawstyle=style)
        for across, dashes in ((chart.keep, (4, 3)), (chart.rounding, (1, 2))):
            if across is not None:
                plot.axhline(100 * across, color=MUTED, linewidth=0.9, linestyle=(0, dashes))
        # All intervals in one path: a page may have many.
        whole = [mark for mark in chart.marks if mark.kept.low is not None]
        ends = [(mark.cost, end) for mark in whole for end in (*to_percents(mark.kept)[1:], nan)]
        if ends:
            plot.plot(*zip(*ends, strict=True), color=MUTED, linewidth=1.1)
        _draw_marks(plot, chart)
        # Outside the plot, because points may be anywhere in it.
        columns = 3 if broad else 1 if any(len(kind) > _LONG for kind in chart.looks) else 2
        room: Any = {"ncols": columns, "columnspacing": 1, "handletextpad": 0, "frameon": False}
        plot.figure.legend(loc="outside upper left", fontsize=10, **room)
        low, high = plot.get_xlim()
        # Start below the smallest cost, by a twentieth: any closer, almost equal costs would look far apart.
        left = 0.0 if low < high / 4 else min(low, 0.95 * min(mark.cost for mark in chart.marks))
        # Lines across do not widen the axis by themselves.
        lows = [to_percents(mark.kept)[1] for mark in chart.marks]
        lows += [100 * across for across in (chart.keep, chart.rounding) if across is not None]
        bottom = max(0.0, min(round_range(lows, low=min(lows))[0], 100 - _SPAN))
        # Three digits, but no exponent: the ticks have none.
        cut = [f"horizontal axis from {f'{left:,.0f}' if left >= 100 else f'{left:.3g}'}"] if left else []
        cut += [f"vertical axis from {bottom:g}{PERCENT}"] if bottom else []
        plot.set_xlim(left=left)
        plot.set_xlabel(f"{chart.cost}\n({', '.join(cut)})" if cut else chart.cost)
        set_percent_axis(plot, bottom)
        draw_labels(plot, [(mark.cost, 100 * mark.share, mark.label) for mark in chart.marks])
    return drawn()


def _draw_marks(plot: Axes, chart: Tradeoff) -> None:
    """Draw each mark; the first of each kind is in the legend."""
    for kind, (marker, colour, size) in chart.looks.items():
        label = kind
        for i, mark in enumerate(chart.marks):
            if mark.kind == kind:
                drawn: Any = {"color": colour, "markersize": size, "label": label, "gid": f"mark{i}"}
                plot.plot(mark.cost, 100 * mark.share, marker, clip_on=False, **drawn)
                label = "_nolegend_"


def draw_labels(plot: Axes, marks: Sequence[tuple[float, float, str]]) -> None:
    """Write the label of each mark (x, y, label) next to it if other labels and marks leave room."""
    figure = plot.get_figure(root=True)
    assert figure is not None
    # Drawing fixes the layout, and so the positions of marks.
    figure.draw_without_rendering()
    unit = 72 / figure.dpi
    at = [tuple(unit * plot.transData.transform(mark[:2])) for mark in marks]
    left, bottom, right, top = (unit * end for end in plot.bbox.extents)
    taken = [_make_box(x, y, 6.0, 6.0) for x, y in at]
    for (across, high, label), (x, y) in zip(marks, at, strict=True):
        width = _DIGIT * len(label) + 2
        for step, (way_x, way_y) in product(_STEPS if label else (), _WAYS):
            offset = step * way_x + way_x * (width - _DIGIT) / 2, step * way_y
            box = _make_box(x + offset[0], y + offset[1], width, _LINE)
            inside = left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
            if inside and all(
                box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1] for other in taken
            ):
                taken.append(box)
                place: Any = {"textcoords": "offset points", "ha": "center", "va": "center"}
                plot.annotate(label, (across, high), offset, fontsize=10, color=INK, **place)
                break


def _make_box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
