"""What each wording of the facts says, where they were put in several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.format import count, estimate, percent, plain, share
from compressknow.pages.card.section import Context, Section
from compressknow.pages.parts import Note, Part
from compressknow.pages.records import counts_to_json, estimate_to_json
from compressknow.pages.tables import Table
from compressknow.stats.records import Counts, Estimate, ProbeFigures, Wordings

_COLUMNS = ("Wording", "Facts", "Right before", "Right after", "Lost", "Gained", "Kept")


class ByWording(Section):
    """A table a probe, a row a wording and one of the majority."""

    title = "By wording"
    order = 45

    def parts(self, context: Context) -> Iterator[Part]:
        for probe in context.comparison.probes:
            # On a page of many models the JSON alone has them.
            if (wordings := probe.wordings) and context.limits.relations is None:
                rows = [_row(str(each.number), each.counts, each.kept) for each in wordings.by_template]
                rows.append(_row("majority", probe.counts, probe.kept))
                yield Table(f"{plain(probe.probe, 60)} by wording", _COLUMNS, tuple(rows))
                yield Note(_told(wordings))

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return to_json(probe.wordings)


def _row(name: str, counts: Counts, kept: Estimate) -> tuple[str, ...]:
    return (
        name,
        count(counts.n),
        percent(counts.known_before, counts.n),
        percent(counts.known_after, counts.n),
        count(counts.lost),
        count(counts.gained),
        estimate(kept.value, kept.low, kept.high),
    )


def _told(wordings: Wordings) -> str:
    before, after = wordings.consistency
    return (
        "A fact is known if more than half of its wordings are answered right. Consistency, the share of pairs of "
        "wordings of a fact that are answered alike (Elazar et al. 2021): "
        f"{share(before)} before, {share(after)} after."
    )


def to_json(wordings: Wordings | None) -> dict[str, Any]:
    """By number of the wording, as text; empty where there is one wording."""
    before, after = wordings.consistency if wordings else (None, None)
    return {
        "by_template": {
            str(each.number): {**counts_to_json(each.counts), **estimate_to_json("kept", each.kept)}
            for each in (wordings.by_template if wordings else ())
        },
        "consistency_original": before,
        "consistency_compressed": after,
    }
