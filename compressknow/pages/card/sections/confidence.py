"""How sure both models are: what was kept by the original's confidence, wrong with confidence, and calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from compressknow.format import NONE, count, estimate, percent, plain, share
from compressknow.pages import drawing
from compressknow.pages.card.section import Context, Section
from compressknow.pages.drawing import Chart
from compressknow.pages.parts import Charts, Folded, Note, Part
from compressknow.pages.records import estimate_to_json
from compressknow.pages.tables import Table
from compressknow.stats.distributions import CALIBRATION_BINS
from compressknow.stats.records import Confidence, ProbeFigures, ReliabilityBin, Third

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = ("Confidence", "Original's answers", "Right", "Compressed model's answers", "Right")
# A dot of fewer answers than this says nothing of calibration: it is drawn hollow.
_FEW = 10
_DRAWN = (
    "On the dotted line a model is right as often as it is sure; below it is too sure. Hollow dots rest on fewer than "
    f"{_FEW} answers."
)


class Confident(Section):
    """A table, a note and two charts a probe that gives probabilities of answers."""

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
                yield from _parts(plain(probe.probe, 60), probe.confidence)

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return confidence_to_json(probe.confidence)


def confidence_to_json(confidence: Confidence | None) -> dict[str, Any]:
    """How sure both models are; None, and no thirds, where that cannot be told."""
    told = asdict(confidence) if confidence else {}
    sides = ("original", "compressed")
    keys = ["confidence_median", *(f"{key}_{side}" for key in ("wrong", "confidently_wrong") for side in sides)]
    return {
        **{key: told.get(key.removeprefix("confidence_")) for key in keys},
        "by_confidence": {third.name: _third_to_json(third) for third in confidence.thirds} if confidence else {},
        **{f"reliability_{side}": list(told.get(f"reliability_{side}", ())) for side in sides},
    }


def _third_to_json(third: Third) -> dict[str, Any]:
    return {
        "confidence": [third.low, third.high],
        **{"n": third.counts.n, "both": third.counts.both, "lost": third.counts.lost},
        **estimate_to_json("kept", third.kept),
    }


def _parts(name: str, confidence: Confidence) -> Iterator[Part]:
    if confidence.thirds:
        yield _thirds(name, confidence.thirds)
    yield Note(_confidently_wrong(name, confidence), _DRAWN)
    sides = {"Original": confidence.reliability_original, "Compressed": confidence.reliability_compressed}
    yield Charts(tuple(_chart(name, side, bins) for side, bins in sides.items()), f"Calibration, {name}")
    yield Folded(f"Calibration, {name}, bin by bin", (_bins(name, *sides.values()),))


def _thirds(name: str, thirds: Sequence[Third]) -> Table:
    return Table(
        f"{name}: kept by the original's confidence",
        ("Original's answer", "Its confidence", "Known before", "Lost", "Kept"),
        tuple(
            (
                plain(third.name, 40),
                f"{share(third.low).removesuffix(' %')} to {share(third.high)}",
                count(third.counts.known_before),
                count(third.counts.lost),
                estimate(third.kept.value, third.kept.low, third.kept.high),
            )
            for third in thirds
        ),
        bars=tuple(third.kept for third in thirds),
        bars_after=4,
    )


def _confidently_wrong(name: str, told: Confidence) -> str:
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


def _chart(name: str, side: str, bins: Sequence[ReliabilityBin]) -> Chart:
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
    drawing.percent_axis(plot, 0)


def _bins(name: str, original: Sequence[ReliabilityBin], compressed: Sequence[ReliabilityBin]) -> Table:
    rows = []
    for place, (before, after) in enumerate(zip(original, compressed, strict=True)):
        if before.facts or after.facts:
            ends = (100 * edge / CALIBRATION_BINS for edge in (place, place + 1))
            rows.append((" to ".join(f"{end:.0f}" for end in ends) + " %", *_cells(before), *_cells(after)))
    return Table(f"Calibration of both models, {name}", _BINS, tuple(rows))


def _cells(told: ReliabilityBin) -> tuple[str, str]:
    return count(told.facts), percent(told.right, told.facts) if told.facts else NONE
