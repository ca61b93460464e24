"""What was kept of facts that are widely known, and of those that are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compressknow.format import plain, share
from compressknow.report import drawing
from compressknow.report.card.section import Context, Section
from compressknow.report.drawing import Chart, percents
from compressknow.report.parts import Beside, Part
from compressknow.report.probe_tables import groups_table
from compressknow.report.values import groups_to_json
from compressknow.stats.records import Estimate, Group, ProbeFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Popularity(Section):
    """A table a probe, a row a popularity bin, and its chart."""

    title = "By popularity"
    order = 40

    def parts(self, context: Context) -> Iterator[Part]:
        for probe in context.comparison.probes:
            if bins := probe.by_popularity:
                name = plain(probe.probe, 60)
                table = groups_table(bins, "Popularity", f"{name} by popularity", bars=False)
                yield Beside(popularity_chart(bins, name), replace(table, sortable=False))

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return {"by_popularity": groups_to_json(probe.by_popularity)}


def popularity_chart(groups: Sequence[Group], name: str) -> Chart | None:
    """Knowledge kept by popularity bin, as dots with intervals; None where fewer than two bins have any."""
    bins = [(plain(group.name, 16), group.kept) for group in groups if group.kept.value is not None]
    if len(bins) < 2:
        return None
    told = ", ".join(f"{label} {share(kept.value)}" for label, kept in bins)
    title = f"Knowledge kept by popularity, {plain(name, 60)}"
    return Chart(title, f"From left to right: {told}.", lambda plot: _draw(plot, bins))


def _draw(plot: Axes, bins: Sequence[tuple[str, Estimate]]) -> None:
    for x, (_, kept) in enumerate(bins):
        value, low, high = percents(kept)
        plot.plot([x, x], [low, high], color=drawing.SERIES[0], linewidth=2, solid_capstyle="round")
        plot.plot([x], [value], "o", color=drawing.SERIES[0], markersize=8, markeredgecolor=drawing.PAPER)
        plot.annotate(share(kept.value), (x, value), (8, 0), textcoords="offset points", va="center", fontsize=11)
    plot.set_xlim(-0.4, len(bins) - 0.3)
    plot.set_xticks(range(len(bins)), [label for label, _ in bins])
    # The axis begins at the tens below the lowest interval.
    drawing.percent_axis(plot, max(0, int(min(percents(kept)[1] for _, kept in bins) // 10) * 10))
