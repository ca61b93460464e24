"""Sections on certainty: how sure the figures are, and how sure both models are of their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from compressknow.base.format import NONE, count, p_value, percent, plain, points, share
from compressknow.comparison.clusters import FEWEST
from compressknow.comparison.distributions import CALIBRATION_BINS
from compressknow.comparison.intervals import mcnemar, paired_difference, proportion
from compressknow.comparison.records import Certainty, Confidence, Counts, Estimate, ReliabilityBin, Third
from compressknow.pages import drawing
from compressknow.pages.card.sections import Context, Section
from compressknow.pages.parts import Chart, Charts, Folded, Note, Part, Table
from compressknow.pages.records import write_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class HowSure(Section):
    """Table of one row per figure and one column per probe, and one of all where there are several."""

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
        comparison = context.comparison
        columns = [(plain(each.probe, 60), each.counts, each.certainty) for each in comparison.probes]
        columns += [("all", comparison.counts, comparison.certainty)] if len(columns) > 1 else []
        columns = [each for each in columns if each[1].known_before]
        # On a page of many models the verdict alone says it; the JSON has it all.
        if not columns or context.limits.relations is not None:
            return
        rows = tuple((name, *(write(counts, sure) for _, counts, sure in columns)) for name, write in _ROWS)
        yield Table(
            "Intervals, and the smallest loss seen", ("Estimate", *(each[0] for each in columns)), rows, captioned=False
        )
        yield from _note_missing_clusters(columns)


def _note_missing_clusters(columns: Sequence[tuple[str, Counts, Certainty]]) -> Iterator[Note]:
    for name, _, sure in columns:
        where = f" of {name}" if len(columns) > 1 else ""
        if sure.relations == 1:
            yield Note(f"All known facts{where} are of one relation: no clusters, so no interval over relations.")
        elif sure.relations < FEWEST:
            yield Note(f"The known facts{where} are of {sure.relations} relations: too few for an interval over these.")


def _write_interval(figure: Estimate, write: Callable[[float], str] = share) -> str:
    return NONE if figure.low is None else write_estimate(figure, write)


_ROWS: tuple[tuple[str, Callable[[Counts, Certainty], str]], ...] = (
    ("Known facts", lambda counts, _: count(counts.known_before)),
    ("Relations with known facts", lambda _, sure: count(sure.relations)),
    (
        "Knowledge kept, simple interval",
        lambda counts, _: _write_interval(proportion(counts.both, counts.known_before)),
    ),
    ("Knowledge kept, interval over relations", lambda _, sure: _write_interval(sure.kept)),
    ("Difference of accuracy, simple interval", lambda counts, _: write_estimate(paired_difference(counts), points)),
    ("Difference of accuracy, interval over relations", lambda _, sure: _write_interval(sure.difference, points)),
    (
        "Net change against chance, by relation",
        lambda _, sure: p_value(sure.test.p) if sure.test.unit == "relation" else NONE,
    ),
    ("Net change against chance, facts as independent", lambda counts, _: p_value(mcnemar(counts))),
    ("Smallest net loss seen", lambda _, sure: share(sure.smallest_loss)),
    (
        "Known facts to see a net loss of 2 %",
        lambda _, sure: NONE if sure.facts_for_two is None else count(sure.facts_for_two),
    ),
)


_BINS = ("Confidence", "Original's answers", "Right", "Compressed model's answers", "Right")
# A dot of fewer answers than this says nothing of calibration: it is drawn hollow.
_FEW = 10
_DRAWN = (
    "On the dotted line a model is right as often as it is sure; below it is too sure. Hollow dots rest on fewer than "
    f"{_FEW} answers."
)


class Confident(Section):
    """Table, note and two charts for each probe that gives probabilities of answers."""

    title = "Confidence"
    order = 48
    glossary = (
        ("Confidence", "the probability that a model gives to its answer, among all answers that it could give."),
        (
            "Confidently wrong",
            "a wrong answer of which the model is surer than the original is of half of its answers.",
        ),
        (
            "Calibration",
            "whether answers of 80 % confidence are right 80 % of the time: then the dots lie on the diagonal.",
        ),
    )
    method = (
        "Thirds are of the facts that the original knew, by the probability of its answer. An answer is confidently "
        "wrong if it is wrong and its probability is above the median of the original's over all facts.",
    )

    def parts(self, context: Context) -> Iterator[Part]:
        # On a page of many models this would be the most of it; the JSON has it all.
        if context.limits.relations is not None:
            return
        for probe in context.comparison.probes:
            if probe.confidence:
                yield from _list_parts(plain(probe.probe, 60), probe.confidence)


def _list_parts(name: str, confidence: Confidence) -> Iterator[Part]:
    if confidence.thirds:
        yield _tabulate_thirds(name, confidence.thirds)
    yield Note(_describe_wrong(name, confidence), _DRAWN)
    sides = {"Original": confidence.reliability_original, "Compressed": confidence.reliability_compressed}
    yield Charts(tuple(_chart_calibration(name, side, bins) for side, bins in sides.items()), f"Calibration, {name}")
    yield Folded(f"Calibration, {name}, bin by bin", (_tabulate_bins(name, *sides.values()),))


def _tabulate_thirds(name: str, thirds: Sequence[Third]) -> Table:
    return Table(
        f"{name}: kept by the original's confidence",
        ("Original's answer", "Its confidence", "Known before", "Lost", "Kept"),
        tuple(
            (
                plain(third.name, 40),
                f"{share(third.low).removesuffix(' %')} to {share(third.high)}",
                count(third.counts.known_before),
                count(third.counts.lost),
                write_estimate(third.kept),
            )
            for third in thirds
        ),
        bars=tuple(third.kept for third in thirds),
        bars_after=4,
    )


def _describe_wrong(name: str, told: Confidence) -> str:
    sides = (
        f"{count(part)} of the {whose}'s {count(wrong)} wrong answers ({percent(part, wrong)})"
        for whose, part, wrong in (
            ("compressed model", told.confidently_wrong_compressed, told.wrong_compressed),
            ("original", told.confidently_wrong_original, told.wrong_original),
        )
    )
    return (
        f"Confidently wrong on {name}: {' and '.join(sides)} are surer than the original's median "
        f"({share(told.median)})."
    )


def _chart_calibration(name: str, side: str, bins: Sequence[ReliabilityBin]) -> Chart:
    told = ", ".join(
        f"at {share(each.confidence)} confidence {percent(each.right, each.facts)} right" for each in bins if each.facts
    )
    title = f"Calibration of the {side.lower()} model, {name}"
    return Chart(title, f"{told[:1].upper()}{told[1:]}.", partial(_draw, bins=bins), height=300, heading=side)


def _draw(plot: Axes, bins: Sequence[ReliabilityBin]) -> None:
    plot.plot([0, 100], [0, 100], color=drawing.MUTED, linestyle=(0, (2, 3)), linewidth=1)
    dots = [(100 * each.confidence, 100 * each.right / each.facts, each.facts) for each in bins if each.confidence]
    plot.plot([x for x, _, _ in dots], [y for _, y, _ in dots], color=drawing.SERIES[0], linewidth=1.2)
    for x, y, facts in dots:
        inside = drawing.PAPER if facts < _FEW else drawing.SERIES[0]
        plot.plot([x], [y], "o", color=inside, markersize=7, markeredgecolor=drawing.SERIES[0])
    plot.set_xlim(-2, 102)
    plot.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    plot.set_xlabel("confidence; right answers upwards", fontsize=11, loc="left")
    drawing.set_percent_axis(plot, 0)


def _tabulate_bins(name: str, original: Sequence[ReliabilityBin], compressed: Sequence[ReliabilityBin]) -> Table:
    rows = []
    for place, (before, after) in enumerate(zip(original, compressed, strict=True)):
        if before.facts or after.facts:
            ends = (100 * edge / CALIBRATION_BINS for edge in (place, place + 1))
            rows.append((" to ".join(f"{end:.0f}" for end in ends) + " %", *_make_cells(before), *_make_cells(after)))
    return Table(f"Calibration of both models, {name}", _BINS, tuple(rows))


def _make_cells(told: ReliabilityBin) -> tuple[str, str]:
    return count(told.facts), percent(told.right, told.facts) if told.facts else NONE
