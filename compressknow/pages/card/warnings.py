"""Write warnings about a comparison's figures, and say what rounding alone changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

from compressknow.base.format import clean, count, share, write_percent, write_two_sizes
from compressknow.comparison.intervals import FEWEST, average_estimates, estimate_proportion
from compressknow.comparison.records import Counts, EarlyStop, Estimate, ProbeFigures
from compressknow.compress.schemes import read_schemes
from compressknow.evaluate.answers import REFERENCE_TOKENS, Answers
from compressknow.evaluate.grades import PRODUCED
from compressknow.evaluate.records import UNKNOWN, FactsInText, ModelRecord, is_on_server
from compressknow.model.tensors import FLOAT_DTYPES
from compressknow.pages.card.verdict import count_facts, is_larger_by_final_layer, join_names
from compressknow.pages.parts import get_headline_accuracy
from compressknow.pages.records import Comparison, Grade, write_estimate

# With fewer known facts, an interval spans several points.
FEW_FACTS = 100
FEW_FACTS_OF_A_SUBJECT = 20
# Larger shares cause a warning: of the known facts, those that appear in the calibration text, and those that guided
# how a file was rounded; of the parameters in scope, those that the text did not reach.
MANY_IN_TEXT, MANY_GUIDES, MANY_UNSEEN = 0.01, 0.05, 0.1
# Models of more than this many times the original's bytes cause one, too. (Pruning changes only the header's size.)
LARGER = 1.01


def warn_of_known(known: str) -> Iterator[str]:
    """Warn if only what a model produces counts as known."""
    if known == PRODUCED:
        yield (
            "Known means produced here: a fact counts if the model picks the right answer, and what it writes by "
            "itself begins with it. What it only picks among candidates counts as not known."
        )


def warn_of_size(original: ModelRecord, comparisons: Sequence[Comparison], within: int | None) -> Iterator[str]:
    """Warn if models are larger than the original, or than allowed."""
    models = [comparison.model for comparison in comparisons]
    for model in models:
        if original.bytes and model.bytes and model.bytes > LARGER * original.bytes:
            cause = ": its final layer no longer shares its weight with the embedding. --scope blocks leaves it out."
            size, original_size = write_two_sizes(model.bytes, original.bytes)
            yield (
                f"{clean(model.name, 80)} is larger than {clean(original.name, 80)} ({size} against "
                f"{original_size}){cause if is_larger_by_final_layer(model.groups or {}) else '.'}"
            )
    if within is None:
        return
    if larger := [(clean(model.name, 80), model.bytes) for model in models if model.bytes and model.bytes > within]:
        allowed, _ = write_two_sizes(within, min(size for _, size in larger))
        named = join_names([f"{name} ({write_two_sizes(size, within)[0]})" for name, size in larger])
        yield f"Larger than the {allowed} that a model may have: {named}."


def warn_of_models(original: ModelRecord, model: ModelRecord) -> Iterator[str]:
    """Warn of oddities of the two checkpoints that affect the comparison."""
    if original.sha256 == model.sha256:
        yield "Both models are the same checkpoint (same fingerprint): there is nothing to compare."
    yield from warn_of_recipe(model)
    yield from warn_of_calibration(original, model)
    yield from warn_of_guides(original, model)
    if model.quantization or model.runtime:
        yield from warn_of_grid(original)
    known = UNKNOWN not in (original.dtype, model.dtype)
    if known and original.dtype != model.dtype and not (original.quantization or model.quantization):
        yield (
            f"The weights differ in type ({clean(original.dtype, 40)} and {clean(model.dtype, 40)}) though neither "
            "model is quantized: part of the change may be rounding."
        )
    if original.speed and model.speed and original.speed.device != model.speed.device:
        yield (
            f"The models ran on different devices ({clean(original.speed.device, 60)} and "
            f"{clean(model.speed.device, 60)}): answers that are almost tied may differ for this reason alone."
        )


def warn_of_grid(original: ModelRecord) -> Iterator[str]:
    """Warn of an original that was rounded before."""
    if grid := original.grid:
        yield (
            f"The original's weights already lie on a grid: in {grid['weights']} of {grid['of']} matrices, 32 "
            f"neighbours have at most {grid['values']} different values. A type with the same grid leaves them as they "
            "are, so this result says little about models that were not rounded before."
        )


def warn_of_provenance(original: ModelRecord, model: ModelRecord) -> Iterator[str]:
    """Warn if the model was made from another original, files changed since, the two look swapped, or the original is
    itself compressed."""
    is_sibling = not _list_source_hashes(original).isdisjoint(_list_source_hashes(model))
    if check_source(original, model) is False and not is_sibling:
        recorded = clean((model.source or {}).get("sha256") or "", 13)
        yield (
            f"{clean(model.name, 80)} was not made from {clean(original.name, 80)}: its record names "
            f"{name_source(model)}{f' (fingerprint {recorded})' if recorded else ''}, but the original's fingerprint "
            f"is {clean(original.sha256, 13)}. Differences may not be due to compression. Give the original that it "
            "was made from."
        )
    yield from warn_of_changes(original, model)
    if is_made_from(original, model):
        yield (
            f"The two models look swapped: {clean(original.name, 80)}, given as the original, was made from "
            f"{clean(model.name, 80)}, according to its own record. Give the original first."
        )
    elif _is_compressed(original):
        source, how = original.source or {}, clean(original.setup or original.quantization or "", 80)
        made_from = name_source(original) + ", a converted checkpoint" * ("original_sha256" in source)
        yield (
            f"{clean(original.name, 80)}, given as the original, is itself compressed: "
            f"{f'{how}, ' if how else ''}made from {made_from}. What it lost by that is not "
            "counted here; to count it, give the model that it was made from as the original."
        )


def name_source(model: ModelRecord) -> str:
    """Return the name of the model that a model was made from, by its own record."""
    return clean((model.source or {}).get("name") or "another model", 80)


def check_source(original: ModelRecord, model: ModelRecord) -> bool | None:
    """Return whether a model was made from this very original; None if unknown."""
    hashes = _list_source_hashes(model)
    return None if not hashes or is_on_server(original) else original.sha256 in hashes


def _is_compressed(model: ModelRecord) -> bool:
    """Return whether a model may have lost something to compression, by its own record. A GGUF file of floats has
    not."""
    if not model.source:
        return False
    types = {kind for kinds in (model.runtime or {}).get("types", {}).values() for kind in kinds}
    return "original_sha256" in model.source or not types.issubset(FLOAT_DTYPES) or _is_changed(model)


def _is_changed(model: ModelRecord) -> bool:
    """Return whether a conversion changed or left out any weight."""
    changed = any(group.get("pruned") or group.get("quantized") for group in (model.groups or {}).values())
    return bool(model.removed) or changed


def _list_source_hashes(model: ModelRecord) -> set[str]:
    """Return the hashes of the model's source, and of the source of that."""
    values = [(model.source or {}).get(key) for key in ("sha256", "original_sha256")]
    return {value for value in values if isinstance(value, str) and value}


