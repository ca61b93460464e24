"""Evaluate a model on the facts of a probe, batch by batch, on the original's most likely tokens if there is one."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.progress import Advance, Pace, ignore_advance
from compressknow.evaluate.answers import Answer, Answers
from compressknow.evaluate.facts import BLANK, STOPS, Fact, Probe
from compressknow.evaluate.grades import grade_answer
from compressknow.evaluate.runtimes import BATCH_SIZE, Runtime
from compressknow.evaluate.sources import Opened, Task

if TYPE_CHECKING:
    from compressknow.evaluate.scoring.scorer import Ids, MeasureKl, Query, Scorer


_ENDED = re.compile(rf"""[.!?…{STOPS}]["'”’)\]」』]*$""")
# Facts to time before the first batch, if there are LEAST times as many.
SAMPLE, LEAST = 12, 16
# About so many tokens of candidates are scored, however many there are.
MOST_FURTHER = 64


@dataclass(frozen=True)
class Prompts:
    """Facts of a probe as one model reads them, in batches; and how many it cannot read, by reason."""

    scorer: Scorer
    batches: tuple[Sequence[Query], ...]
    dropped: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(len(batch) for batch in self.batches)


def make_prompts(scorer: Scorer, batch_size: int = BATCH_SIZE) -> Prompts:
    """Build the probe's prompts: sorted by length, so that a batch needs no padding; the order is fixed."""
    queries: list[Query] = []
    dropped: Counter[str] = Counter(scorer.probe.dropped)
    for fact in scorer.probe.facts:
        query = scorer.make_query(fact)
        if isinstance(query, str):
            dropped[query] += 1
        else:
            queries.append(query)
    return Prompts(scorer, tuple(_cut_batches(scorer, queries, batch_size)), dict(dropped))


def evaluate(
    prompts: Prompts,
    *,
    reference: Mapping[str, Ids] | None = None,
    done: frozenset[str] = frozenset(),
    known: Mapping[str, Answer] | None = None,
    measure_kl: MeasureKl | None = None,
    advance: Advance = ignore_advance,
) -> Iterator[list[Answer]]:
    """Yield the answers to all facts that are not `done`, a batch at a time as they come.

    Parameters
    ----------
    reference : fact id -> ids at the answer's first position whose log-probabilities are wanted: the original's.
    done : ids of facts that are answered. A batch is left out whole or run whole, so that a batch that is run
        later is the same one.
    known : fact id -> what this model answered, with the log-probabilities of other tokens: these alone are scored.
    measure_kl : takes a batch's distributions over the whole vocabulary; see `compressknow.evaluate.distributions`.
    """
    left = [batch for batch in prompts.batches if not all(query.fact.id in done for query in batch)]
    total = prompts.total
    answered = total - sum(map(len, left))
    advance(answered, total)
    pace = _measure_pace(prompts.scorer, left, measured=advance is not ignore_advance and known is None)
    if pace.left is not None:
        advance(answered, total, pace.left)

    def answer(batch: Sequence[Query]) -> list[Answer]:
        wanted = [reference[query.fact.id] for query in batch] if reference is not None else None
        if known is None:
            return prompts.scorer.answer(batch, wanted, measure_kl)
        return prompts.scorer.answer_anew(batch, [known[query.fact.id] for query in batch], wanted, measure_kl)

    for batch, answers in prompts.scorer.run_each(answer, left):
        yield answers
        answered += len(batch)
        pace.add(_estimate_cost(prompts.scorer, batch))
        advance(answered, total, pace.left)


