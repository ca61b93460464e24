"""Guides of a size: facts that a model knows, text that it writes, and the sensitivity of its weights to both.

Answers, text and sensitivity are stored, so that for another size of the same model only types need choosing.

Facts and text are measured as batches of rows whose scores have gradients (`compressknow.compress.calibrate.backward`).
A fact has a score for each of its best candidates: the log-probability of its tokens, as the model family scores it. If
any answer is allowed, the candidates are the most likely first tokens of an answer. A candidate's tokens may be in
several rows (masked models), and a row may serve several candidates. Text has random scores, such that the mean square
of their changes is twice the KL divergence of the next token's distribution, to second order: draws of random signs
(Hutchinson's trace estimator) over the whole vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressknow.base.errors import UnsupportedError
from compressknow.base.files import find_cache_folder
from compressknow.base.progress import Listener, Stage, report_progress
from compressknow.base.reading import group_by, hash_json
from compressknow.compress.calibrate.backward import ScoredBatch
from compressknow.compress.calibrate.model import BlockwiseUnsupported
from compressknow.compress.calibrate.text import CalibrationText, load_or_make_text, read_calibration_text
from compressknow.compress.calibrate.walk import Batches
from compressknow.compress.steps import Calibration
from compressknow.engine.language_model import find_family
from compressknow.engine.load import load_tokenizer
from compressknow.evaluate.answers import Answer, Answers
from compressknow.evaluate.distributions import Context
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.gather import find_answers_folder
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.run import probe_model
from compressknow.evaluate.scoring.families import MaskedScorer, Seq2SeqScorer, make_scorer
from compressknow.evaluate.scoring.ranking import TOP
from compressknow.evaluate.scoring.scorer import Ids, Query, Scorer
from compressknow.gguf.gptq import batch_sequences
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import read_structure
from compressknow.model.loading import open_complete
from compressknow.study.measuring import FEWEST_OF_A_DOMAIN, FactBatches, Roundings, measure
from compressknow.study.sensitivity import Guidance, Guide, Sensitivity, can_guide, read_sensitivity, write_sensitivity

FACTS = 200  # maximum facts that guide
EVALUATED = 400  # facts to evaluate: enough even if a small model knows only half of them
# Share of the probability of a fact's best five candidates that is enough: other candidates hardly affect KL.
MASS = 0.95
TOKENS = 2_048  # tokens of text that guide: more would add little and take long
# Decoder rows whose lengths differ by less than this many tokens are padded at the end, which affects nothing.
SPREAD = 4
# Per row of text: tokens, scored positions, and draws for each. More rows help more than more positions.
TEXT_LENGTH, TEXT_POSITIONS, TEXT_DRAWS = 64, 16, 2
TEXT_ROWS = 8  # rows of text per batch: for each draw, the logits of that many rows are in memory at once


def measure_guides(
    handle: ModelHandle,
    probes: Sequence[Probe],
    calibration: Calibration,
    guide: Guide,
    roundings: Roundings,
    on_progress: Listener | None,
    answers: Answers | None = None,
) -> tuple[Sensitivity, tuple[Batches, ...], CalibrationText]:
    """Measure what guides the types of a checkpoint's weights, unless it is stored: facts, even if only text guides,
    and the first `TOKENS` of the text of `calibration`. `answers` are the model's to all probes; by default it is
    evaluated on some facts of each. Return the sensitivity of the weights; batches of token ids for GPTQ: those of
    facts with their objects, if a causal model knows any, and those of the text; and the text. Raises UsageError if
    facts are to guide and the model knows fewer than 30."""
    model, trusted = handle.located, handle.settings.trust_remote_code
    is_search = answers is not None
    if answers is None:
        probes = [probe.sample(max(1, EVALUATED // len(probes))) for probe in probes]
        # A separate folder, so that answers of reports to all facts of the probe are not replaced.
        folder = find_answers_folder() / f"{handle.sha256[:16]}-guides"
        answers = probe_model(handle, probes, folder, Context(), on_progress=on_progress, wait=True)
        handle.release()
    known = select_known_facts(answers, probes)
    number, total = (sum(len(probe.facts) for probe in each) for each in (known, probes))
    if not can_guide(number, f"{model.name} knows {number} of {total} facts", guide, is_search=is_search):
        known = []
    checkpoint, tree = open_complete(model.path, trust_remote_code=trusted)
    tokenizer = load_tokenizer(model.path, trust_remote_code=trusted)
    text = _get_text(handle, tree, calibration, on_progress)
    scored = _score_facts(tree, tokenizer, answers, known)
    ids = tuple((each.answer.probe, each.answer.fact_id) for each in scored)
    fingerprint, tokens = hash_facts(known) if scored else None, min(text.tokens, TOKENS)
    measured_with = (len(scored), fingerprint, tokens, text.sha256, ids)
    guidance = Guidance(roundings.form, roundings.types, *measured_with, roundings.has_one_type, text.tokens)
    texts = batch_text(_cut_text(text), find_family(tree) or "", tokenizer.mask_token_id)
    sensitivity = _measure_sensitivity(handle, checkpoint, tree, roundings, guidance, scored, texts, on_progress)
    # The last token of a fact's object predicts nothing.
    read = [[*each.query.prompt, *each.query.gold[:-1]] for each in scored if each.scorer.family == "causal"]
    return sensitivity, (*([batch_sequences(read)] if read else []), text.batches), text


def select_known_facts(answers: Answers, probes: Sequence[Probe]) -> list[Probe]:
    """Return at most `FACTS` facts that a model answered right, evenly over relations, in the order of the probe."""
    right = {(answer.probe, answer.fact_id) for answer in answers.answers if answer.correct}
    known = [(probe.name, fact) for probe in probes for fact in probe.facts if (probe.name, fact.id) in right]
    by_relation = group_by(known, lambda each: (each[0], each[1].relation))
    turns = sorted((turn for of in by_relation.values() for turn in enumerate(of)), key=lambda turn: turn[0])
    facts = group_by((each for _, each in turns[:FACTS]), lambda each: each[0])
    return [
        replace(probe, facts=tuple(fact for _, fact in facts[probe.name])) for probe in probes if probe.name in facts
    ]


def hash_facts(probes: Iterable[Probe]) -> str:
    """Return a hash of the ids, prompts and candidates of facts."""
    values = [(probe.name, fact.id, fact.prompt, fact.candidates) for probe in probes for fact in probe.facts]
    return hash_json(values)


def _measure_sensitivity(
    handle: ModelHandle,
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    roundings: Roundings,
    guidance: Guidance,
    scored: Sequence[ScoredFact],
    texts: Sequence[ScoredBatch],
    on_progress: Listener | None,
) -> Sensitivity:
    """Return the sensitivity of a checkpoint: the stored one, or else measure and store it."""
    key = hashlib.sha256(repr(guidance).encode()).hexdigest()
    place = find_cache_folder() / "sensitivity" / f"{handle.sha256[:16]}-{key[:16]}.json"
    domains = [each.query.fact.subject for each in scored]
    known = {name: number for name, number in Counter(domains).items() if number >= FEWEST_OF_A_DOMAIN}
    stored = read_sensitivity(place, handle.sha256, guidance)
    # Domains are no part of the guidance, since they do not change types; they may have been corrected since then.
    if stored is not None and stored.domains == known:
        return stored
    fact_batches = batch_facts(scored) if scored else None
    try:
        with report_progress(on_progress, Stage("sensitivity", handle.located.name)) as advance:
            measured = measure(checkpoint, tree, roundings, fact_batches, texts, advance)
    except BlockwiseUnsupported as error:
        raise UnsupportedError(
            f"{handle.located.name} does not run block by block, as measuring its sensitivity needs.", why=f"{error}."
        ) from error
    rows = measured.build_rows(roundings, domains)
    others = read_structure(tree).stored - sum(prod(row.shape) for row in rows)
    sensitivity = Sensitivity(handle.sha256, guidance, rows, known, others)
    write_sensitivity(sensitivity, place)
    return sensitivity


def _score_facts(
    tree: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers, probes: Iterable[Probe]
) -> list[ScoredFact]:
    """Return the facts as the model reads them, with its answers."""
    scored: list[ScoredFact] = []
    for probe in probes:
        scorer = make_scorer(tree, tokenizer, find_family(tree) or "", probe)
        by_fact = {answer.fact_id: answer for answer in answers.of(probe.name)}
        queries = [scorer.make_query(fact) for fact in probe.facts]
        scored += [ScoredFact(scorer, query, by_fact[query.fact.id]) for query in queries if not isinstance(query, str)]
    return scored


def _cut_text(text: CalibrationText) -> list[dict[str, torch.Tensor]]:
    """Return batches of the first tokens of a text."""
    batches: list[dict[str, torch.Tensor]] = []
    remaining = TOKENS
    for batch in text.batches:
        length = batch["input_ids"].shape[1]
        rows = min(len(batch["input_ids"]), remaining // length)
        if rows:
            batches.append({name: ids[:rows] for name, ids in batch.items()})
            remaining -= rows * length
    return batches


def _get_text(
    handle: ModelHandle, tree: PreTrainedModel, calibration: Calibration, on_progress: Listener | None
) -> CalibrationText:
    """Return the calibration text; one that the model writes itself is stored and written only once."""

    def make() -> CalibrationText:
        folder, trusted = handle.located.path, handle.settings.trust_remote_code
        with report_progress(on_progress, Stage(calibration.work, handle.located.name)) as advance:
            return read_calibration_text(folder, tree, calibration, trust_remote_code=trusted, advance=advance)

    key = hash_json([handle.sha256, asdict(calibration)])
    file = find_cache_folder() / "texts" / f"{key[:32]}.json"
    return load_or_make_text(file, make) if calibration.text == "self" else make()


class ScoredFact(NamedTuple):
    """Fact as a model reads it, with the model's answer, whose best candidates are scored."""

    scorer: Scorer
    query: Query
    answer: Answer


