"""Evaluate a model on the facts of a probe, batch by batch; if there is an original, on its most likely tokens."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.progress import Advance, Pace, ignore_advance
from compressknow.base.reading import group_by
from compressknow.evaluate.answers import Answer, Answers
from compressknow.evaluate.facts import BLANK, STOPS, Fact, Probe
from compressknow.evaluate.grades import grade_answer
from compressknow.evaluate.runtimes import BATCH_SIZE, Runtime
from compressknow.evaluate.sources import Opened, Task

if TYPE_CHECKING:
    from compressknow.evaluate.scoring.scorer import Ids, MeasureKl, Query, Scorer


_SENTENCE_END = re.compile(rf"""[.!?…{STOPS}]["'”’)\]」』]*$""")
# Numbers of facts that are timed before the first batch, if there are at least this many facts.
TIMED, LEAST = (4, 16), 320
# About as many tokens of candidates are scored at most, since ranking leaves out the others.
MOST_FURTHER = 64


class Prompts:
    """Facts of a scorer's probe as prompts for its model, in batches of a fixed order by length, so that these need no
    padding; and the number of facts dropped, by reason."""

    def __init__(self, scorer: Scorer, batch_size: int = BATCH_SIZE) -> None:
        self.scorer = scorer
        queries: list[Query] = []
        dropped: Counter[str] = Counter(scorer.probe.dropped)
        for fact in scorer.probe.facts:
            query = scorer.make_query(fact)
            if isinstance(query, str):
                dropped[query] += 1
            else:
                queries.append(query)
        self.batches = tuple(_cut_batches(scorer, queries, batch_size))
        self.dropped, self.total = dict(dropped), sum(map(len, self.batches))

    def check_not_empty(self) -> None:
        """Raise UsageError with the reasons if all facts are dropped."""
        if not self.total:
            raise UsageError(
                f"{self.scorer.probe.name} has no fact that this model can be evaluated on.",
                "\n".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()),
                "Choose another probe or protocol.",
            )


def evaluate(
    prompts: Prompts,
    *,
    reference: Mapping[str, Ids] | None = None,
    done: frozenset[str] = frozenset(),
    known: Mapping[str, Answer] | None = None,
    measure_kl: MeasureKl | None = None,
    advance: Advance = ignore_advance,
) -> Iterator[list[Answer]]:
    """Yield the answers to all facts that are not `done`, batch by batch.

    Parameters
    ----------
    reference : fact id -> token ids whose log-probabilities to store at the answer's first position: the original's.
    done : ids of facts that are answered. Batches are skipped or run as a whole, so that they do not change.
    known : fact id -> answer of this model, scored on other tokens: only its distribution is computed again.
    measure_kl : takes a batch's distributions over the whole vocabulary; see `compressknow.evaluate.distributions`.
    """
    remaining = [batch for batch in prompts.batches if not all(query.fact.id in done for query in batch)]
    total = prompts.total
    answered = total - sum(map(len, remaining))
    advance(answered, total)
    pace = _measure_pace(prompts.scorer, remaining, measured=advance is not ignore_advance and known is None)
    if pace.left is not None:
        advance(answered, total, pace.left)

    def answer(batch: Sequence[Query]) -> list[Answer]:
        ids = None if reference is None else [reference[query.fact.id] for query in batch]
        answers = None if known is None else [known[query.fact.id] for query in batch]
        return prompts.scorer.answer(batch, ids, measure_kl, answers)

    for batch, answers in prompts.scorer.run_each(answer, remaining):
        yield answers
        answered += len(batch)
        pace.add(_estimate_cost(prompts.scorer, batch))
        advance(answered, total, pace.left)


def _measure_pace(scorer: Scorer, batches: Sequence[Sequence[Query]], *, measured: bool) -> Pace:
    """Return the pace of the remaining batches; if `measured`, time a few of their facts first."""
    work = sum(_estimate_cost(scorer, batch) for batch in batches)
    largest = max(batches, key=len, default=())
    if not measured or sum(map(len, batches)) < LEAST or len(largest) < max(TIMED):
        return Pace(work)
    # Warm up.
    scorer.answer(largest[:1], None)
    # A batch takes some time however few facts it has, so two sizes are needed: their line gives the time of a batch
    # and of a token.
    costs, seconds = [], []
    for number in TIMED:
        start = time.monotonic()
        scorer.answer(largest[:number], None)
        seconds.append(time.monotonic() - start)
        costs.append(_estimate_cost(scorer, largest[:number]))
    per_token = max((seconds[1] - seconds[0]) / (costs[1] - costs[0]), 0)
    per_batch = max(seconds[1] - per_token * costs[1], 0)
    return Pace(work, per_batch * len(batches) + per_token * work)


