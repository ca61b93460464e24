"""Facts that were read and not evaluated, by reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.format import count, percent, plain
from compressknow.report.card.section import Context, Section
from compressknow.report.parts import Part
from compressknow.report.tables import Table
from compressknow.stats.records import ProbeFigures


class Dropped(Section):
    """A row a reason and probe."""

    title = "Dropped facts"
    order = 80

    def parts(self, context: Context) -> Iterator[Part]:
        if rows := tuple(row for probe in context.comparison.probes for row in _rows(probe)):
            columns = ("Reason", "Probe", "Facts", "Of those read")
            yield Table("Facts that were dropped", columns, rows, captioned=False)

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return {
            "facts_read": probe.facts_read,
            "dropped": dict(probe.dropped),
            "limit": probe.limit,
            "seed": probe.seed,
        }


def _rows(probe: ProbeFigures) -> Iterator[tuple[str, ...]]:
    read = max(probe.facts_read, sum(probe.dropped.values()))
    for reason, number in probe.dropped.items():
        if number:
            yield plain(reason, 120), plain(probe.probe, 60), count(number), percent(number, read)
