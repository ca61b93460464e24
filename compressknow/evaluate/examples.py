"""Whether a fact that compression lost comes back after one solved example of the same relation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from compressknow.evaluate.answers import Answer
from compressknow.evaluate.evaluate import BATCH_SIZE, batched
from compressknow.evaluate.facts import BLANK, Fact, Probe
from compressknow.evaluate.grades import grade_of

if TYPE_CHECKING:
    from compressknow.evaluate.runtimes.runtime import Answering

_ENDED = re.compile(r"""[.!?…]["'”’)\]]*$""")


def with_examples(scorer: Answering, answers: Sequence[Answer], original: Sequence[Answer]) -> list[Answer]:
    """A model's answers to the facts of the scorer's probe, with what it says after an example where `original`, the
    original's answers, knew the fact and this model does not; their grades follow.
    """
    known = {answer.fact_id for answer in original if answer.correct}
    lost = {answer.fact_id for answer in answers if answer.fact_id in known and not answer.correct}
    texts = dict(_said(scorer, [fact for fact in scorer.probe.facts if fact.id in lost]))
    return [_with(answer, texts.get(answer.fact_id)) for answer in answers]


def _with(answer: Answer, text: str | None) -> Answer:
    answer = replace(answer, with_example=text)
    return answer if answer.grade is None else replace(answer, grade=grade_of(answer))


def _said(scorer: Answering, facts: Sequence[Fact]) -> Iterator[tuple[str, str]]:
    """Fact id -> what is said; of facts that an example makes too long, and of relations of one object, nothing is."""
    shown = [shown for fact in facts if (shown := after_example(fact, scorer.probe)) is not None]
    queries = [query for query in map(scorer.query, shown) if not isinstance(query, str)]
    batches = chain.from_iterable(scorer.parts(batch) for batch in batched(queries, BATCH_SIZE))
    for batch, texts in scorer.each(scorer.say, batches):
        for query, text in zip(batch, texts, strict=True):
            if text is not None:
                yield query.fact.id, text


def after_example(fact: Fact, probe: Probe) -> Fact | None:
    """The fact's prompt after another fact of its relation, solved; None where the relation has no other object.

    The example is the first of another subject and object, so that it does not give the answer away.
    """
    example = probe.example(fact)
    if example is None:
        return None
    solved = example.prompt.replace(BLANK, example.obj_label).rstrip()
    stop = "" if _ENDED.search(solved) else "."
    return replace(fact, prompt=f"{solved}{stop} {fact.prompt}")
