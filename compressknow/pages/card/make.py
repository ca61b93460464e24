"""Make the report card of one original and its compressed models from their answers, and describe the method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from compressknow.base.errors import CompressknowError
from compressknow.base.format import clean, count
from compressknow.base.reading import group_by
from compressknow.comparison.distributions import CALIBRATION_BINS, POPULARITY_BINS, compare_wordings
from compressknow.comparison.intervals import FEWEST, FEWEST_SIGNS, RESAMPLES, SEED, estimate_proportion
from compressknow.comparison.paired import compare_probe, list_changed_facts, measure_certainty, pair_answers
from compressknow.comparison.records import Counts, EarlyStop, ProbeFigures, TextFigures
from compressknow.comparison.text import compare_text
from compressknow.evaluate.answers import REFERENCE_TOKENS, Answer, Answers
from compressknow.evaluate.evaluate import check_alike
from compressknow.evaluate.grades import RECOGNIZED, apply_reading, merge_wordings
from compressknow.evaluate.records import UNKNOWN, ModelRecord, ProbeEntry, is_on_server
from compressknow.evaluate.sources import find_source
from compressknow.pages.card import verdict, warnings
from compressknow.pages.card.gate import describe_share, recommend_model
from compressknow.pages.card.sections import add_sections, list_explained, list_failures
from compressknow.pages.records import SCALE, Card, Comparison, Gate, Recommendation, label_models
from compressknow.pages.texts import METHOD as TEXT_METHOD
from compressknow.pages.texts import write_joint_sentence, write_sentence

_SCORING = {
    "masked": "The blank of each prompt is the model's mask; an answer of several tokens is scored by its "
    "pseudo-log-likelihood.",
    "causal": "The model reads each prompt up to the blank; an answer is scored by the log-probability of all its "
    "tokens.",
    "seq2seq": "The encoder reads each prompt with the blank as a sentinel; an answer is scored by the decoder, by the "
    "log-probability of all its tokens.",
}
_REQUIRED = ("name", "sha256", "architecture", "family")
_OF_FILES = ("parameters", "bytes", "dtype")  # fields that a server may leave out
# Figures of a model that produces NaN support no advice on compression.
_REPAIR = "Next: find an intact copy of the model that produces NaN; these figures mean nothing."


def make_card(
    original: Answers,
    compressed: Sequence[Answers],
    *,
    show_facts: bool = True,
    known: str = RECOGNIZED,
    command: str | None = None,
    early: EarlyStop | None = None,
    path: str | None = None,
    gates: Sequence[Gate] = (),
    within: int | None = None,
) -> Card:
    """Compare each compressed model with the original, over the probes that both were evaluated on.

    Without `show_facts`, the card has no text of a fact. `known` is what counts as known: ``recognized`` (or better) or
    only ``produced``. `command` is the command line to show; `early` how a gate was decided before all facts were
    evaluated, for one compressed model only; `path` the original as the user gave it, where that can be converted.
    `gates` and `within` decide which of several models is recommended (see `card.gate.recommend_model`); the advice on
    each follows the gates too.

    Raises CompressknowError if a compressed model is of another family or vocabulary, shares no probe with the
    original, or was evaluated on other prompts, or if the answers do not record what is ``produced``.
    """
    first, *others = (apply_reading(answers, known) for answers in (original, *compressed))
    original, *compressed = map(merge_wordings, (first, *others))
    model = read_model_facts(original.record.model)
    comparisons = []
    for answers, wordings in zip(compressed, others, strict=True):
        compared = compare(original, answers, show_facts=show_facts, early=early, path=path, gates=gates)
        # The figures of each wording come from the answers before wordings are merged.
        probes = (replace(p, **compare_wordings(first.of(p.probe), wordings.of(p.probe))) for p in compared.probes)
        compared = replace(compared, probes=tuple(probes))
        comparisons.append(add_sections(model, compared, (original, answers), show_facts=show_facts))
    # Warnings common to all models are given once, for the whole card.
    common = comparisons[0].warnings if len(comparisons) > 1 else ()
    common = tuple(warning for warning in common if all(warning in each.warnings for each in comparisons))
    of_sections = (text for section in list_explained(comparisons) for text in section.method)
    broken = [place for place, comparison in enumerate(comparisons) if comparison.next == _REPAIR]
    if len(comparisons) == 1:
        outcome, decision = comparisons[0].verdict, None
    else:
        decision = recommend_model(original, compressed, comparisons, gates=gates, within=within, broken=broken)
        outcome = _write_joint_verdict(original, comparisons, decision, gates)
    return Card(
        verdict=outcome,
        original=model,
        comparisons=tuple(replace(c, warnings=tuple(w for w in c.warnings if w not in common)) for c in comparisons),
        warnings=(
            *warnings.warn_of_known(known),
            *warnings.warn_of_size(model, comparisons, within),
            *common,
            *list_failures(comparisons),
        ),
        show_facts=show_facts,
        versions=dict(original.record.versions),
        command=command,
        method=describe_method(original, comparisons, tuple(dict.fromkeys(of_sections))),
        known=known,
        decision=decision,
        gates=tuple(gates),
    )


def complete_warnings(card: Card) -> Card:
    """Return the card with all warnings on a model at that model, for a page about it alone. Nothing is said there of
    other models, nor of sections that are left out."""
    within = card.decision.within if card.decision else None
    complete = []
    for comparison in card.comparisons:
        others = [each for each in card.comparisons if each is not comparison]
        of_others, own = (set(warnings.warn_of_size(card.original, each, within)) for each in (others, [comparison]))
        unrelated = {*list_failures(card.comparisons), *(of_others - own)}
        every = dict.fromkeys((*card.warnings, *comparison.warnings))
        complete.append(replace(comparison, warnings=tuple(each for each in every if each not in unrelated)))
    return replace(card, comparisons=tuple(complete))


def _write_joint_verdict(
    original: Answers, comparisons: Sequence[Comparison], decision: Recommendation | None, gates: Sequence[Gate]
) -> str:
    name = original.record.model.name
    sentences = []
    if any(c.probes for c in comparisons):
        alike = max(decision.standings, key=lambda each: each.keeps).alike if decision else None
        sentences.append(verdict.write_joint_verdict(name, comparisons, alike, gates))
    labelled = zip(label_models(comparisons), comparisons, strict=True)
    read = [(label, figures) for label, comparison in labelled for figures in comparison.texts]
    for text, of_text in group_by(read, lambda each: each[1].text).items():
        compressed = [(label, figures.compressed) for label, figures in of_text]
        sentences.append(write_joint_sentence(text, of_text[0][1].original, compressed))
    return " ".join(sentences)


def read_model_facts(record: ModelRecord) -> ModelRecord:
    """Return the model of a ``probe.json``, ready to be shown. Raises CompressknowError if fields are missing."""
    required = _REQUIRED if is_on_server(record) else (*_REQUIRED, *_OF_FILES)
    missing = [key for key in required if getattr(record, key) is None]
    if missing:
        raise CompressknowError(
            f"The record of the answers does not name the model's {', '.join(missing)}.",
            hint="Probe the model again with this version.",
        )
    return replace(record, groups=record.groups or {}, dtype=record.dtype or UNKNOWN)


def compare(
    original: Answers,
    compressed: Answers,
    *,
    show_facts: bool = True,
    early: EarlyStop | None = None,
    path: str | None = None,
    gates: Sequence[Gate] = (),
) -> Comparison:
    """Return all figures of one compressed model; parameters and errors are those of `make_card`."""
    before, model = read_model_facts(original.record.model), read_model_facts(compressed.record.model)
    _check_comparable(original, compressed)
    common = [probe for probe in original.probes if probe in compressed.probes]
    probes = [probe for probe in common if not original.record.probes[probe].text]
    texts = tuple(_compare_text(original, compressed, name) for name in common if name not in probes)
    figures, pairs = [], []
    for probe in probes:
        figures.append(compare_probe(original, compressed, probe))
        pairs += pair_answers(original, compressed, probe) if show_facts else []
    lost, gained = list_changed_facts(pairs)
    counts = sum((probe.counts for probe in figures), Counts())
    graded = verdict.grade_domains(figures)
    sure = measure_certainty([[group.counts for group in probe.by_relation] for probe in figures])
    kept = estimate_proportion(counts.both, counts.known_before).or_by_relation(sure.kept)
    outcome = verdict.write_verdict(before.name, counts, kept, sure, gates) if probes else ""
    outcome += warnings.compare_with_rounding(figures)
    compared = Comparison(
        model=model,
        verdict=" ".join(filter(None, (outcome, *map(write_sentence, texts), verdict.describe_early(early, counts.n)))),
        kept=kept,
        counts=counts,
        grades=graded,
        probes=tuple(figures),
        certainty=sure,
        early=early,
        lost=lost,
        gained=gained,
        texts=texts,
        source_matches=warnings.check_source(before, model),
        warnings=(
            *warnings.warn_of_provenance(before, model),
            *warnings.warn_of_models(before, model),
            *warnings.warn_of_runs(original, compressed, probes),
            *warnings.warn_of_figures(counts, graded, figures),
            *warnings.warn_of_early(early),
        ),
    )
    is_broken = any(any(warnings.warn_of_answers("", side)) for side in (original, compressed))
    source = path if warnings.is_made_from(model, before) else None
    return replace(compared, next=_REPAIR if is_broken else _advise(compared, source, gates))


def _advise(comparison: Comparison, path: str | None, gates: Sequence[Gate]) -> str:
    """Return what to do next; a missed gate of a domain or relation is reason enough to compress less."""
    if comparison.counts.known_before and warnings.is_at_chance(comparison):
        return f"Next: evaluate more facts, or another probe (-p): {warnings.AT_CHANCE}"
    met = {gate: gate.is_met(comparison) for gate in gates}
    missed = [gate for gate in gates if met[gate] is False]
    unsure = [gate for gate in gates if gate.of and met[gate] is None]
    if any(gate.of and gate.measure_kept(comparison)[0].known_before for gate in missed):
        return verdict.advise_less(comparison, f"less than {describe_share(missed)} is kept", path)
    least = verdict.find_least(gates)
    if unsure and (comparison.kept.low or 0.0) >= least:
        return f"Next: evaluate more facts: these do not show whether {describe_share(unsure)} is kept."
    return verdict.write_advice(comparison, path, least)


def _compare_text(original: Answers, compressed: Answers, name: str) -> TextFigures:
    before, after = (side.record.probes[name] for side in (original, compressed))
    if before.fingerprint != after.fingerprint:
        raise CompressknowError(
            f"The two models read different texts, or different chunks, as {name}.",
            hint="Probe both with the same file, --limit and --context.",
        )
    text = before.text or {}
    divergence = str((after.text or {}).get("divergence"))
    return compare_text(name, int(text["context"]), divergence, original.texts[name], compressed.texts[name])


def describe_method(
    original: Answers, comparisons: Sequence[Comparison], of_sections: Sequence[str] = ()
) -> tuple[str, ...]:
    """Say how the probes were run and judged, how sections compute their own figures, and the limits of that."""
    probes = warnings.list_probes(comparisons)
    of_texts = (TEXT_METHOD,) if any(comparison.texts for comparison in comparisons) else ()
    if not probes and of_texts:
        return (*of_texts, *of_sections)
    scored_here = any(_describe_source(figures.probe) is None for figures in probes)
    family = original.record.model.family or ""
    return (
        *([_SCORING[family]] if scored_here and family in _SCORING else []),
        *(_describe_probe(p, original.record.probes[p.probe], original.of(p.probe)) for p in probes),
        *_describe_figures(),
        *of_texts,
        *of_sections,
        *_describe_limits(probes),
    )


def _describe_probe(figures: ProbeFigures, entry: ProbeEntry, answers: Sequence[Answer]) -> str:
    name = clean(figures.probe, 60)
    how = _describe_source(figures.probe) or f"protocol {clean(figures.protocol, 60)}, {_describe_choices(answers)}"
    limited = f", a sample of {count(figures.limit)} with seed {figures.seed}" if figures.limit is not None else ""
    left_out = sum(figures.dropped.values())
    reasons = "; ".join(f"{clean(reason, 120)}: {count(n)}" for reason, n in figures.dropped.items() if n)
    dropped = f", {count(left_out)} left out ({reasons})" if left_out else ", none left out"
    wordings = f", each in {entry.templates} wordings, and known if more than half are right" if entry.templates else ""
    template = (entry.source or {}).get("template")
    template = f" Template: {clean(template, 200)}." if template else ""
    average = "the mean over relations" if figures.average == "macro" else "the share of all facts"
    return (
        f"{name}: {how}; {verdict.count_facts(figures.facts_read)} read{dropped}, {count(figures.counts.n)} "
        f"evaluated{limited}{wordings}; its headline accuracy is {average}.{template}"
    )


def _describe_source(probe: str) -> str | None:
    """Say how a probe's source evaluates it, if the scorers of this package do not."""
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
        "Knowledge kept is the share of the facts the original answers right that the compressed model also answers "
        "right. Above chance it is (kept - g) / (1 - g), where g is the mean of 1 / number of answers."
    )
    yield (
        "Intervals are 95 %: Wilson's for shares, Newcombe's (1998, method 10) for the difference of paired shares, "
        f"and for means over relations a paired bootstrap within relations ({count(RESAMPLES)} resamples, seed "
        f"{SEED}). The interval of knowledge kept is over relations if there are {FEWEST} or more, because facts of "
        "one relation are kept and lost together."
    )
    yield (
        "p-values (two-sided) say whether chance could explain the balance of facts lost and gained. Chance "
        f"draws relations, not facts: with {FEWEST_SIGNS} relations or more, p is from a test that flips the signs of "
        "their net changes; with fewer, it is the larger of those of Student's t-test by the jackknife over relations "
        f"and of the exact McNemar test; with fewer than {FEWEST}, it is that of the McNemar test. In a table of "
        "groups, p-values are adjusted by Holm's method."
    )
    yield (
        "How far answers moved is KL(original || compressed) in nats at the answer's first position, over the whole "
        'vocabulary. "At least" marks a lower bound, the KL over the '
        f"original's {REFERENCE_TOKENS} most likely tokens with all others taken as one: what moves among the others "
        "is not seen. Calibration error (ECE) uses "
        f"{CALIBRATION_BINS} bins of equal width; popularity has up to {POPULARITY_BINS} bins of about equal size."
    )
    scale = ", ".join(f"{name} from {least} %" for name, least in SCALE)
    scale = f"{scale}, {verdict.LOWEST} below"
    yield f"Grades by the share kept: {scale}; a range names the grades that the interval spans."


