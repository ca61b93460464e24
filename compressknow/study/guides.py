"""Guides of a size: facts that a model knows, its own text, and how its weights are sensitive to both.

Answers, text and sensitivity are kept: another size of the same model begins where types are chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.base.files import cache_folder
from compressknow.base.progress import Listener, Stage, report_progress
from compressknow.compress.calibrate.model import BlockwiseUnsupported
from compressknow.compress.calibrate.text import CalibrationText, calibration_text, load_or_make_text
from compressknow.compress.calibrate.walk import Batches
from compressknow.compress.steps import Calibration
from compressknow.engine.language_model import family_of
from compressknow.engine.load import load_tokenizer
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.distributions import Context
from compressknow.evaluate.facts import Fact, Probe
from compressknow.evaluate.gather import default_answers_folder
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.run import probe_model
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.gguf.gptq import batch_sequences
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.loading import open_complete
from compressknow.study.batches import ScoredFact, batch_facts, batch_text
from compressknow.study.measuring import FEWEST_OF_A_DOMAIN, Roundings, measure
from compressknow.study.sensitivity import Guidance, Guide, Sensitivity, read_sensitivity, write_sensitivity

# Facts that guide, and the fewest that tell one weight from another.
FACTS, FEWEST = 200, 30
# Of four facts that are evaluated, a small model may know two: so many, that there are enough.
ASKED = 400
# Tokens of the text that guide: more tell little more, and take as long as so many more facts.
TOKENS = 2_048


def measure_guides(
    handle: ModelHandle,
    probes: Sequence[Probe],
    calibration: Calibration,
    guide: Guide,
    roundings: Roundings,
    on_progress: Listener | None,
    answers: Answers | None = None,
) -> tuple[Sensitivity, tuple[Batches, ...]]:
    """Measure what guides the types of weights, as far as it was not before.

    Returns the sensitivity of the weights, and token ids as batches, which GPTQ runs over: those of facts with their
    objects, if any are known to a causal model, and those of the text.

    Parameters
    ----------
    handle : of a checkpoint of floats.
    probes : of facts. They are measured, and GPTQ runs over them, even where text guides alone.
    calibration : the text; its first `TOKENS` guide.
    answers : what the model answered to all of the probes; by default it is evaluated on some facts of each.

    Raises UsageError where facts are to guide and the model knows fewer than 30.
    """
    model, trusted = handle.located, handle.settings.trust_remote_code
    if answers is None:
        probes = [probe.sample(max(1, ASKED // len(probes))) for probe in probes]
        folder = default_answers_folder() / handle.sha256[:16]
        answers = probe_model(handle, probes, folder, Context(), on_progress=on_progress, wait=True)
        handle.release()
    facts = select_known_facts(answers, probes)
    if (number := sum(map(len, facts.values()))) < FEWEST:
        if guide != "text":
            raise UsageError(
                f"{model.name} knows {number} of these facts, and {FEWEST} are needed to guide.",
                hint="Give other --facts, or --guide text.",
            )
        facts = {}
    checkpoint, tree = open_complete(model.path, trust_remote_code=trusted)
    text = _get_text(handle, tree, calibration, on_progress)
    scored = _score_facts(model.path, tree, answers, probes, facts, trusted)
    sensitivity = _measure_sensitivity(handle, checkpoint, tree, roundings, scored, facts, text, on_progress)
    # Nothing is predicted after the last token of a fact's object.
    known = [[*each.query.prompt, *each.query.gold[:-1]] for each in scored if each.scorer.family == "causal"]
    return sensitivity, (*([batch_sequences(known)] if known else []), text.batches)


def select_known_facts(answers: Answers, probes: Iterable[Probe], most: int = FACTS) -> dict[str, list[Fact]]:
    """Return facts that a model answered right, by probe: evenly over relations, the first of each in the order of the
    probe; at most so many in all."""
    right = {(answer.probe, answer.fact_id) for answer in answers.answers if answer.correct}
    by_relation: dict[tuple[str, str], list[Fact]] = {}
    for probe in probes:
        for fact in probe.facts:
            if (probe.name, fact.id) in right:
                by_relation.setdefault((probe.name, fact.relation), []).append(fact)
    selected: dict[str, list[Fact]] = {}
    depth = max(map(len, by_relation.values()), default=0)
    turns = [
        (name, facts[turn]) for turn in range(depth) for (name, _), facts in by_relation.items() if turn < len(facts)
    ]
    for name, fact in turns[:most]:
        selected.setdefault(name, []).append(fact)
    return selected


def hash_facts(facts: Mapping[str, Sequence[Fact]]) -> str:
    """Return a hash of their ids, prompts and candidates."""
    values = [(name, fact.id, fact.prompt, fact.candidates) for name, own in facts.items() for fact in own]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _measure_sensitivity(
    handle: ModelHandle,
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    roundings: Roundings,
    scored: Sequence[ScoredFact],
    facts: Mapping[str, Sequence[Fact]],
    text: CalibrationText,
    on_progress: Listener | None,
) -> Sensitivity:
    """Measure the sensitivity of a checkpoint, or read it as it was stored when it was measured."""
    guidance = Guidance(
        roundings.form,
        roundings.types,
        facts=len(scored),
        fingerprint=hash_facts(facts) if scored else None,
        tokens=min(text.tokens, TOKENS),
        text=text.sha256,
    )
    key = hashlib.sha256(repr(guidance).encode()).hexdigest()
    place = cache_folder() / "sensitivity" / f"{handle.sha256[:16]}-{key[:16]}.json"
    if (stored := read_sensitivity(place, handle.sha256, guidance)) is not None:
        return stored
    model, trusted = handle.located, handle.settings.trust_remote_code
    mask = load_tokenizer(model.path, trust_remote_code=trusted).mask_token_id
    texts = batch_text(_cut_text(text), family_of(tree) or "", mask, text.seed)
    fact_batches = batch_facts(scored) if scored else None
    try:
        with report_progress(on_progress, Stage("sensitivity", model.name)) as advance:
            measured = measure(checkpoint, tree, roundings, fact_batches, texts, advance)
    except BlockwiseUnsupported as error:
        raise UnsupportedError(
            f"{model.name} does not run block by block, as measuring its sensitivity needs.", why=f"{error}."
        ) from error
    domains = [each.query.fact.subject for each in scored]
    rows = measured.build_rows(roundings, domains)
    known = {name: number for name, number in Counter(domains).items() if number >= FEWEST_OF_A_DOMAIN}
    others = _count_weights(tree) - sum(prod(row.shape) for row in rows)
    sensitivity = Sensitivity(handle.sha256, guidance, rows, known, others)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_sensitivity(sensitivity, place)
    return sensitivity


def _count_weights(tree: PreTrainedModel) -> int:
    """Count the weights of a model, those that share their storage once."""
    structure = structure_of(tree)
    others = {*structure.tied, *structure.buffers}
    return sum(prod(shape) for name, shape in structure.parameters.items() if name not in others)


def _score_facts(
    folder: Path,
    tree: PreTrainedModel,
    answers: Answers,
    probes: Sequence[Probe],
    facts: Mapping[str, Sequence[Fact]],
    trusted: bool,
) -> list[ScoredFact]:
    """Return the facts as the model reads them, and what it answered."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    scored: list[ScoredFact] = []
    for probe in probes:
        scorer = make_scorer(tree, tokenizer, family_of(tree) or "", probe)
        own = {answer.fact_id: answer for answer in answers.of(probe.name)}
        queries = [scorer.make_query(fact) for fact in facts.get(probe.name, ())]
        scored += [ScoredFact(scorer, query, own[query.fact.id]) for query in queries if not isinstance(query, str)]
    return scored


def _cut_text(text: CalibrationText) -> list[dict[str, torch.Tensor]]:
    """Return batches of the first tokens of a text."""
    batches: list[dict[str, torch.Tensor]] = []
    left = TOKENS
    for batch in text.batches:
        length = batch["input_ids"].shape[1]
        rows = min(len(batch["input_ids"]), max(left // length, 0 if batches else 1))
        if rows:
            batches.append({name: ids[:rows] for name, ids in batch.items()})
            left -= rows * length
    return batches


def _get_text(
    handle: ModelHandle, tree: PreTrainedModel, calibration: Calibration, on_progress: Listener | None
) -> CalibrationText:
    """Return the text, which a model that writes its own writes once."""

    def make() -> CalibrationText:
        folder, trusted = handle.located.path, handle.settings.trust_remote_code
        with report_progress(on_progress, Stage(calibration.work, handle.located.name)) as advance:
            return calibration_text(folder, tree, **asdict(calibration), trust_remote_code=trusted, advance=advance)

    key = hashlib.sha256(json.dumps([handle.sha256, asdict(calibration)]).encode()).hexdigest()
    file = cache_folder() / "texts" / f"{key[:32]}.json"
    return load_or_make_text(file, make) if calibration.text == "self" else make()