def _measure_pace(scorer: Scorer, left: Sequence[Sequence[Query]], *, measured: bool) -> Pace:
    """Return the pace of the remaining batches; `measured` runs a few facts of some of them first, to take the time."""
    work = sum(_estimate_cost(scorer, batch) for batch in left)
    # If facts are answered one by one, the first ones tell the pace as soon.
    if not measured or sum(map(len, left)) < LEAST * SAMPLE or max(map(len, left)) == 1:
        return Pace(work)
    samples = [left[len(left) * place // 4][: SAMPLE // 3] for place in (1, 2, 3)]
    # The first call of all prepares much that later ones find done.
    scorer.answer(samples[0][:1], None)
    start = time.monotonic()
    for sample in samples:
        scorer.answer(sample, None)
    return Pace(work, sum(_estimate_cost(scorer, sample) for sample in samples), time.monotonic() - start)


def _estimate_cost(scorer: Scorer, batch: Iterable[Query]) -> int:
    """Estimate what a batch costs, in tokens. Masked models read the prompt again for each further token."""
    tokens = 0
    for query in batch:
        further = min(sum(len(option) - 1 for option in query.options), MOST_FURTHER)
        tokens += len(query.prompt) * (1 + further) if scorer.family == "masked" else len(query.prompt) + further
    return tokens


def _cut_batches(scorer: Scorer, queries: Iterable[Query], size: int) -> Iterator[Sequence[Query]]:
    """Yield queries of one shape, at most `size` of them at a time, as the scorer splits these; the shortest first."""
    shapes: dict[tuple[int, ...], list[Query]] = {}
    for query in queries:
        shapes.setdefault(query.shape, []).append(query)
    for _, alike in sorted(shapes.items()):
        for start in range(0, len(alike), size):
            yield from scorer.split(alike[start : start + size])


def add_examples(scorer: Scorer, answers: Sequence[Answer], original: Sequence[Answer]) -> list[Answer]:
    """Add what a model says after an example where the `original` knew the fact and it does not, and grade again."""
    known = {answer.fact_id for answer in original if answer.correct}
    lost = {answer.fact_id for answer in answers if answer.fact_id in known and not answer.correct}
    facts = [fact for fact in scorer.probe.facts if fact.id in lost]
    # Nothing of facts that an example makes too long, and of relations of one object.
    shown = [shown for fact in facts if (shown := put_after_example(fact, scorer.probe)) is not None]
    queries = [query for query in map(scorer.make_query, shown) if not isinstance(query, str)]
    texts: dict[str, str] = {}
    for batch, written in scorer.run_each(scorer.say, _cut_batches(scorer, queries, BATCH_SIZE)):
        texts |= zip((query.fact.id for query in batch), written, strict=True)
    answers = [replace(answer, with_example=texts.get(answer.fact_id)) for answer in answers]
    return [replace(answer, grade=grade_answer(answer)) for answer in answers]


def put_after_example(fact: Fact, probe: Probe) -> Fact | None:
    """Put the fact's prompt after another fact of its relation, solved; None if there is no other object."""
    example = probe.find_example(fact)
    if example is None:
        return None
    solved = example.prompt.replace(BLANK, example.obj_label).rstrip()
    stop = "" if _ENDED.search(solved) else "."
    return replace(fact, prompt=f"{solved}{stop} {fact.prompt}")


def check_facts(answers: Answers, probe: Opened) -> None:
    """Raise UsageError if a model was evaluated on other prompts of this probe, or the original not at all."""
    entry = answers.record.probes.get(probe.name)
    if entry is None and not isinstance(probe, Task):
        raise UsageError(
            f"The original was not evaluated on {probe.name}, but its most likely tokens are needed.",
            hint="Probe the original with the same -p PROBE first.",
        )
    if entry and entry.fingerprint != probe.fingerprint():
        raise UsageError(
            f"{answers.record.model.name} was evaluated on other facts or prompts of {probe.name}.",
            hint="Give the options that it was probed with (--limit, --seed, --template, --templates, --protocol, "
            "--context, --data), or probe it again.",
        )


def check_model(reference: Answers, name: str, loaded: Runtime) -> None:
    """Raise CompressknowError if a model cannot be a compressed form of the original."""
    before = reference.record.model
    check_alike("family", (before.name, before.family), (name, loaded.family))
    # Answers of other runtimes than transformers are compared as texts.
    if before.runtime is None and loaded.make_record() is None:
        check_alike("vocabulary", (before.name, before.vocabulary), (name, loaded.vocabulary))
    if loaded.gives_scores != (before.runtime or {}).get("scores", True):
        raise CompressknowError(
            f"{name} and {before.name} were not evaluated in the same way.",
            why="One gave probabilities of candidates; the other, on a server, only wrote text.",
            hint="Run both on the same kind of server.",
        )


def check_alike(key: str, before: tuple[str, object], after: tuple[str, object]) -> None:
    """Raise CompressknowError if two models, each a name and its `key`, differ in that; None is not known."""
    (original, known), (name, value) = before, after
    if None not in (known, value) and known != value:
        raise CompressknowError(
            f"{name} is not a compressed version of {original}: they differ in {key}.",
            why=f"The {key} of {original} is {known}, that of {name} {value}.",
            hint="Compare a model with the checkpoint that it was made from.",
        )


def has_same_tokens(reference: Answers, loaded: Runtime) -> bool:
    """Return whether a model can be scored on the original's most likely tokens: not where its own are others."""
    known = reference.record.model.vocabulary
    return None in (known, loaded.vocabulary) or known == loaded.vocabulary


def find_first_ids(reference: Answers, probe: Probe, prompts: Prompts) -> dict[str, Ids]:
    """Map each fact's id to the original's most likely tokens at the answer's first position. Raises CompressknowError
    if the original has not answered a fact."""
    ids = {answer.fact_id: answer.first_ids for answer in reference.of(probe.name)}
    wanted = [query.fact.id for batch in prompts.batches for query in batch]
    if missing := [fact for fact in wanted if fact not in ids]:
        raise CompressknowError(
            f"The original's answers to {probe.name} lack {len(missing):,} of {len(wanted):,} facts "
            f"({missing[0]!r}, for one).",
            hint="Probe the original again.",
        )
    return ids