@dataclass(frozen=True)
class Row:
    """Input that a model reads once."""

    ids: Ids  # the model's input
    decoder: Ids | None  # the decoder's input, if any
    start: int  # position that predicts the first wanted token
    # Pairs of a candidate's number, counted over all facts, and consecutive tokens.
    wanted: tuple[tuple[int, Ids], ...]


def batch_facts(scored: Sequence[ScoredFact]) -> FactBatches:
    """Return batches of one or more facts, which all have the same scorer family."""
    rows: list[Row] = []
    facts: list[int] = []
    for number, (scorer, query, answer) in enumerate(scored):
        options = _list_best(scorer, query, answer)
        rows += _build_rows(scorer, query, dict(enumerate(options, start=len(facts))))
        facts += [number] * len(options)
    family = scored[0].scorer.family
    groups = _group_rows(rows, pads=family != "masked")
    batches, owners = zip(*(_build_batch(group, family) for group in groups), strict=True)
    return FactBatches(batches, owners, torch.tensor(facts))


def _list_best(scorer: Scorer, query: Query, answer: Answer) -> list[Ids]:
    """Return the token ids of the best answers to a fact, at least two, the model's answer first."""
    if query.fact.candidates:
        best = [query.options[query.fact.candidates.index(text)] for text in answer.top5]
        logp = list(answer.top5_logp)
    else:
        likeliest = zip(map(int, answer.first_ids), answer.first_logp, strict=True)
        allowed = [each for each in likeliest if scorer.allowed is None or each[0] in scorer.words][:TOP]
        best, logp = [(token,) for token, _ in allowed], [logp for _, logp in allowed]
    shares = torch.tensor(logp).softmax(0).cumsum(0)
    return best[: max(2, 1 + int((shares < MASS).sum()))]