def warn_of_changes(*models: ModelRecord) -> Iterator[str]:
    """Warn of files that no longer match their manifest."""
    for model in models:
        if model.changed:
            yield (
                f"{clean(model.name, 80)} changed since it was converted: run `compressknow verify` on it to see what, "
                "and convert it again."
            )


def is_made_from(one: ModelRecord, other: ModelRecord) -> bool:
    """Return whether `one` records `other` as its source, and `other` does not record `one`."""
    return _is_source(other, one) and not _is_source(one, other)


def _is_source(model: ModelRecord, made: ModelRecord) -> bool:
    """Return whether the recorded source of `made` has the name or the hash of `model`."""
    source = made.source or {}
    return model.name == source.get("name") or model.sha256 == source.get("sha256", "")


def warn_of_recipe(model: ModelRecord) -> Iterator[str]:
    """Warn of effects of a converted checkpoint's recipe on its answers."""
    if model.groups and not _is_changed(model):
        yield "Nothing in this model was in scope: no weight was pruned or quantized."
    if by_batch := [scheme.name for scheme in read_schemes(model.recipe) if scheme.rounds == "batch"]:
        yield (
            f"With {by_batch[0]}, the activations of a batch share one scale, so each answer depends slightly on the "
            "other facts in its batch. The order of facts is fixed, so the figures are reproducible, but another "
            "batch size would change them slightly."
        )


def warn_of_calibration(original: ModelRecord, model: ModelRecord) -> Iterator[str]:
    """Warn if facts appear in the calibration text, or the text did not reach much of the model."""
    source = model.calibration["source"] if model.calibration else ""
    yield from warn_of_facts_in_text(original, model.in_calibration, source)
    if not model.calibration:
        return
    if (unseen := model.calibration["unseen_share"]) > MANY_UNSEEN:
        yield (
            f"The calibration text did not reach {share(unseen)} of the parameters that {clean(model.name, 80)} has in "
            "scope: they were compressed without knowledge of the inputs. Calibrate it on more tokens."
        )


