"""Draw two charts: knowledge kept against what a model costs, and figures by layer and module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import nan
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from compressknow.base.format import number
from compressknow.comparison.records import Estimate
from compressknow.pages.drawing import (
    INK,
    MUTED,
    PERCENT,
    SERIES,
    WIDTH,
    open_axes,
    round_range,
    set_percent_axis,
    to_percents,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Units of a chart for a narrow screen, and of one that fills the page.
_NARROW, _BROAD = (300, WIDTH), (380, 1080)
# Points of kept knowledge that an axis spans at least: two models near each other stay near.
_SPAN = 20
# Characters of a name in the legend, above which a narrow chart has one in a line.
_LONG = 32
# A digit's box, and how far from its mark a label may stand, in units of the drawing.
_DIGIT, _LINE, _STEPS = 6.6, 11.0, (9, 14, 20)
_WAYS = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


@dataclass(frozen=True, slots=True)
class Mark:
    """Model on the chart."""

    cost: float  # in the unit of the axis
    kept: Estimate  # a share of 1
    kind: str
    told: str  # what a pointer over it is told
    label: str = ""  # written beside it where there is room

    @property
    def share(self) -> float:
        """Return what is kept, without its interval."""
        return self.kept.value or 0.0


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Chart of knowledge kept against a cost."""

    title: str
    cost: str  # what the horizontal axis shows, with its unit
    marks: Sequence[Mark]
    looks: Mapping[str, tuple[str, str, float]]  # by kind, in the legend's order: matplotlib's marker, colour, size
    edge: Sequence[str]  # kinds whose marks can be on the edge
    told: str
    more_is_better: bool = False  # of a cost that is none, such as a speed
    keep: float | None = None  # a share of 1 to be kept, drawn across (broken)
    rounding: float | None = None  # what rounding alone keeps, drawn across (dotted)


def find_unbeaten(marks: Sequence[Mark], *, more_is_better: bool = False) -> list[Mark]:
    """Return those of which none keeps more at the same cost or less, the cheapest first.

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


def draw_tradeoff(chart: Tradeoff, id: str, *, broad: bool = False) -> str:
    """Return the SVG element, for a narrow screen or, if `broad`, for the width of the page. A pointer over a mark is
    told which model it is.
    """
    height, width = _BROAD if broad else _NARROW
    hover = {f"mark{i}": mark.told for i, mark in enumerate(chart.marks)}
    with open_axes(height, id, chart.title, chart.told, width=width, hover=hover) as (plot, drawn):
        _draw_edge(plot, chart)
        for across, dashes in ((chart.keep, (4, 3)), (chart.rounding, (1, 2))):
            if across is not None:
                plot.axhline(100 * across, color=MUTED, linewidth=0.9, linestyle=(0, dashes))
        _draw_intervals(plot, chart.marks)
        _draw_marks(plot, chart)
        # Outside of the plot: points may lie anywhere in it.
        columns = 3 if broad else 1 if any(len(kind) > _LONG for kind in chart.looks) else 2
        room: Any = {"ncols": columns, "columnspacing": 1, "handletextpad": 0, "frameon": False}
        plot.figure.legend(loc="outside upper left", fontsize=10, **room)
        low, high = plot.get_xlim()
        # No nearer to the dearest than half of it, or what is alike would look far apart.
        left = 0.0 if low < high / 4 else min(low, high / 2)
        # A line across alone would not widen the axis.
        ends = [to_percents(mark.kept)[1] for mark in chart.marks]
        ends += [] if chart.rounding is None else [100 * chart.rounding]
        bottom = max(0.0, min(round_range(ends, low=min(ends))[0], 100 - _SPAN))
        cut = [f"across from {left:,.3g}"] if left else []
        cut += [f"up from {bottom:g}{PERCENT}"] if bottom else []
        plot.set_xlim(left=left)
        plot.set_xlabel(f"{chart.cost}\n(not from zero: {', '.join(cut)})" if cut else chart.cost)
        set_percent_axis(plot, bottom, unit=PERCENT)
        draw_labels(plot, [(mark.cost, 100 * mark.share, mark.label) for mark in chart.marks])
    return drawn()


def _draw_intervals(plot: Axes, marks: Sequence[Mark]) -> None:
    """Draw all intervals in one path: a page may have many."""
    ends = [
        (mark.cost, end) for mark in marks if mark.kept.low is not None for end in (*to_percents(mark.kept)[1:], nan)
    ]
    if ends:
        plot.plot(*zip(*ends, strict=True), color=MUTED, linewidth=1.1)


def _draw_edge(plot: Axes, chart: Tradeoff) -> None:
    """Draw what nothing beats: it is kept at every cost from there on; at every speed up to there."""
    able = [mark for mark in chart.marks if mark.kind in chart.edge]
    if best := find_unbeaten(able, more_is_better=chart.more_is_better):
        places = sorted((mark.cost, 100 * mark.share) for mark in best)
        style = "steps-pre" if chart.more_is_better else "steps-post"
        plot.plot(*zip(*places, strict=True), "-", color=SERIES[0], linewidth=1.2, drawstyle=style)


def _draw_marks(plot: Axes, chart: Tradeoff) -> None:
    """Draw each mark with a name by which it is told apart; the first of a kind stands in the legend."""
    for kind, (marker, colour, size) in chart.looks.items():
        label = kind
        for i, mark in enumerate(chart.marks):
            if mark.kind == kind:
                drawn: Any = {"color": colour, "markersize": size, "label": label, "gid": f"mark{i}"}
                plot.plot(mark.cost, 100 * mark.share, marker, clip_on=False, **drawn)
                label = "_nolegend_"


def draw_labels(plot: Axes, marks: Sequence[tuple[float, float, str]]) -> None:
    """Write the label of each mark (x, y, label) beside it, where no other label or mark is; none where there is no
    room, or no label."""
    figure = plot.get_figure(root=True)
    assert figure is not None
    # Where the marks are, in units of the drawing, is settled by the layout.
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


@dataclass(frozen=True, slots=True)
class Grid:
    """Figures by block (rows) and by module inside a block (columns); None where there is no such module or figure. A
    row of one figure is as wide as all columns.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]

    @property
    def figures(self) -> list[float]:
        """Return the figures that are not 0."""
        return [cell for row in self.cells for cell in row if cell]


