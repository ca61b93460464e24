"""The tables of what two models know of the same facts, in both directions, as text."""

from __future__ import annotations

from collections.abc import Callable

from compressknow.report.contrast.records import Behaviour, SideBySide
from compressknow.report.figures import NONE, at_least, count, estimate, number, ordinal, p_value, share
from compressknow.report.records import Estimate, Group, Movement, ProbeFigures
from compressknow.report.tables import FactList, Table
from compressknow.report.text import answer, plain

_COLUMNS = ("Asked", "Right answer", "A answers", "B answers", "Known by", "Relation")
_GROUP_COLUMNS = ("Facts", "A knows", "of these B", "B knows", "of these A", "Answer differs", "p (Holm)")
_BLANK = "[MASK]"

# A probe's figures with A as the original, and with B.
Both = tuple[ProbeFigures, ProbeFigures]


def probes_of(behaviour: Behaviour) -> tuple[Both, ...]:
    """Each probe's figures in both directions."""
    there, back = behaviour.b_against_a.comparisons[0].probes, behaviour.a_against_b.comparisons[0].probes
    return tuple(zip(there, back, strict=True))


def figures_table(probes: tuple[Both, ...]) -> Table:
    """Every figure that says something of two models on a level, a column a probe."""
    rows = tuple((name, *(write(both[side]) for both in probes)) for name, side, write in _FIGURES)
    columns = ("Figure", *(plain(there.probe, 60) for there, _ in probes))
    return Table("What each knows, and how far their answers are apart", columns, rows)


def group_tables(probes: tuple[Both, ...]) -> tuple[Table, ...]:
    """By school subject and by relation, of each probe."""
    found = []
    for there, back in probes:
        name = plain(there.probe, 60)
        found.append(_groups(f"{name} by school subject", "School subject", there.by_subject, back.by_subject))
        found.append(_groups(f"{name} by relation", "Relation", there.by_relation, back.by_relation))
    return tuple(table for table in found if table.rows)


def answers_list(answers: tuple[SideBySide, ...], limit: int, shown: int) -> FactList:
    """The facts that are answered differently, `shown` of them at once."""
    rows = tuple(map(_row, answers[:limit]))
    first, rest = (Table("", _COLUMNS, some, prose=True) if some else None for some in (rows[:shown], rows[shown:]))
    return FactList(len(answers), first, rest, len(answers) - len(rows))


def _row(fact: SideBySide) -> tuple[str, ...]:
    return (
        plain(fact.prompt.replace(_BLANK, "___"), 300),
        plain(fact.gold),
        _top(fact.top_a, fact.rank_a),
        _top(fact.top_b, fact.rank_b),
        fact.known_by,
        plain(fact.relation, 60),
    )


def _top(answers: tuple[str, ...], rank: int | None) -> str:
    """The answers, best first, and the right one's rank where it is none of them."""
    named = ", ".join(answer(plain(each, 60)) for each in answers)
    return f"{named} (the right one is {ordinal(rank)})" if rank and rank > len(answers) else named


def _groups(caption: str, kind: str, there: tuple[Group, ...], back: tuple[Group, ...]) -> Table:
    others = {group.name: group for group in back}
    rows = tuple(
        (
            plain(group.name, 80),
            count(group.counts.n),
            count(group.counts.known_before),
            share(group.kept.value),
            count(group.counts.known_after),
            share(others[group.name].kept.value),
            share(group.answer_changed),
            p_value(group.p_holm).removeprefix("p = ").removeprefix("p "),
        )
        for group in there
    )
    return Table(caption, (kind, *_GROUP_COLUMNS), rows, sortable=len(rows) > 1)


def _written(figure: Estimate) -> str:
    return estimate(figure.value, figure.low, figure.high)


def _moved(movement: Movement | None, get: Callable[[Movement], float]) -> str:
    return NONE if movement is None else at_least(number(get(movement), 4), movement.is_lower_bound)


def _rest(movement: Movement | None) -> str:
    return _pair(movement.rest if movement else None, share)


def _pair(pair: tuple[float, float] | None, write: Callable[[float], str]) -> str:
    return NONE if pair is None else f"{write(pair[0])}, {write(pair[1])}"


# The direction that a figure is of, and the figure.
_THERE, _BACK = 0, 1
_FIGURES: tuple[tuple[str, int, Callable[[ProbeFigures], str]], ...] = (
    ("Facts asked", _THERE, lambda p: count(p.counts.n)),
    ("A is right", _THERE, lambda p: _written(p.accuracy_original)),
    ("B is right", _THERE, lambda p: _written(p.accuracy_compressed)),
    ("Both know", _THERE, lambda p: count(p.counts.both)),
    ("Only A knows", _THERE, lambda p: count(p.counts.lost)),
    ("Only B knows", _THERE, lambda p: count(p.counts.gained)),
    ("Neither knows", _THERE, lambda p: count(p.counts.neither)),
    ("Of what A knows, B keeps", _THERE, lambda p: _written(p.kept)),
    ("Of what B knows, A keeps", _BACK, lambda p: _written(p.kept)),
    ("Flips (known by one alone)", _THERE, lambda p: share(p.counts.flips)),
    ("Is one better? (exact McNemar)", _THERE, lambda p: p_value(p.p)),
    ("Top answer differs", _THERE, lambda p: share(p.answer_changed)),
    ("Mean reciprocal rank, A and B", _THERE, lambda p: _pair(p.mrr, number)),
    ("Right answer among the top 5, A and B", _THERE, lambda p: _pair(p.p_at_5, share)),
    ("KL(A‖B), nats, mean", _THERE, lambda p: _moved(p.movement, lambda m: m.kl_mean)),
    ("KL(A‖B), median", _THERE, lambda p: _moved(p.movement, lambda m: m.kl_median)),
    ("KL(A‖B), 99th percentile", _THERE, lambda p: _moved(p.movement, lambda m: m.kl_p99)),
    ("KL(A‖B): rest's probability, A and B", _THERE, lambda p: _rest(p.movement)),
    ("KL(B‖A), nats, mean", _BACK, lambda p: _moved(p.movement, lambda m: m.kl_mean)),
    ("KL(B‖A), median", _BACK, lambda p: _moved(p.movement, lambda m: m.kl_median)),
    ("KL(B‖A), 99th percentile", _BACK, lambda p: _moved(p.movement, lambda m: m.kl_p99)),
    ("KL(B‖A): rest's probability, B and A", _BACK, lambda p: _rest(p.movement)),
)
