"""What is said of a probe wherever it is shown: its headline accuracy, and what was kept of each group of its facts."""

from __future__ import annotations

from compressknow.format import count, estimate, p_value, plain, share
from compressknow.report.tables import Table
from compressknow.stats.records import Estimate, Group, ProbeFigures

_COLUMNS = ("Facts", "Known before", "Lost", "Gained", "Kept", "Answer changed", "p (Holm)")


def headline_accuracy(probe: ProbeFigures) -> tuple[Estimate, Estimate]:
    """Of the original and of the compressed model, averaged as the probe's protocol does."""
    if probe.average == "macro":
        return probe.macro_original, probe.macro_compressed
    return probe.accuracy_original, probe.accuracy_compressed


def groups_table(groups: tuple[Group, ...], kind: str, caption: str, *, bars: bool = True) -> Table:
    """A row a group; `kind` is what a group is of."""
    return Table(
        caption,
        (kind, *_COLUMNS),
        tuple(_group_row(group) for group in groups),
        bars=tuple(group.kept for group in groups) if bars else (),
        bars_after=5,
        sortable=len(groups) > 1,
    )


def _group_row(group: Group) -> tuple[str, ...]:
    counts = group.counts
    return (
        plain(group.name, 80),
        count(counts.n),
        count(counts.known_before),
        count(counts.lost),
        count(counts.gained),
        estimate(group.kept.value, group.kept.low, group.kept.high),
        share(group.answer_changed),
        p_value(group.p_holm).removeprefix("p = ").removeprefix("p "),
    )
