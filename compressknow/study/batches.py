"""Facts and text as batches of rows whose scores have gradients (`compressknow.compress.calibrate.backward`).

A fact has a score for each of its best candidates: the log-probability of its tokens, as its family scores them. Where
any answer is allowed, the candidates are the likeliest tokens that an answer begins with. A candidate's tokens may lie
in several rows (masked models), and a row may serve several candidates. Text has random scores, whose changes have
squares that are twice the KL divergence of the next token's distribution in the mean, to second order: draws of random
signs (Hutchinson's estimator of a trace) over all of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from compressknow.compress.calibrate.backward import Batch
from compressknow.evaluate.scoring.families import MaskedScorer, Seq2SeqScorer
from compressknow.evaluate.scoring.scorer import Ids

if TYPE_CHECKING:
    from compressknow.evaluate.answers import Answer
    from compressknow.evaluate.scoring.scorer import Query, Scorer

# Rows of decoders whose lengths differ by less than so many tokens are filled up at their ends, which nothing sees.
SPREAD = 4
# Of a row of text: tokens, positions that are scored, and draws for each. More rows tell more than more positions.
TEXT_LENGTH, TEXT_POSITIONS, TEXT_DRAWS = 64, 16, 2
# Rows of text in a batch: what a head gives of so many lies in memory at a time, for each draw.
TEXT_ROWS = 8


@dataclass(frozen=True)
class Row:
    """Input that a model reads once.

    Attributes
    ----------
    ids : of the model's input; `decoder` those of a decoder beside it.
    start : the position that predicts the first of the wanted tokens.
    wanted : pairs of a candidate's number, counted over all facts, and tokens that follow one another.
    """

    ids: Ids
    decoder: Ids | None
    start: int
    wanted: tuple[tuple[int, Ids], ...]


@dataclass(frozen=True)
class FactBatches:
    """Batches, and the candidates that their scores are of.

    Attributes
    ----------
    owners : of each batch, the number of the candidate that a score is of, int64 [rows, directions].
    facts : of each candidate the number of its fact, int64 [candidates], ascending.
    """

    batches: tuple[Batch, ...]
    owners: tuple[torch.Tensor, ...]
    facts: torch.Tensor


class ScoredFact(NamedTuple):
    """Fact as a model reads it, and what it answered: its best candidates are scored."""

    scorer: Scorer
    query: Query
    answer: Answer


def batch_facts(scored: Sequence[ScoredFact]) -> FactBatches:
    """Return the questions of facts to one model, one or more."""
    rows: list[Row] = []
    facts: list[int] = []
    for number, (scorer, query, answer) in enumerate(scored):
        options = _list_best(scorer, query, answer)
        rows += _build_rows(scorer, query, dict(enumerate(options, start=len(facts))))
        facts += [number] * len(options)
    family = scored[0].scorer.family
    groups = _group_rows(rows, fills=family != "masked")
    batches, owners = zip(*(_build_batch(group, family) for group in groups), strict=True)
    return FactBatches(batches, owners, torch.tensor(facts))


def _list_best(scorer: Scorer, query: Query, answer: Answer) -> list[Ids]:
    """Return the ids of the best answers to a fact, what was answered first."""
    if query.fact.candidates:
        return [query.options[query.fact.candidates.index(text)] for text in answer.top5]
    allowed = [int(token) for token in answer.first_ids if scorer.allowed is None or int(token) in scorer.words]
    return [(token,) for token in allowed[: len(answer.top5)]]


def _build_rows(scorer: Scorer, query: Query, options: Mapping[int, Ids]) -> Iterator[Row]:
    if isinstance(scorer, MaskedScorer):
        steps: dict[tuple[Ids, int], list[tuple[int, Ids]]] = {}
        for number, ids in options.items():
            for place, token in enumerate(ids):
                steps.setdefault(scorer.step(query, len(ids), ids[:place]), []).append((number, (token,)))
        yield from (Row(ids, None, start, tuple(wanted)) for (ids, start), wanted in steps.items())
        return
    # A candidate is read in the row of another that begins with it.
    beginnings: dict[Ids, list[tuple[int, Ids]]] = {}
    for number, ids in sorted(options.items(), key=lambda each: -len(each[1])):
        read = ids[:-1]
        held = next((longer for longer in beginnings if longer[: len(read)] == read), read)
        beginnings.setdefault(held, []).append((number, ids))
    for read, wanted in beginnings.items():
        if isinstance(scorer, Seq2SeqScorer):
            begun = scorer.begin(query.fact)
            yield Row(query.prompt, (*begun, *read), len(begun) - 1, tuple(wanted))
        else:
            yield Row((*query.prompt, *read), None, len(query.prompt) - 1, tuple(wanted))


def _group_rows(rows: Iterable[Row], *, fills: bool) -> list[list[Row]]:
    """Group rows that run together: of as many scores, and of one length, or nearly so where they can be filled up."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        step = SPREAD if fills else 1
        own = (len(row.ids) // step,) if row.decoder is None else (len(row.ids), len(row.decoder) // step)
        groups.setdefault((*own, len(row.wanted)), []).append(row)
    return [groups[key] for key in sorted(groups)]


def _build_batch(rows: Sequence[Row], family: str) -> tuple[Batch, torch.Tensor]:
    width = max(len(ids) for row in rows for _, ids in row.wanted)
    targets = torch.tensor([[_fill(ids, width) for _, ids in row.wanted] for row in rows])
    real = torch.tensor([[[place < len(ids) for place in range(width)] for _, ids in row.wanted] for row in rows])
    inputs = _build_inputs([row.ids for row in rows], [row.decoder for row in rows if row.decoder is not None], family)
    last = next(iter(reversed(inputs.values()))).shape[1] - 1
    positions = torch.tensor([[min(row.start + place, last) for place in range(width)] for row in rows])
    owners = torch.tensor([[number for number, _ in row.wanted] for row in rows])

    def score(logits: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of the tokens [rows, directions, positions], where they are real, summed."""
        log_probs = logits.gather(3, targets[..., None]).squeeze(3) - logits.logsumexp(3)
        return log_probs.where(real, 0.0).sum(2)

    return Batch(inputs, owners.shape[1], positions, score), owners


def _build_inputs(ids: Sequence[Ids], decoders: Sequence[Ids], family: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, ids))
    inputs = {"input_ids": torch.tensor([_fill(row, longest) for row in ids])}
    if family != "causal":
        inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    if decoders:
        longest = max(map(len, decoders))
        inputs["decoder_input_ids"] = torch.tensor([_fill(row, longest) for row in decoders])
    return inputs


def _fill(ids: Ids, length: int) -> Ids:
    return ids + ids[-1:] * (length - len(ids))


def batch_text(batches: Sequence[Mapping[str, torch.Tensor]], family: str, mask: int | None, seed: int) -> list[Batch]:
    """Return batches of text, the text that a checkpoint is calibrated on: pieces of it for a causal model, whole
    sequences for others, for these are made of what is hidden in them. The draws are seeded."""
    generator = torch.Generator().manual_seed(seed)
    text_batches = []
    for batch in batches:
        ids = batch["input_ids"]
        inputs = dict(batch)
        if family == "causal":
            # The first positions of a piece say little of the text: they have read too few tokens.
            length = min(TEXT_LENGTH, ids.shape[1])
            ids = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
            inputs = {"input_ids": ids}
            positions = _draw_positions(torch.ones_like(ids, dtype=torch.bool)[:, length // 4 :], generator)
            positions += length // 4
        elif family == "masked":
            positions = _draw_positions(ids.eq(mask if mask is not None else -1), generator)
        else:
            positions = _draw_positions(torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool), generator)
        if family != "causal":
            inputs = {"attention_mask": torch.ones_like(ids), **inputs}
        for start in range(0, len(ids), TEXT_ROWS):
            rows = slice(start, start + TEXT_ROWS)
            own = {name: each[rows] for name, each in inputs.items()}
            text_batches.append(Batch(own, TEXT_DRAWS, positions[rows], partial(_sketch, generator)))
    return text_batches


def _draw_positions(allowed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw positions of each row that are allowed, [rows, positions]: as many as every row has, at most as wanted."""
    count = min(TEXT_POSITIONS, int(allowed.sum(1).min()))
    keys = torch.rand(allowed.shape, generator=generator).where(allowed, -1.0)
    return keys.topk(max(count, 1), 1).indices.sort(1).values


def _sketch(generator: torch.Generator, logits: torch.Tensor) -> torch.Tensor:
    """Return a random sum of log-probabilities, each centred and weighted by the root of its probability p, with a
    random sign: the mean of the squares of its changes is dz' (diag p - p p') dz. Those of all positions are added, for
    their signs are independent, and divided so that squares are means over positions."""
    with torch.no_grad():
        # The copies of a row are alike.
        p = logits[:, :1].softmax(3)
        signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8)
        weights = signs.mul_(2).sub_(1) * p.sqrt()
        weights -= weights.sum(3, keepdim=True) * p
    scores: torch.Tensor = torch.einsum("rdpv,rdpv->rd", weights, logits) / logits.shape[2] ** 0.5
    return scores
