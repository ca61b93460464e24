"""Say how facts were evaluated and judged, and what rounding alone changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from compressknow.base.format import count, estimate, percent, plain, share
from compressknow.comparison.clusters import FEWEST, FEWEST_SIGNS
from compressknow.comparison.distributions import CALIBRATION_BINS, POPULARITY_BINS
from compressknow.comparison.intervals import RESAMPLES, SEED, proportion
from compressknow.comparison.records import ProbeFigures
from compressknow.evaluate.answers import REFERENCE_TOKENS, Answer, Answers
from compressknow.evaluate.records import NoiseFloor, ProbeEntry
from compressknow.evaluate.sources import find_source
from compressknow.pages.card.verdict import LOWEST, SCALE
from compressknow.pages.drawing import Level
from compressknow.pages.records import Comparison
from compressknow.pages.texts import METHOD as TEXT_METHOD

_SCALE = ", ".join(f"{grade} from {least} % kept" if grade == "A+" else f"{grade} {least} %" for grade, least in SCALE)
LEGEND = f"{_SCALE}, {LOWEST} less. Where the interval reaches over several grades, they are named beside the letter."
SHORT_LEGEND = f"{_SCALE}, {LOWEST} less. A question mark says that the interval reaches over several grades."
_SCORING = {
    "masked": "The blank of each prompt is the model's mask; an answer of several tokens is scored by its "
    "pseudo-log-likelihood.",
    "causal": "The model reads each prompt up to the blank; an answer is scored by the log-probability of all its "
    "tokens.",
    "seq2seq": "The encoder reads each prompt with the blank as a sentinel; an answer is scored by the decoder, by the "
    "log-probability of all its tokens.",
}


def describe_method(
    original: Answers, comparisons: Sequence[Comparison], of_sections: Sequence[str] = ()
) -> tuple[str, ...]:
    """Say how the probes were run and judged, and the limits of that.

    Parameters
    ----------
    of_sections : how the card's sections compute what they alone show.
    """
    probes: dict[str, ProbeFigures] = {}
    for comparison in comparisons:
        for figures in comparison.probes:
            probes.setdefault(figures.probe, figures)
    of_texts = (TEXT_METHOD,) if any(comparison.texts for comparison in comparisons) else ()
    if not probes and of_texts:
        return (*of_texts, *of_sections)
    scored_here = any(_describe_source(name) is None for name in probes)
    family = original.record.model.family or ""
    return (
        *([_SCORING[family]] if scored_here and family in _SCORING else []),
        *(_describe_probe(p, original.record.probes[name], original.of(name)) for name, p in probes.items()),
        *_describe_figures(),
        *of_texts,
        *of_sections,
        *_describe_limits(probes.values()),
    )


def _describe_probe(figures: ProbeFigures, entry: ProbeEntry, answers: Sequence[Answer]) -> str:
    name = plain(figures.probe, 60)
    how = _describe_source(figures.probe) or f"protocol {plain(figures.protocol, 60)}, {_describe_choices(answers)}"
    limited = f", a sample of {count(figures.limit)} by seed {figures.seed}" if figures.limit is not None else ""
    left_out = sum(figures.dropped.values())
    reasons = "; ".join(f"{plain(reason, 120)}: {count(n)}" for reason, n in figures.dropped.items() if n)
    dropped = f", {count(left_out)} left out ({reasons})" if left_out else ", none left out"
    wordings = f", each in {entry.templates} wordings, and known if more than half are right" if entry.templates else ""
    template = (entry.source or {}).get("template")
    template = f" Template: {plain(template, 200)}." if template else ""
    average = "the mean over relations" if figures.average == "macro" else "the share of all facts"
    return (
        f"{name}: {how}; {count(figures.facts_read)} facts read{dropped}, {count(figures.counts.n)} "
        f"evaluated{limited}{wordings}; its headline accuracy is {average}.{template}"
    )


def _describe_source(probe: str) -> str | None:
    """Say how its answers came about, where not by the scorers of this package, as its source has it."""
    source = find_source(probe)
    return source.evaluated if source else None


def _describe_choices(answers: Sequence[Answer]) -> str:
    numbers = [answer.choices for answer in answers if answer.choices is not None]
    if not numbers or len(numbers) < len(answers):
        return "the answer is free text"
    low, high = min(numbers), max(numbers)
    return f"one of {count(low)} answers" if low == high else f"one of {count(low)} to {count(high)} answers"


def _describe_figures() -> Iterator[str]:
    yield (
        "Knowledge kept is the share of the facts that the original answers right which the compressed model answers "
        "right too. Beyond chance it is (kept - g) / (1 - g), g being the mean of 1 / number of answers."
    )
    yield (
        "Intervals are 95 %: Wilson's for shares, Newcombe's (1998, method 10) for the difference of paired shares, "
        f"and for means over relations a paired bootstrap within relations ({count(RESAMPLES)} resamples, seed "
        f"{SEED}). That of knowledge kept is over relations where there are {FEWEST} or more: facts of a relation are "
        "kept and lost together."
    )
    yield (
        "p-values say whether facts lost and gained are out of balance, two-sided, with a relation as what could "
        f"have fallen out otherwise: from {FEWEST_SIGNS} relations on all flips of the signs of their net changes, of "
        f"fewer the larger one of Student's t-test of these and of the exact McNemar test, of less than {FEWEST} "
        "McNemar's. Those of a table of groups are adjusted by Holm's method."
    )
    yield (
        "How far answers moved is KL(original || compressed) in nats at the answer's first position, over the whole "
        'vocabulary. Where it says "at least", it is over the '
        f"original's {REFERENCE_TOKENS} most likely tokens and the rest taken together, and what moves within the rest "
        "is not seen: over the whole vocabulary the divergence is at least that. Calibration error (ECE) uses "
        f"{CALIBRATION_BINS} bins of equal width; popularity has up to {POPULARITY_BINS} bins of about equal size."
    )
    scale = ", ".join(f"{name} from {least} %" for name, least in SCALE)
    yield f"Grades by the share kept: {scale}, {LOWEST} below; a range names the grades that the interval spans."


def _describe_limits(probes: Iterable[ProbeFigures]) -> Iterator[str]:
    yield (
        "Limits: a fact is judged by the wording that it was put in. Other wordings may give other results, and a lost "
        "fact may rank second."
    )
    if any(probe.chance for probe in probes):
        yield (
            "Where a model chooses among given answers, some right ones are guesses; a model that writes freely knows "
            "less than these figures say."
        )


def compare_with_rounding(probes: Iterable[ProbeFigures]) -> str:
    """Say what share of the answers is another one, and what rounding alone changes, and the runtime alone, over the
    probes that tell; nothing where none does.
    """
    measured = [probe for probe in probes if any(floor and floor.n for floor in _list_floors(probe).values())]
    if not measured:
        return ""
    facts = sum(probe.counts.n for probe in measured)
    changed = sum(round((probe.answer_changed or 0.0) * probe.counts.n) for probe in measured)
    parts, could_be_all = [], False
    for name in _list_floors(measured[0]):
        floors = [floor for probe in measured if (floor := _list_floors(probe)[name]) and floor.n]
        if floors:
            alone = proportion(sum(floor.changed for floor in floors), sum(floor.n for floor in floors))
            could_be_all |= changed <= (alone.high or 0.0) * facts
            parts.append(f"{name} alone changes {estimate(alone.value, alone.low, alone.high)}")
    explained = ", which could be all of it" if could_be_all else ""
    return f" Of its answers, {percent(changed, facts)} differ; {', '.join(parts)}{explained}."


def _list_floors(probe: ProbeFigures) -> dict[str, NoiseFloor | None]:
    return {"rounding": probe.noise_floor, "the runtime": probe.runtime_noise_floor}


def list_probes(comparisons: Iterable[Comparison]) -> Iterable[ProbeFigures]:
    """Return one probe of each name: what is the original's alone is the same in all."""
    return {probe.probe: probe for comparison in comparisons for probe in comparison.probes}.values()


def find_rounding_kept(probes: Iterable[ProbeFigures]) -> float | None:
    """Return the share of all that the original knows which it still knows in another precision (0 to 1).

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


def mark_rounding(kept: float | None) -> tuple[Level, ...]:
    """Return the mark of what rounding alone keeps; none where that is not known."""
    return () if kept is None else (Level("rounding alone", kept),)


def describe_mark(probes: Iterable[ProbeFigures], name: str) -> str:
    """Say what the mark of this name shows; nothing where there is none."""
    probes = [probe for probe in probes if probe.counts.known_before]
    kept = find_rounding_kept(probes)
    if kept is None:
        return ""
    floors = [probe.noise_floor for probe in probes if probe.noise_floor]
    known = sum(floor.known for floor in floors)
    facts = "1 fact that the original knew" if known == 1 else f"{count(known)} facts that the original knew"
    again = plain(floors[0].computed_in, 40)
    return f"{name} shows what rounding alone keeps: {share(kept)}, by {facts} and answered once more in {again}."
