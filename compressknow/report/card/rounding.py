"""What rounding alone changes: the noise floor in the words and the charts of a page."""

from __future__ import annotations

from collections.abc import Iterable

from compressknow.format import count, percent, plain, share
from compressknow.report.drawing import Level
from compressknow.stats.records import ProbeFigures


def beside_rounding(probes: Iterable[ProbeFigures]) -> str:
    """What share of the answers is another one, and what rounding alone changes, over the probes that tell; nothing
    where none does.
    """
    told = [(probe, probe.noise_floor) for probe in probes if probe.noise_floor and probe.noise_floor.n]
    if not told:
        return ""
    facts = sum(probe.counts.n for probe, _ in told)
    changed = sum(round((probe.answer_changed or 0.0) * probe.counts.n) for probe, _ in told)
    rounded, of = sum(floor.changed for _, floor in told), sum(floor.n for _, floor in told)
    if changed * of <= rounded * facts:
        return f" Of its answers, {percent(changed, facts)} differ, no more than rounding alone changes."
    return f" Of its answers, {percent(changed, facts)} differ; rounding alone changes {percent(rounded, of)}."


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