def warn_of_facts_in_text(original: ModelRecord, facts: FactsInText | None, source: str = "") -> Iterator[str]:
    """Warn if many facts appear in the calibration text of this source."""
    if facts and facts.known_found > MANY_IN_TEXT * facts.known:
        appear = "appears" if facts.found == 1 else "appear"
        text = f"the calibration text {clean(source, 80)}".rstrip()
        yield (
            f"Of {count_facts(facts.facts)}, {count(facts.found)} {appear} in {text}, {count(facts.known_found)} of "
            f"them among the {count(facts.known)} that {clean(original.name, 80)} knew. A model calibrated on it may "
            "keep more of these than of other facts."
        )


def warn_of_guides(original: ModelRecord, model: ModelRecord) -> Iterator[str]:
    """Warn if many facts that guided how a file was rounded judge it, too."""
    guides = model.guides
    if guides and guides.known > MANY_GUIDES * (known := guides.known + guides.others):
        yield (
            f"Of the {count_facts(known)} that {clean(original.name, 80)} knew, {count(guides.known)} guided how "
            f"{clean(model.name, 80)} was rounded, so it may keep more of these than of other facts. It keeps "
            f"{count(guides.kept)} of these, and {count(guides.others_kept)} of the {count(guides.others)} others. "
            "Judge it by the others: evaluate more facts, or another sample (--seed)."
        )


def warn_of_runs(original: Answers, compressed: Answers, probes: Iterable[str]) -> Iterator[str]:
    """Warn of differences between two runs, and of missing or damaged answers; `probes` are those of both."""
    before, after = original.record.versions, compressed.record.versions
    differing = [
        f"{clean(name, 40)} {clean(before[name], 40)} and {clean(after[name], 40)}"
        for name in before
        if name in after and before[name] != after[name]
    ]
    if differing:
        listed = ", ".join(differing)
        yield f"The two models were evaluated with different versions ({listed}), which may change answers too."
    yield from warn_of_runtimes(original, compressed)
    for who, these, others in (("original", original, compressed), ("compressed model", compressed, original)):
        only = [clean(probe, 60) for probe in these.probes if probe not in others.probes]
        if only:
            yield f"Not compared, because only the {who} was evaluated on them: {', '.join(only)}."
        yield from warn_of_answers(f"The {who}", these)
        yield from warn_of_server(f"the {who}", these)
    for probe in probes if _have_same_tokens(original.record.model, compressed.record.model) else ():
        references = [side.record.probes[probe].reference for side in (original, compressed)]
        if None not in references and references[0] != references[1]:
            yield (
                f"How far distributions moved on {clean(probe, 60)} was not measured: the two models gave the "
                "probabilities of different tokens. To measure it, give `compressknow report` the checkpoints, not "
                "the answers of two runs."
            )


def warn_of_runtimes(original: Answers, compressed: Answers) -> Iterator[str]:
    """Warn of different runtimes, with their part of the change, and of different vocabularies."""
    before, after = original.record.model, compressed.record.model
    if before.ran_in != after.ran_in:
        names, ran_in = ([clean(getattr(model, key), 80) for model in (before, after)] for key in ("name", "ran_in"))
        yield (
            f"{names[0]} ran in {ran_in[0]}, {names[1]} in {ran_in[1]}: part of the change may be due to the runtime. "
            f"{_describe_runtimes_part(original, compressed)}"
        )
    if not _have_same_tokens(before, after):
        yield (
            f"The vocabularies of {clean(before.name, 80)} and {clean(after.name, 80)} differ: answers were compared "
            "as texts, and how far distributions moved was not measured."
        )


def _describe_runtimes_part(original: Answers, compressed: Answers) -> str:
    before, after = original.record.model, compressed.record.model
    entries = [entry for probe, entry in original.record.probes.items() if probe in compressed.probes]
    floors = [floor for entry in entries if (floor := entry.runtime_noise_floors.get(after.ran_in)) and floor.n]
    if floors:
        changed, of = sum(floor.changed for floor in floors), sum(floor.n for floor in floors)
        answers = f"{count(changed)} of {count_facts(of)}"
        sentences = f"Run there from an unquantized file, the original answers {answers} differently."
        if split := sum(floor.read_otherwise or 0 for floor in floors):
            are = "is" if split == 1 else "are"
            sentences += (
                f" Of these prompts, {count(split)} {are} split into other tokens there than by the model's own "
                "tokenizer, which no other type can fix. Check that the tokenizer's files are the model's own."
            )
        return sentences
    if is_on_server(before) or is_on_server(after):
        why = "a server runs only the one model. Give an original that the same kind of server runs."
    elif before.runtime is not None:
        why = "that needs an original that runs in transformers, and a GGUF file that runs in llama.cpp."
    else:
        why = clean(before.runtime_unmeasured or "that needs checkpoints, not answers folders.", 400)
    return f"How much was not measured: {why}"


