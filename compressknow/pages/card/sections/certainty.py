"""How sure the figures are: intervals over relations beside the simple ones, and which loss could have been seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from compressknow.format import NONE, count, estimate, p_value, plain, points, share
from compressknow.pages.card.section import Context, Section
from compressknow.pages.parts import Note, Part
from compressknow.pages.records import Comparison, certainty_to_json
from compressknow.pages.tables import Table
from compressknow.stats.clusters import FEWEST
from compressknow.stats.intervals import mcnemar, paired_difference, proportion
from compressknow.stats.records import Certainty, Counts, Estimate, ProbeFigures

# Of a probe, or of all together: name, counts, how sure their figures are.
_Figures = tuple[str, Counts, Certainty]


class HowSure(Section):
    """A row a figure, a column a probe, and one of all where there are several."""

    title = "How sure the figures are"
    order = 57
    glossary = (
        (
            "Interval over relations",
            "facts of one relation are learned and lost together, so that they tell less than as many unrelated "
            "ones: this interval says how the figure would vary with other relations. It is what gates, advice and "
            "searches go by.",
        ),
        (
            "Smallest loss seen",
            "a smaller net loss than this, in percent of the known facts, would pass for chance in more than one of "
            "five cases.",
        ),
    )
    method = (
        "Intervals over relations are Wilson's, of as many independent facts as tell as much (design effect, Kish "
        f"1965; Korn and Graubard 1998), with Student's t; the difference's is of a linearized ratio. Below {FEWEST} "
        "relations there are none.",
        "The smallest loss seen is that which the test shows with a power of 80 % (Duffy 1984), were facts gained as "
        "often as they were here. Facts that hang together count as the independent ones that tell as much.",
    )

    def parts(self, context: Context) -> Iterator[Part]:
        columns = [each for each in _columns(context.comparison) if each[1].known_before]
        # On a page of many models the verdict alone says it; the JSON has it all.
        if not columns or context.limits.relations is not None:
            return
        rows = tuple((name, *(write(each) for each in columns)) for name, write in _ROWS)
        yield Table(
            "Intervals, and the smallest loss seen", ("Estimate", *(each[0] for each in columns)), rows, captioned=False
        )
        yield from _without_clusters(columns)

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return certainty_to_json(probe.certainty)


def _columns(comparison: Comparison) -> Iterator[_Figures]:
    for probe in comparison.probes:
        yield plain(probe.probe, 60), probe.counts, probe.certainty
    if len(comparison.probes) > 1:
        yield "all", comparison.counts, comparison.certainty


def _without_clusters(columns: list[_Figures]) -> Iterator[Note]:
    for name, _, sure in columns:
        where = f" of {name}" if len(columns) > 1 else ""
        if sure.relations == 1:
            yield Note(f"All known facts{where} are of one relation: no clusters, so no interval over relations.")
        elif sure.relations < FEWEST:
            yield Note(f"The known facts{where} are of {sure.relations} relations: too few for an interval over these.")


def _difference(figures: _Figures) -> str:
    simple = paired_difference(figures[1])
    return estimate(simple.value, simple.low, simple.high, points)


def _written(figure: Estimate, write: Callable[[float], str] = share) -> str:
    return NONE if figure.low is None else estimate(figure.value, figure.low, figure.high, write)


def _simple(figures: _Figures) -> str:
    return _written(proportion(figures[1].both, figures[1].known_before))


_ROWS: tuple[tuple[str, Callable[[_Figures], str]], ...] = (
    ("Known facts", lambda figures: count(figures[1].known_before)),
    ("Relations with known facts", lambda figures: count(figures[2].relations)),
    ("Knowledge kept, simple interval", _simple),
    ("Knowledge kept, interval over relations", lambda figures: _written(figures[2].kept)),
    ("Difference of accuracy, simple interval", _difference),
    ("Difference of accuracy, interval over relations", lambda figures: _written(figures[2].difference, points)),
    ("Net change against chance, by relation", lambda figures: _by_relation(figures[2])),
    ("Net change against chance, facts as independent", lambda figures: p_value(mcnemar(figures[1]))),
    ("Smallest net loss seen", lambda figures: share(figures[2].smallest_loss)),
    ("Known facts to see a net loss of 2 %", lambda figures: _number(figures[2].facts_for_two)),
)


def _by_relation(sure: Certainty) -> str:
    return p_value(sure.test.p) if sure.test.unit == "relation" else NONE


def _number(facts: int | None) -> str:
    return NONE if facts is None else count(facts)
