"""Knowledge kept against size: every recipe of a search, the front of the best, and the winner."""

from __future__ import annotations

from collections.abc import Sequence

from compressknow.report.drawing import INK, MUTED, SERIES, axes, percent_axis
from compressknow.report.figures import share, size
from compressknow.report.search.records import SIZES, Search, Tried
from compressknow.report.text import plain

_UNITS = {"sparse-bytes": (1e6, "MB"), "bytes": (1e6, "MB"), "nonzero": (1e6, "millions")}


def pareto(search: Search) -> str:
    """The chart, as an SVG element."""
    unit, name = _UNITS[search.minimize]
    points = [t for t in search.tried if t.kept.value is not None and t.kind != "layers"]
    best = front(points, search.minimize)
    told = "; ".join(f"{plain(t.setup, 60)} {share(t.kept.value)}, {_told(t, search)}" for t in best)
    title = f"Knowledge kept by {SIZES[search.minimize]}"
    with axes(300, "pareto-chart", title, f"The best at each size: {told}.") as (plot, drawn):
        for kind, marker, colour, label in (
            ("paper", "s", MUTED, "the paper's setups"),
            ("search", "o", SERIES[0], "chosen by the search"),
        ):
            shown = [t for t in points if t.kind == kind]
            x = [t.sizes[search.minimize] / unit for t in shown]
            plot.plot(x, [100 * (t.kept.value or 0) for t in shown], marker, color=colour, markersize=5, label=label)
        edge = [(t.sizes[search.minimize] / unit, 100 * (t.kept.value or 0)) for t in best]
        plot.plot(*zip(*edge, strict=True), "-", color=SERIES[0], linewidth=1.2, drawstyle="steps-post")
        plot.axhline(100 * search.keep, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        if search.winner:
            at = search.winner.sizes[search.minimize] / unit, 100 * (search.winner.kept.value or 0)
            plot.plot(*at, "*", color=INK, markersize=13, label="the winner")
        plot.set_xlabel(f"{SIZES[search.minimize]}, {name}")
        # Outside of the plot: points may lie anywhere in it.
        room = {"ncols": 3, "columnspacing": 1, "handletextpad": 0, "frameon": False, "fontsize": 10}
        plot.figure.legend(loc="outside upper left", **room)
        percent_axis(plot, 0)
    return drawn()


def front(points: Sequence[Tried], minimize: str) -> list[Tried]:
    """Those of which none keeps more at the same size or less, the smallest first."""
    best: list[Tried] = []
    for point in sorted(points, key=lambda t: (t.sizes[minimize], -(t.kept.value or 0))):
        if not best or (point.kept.value or 0) > (best[-1].kept.value or 0):
            best.append(point)
    return best


def _told(tried: Tried, search: Search) -> str:
    amount = tried.sizes[search.minimize]
    return f"{amount / 1e6:.1f} millions" if search.minimize == "nonzero" else size(amount)
