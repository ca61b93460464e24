"""Tables as both formats print them: of facts that were lost or gained, and of the models themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressknow.compress.schemes import schemes_of, word_of
from compressknow.report.format import NONE, answer, count, millions, number, ordinal, percent, plain, size
from compressknow.report.records import Card, ModelFacts
from compressknow.stats.records import ChangedFact, Estimate

_FACT_COLUMNS = ("Asked", "Right answer", "Original", "Compressed", "Rank of the right answer", "Relation")
_BLANK = "[MASK]"


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
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bars: tuple[Estimate | None, ...] = ()
    bars_after: int = 0
    links: tuple[str, ...] = ()
    prose: bool = False
    pinned: int = 0
    sortable: bool = False


@dataclass(frozen=True, slots=True)
class FactList:
    """Facts in two tables: those shown at once, and the rest; `left_out` is how many only the JSON has."""

    total: int
    first: Table | None
    rest: Table | None
    left_out: int


def fact_list(facts: tuple[ChangedFact, ...], limit: int, shown: int) -> FactList:
    """The first `limit` facts, `shown` of them at once."""
    rows = tuple(_fact_row(fact) for fact in facts[:limit])
    first = Table("", _FACT_COLUMNS, rows[:shown], prose=True) if rows else None
    rest = Table("", _FACT_COLUMNS, rows[shown:], prose=True) if rows[shown:] else None
    return FactList(len(facts), first, rest, len(facts) - len(rows))


def _fact_row(fact: ChangedFact) -> tuple[str, ...]:
    return (
        plain(fact.prompt.replace(_BLANK, "___"), 300),
        plain(fact.gold),
        answer(fact.before),
        answer(fact.after),
        f"{ordinal(fact.rank_before)} → {ordinal(fact.rank_after)}" if fact.rank_before or fact.rank_after else "-",
        plain(fact.relation, 60),
    )


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
        Entry("Kind", f"{plain(model.architecture, 80)}, {plain(model.family, 40)}, {plain(model.dtype, 40)}"),
        Entry("Parameters", _parameters(model)),
    ]
    return tuple(entry for entry in entries if entry)


def _at(name: str, revision: str | None) -> str:
    return plain(name, 120) + (f"@{plain(revision, 60)}" if revision else "")


def _source(source: Mapping[str, Any]) -> str:
    return _at(str(source.get("name", "")), str(source["revision"]) if source.get("revision") else None)


def _parameters(model: ModelFacts) -> str:
    zeros = f", {percent(model.zeros, model.parameters)} of them zero" if model.zeros is not None else ""
    return f"{millions(model.parameters)}{zeros}"


def layers(model: ModelFacts) -> Table | None:
    """Parameters, zeros and error of each group of layers; None for a checkpoint without a manifest."""
    rows = tuple(_layer_row(name, group) for name, group in model.groups.items() if group.get("parameters"))
    columns = ("Group of layers", "Parameters", "Zeros", "Pruned", word_of(schemes_of(model.recipe)), "Relative error")
    return Table("What was done to which layers", columns, rows) if rows else None


def _layer_row(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    parameters = int(group["parameters"])

    def part(key: str) -> str:
        return percent(int(group[key]), parameters) if group.get(key) is not None else NONE

    error = group.get("relative_error")
    return (
        plain(name, 60),
        count(parameters),
        part("zeros_after"),
        part("pruned"),
        part("quantized"),
        number(float(error), 4) if error is not None else NONE,
    )


def speed(original: ModelFacts, model: ModelFacts) -> Table | None:
    """Facts a second and peak memory, where both were measured or at least one was."""
    rows = tuple(
        (
            who,
            plain(m.speed.device, 60),
            f"{m.speed.facts_per_second:,.1f}",
            size(m.speed.peak_bytes) if m.speed.peak_bytes is not None else NONE,
        )
        for who, m in (("original", original), ("compressed", model))
        if m.speed
    )
    columns = ("Model", "Device", "Facts a second", "Peak memory")
    return Table("Speed and memory, measured on this machine", columns, rows) if rows else None


def run_entries(card: Card) -> tuple[Entry, ...]:
    """How the card was made, for making it again."""
    seeds = sorted({probe.seed for c in card.comparisons for probe in c.probes})
    versions = ", ".join(f"{plain(name, 40)} {plain(version, 40)}" for name, version in card.versions.items())
    return (Entry("Seed", ", ".join(map(str, seeds)) or NONE), Entry("Versions", versions or NONE))


def hashes(card: Card) -> tuple[Entry, ...]:
    """The SHA-256 of every model, in full."""
    models = (card.original, *(comparison.model for comparison in card.comparisons))
    return tuple(Entry(plain(model.name, 60), plain(model.sha256, 80), code=True) for model in models)