def _describe_limits(probes: Iterable[ProbeFigures]) -> Iterator[str]:
    yield (
        "Limits: a fact is judged by the wording that was used. Other wordings may give other results, and a lost "
        "fact may rank second."
    )
    if any(probe.chance for probe in probes):
        yield (
            "Where a model chooses among given answers, some right ones are guesses; a model that writes freely knows "
            "less than these figures say."
        )


def _check_comparable(original: Answers, compressed: Answers) -> None:
    """Raise CompressknowError if the models cannot be compared fact by fact."""
    before, after = original.record.model, compressed.record.model
    shared = [original.record.probes[name] for name in original.probes if name in compressed.probes]
    # Bits per byte are comparable for any tokens. Answers from another runtime than transformers are compared as text,
    # because its tokens may be unknown.
    by_text = (bool(shared) and all(entry.text for entry in shared)) or before.runtime or after.runtime
    for key in ("family",) if by_text else ("family", "vocabulary"):
        check_alike(key, (before.name, getattr(before, key)), (after.name, getattr(after, key)))
    if not set(original.probes) & set(compressed.probes):
        raise CompressknowError(
            f"{before.name} and {after.name} were not evaluated on any common probe.",
            why=f"The original was evaluated on {', '.join(original.probes) or 'nothing'}, "
            f"the other model on {', '.join(compressed.probes) or 'nothing'}.",
            hint="Probe both with the same -p PROBE.",
        )
