"""What rounding alone changes, and the runtime alone: the noise floors in the words and the charts of a page."""

from __future__ import annotations

from collections.abc import Iterable

from compressknow.evaluate.records import NoiseFloor
from compressknow.format import count, estimate, percent, plain, share
from compressknow.pages.drawing import Level
from compressknow.pages.records import Comparison
from compressknow.stats.intervals import proportion
from compressknow.stats.records import ProbeFigures


def beside_rounding(probes: Iterable[ProbeFigures]) -> str:
    """Return what share of the answers is another one, and what rounding alone changes, and the runtime alone, over the
    probes that tell; nothing where none does.
    """
    told = [probe for probe in probes if any(floor and floor.n for floor in _floors(probe).values())]
    if not told:
        return ""
    facts = sum(probe.counts.n for probe in told)
    changed = sum(round((probe.answer_changed or 0.0) * probe.counts.n) for probe in told)
    parts, could_be_all = [], False
    for name in _floors(told[0]):
        floors = [floor for probe in told if (floor := _floors(probe)[name]) and floor.n]
        if floors:
            alone = proportion(sum(floor.changed for floor in floors), sum(floor.n for floor in floors))
            could_be_all |= changed <= (alone.high or 0.0) * facts
            parts.append(f"{name} alone changes {estimate(alone.value, alone.low, alone.high)}")
    explained = ", which could be all of it" if could_be_all else ""
    return f" Of its answers, {percent(changed, facts)} differ; {', '.join(parts)}{explained}."


def _floors(probe: ProbeFigures) -> dict[str, NoiseFloor | None]:
    return {"rounding": probe.noise_floor, "the runtime": probe.runtime_noise_floor}


def probes_of(comparisons: Iterable[Comparison]) -> Iterable[ProbeFigures]:
    """One of each name: what is the original's alone is the same in all."""
    return {probe.probe: probe for comparison in comparisons for probe in comparison.probes}.values()


def kept_by_rounding(probes: Iterable[ProbeFigures]) -> float | None:
    """Of all that the original knows, the share that it still knows in another precision (0 to 1).

    A probe counts as much as it has known facts, as in knowledge kept. None where the original knows nothing, or where
    this was not found for every probe of which it knows something.
    """
    known = [probe for probe in probes if probe.counts.known_before]
    shares = [probe.noise_floor.kept for probe in known if probe.noise_floor]
    weights = [probe.counts.known_before for probe in known]
    measured = [each for each in shares if each is not None]
    if not known or len(measured) < len(known):
        return None
    return sum(weight * each for weight, each in zip(weights, measured, strict=True)) / sum(weights)


def mark(kept: float | None) -> tuple[Level, ...]:
    """The mark of what rounding alone keeps; none where that is not known."""
    return () if kept is None else (Level("rounding alone", kept),)


def mark_in_words(probes: Iterable[ProbeFigures], name: str) -> str:
    """What the mark of this name shows; nothing where there is none."""
    probes = [probe for probe in probes if probe.counts.known_before]
    kept = kept_by_rounding(probes)
    if kept is None:
        return ""
    floors = [probe.noise_floor for probe in probes if probe.noise_floor]
    known = sum(floor.known for floor in floors)
    facts = "1 fact that the original knew" if known == 1 else f"{count(known)} facts that the original knew"
    again = plain(floors[0].computed_in, 40)
    return f"{name} shows what rounding alone keeps: {share(kept)}, by {facts} and answered once more in {again}."
