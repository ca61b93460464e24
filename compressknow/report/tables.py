"""A table as both formats print it, and the tables of facts that were lost or gained."""

from __future__ import annotations

from dataclasses import dataclass

from compressknow.report.figures import ordinal
from compressknow.report.records import ChangedFact, Estimate
from compressknow.report.text import answer, plain

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