@dataclass(frozen=True, slots=True)
class Form:
    """Form of a map, in units of the drawing."""

    width: int
    widest: int  # of a column, at most
    label: int  # room for the names of rows
    row: int
    upright: bool  # names of columns run upwards
    most_figures: int  # columns that leave room for a figure in each cell; where there are more, a pointer is told it


WIDE = Form(720, 110, 76, 19, upright=False, most_figures=10)
NARROW = Form(328, 60, 66, 14, upright=True, most_figures=0)
# Shades of one colour, faint to full. Up to the fifth, ink reads on them in light and in dark; then paper does.
_SHADES = (0.08, 0.17, 0.27, 0.38, 0.5, 0.85, 1.0)
_INK_UP_TO = 4
_ORDERS = 4  # of magnitude that the shades span at most
_TOP, _LETTER, _LONGEST = 26, 5.6, 16


def draw_heat_map(
    grid: Grid,
    id: str,
    title: str,
    *,
    bounds: Sequence[float] = (),
    write: Callable[[float], str] = lambda figure: number(figure, 4),
    form: Form = WIDE,
) -> str | None:
    """Return the map as an element for HTML, with its figures as `write` gives them; None where all are 0.

    Nothing else on the page may have its `id` or begin with it. `bounds` are the scale, as `find_bounds` gives it; by
    default the grid's own.
    """
    if not grid.figures:
        return None
    bounds = bounds or find_bounds(grid.figures)
    width = min(form.widest, (form.width - form.label) / len(grid.columns))
    top = 10 + round(min(_LONGEST, max(map(len, grid.columns))) * _LETTER) if form.upright else _TOP
    height = top + form.row * len(grid.rows) + 34
    return "".join(
        [
            f'<svg class="chart heat" id="{id}" viewBox="0 0 {form.width} {height}" role="img" ',
            f'aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{escape(title)}</title>',
            f'<desc id="{id}-desc">{escape(_describe_grid(grid, write))}</desc>',
            *_draw_heads(grid, width, top, form),
            *(mark for i in range(len(grid.rows)) for mark in _draw_row(grid, i, width, top, bounds, write, form)),
            *_draw_legend(bounds, top + form.row * len(grid.rows) + 12, write, form),
            "</svg>",
        ]
    )