def _build_rows(scorer: Scorer, query: Query, options: Mapping[int, Ids]) -> Iterator[Row]:
    if isinstance(scorer, MaskedScorer):
        steps: dict[tuple[Ids, int], list[tuple[int, Ids]]] = {}
        for number, ids in options.items():
            for place, token in enumerate(ids):
                steps.setdefault(scorer.step(query, len(ids), ids[:place]), []).append((number, (token,)))
        yield from (Row(ids, None, start, tuple(wanted)) for (ids, start), wanted in steps.items())
        return
    # A row of a longer candidate also serves its beginnings.
    beginnings: dict[Ids, list[tuple[int, Ids]]] = {}
    for number, ids in sorted(options.items(), key=lambda each: -len(each[1])):
        read = ids[:-1]
        row = next((longer for longer in beginnings if longer[: len(read)] == read), read)
        beginnings.setdefault(row, []).append((number, ids))
    for read, wanted in beginnings.items():
        if isinstance(scorer, Seq2SeqScorer):
            begun = scorer.begin(query.fact)
            yield Row(query.prompt, (*begun, *read), len(begun) - 1, tuple(wanted))
        else:
            yield Row((*query.prompt, *read), None, len(query.prompt) - 1, tuple(wanted))


def _group_rows(rows: Iterable[Row], *, pads: bool) -> list[list[Row]]:
    """Group rows that run together: with equally many scores and equal lengths, or similar ones if `pads`."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        step = SPREAD if pads else 1
        lengths = (len(row.ids) // step,) if row.decoder is None else (len(row.ids), len(row.decoder) // step)
        groups.setdefault((*lengths, len(row.wanted)), []).append(row)
    return [groups[key] for key in sorted(groups)]


def _build_batch(rows: Sequence[Row], family: str) -> tuple[ScoredBatch, torch.Tensor]:
    width = max(len(ids) for row in rows for _, ids in row.wanted)
    targets = torch.tensor([[_pad(ids, width) for _, ids in row.wanted] for row in rows])
    real = torch.tensor([[[place < len(ids) for place in range(width)] for _, ids in row.wanted] for row in rows])
    inputs = {"input_ids": _stack([row.ids for row in rows])}
    if family != "causal":
        inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    if decoders := [row.decoder for row in rows if row.decoder is not None]:
        inputs["decoder_input_ids"] = _stack(decoders)
    last = next(iter(reversed(inputs.values()))).shape[1] - 1
    positions = torch.tensor([[min(row.start + place, last) for place in range(width)] for row in rows])
    owners = torch.tensor([[number for number, _ in row.wanted] for row in rows])

    def score(logits: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [rows, directions], summed over the positions of real tokens."""
        log_probs = logits.gather(3, targets[..., None]).squeeze(3) - logits.logsumexp(3)
        return log_probs.where(real, 0.0).sum(2)

    return ScoredBatch(inputs, owners.shape[1], positions, score), owners