def _have_same_tokens(original: ModelRecord, model: ModelRecord) -> bool:
    """Return False if both vocabularies are known and differ."""
    return None in (original.vocabulary, model.vocabulary) or original.vocabulary == model.vocabulary


def warn_of_server(who: str, answers: Answers) -> Iterator[str]:
    """Warn of figures that are left out, or are bounds, because a server returns too little."""
    runtime = answers.record.model.runtime or {}
    if not is_on_server(answers.record.model):
        return
    if not runtime.get("scores", True):
        yield (
            f"The server of {who} gives no log-probabilities. An answer is what it writes, right if it begins with the "
            "object: there are no ranks, no probabilities, and nothing on how far distributions moved."
        )
        return
    tokens = max((len(answer.first_ids) for answer in answers.answers), default=0)
    if not tokens:
        of_its_own = "returns probabilities only for its own most likely tokens"
        returns = of_its_own if runtime.get("distribution") else "returns no tokens"
        yield f"The server of {who} {returns}: how far distributions moved is left out."
    elif tokens < REFERENCE_TOKENS:
        yield (
            f"The server of {who} returns its {tokens} most likely tokens: KL takes all others as one, and is a lower "
            "bound."
        )


def warn_of_answers(who: str, answers: Answers) -> Iterator[str]:
    """Warn if a model produces NaN."""
    numbers = Counter(
        a.probe for a in answers.answers if math.isnan(a.logp_gold or 0) or any(map(math.isnan, a.top5_logp))
    )
    for probe, number in numbers.items():
        yield (
            f"{who} produces NaN for {count_facts(number)} of {clean(probe, 60)}: it is broken, and "
            "these answers are meaningless."
        )


def warn_of_figures(
    counts: Counts, grades: Iterable[Grade], probes: Iterable[ProbeFigures], *, name: str = "The original"
) -> Iterator[str]:
    """Warn of too few facts, and of an original, called `name`, that knows no more than guessing would."""
    if 0 < counts.known_before < FEW_FACTS:
        yield f"{name} knew only {count_facts(counts.known_before)}: with so few, the share kept is uncertain."
    yield from warn_of_grades(grades)
    for probe in probes:
        yield from _warn_of_few_relations(probe, name)
        yield from _warn_of_chance(probe, name)
        yield from _warn_of_dropped(probe)


def warn_of_grades(grades: Iterable[Grade]) -> Iterator[str]:
    """Warn of grades that rest on too few facts."""
    few = [grade for grade in grades if 0 < grade.counts.known_before < FEW_FACTS_OF_A_SUBJECT]
    if few:
        named = ", ".join(f"{clean(grade.subject, 60)} ({grade.counts.known_before})" for grade in few)
        yield f"Grades that rest on fewer than {FEW_FACTS_OF_A_SUBJECT} known facts say little: {named}."


def warn_of_early(early: EarlyStop | None) -> Iterator[str]:
    """Warn that evaluation stopped as soon as one gate was decided."""
    if early and early.facts < early.of:
        yield (
            f"Facts were evaluated only until it was clear whether {100 * early.gate:g} % of the knowledge is kept. "
            "The other figures rest on few facts, and their intervals do not allow for the choice of when to stop."
        )


def _warn_of_few_relations(probe: ProbeFigures, who: str) -> Iterator[str]:
    if 1 < (relations := probe.certainty.relations) < FEWEST:
        by_fact = probe.certainty.unit == "fact"
        figures = "intervals and p-values treat" if by_fact else "the interval of what is kept treats"
        yield (
            f"{who} knew facts of only {relations} relations of {clean(probe.probe, 60)}. Facts of one relation are "
            f"lost together; fewer than {FEWEST} relations cannot show how much, so {figures} facts as independent "
            "here, and may be too sure."
        )


def _warn_of_chance(probe: ProbeFigures, who: str) -> Iterator[str]:
    if unbeaten := _find_unbeaten_baseline(probe):
        (name, baseline), accuracy = unbeaten, get_headline_accuracy(probe)[0].value
        yield (
            f"{who} itself may know little of {clean(probe.probe, 60)}: its accuracy ({share(accuracy)}) is not "
            f"clearly above that of {name} ({share(baseline)}), so what is kept says little."
        )


