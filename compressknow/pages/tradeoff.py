"""Knowledge kept against what a model costs, as a chart: a mark each, and the edge that nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any, TypeVar

from compressknow.pages.drawing import INK, MUTED, PERCENT, SERIES, WIDTH, axes, percent_axis, percents, round_range
from compressknow.stats.records import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

# Units of a chart for a narrow screen, and of one that fills the page.
_NARROW, _BROAD = (300, WIDTH), (380, 1080)
# Points of kept knowledge that an axis spans at least: two models near each other stay near.
_SPAN = 20
# A digit's box, and how far from its mark a label may stand, in units of the drawing.
_DIGIT, _LINE, _STEPS = 6.6, 11.0, (9, 14, 20)
_WAYS = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


@dataclass(frozen=True, slots=True)
class Mark:
    """A model.

    Attributes
    ----------
    cost, kept : where it stands: in the unit of the axis, and a share of 1 with its interval.
    told : what a pointer over it is told.
    label : written beside it where there is room.
    """

    cost: float
    kept: Estimate
    kind: str
    told: str
    label: str = ""

    @property
    def share(self) -> float:
        """What is kept, without its interval."""
        return self.kept.value or 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """How marks of a kind are drawn: a marker of matplotlib's, its colour and size."""

    marker: str
    colour: str
    size: float = 5


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """What is drawn.

    Attributes
    ----------
    cost : what the horizontal axis shows, with its unit.
    looks : by kind, the kinds in the order of the legend.
    edge : by kind, whose marks can be on the edge.
    more_is_better : of a cost that is none, such as a speed.
    keep, rounding : a share of 1 to be kept (broken), and what rounding alone keeps (dotted), drawn across; or None.
    """

    title: str
    cost: str
    marks: Sequence[Mark]
    looks: Mapping[str, Look]
    edge: Sequence[str]
    told: str
    more_is_better: bool = False
    keep: float | None = None
    rounding: float | None = None


def unbeaten(
    points: Sequence[T], place: Callable[[T], tuple[float, float]], *, more_is_better: bool = False
) -> list[T]:
    """Those of which none keeps more at the same cost or less, the cheapest first; `place` says (cost, kept).

    >>> unbeaten([(3, 0.9), (1, 0.5), (2, 0.4)], lambda point: point)
    [(1, 0.5), (3, 0.9)]
    """
    sign = -1 if more_is_better else 1
    best: list[T] = []
    for point in sorted(points, key=lambda each: (sign * place(each)[0], -place(each)[1])):
        if not best or place(point)[1] > place(best[-1])[1]:
            best.append(point)
    return best


def tradeoff(chart: Tradeoff, id: str, *, broad: bool = False) -> str:
    """The SVG element, for a narrow screen or, if `broad`, for the width of the page. Each mark says which it is to a
    pointer over it.
    """
    height, width = _BROAD if broad else _NARROW
    hover = {f"mark{i}": mark.told for i, mark in enumerate(chart.marks)}
    with axes(height, id, chart.title, chart.told, width=width, hover=hover) as (plot, drawn):
        _draw_edge(plot, chart)
        for across, dashes in ((chart.keep, (4, 3)), (chart.rounding, (1, 2))):
            if across is not None:
                plot.axhline(100 * across, color=MUTED, linewidth=0.9, linestyle=(0, dashes))
        _draw_intervals(plot, chart.marks)
        _draw_marks(plot, chart)
        # Outside of the plot: points may lie anywhere in it.
        room: Any = {"ncols": 3 if broad else 2, "columnspacing": 1, "handletextpad": 0, "frameon": False}
        plot.figure.legend(loc="outside upper left", fontsize=10, **room)
        left, bottom = _left(plot), _bottom(chart)
        plot.set_xlim(left=left)
        plot.set_xlabel("\n".join((chart.cost, *_beginnings(left, bottom))))
        percent_axis(plot, bottom, unit=PERCENT)
        draw_labels(plot, [(mark.cost, 100 * mark.share, mark.label) for mark in chart.marks])
    return drawn()


def _left(plot: Axes) -> float:
    """Where the axis of costs begins: zero where that is near, and no nearer to the dearest than half of it, or what is
    alike would look far apart.
    """
    low, high = plot.get_xlim()
    return 0.0 if low < high / 4 else min(low, high / 2)


def _bottom(chart: Tradeoff) -> float:
    # A line across alone would not widen the axis.
    ends = [percents(mark.kept)[1] for mark in chart.marks]
    ends += [] if chart.rounding is None else [100 * chart.rounding]
    return max(0.0, min(round_range(ends, low=min(ends))[0], 100 - _SPAN))


def _beginnings(left: float, bottom: float) -> Iterator[str]:
    """Of axes that do not begin at zero, where they do."""
    cut = [f"across from {left:,.3g}"] if left else []
    cut += [f"up from {bottom:g}{PERCENT}"] if bottom else []
    if cut:
        yield f"(not from zero: {', '.join(cut)})"


def _draw_intervals(plot: Axes, marks: Sequence[Mark]) -> None:
    """All in one path: a page may have many."""
    ends = [(mark.cost, end) for mark in marks if mark.kept.low is not None for end in (*percents(mark.kept)[1:], nan)]
    if ends:
        plot.plot(*zip(*ends, strict=True), color=MUTED, linewidth=1.1)


def _draw_edge(plot: Axes, chart: Tradeoff) -> None:
    """What nothing beats is kept at every cost from there on; at every speed up to there."""
    able = [mark for mark in chart.marks if mark.kind in chart.edge]
    best = unbeaten(able, lambda mark: (mark.cost, mark.share), more_is_better=chart.more_is_better)
    if best:
        places = sorted((mark.cost, 100 * mark.share) for mark in best)
        style = "steps-pre" if chart.more_is_better else "steps-post"
        plot.plot(*zip(*places, strict=True), "-", color=SERIES[0], linewidth=1.2, drawstyle=style)


def _draw_marks(plot: Axes, chart: Tradeoff) -> None:
    """A mark each, with a name by which it is told apart; the first of a kind stands in the legend."""
    for kind, look in chart.looks.items():
        label = kind
        for i, mark in enumerate(chart.marks):
            if mark.kind == kind:
                drawn: Any = {"color": look.colour, "markersize": look.size, "label": label, "gid": f"mark{i}"}
                plot.plot(mark.cost, 100 * mark.share, look.marker, clip_on=False, **drawn)
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
    edges = [unit * end for end in plot.bbox.extents]
    taken = [_box(x, y, 6.0, 6.0) for x, y in at]
    for (across, high, label), (x, y) in zip(marks, at, strict=True):
        size = _DIGIT * len(label) + 2, _LINE
        for right, up in _offsets(size[0]) if label else ():
            box = _box(x + right, y + up, *size)
            inside = edges[0] <= box[0] and box[2] <= edges[2] and edges[1] <= box[1] and box[3] <= edges[3]
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                place: Any = {"textcoords": "offset points", "ha": "center", "va": "center"}
                plot.annotate(label, (across, high), (right, up), fontsize=10, color=INK, **place)
                break


def _offsets(width: float) -> Iterator[tuple[float, float]]:
    return ((step * right + right * (width - _DIGIT) / 2, step * up) for step in _STEPS for right, up in _WAYS)


_Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float, height: float) -> _Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