def _stack(rows: Sequence[Ids]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([_pad(ids, longest) for ids in rows])


def _pad(ids: Ids, length: int) -> Ids:
    return ids + ids[-1:] * (length - len(ids))


def batch_text(batches: Sequence[Mapping[str, torch.Tensor]], family: str, mask: int | None) -> list[ScoredBatch]:
    """Return batches of calibration text with random scores, the same for the same text: pieces of it for causal
    models, whole sequences for others, which predict hidden tokens."""
    generator = torch.Generator().manual_seed(0)
    text_batches = []
    for batch in batches:
        ids = batch["input_ids"]
        if family == "causal":
            # The first positions of a piece have too little context.
            length = min(TEXT_LENGTH, ids.shape[1])
            ids = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
            inputs = {"input_ids": ids}
            positions = _draw_positions(torch.ones_like(ids, dtype=torch.bool)[:, length // 4 :], generator)
            positions += length // 4
        else:
            inputs = {"attention_mask": torch.ones_like(ids), **batch}
            hidden = ids.eq(mask if mask is not None else -1)
            allowed = hidden if family == "masked" else torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
            positions = _draw_positions(allowed, generator)
        for start in range(0, len(ids), TEXT_ROWS):
            rows = slice(start, start + TEXT_ROWS)
            in_rows = {name: each[rows] for name, each in inputs.items()}
            text_batches.append(ScoredBatch(in_rows, TEXT_DRAWS, positions[rows], partial(_sketch, generator)))
    return text_batches


def _draw_positions(allowed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw allowed positions, [rows, positions]: as many as every row has, at most `TEXT_POSITIONS`."""
    count = min(TEXT_POSITIONS, int(allowed.sum(1).min()))
    keys = torch.rand(allowed.shape, generator=generator).where(allowed, -1.0)
    return keys.topk(max(count, 1), 1).indices.sort(1).values


def _sketch(generator: torch.Generator, logits: torch.Tensor) -> torch.Tensor:
    """Return a random sum of log-probabilities, each centred and weighted by the root of its probability p, with a
    random sign: the mean square of its changes is dz' (diag p - p p') dz. Positions are added, because their signs are
    independent, and scaled so that squares are means over positions."""
    with torch.no_grad():
        # All copies of a row are the same.
        p = logits[:, :1].softmax(3)
        signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8)
        weights = signs.mul_(2).sub_(1) * p.sqrt()
        weights -= weights.sum(3, keepdim=True) * p
    scores: torch.Tensor = torch.einsum("rdpv,rdpv->rd", weights, logits) / logits.shape[2] ** 0.5
    return scores