def find_bounds(figures: Sequence[float]) -> tuple[float, ...]:
    """Return figures that part the shades, in equal ratios between the least and the largest."""
    high = max(figures)
    low = max(min(figures), high / 10**_ORDERS)
    steps = len(_SHADES)
    return tuple(low * math.exp(math.log(high / low) * i / steps) for i in range(1, steps))


def _describe_grid(grid: Grid, write: Callable[[float], str]) -> str:
    found = []
    for row, cells in zip(grid.rows, grid.cells, strict=True):
        columns = grid.columns if len(cells) == len(grid.columns) else ("",)
        places = (", ".join(filter(None, (column, row))) for column in columns)
        found += [(figure, place) for figure, place in zip(cells, places, strict=True) if figure]
    largest, least = max(found), min(found)
    return (
        f"From {write(least[0])} ({least[1]}) to {write(largest[0])} ({largest[1]}). "
        "The table after the map has every figure."
    )


def _draw_heads(grid: Grid, width: float, top: int, form: Form) -> Iterator[str]:
    room = _LONGEST if form.upright else max(4, int(width / _LETTER))
    for i, name in enumerate(grid.columns):
        shown = name if len(name) <= room else f"…{name[1 - room :]}"
        x = form.label + width * (i + 0.5) + 3.5 * form.upright
        yield _draw_text(x, top - 8, shown, "f-muted", "start" if form.upright else "middle", upright=form.upright)


def _draw_row(
    grid: Grid, i: int, width: float, top: int, bounds: Sequence[float], write: Callable[[float], str], form: Form
) -> Iterator[str]:
    y, cells = top + form.row * i, grid.cells[i]
    yield _draw_text(form.label - 8, y + form.row - 6 + (form.row < 16) * 3, grid.rows[i], "f-muted", "end")
    wide = width if len(cells) == len(grid.columns) else width * len(grid.columns)
    for j, figure in enumerate(cells):
        if figure is None:
            continue
        step, x = sum(figure >= bound for bound in bounds), form.label + wide * j
        colour = f'class="f-c1" opacity="{_SHADES[step]}"' if figure else 'class="f-rule" opacity="0.35"'
        if len(grid.columns) <= form.most_figures:
            yield _draw_box(x, y, wide - 1, form.row - 1, colour)
            ink = "f-ink" if not figure or step <= _INK_UP_TO else "f-paper"
            yield _draw_text(x + wide / 2, y + form.row - 6, write(figure), ink, "middle")
        else:
            yield _draw_box(x, y, wide - 1, form.row - 1, colour, write(figure))


def _draw_legend(bounds: Sequence[float], y: float, write: Callable[[float], str], form: Form) -> Iterator[str]:
    box = min(54, (form.width - form.label) / len(_SHADES))
    for i, opacity in enumerate(_SHADES):
        x = form.label + box * i
        yield _draw_box(x, y, box - 1, 7, f'class="f-c1" opacity="{opacity}"')
        if i:
            yield _draw_text(x, y + 18, write(bounds[i - 1]), "f-muted", "middle")


def _draw_box(x: float, y: float, width: float, height: int, colour: str, told: str = "") -> str:
    place = f'x="{_write_number(x)}" y="{_write_number(y)}" width="{_write_number(width)}" height="{height}"'
    end = f"><title>{escape(told)}</title></rect>" if told else "/>"
    return f"<rect {colour} {place}{end}"


def _draw_text(x: float, y: float, text: str, colour: str, anchor: str, *, upright: bool = False) -> str:
    turned = f' transform="rotate(-90 {_write_number(x)} {_write_number(y)})"' if upright else ""
    place = f'x="{_write_number(x)}" y="{_write_number(y)}" text-anchor="{anchor}"'
    return f'<text class="{colour}" {place} font-size="10"{turned}>{escape(text)}</text>'


def _write_number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
