"""The facts themselves: those lost and gained, with what both models answered, and those not evaluated, by reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from compressknow.format import NONE, answer, count, ordinal, percent, plain
from compressknow.pages.card.section import Context, Section
from compressknow.pages.parts import BLANK, Part, fact_parts
from compressknow.pages.records import Comparison
from compressknow.pages.tables import Table
from compressknow.stats.records import ChangedFact, ProbeFigures

_COLUMNS = ("Prompt", "Right answer", "Original", "Compressed", "Rank of the right answer", "Relation")
_GRADED = (*_COLUMNS[:-1], "Grade now", "Relation")


class Lost(Section):
    """Facts that only the original knows."""

    title = "Facts lost"
    order = 10
    shows_facts = True

    def parts(self, context: Context) -> Iterator[Part]:
        if context.comparison.only_texts:
            return
        caption = "The original answered these right, the compressed model does not"
        yield from _facts(context.comparison.lost, caption, "lost", context.limits.lost, context.limits.shown)

    def to_json(self, comparison: Comparison) -> Mapping[str, Any]:
        return {"lost_facts": [asdict(fact) for fact in comparison.lost]}


class Gained(Section):
    """Facts that only the compressed model knows."""

    title = "Facts gained"
    order = 20
    shows_facts = True

    def parts(self, context: Context) -> Iterator[Part]:
        if context.comparison.only_texts:
            return
        caption = "The original answered these wrong, the compressed model answers them right"
        yield from _facts(context.comparison.gained, caption, "gained", context.limits.gained, context.limits.shown)

    def to_json(self, comparison: Comparison) -> Mapping[str, Any]:
        return {"gained_facts": [asdict(fact) for fact in comparison.gained]}


def _facts(facts: tuple[ChangedFact, ...], caption: str, shade: str, limit: int, shown: int) -> Iterator[Part]:
    graded = any(fact.grade_after for fact in facts)
    rows = tuple(_row(fact, graded=graded) for fact in facts[:limit])
    columns = _GRADED if graded else _COLUMNS
    return fact_parts(caption, columns, rows, shown, left_out=len(facts) - len(rows), shade=shade)


def _row(fact: ChangedFact, *, graded: bool) -> tuple[str, ...]:
    return (
        plain(fact.prompt.replace(BLANK, "___"), 300),
        plain(fact.gold),
        answer(fact.before),
        answer(fact.after),
        f"{ordinal(fact.rank_before)} → {ordinal(fact.rank_after)}" if fact.rank_before or fact.rank_after else "-",
        *([_grade(fact)] if graded else []),
        plain(fact.relation, 60),
    )


def _grade(fact: ChangedFact) -> str:
    back = ", comes back with one example" if fact.with_example else ""
    return plain(fact.grade_after, 20) + back if fact.grade_after else NONE


class Dropped(Section):
    """A row a reason and probe."""

    title = "Dropped facts"
    order = 80

    def parts(self, context: Context) -> Iterator[Part]:
        if rows := tuple(row for probe in context.comparison.probes for row in _dropped(probe)):
            columns = ("Reason", "Probe", "Facts", "Of those read")
            yield Table("Facts that were dropped", columns, rows, captioned=False)

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return {
            "facts_read": probe.facts_read,
            "dropped": dict(probe.dropped),
            "limit": probe.limit,
            "seed": probe.seed,
        }


def _dropped(probe: ProbeFigures) -> Iterator[tuple[str, ...]]:
    read = max(probe.facts_read, sum(probe.dropped.values()))
    for reason, number in probe.dropped.items():
        if number:
            yield plain(reason, 120), plain(probe.probe, 60), count(number), percent(number, read)
