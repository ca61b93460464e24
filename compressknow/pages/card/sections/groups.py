"""What was kept of each group of facts: by relation, and by how widely the facts are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compressknow.format import count, plain, share
from compressknow.pages import drawing
from compressknow.pages.card.section import Context, Section
from compressknow.pages.drawing import Chart, percents
from compressknow.pages.parts import Beside, Note, Part
from compressknow.pages.records import groups_to_json
from compressknow.pages.tables import Table, groups_table
from compressknow.stats.records import Estimate, Group, ProbeFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Relations(Section):
    """A table a probe, a row a relation."""

    title = "By relation"
    order = 30

    def parts(self, context: Context) -> Iterator[Part]:
        tables = [
            _most_lost(probe, context.limits.relations) for probe in context.comparison.probes if probe.by_relation
        ]
        yield from tables
        if tables:
            yield Note(
                "p is of the exact McNemar test, adjusted over the relations of a table (Holm): below 0.05, chance "
                "hardly explains that a relation lost more than it gained, or less."
            )

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return {"by_relation": groups_to_json(probe.by_relation)}


def _most_lost(probe: ProbeFigures, limit: int | None) -> Table:
    """All relations, or the `limit` that lost most."""
    caption, groups = f"{plain(probe.probe, 60)} by relation", probe.by_relation
    if limit is None or len(groups) <= limit:
        return groups_table(groups, "Relation", caption)
    most = sorted(groups, key=lambda group: -group.counts.lost)[:limit]
    others = count(len(groups) - limit)
    return groups_table(tuple(most), "Relation", f"{caption}, largest losses first; {others} more are in the JSON")


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


def _tick(bin: str) -> str:
    """Short, or the fifth touches the fourth."""
    return bin.removesuffix(" %").replace(" to ", "\N{EN DASH}") if " to " in bin else bin


def _draw(plot: Axes, bins: Sequence[tuple[str, Estimate]]) -> None:
    for x, (_, kept) in enumerate(bins):
        value, low, high = percents(kept)
        plot.plot([x, x], [low, high], color=drawing.SERIES[0], linewidth=2, solid_capstyle="round")
        plot.plot([x], [value], "o", color=drawing.SERIES[0], markersize=8, markeredgecolor=drawing.PAPER)
        plot.annotate(share(kept.value), (x, value), (8, 0), textcoords="offset points", va="center", fontsize=11)
    plot.set_xlim(-0.4, len(bins) - 0.3)
    plot.set_xticks(range(len(bins)), [_tick(label) for label, _ in bins], fontsize=10)
    # The axis begins at the tens below the lowest interval.
    drawing.percent_axis(plot, max(0, int(min(percents(kept)[1] for _, kept in bins) // 10) * 10))