def _estimate_cost(scorer: Scorer, batch: Iterable[Query]) -> int:
    """Estimate the cost of a batch in tokens. Masked models read the prompt again for each further token."""
    tokens = 0
    for query in batch:
        further = min(sum(len(option) - 1 for option in query.options), MOST_FURTHER)
        tokens += len(query.prompt) * (1 + further) if scorer.family == "masked" else len(query.prompt) + further
    return tokens


def _cut_batches(scorer: Scorer, queries: Iterable[Query], size: int) -> Iterator[Sequence[Query]]:
    """Yield batches of at most `size` queries of one shape, split further by the scorer; the shortest queries first."""
    for _, group in sorted(group_by(queries, lambda query: query.shape).items()):
        for start in range(0, len(group), size):
            yield from scorer.split(group[start : start + size])


def add_examples(scorer: Scorer, answers: Sequence[Answer], original: Sequence[Answer]) -> list[Answer]:
    """Add what a model says after an example to its answers about facts that only the `original` knew; grade again."""
    known = {answer.fact_id for answer in original if answer.correct}
    lost = {answer.fact_id for answer in answers if answer.fact_id in known and not answer.correct}
    facts = [fact for fact in scorer.probe.facts if fact.id in lost]
    # Without facts whose relation has only one object, and prompts that an example makes too long.
    extended = [each for fact in facts if (each := put_after_example(fact, scorer.probe)) is not None]
    queries = [query for query in map(scorer.make_query, extended) if not isinstance(query, str)]
    texts: dict[str, str] = {}
    for batch, generated in scorer.run_each(scorer.generate_answers, _cut_batches(scorer, queries, BATCH_SIZE)):
        texts |= zip((query.fact.id for query in batch), generated, strict=True)
    answers = [replace(answer, with_example=texts.get(answer.fact_id)) for answer in answers]
    return [replace(answer, grade=grade_answer(answer)) for answer in answers]


def put_after_example(fact: Fact, probe: Probe) -> Fact | None:
    """Return the fact with its prompt after a solved example of its relation; None if that has no other object, or one
    that is a blank."""
    example = probe.find_example(fact)
    if example is None or BLANK in example.obj_label:
        return None
    solved = example.prompt.replace(BLANK, example.obj_label).rstrip()
    stop = "" if _SENTENCE_END.search(solved) else "."
    return replace(fact, prompt=f"{solved}{stop} {fact.prompt}")


def check_facts(answers: Answers, probe: Opened) -> None:
    """Raise UsageError if the original was not evaluated on this probe, or on other prompts of it."""
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
    """Raise CompressknowError if a model cannot be a compressed version of the original."""
    before = reference.record.model
    check_alike("family", (before.name, before.family), (name, loaded.family))
    # Answers of other runtimes than transformers are compared as texts.
    if before.runtime is None and loaded.make_record() is None:
        check_alike("vocabulary", (before.name, before.vocabulary), (name, loaded.vocabulary))
    if loaded.gives_scores != (before.runtime or {}).get("scores", True):
        raise CompressknowError(
            f"{name} and {before.name} were not evaluated in the same way.",
            why="One returned probabilities of candidates; the other, on a server, only generated text.",
            hint="Run both on the same kind of server.",
        )


def check_alike(key: str, before: tuple[str, object], after: tuple[str, object]) -> None:
    """Raise CompressknowError if two models differ in `key`; each is a name and a value, None if it is not known."""
    (original, known), (name, value) = before, after
    if None not in (known, value) and known != value:
        raise CompressknowError(
            f"{name} is not a compressed version of {original}: they differ in {key}.",
            why=f"The {key} of {original} is {known}, that of {name} {value}.",
            hint="Compare a model with the checkpoint that it was made from.",
        )


def has_same_tokens(reference: Answers, loaded: Runtime) -> bool:
    """Return whether a model can be scored on the original's most likely tokens: vocabularies are equal, or unknown."""
    known = reference.record.model.vocabulary
    return None in (known, loaded.vocabulary) or known == loaded.vocabulary


def find_first_ids(reference: Answers, probe: Probe, prompts: Prompts) -> dict[str, Ids]:
    """Map each fact's id to the original's most likely first tokens. Raises CompressknowError if one is missing."""
    ids = {answer.fact_id: answer.first_ids for answer in reference.of(probe.name)}
    facts = [query.fact.id for batch in prompts.batches for query in batch]
    if missing := [fact for fact in facts if fact not in ids]:
        raise CompressknowError(
            f"The original's answers to {probe.name} lack {len(missing):,} of {len(facts):,} facts "
            f"(such as {missing[0]!r}).",
            hint="Probe the original again.",
        )
    return ids