def _find_unbeaten_baseline(probe: ProbeFigures) -> tuple[str, float] | None:
    """Return the name and accuracy of the first baseline that the original's accuracy is not clearly above."""
    accuracy, _ = get_headline_accuracy(probe)
    baselines = {"guessing": probe.chance, "always giving the most frequent answer": probe.majority}
    for name, baseline in baselines.items():
        if baseline is not None and accuracy.low is not None and accuracy.low <= baseline:
            return name, baseline
    return None


# The reason for advice if `is_at_chance`.
AT_CHANCE = "the original itself may know little, so what is kept says little."


def is_at_chance(comparison: Comparison) -> bool:
    """Return whether the original is on no probe clearly better than a baseline that knows nothing."""
    return bool(comparison.probes) and all(map(_find_unbeaten_baseline, comparison.probes))


def _warn_of_dropped(probe: ProbeFigures) -> Iterator[str]:
    dropped = sum(probe.dropped.values())
    read = max(probe.facts_read, dropped)
    if 2 * dropped > read:
        reason = max(probe.dropped, key=lambda name: probe.dropped[name])
        yield (
            f"{write_percent(dropped, read)} of the facts of {clean(probe.probe, 60)} were dropped, mostly for this "
            f"reason: {clean(reason, 120)}. The rest may not be representative."
        )


def compare_with_rounding(probes: Iterable[ProbeFigures]) -> str:
    """Say what share of the answers differs, and what rounding and the runtime alone change, if known."""
    measured = [p for p in probes if any(floor and floor.n for floor in (p.noise_floor, p.runtime_noise_floor))]
    if not measured:
        return ""
    facts = sum(probe.counts.n for probe in measured)
    changed = sum(round((probe.answer_changed or 0.0) * probe.counts.n) for probe in measured)
    parts = []
    for name, floor_of in (("rounding", "noise_floor"), ("the runtime", "runtime_noise_floor")):
        floors = [(floor, p.counts.n) for p in measured if (floor := getattr(p, floor_of)) and floor.n]
        if floors:
            # Weighted by facts: only a part of a large probe was evaluated again.
            alone = average_estimates(
                [estimate_proportion(floor.changed, floor.n) for floor, _ in floors], [number for _, number in floors]
            )
            could_be_all = 0 < changed <= (alone.high or 0.0) * facts
            explained = ", which could be all of it" if could_be_all else ""
            is_split = any(floor.read_otherwise for floor, _ in floors)
            tokens = ", which splits text into other tokens," if is_split else ""
            parts.append(f"{name} alone{tokens} changes {write_estimate(alone)}{explained}")
    return f" Of its answers, {write_percent(changed, facts)} differ; {'; '.join(parts)}."


def list_probes(comparisons: Iterable[Comparison]) -> Collection[ProbeFigures]:
    """Return one probe of each name: the original's own figures are the same in all."""
    return {probe.probe: probe for comparison in comparisons for probe in comparison.probes}.values()


def estimate_rounding_kept(probes: Iterable[ProbeFigures]) -> Estimate:
    """Return the share of what the original knows that it still knows in another precision (0 to 1), with its interval:
    it is measured on a sample. Probes are weighted by their known facts; None if one of them has no sample."""
    known = [probe for probe in probes if probe.counts.known_before]
    floors = [probe.noise_floor for probe in known if probe.noise_floor and probe.noise_floor.known]
    if len(floors) < len(known):
        return Estimate(None)
    return average_estimates(
        [estimate_proportion(floor.known - floor.lost, floor.known) for floor in floors],
        [probe.counts.known_before for probe in known],
    )


def mark_rounding(kept: float | None) -> dict[str, float]:
    """Return the line across a chart at what rounding alone keeps; empty if that is unknown."""
    return {} if kept is None else {"rounding alone": kept}


def describe_mark(probes: Iterable[ProbeFigures], name: str) -> str:
    """Say what the mark of this name shows; empty if there is no mark."""
    probes = [probe for probe in probes if probe.counts.known_before]
    kept = estimate_rounding_kept(probes).value
    if kept is None:
        return ""
    floors = [probe.noise_floor for probe in probes if probe.noise_floor]
    known = sum(floor.known for floor in floors)
    again = clean(floors[0].computed_in, 40)
    return (
        f"{name} shows what rounding alone keeps: {share(kept)}, measured on {count_facts(known)} that the original "
        f"knew and answered once more in {again}."
    )
