"""Tables and labelled values as both formats print them, and what those are of any model and any probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from compressknow.format import NONE, count, estimate, millions, p_value, percent, plain, share
from compressknow.pages.records import Card, ModelFacts
from compressknow.stats.records import Estimate, Group, ProbeFigures

_GROUP_COLUMNS = ("Facts", "Known before", "Lost", "Gained", "Kept", "Answer changed", "p (Holm)")


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, one tuple a row; the first cell is the header of its row.

    Attributes
    ----------
    bars : a figure a row that HTML draws as a bar, after the column `bars_after`; empty for none.
    links : the id that each row's header leads to; empty for none.
    prose : all cells are text, not figures.
    pinned : so many rows stay on top however the others are sorted.
    sortable : a click on a column's header sorts by it.
    captioned : Markdown says the caption too; not where the section's title says it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bars: tuple[Estimate | None, ...] = ()
    bars_after: int = 0
    links: tuple[str, ...] = ()
    prose: bool = False
    pinned: int = 0
    sortable: bool = False
    captioned: bool = True


_SHORT = 12  # hexadecimal digits that tell any two checkpoints apart


@dataclass(frozen=True, slots=True)
class Entry:
    """A labelled value; `full` is what a shortened value stands for, `code` that it is to be copied as it is."""

    label: str
    value: str
    code: bool = False
    full: str = ""


def identity(model: ModelFacts) -> tuple[Entry, ...]:
    """Which checkpoint this is, where it came from and what was done to it."""
    entries = [
        Entry("Name", _at(model.name, model.revision), code=True),
        Entry("SHA-256", plain(model.sha256, 80)[:_SHORT], code=True, full=plain(model.sha256, 80)),
        Entry("Made from", _source(model.source), code=True) if model.source else None,
        Entry("Setup", plain(model.setup, 80)) if model.setup else None,
        Entry("Quantization", plain(model.quantization, 200)) if model.quantization else None,
        *_runtime(model.runtime or {}),
        Entry("Kind", f"{plain(model.architecture, 80)}, {plain(model.family, 40)}, {plain(model.dtype, 40)}"),
        Entry("Parameters", _parameters(model)),
    ]
    return tuple(entry for entry in entries if entry)


def _runtime(runtime: Mapping[str, Any]) -> Iterator[Entry]:
    """What ran it, where that was not transformers, and how it stores each group of layers."""
    if runtime:
        yield Entry("Runtime", plain(" ".join(filter(None, (runtime["name"], runtime.get("build")))), 80))
    if types := runtime.get("types"):
        yield Entry("Stored as", plain("; ".join(f"{group} {_shares(kinds)}" for group, kinds in types.items()), 400))


def _shares(kinds: Mapping[str, int]) -> str:
    """Types with their shares of the parameters, where there are several.

    >>> _shares({"Q4_K": 3, "F32": 1}), _shares({"Q6_K": 5})
    ('Q4_K 75.0 %, F32 25.0 %', 'Q6_K')
    """
    if len(kinds) == 1:
        return next(iter(kinds))
    total = sum(kinds.values())
    return ", ".join(f"{kind} {percent(number, total)}" for kind, number in kinds.items())


def _at(name: str, revision: str | None) -> str:
    return plain(name, 120) + (f"@{plain(revision, 60)}" if revision else "")


def _source(source: Mapping[str, Any]) -> str:
    return _at(str(source.get("name", "")), str(source["revision"]) if source.get("revision") else None)


def _parameters(model: ModelFacts) -> str:
    known = model.zeros is not None and model.parameters is not None
    zeros = f", {percent(model.zeros or 0, model.parameters or 0)} of them zero" if known else ""
    return f"{millions(model.parameters)}{zeros}"


def run_entries(card: Card) -> tuple[Entry, ...]:
    """How the card was made, for making it again."""
    seeds = sorted({probe.seed for c in card.comparisons for probe in c.probes})
    versions = ", ".join(f"{plain(name, 40)} {plain(version, 40)}" for name, version in card.versions.items())
    return (Entry("Seed", ", ".join(map(str, seeds)) or NONE), Entry("Versions", versions or NONE))


def hashes(card: Card) -> tuple[Entry, ...]:
    """The SHA-256 of every model, in full."""
    models = (card.original, *(comparison.model for comparison in card.comparisons))
    return tuple(Entry(plain(model.name, 60), plain(model.sha256, 80), code=True) for model in models)


def headline_accuracy(probe: ProbeFigures) -> tuple[Estimate, Estimate]:
    """Of the original and of the compressed model, averaged as the probe's protocol does."""
    if probe.average == "macro":
        return probe.macro_original, probe.macro_compressed
    return probe.accuracy_original, probe.accuracy_compressed


def groups_table(groups: tuple[Group, ...], kind: str, caption: str, *, bars: bool = True) -> Table:
    """A row a group; `kind` is what a group is of."""
    return Table(
        caption,
        (kind, *_GROUP_COLUMNS),
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
