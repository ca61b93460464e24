"""What was kept of each relation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.format import count, plain
from compressknow.report.card.section import Context, Section
from compressknow.report.parts import Note, Part
from compressknow.report.probe_tables import groups_table
from compressknow.report.tables import Table
from compressknow.report.values import groups_to_json
from compressknow.stats.records import ProbeFigures


class Relations(Section):
    """A table a probe, a row a relation."""

    title = "By relation"
    order = 30

    def parts(self, context: Context) -> Iterator[Part]:
        tables = [_table(probe, context.limits.relations) for probe in context.comparison.probes if probe.by_relation]
        yield from tables
        if tables:
            yield Note(
                "p is of the exact McNemar test, adjusted over the relations of a table (Holm): below 0.05, chance "
                "hardly explains that a relation lost more than it gained, or less."
            )

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return {"by_relation": groups_to_json(probe.by_relation)}


def _table(probe: ProbeFigures, limit: int | None) -> Table:
    """All relations, or the `limit` that lost most."""
    caption, groups = f"{plain(probe.probe, 60)} by relation", probe.by_relation
    if limit is None or len(groups) <= limit:
        return groups_table(groups, "Relation", caption)
    most = sorted(groups, key=lambda group: -group.counts.lost)[:limit]
    others = count(len(groups) - limit)
    return groups_table(tuple(most), "Relation", f"{caption}, largest losses first; {others} more are in the JSON")
