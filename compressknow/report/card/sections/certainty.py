"""How sure the figures are: intervals over relations beside the simple ones, and which loss could have been seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from compressknow.format import NONE, count, estimate, plain, points, share
from compressknow.report.card.section import Context, Section
from compressknow.report.parts import Note, Part
from compressknow.report.records import Comparison, certainty_to_json
from compressknow.report.tables import Table
from compressknow.stats.clusters import FEWEST
from compressknow.stats.intervals import RESAMPLES, SEED, paired_difference
from compressknow.stats.records import Certainty, Counts, Estimate, ProbeFigures

# Of a probe, or of all together: name, counts, knowledge kept, how sure that is.
_Figures = tuple[str, Counts, Estimate, Certainty]


class HowSure(Section):
    """A row a figure, a column a probe, and one of all where there are several."""

    title = "How sure the figures are"
    order = 57
    glossary = (
        (
            "Interval over relations",
            "facts of one relation are learned and lost together, so that they tell less than as many unrelated ones: "
            "this interval says how the figure would vary with other relations.",
        ),
        (
            "Smallest loss seen",
            "a smaller net loss than this would often (in more than one of five cases) pass for chance.",
        ),
    )
    method = (
        "Intervals over relations are of a bootstrap of whole relations (Miller 2024, arXiv 2411.00640; BCa at the "
        f"expanded levels of Hesterberg 2015; {count(RESAMPLES)} resamples, seed {SEED}).",
        "The smallest loss seen is that which the exact McNemar test shows with a power of 80 % (Duffy 1984), were "
        "facts gained as often as they were here.",
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
        yield plain(probe.probe, 60), probe.counts, probe.kept, probe.certainty
    if len(comparison.probes) > 1:
        yield "all", comparison.counts, comparison.kept, comparison.certainty


def _without_clusters(columns: list[_Figures]) -> Iterator[Note]:
    for name, _, _, sure in columns:
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


_ROWS: tuple[tuple[str, Callable[[_Figures], str]], ...] = (
    ("Known facts", lambda figures: count(figures[1].known_before)),
    ("Relations with known facts", lambda figures: count(figures[3].relations)),
    ("Knowledge kept, simple interval", lambda figures: _written(figures[2])),
    ("Knowledge kept, interval over relations", lambda figures: _written(figures[3].kept)),
    ("Difference of accuracy, simple interval", _difference),
    ("Difference of accuracy, interval over relations", lambda figures: _written(figures[3].difference, points)),
    ("Smallest net loss seen", lambda figures: points(figures[3].smallest_loss).removeprefix("+")),
    ("Known facts to see a net loss of 2 points", lambda figures: _number(figures[3].facts_for_two)),
)


def _number(facts: int | None) -> str:
    return NONE if facts is None else count(facts)
