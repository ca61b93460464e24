"""From the scores of what may be answered to an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from compressknow.probe.answers import Answer
from compressknow.probe.facts import Fact
from compressknow.probe.settle import TOP, Contest, Scores, rank_of


def best_of(scores: Scores) -> Any:
    """Indices of the five best, equal ones in their own order, [5]."""
    near = np.argpartition(-scores, TOP - 1)[:TOP] if len(scores) > TOP else np.arange(len(scores))
    if not np.isnan(scores[near]).any():
        # Equal scores at the edge: all of them are looked at, so that their order alone decides.
        near = np.flatnonzero(scores >= scores[near].min())
    return near[np.argsort(-scores[near], kind="stable")][:TOP]


def chosen_of(fact: Fact, contest: Contest) -> Answer:
    assert fact.candidates is not None
    best = contest.order()[:TOP]
    words = tuple(fact.candidates[index] for index in best)
    logp = float(contest.scores[contest.gold])
    rank = rank_of(contest.gold, contest.scores)
    return make_answer(fact, words, contest.scores[best], rank, logp, len(fact.candidates), correct=rank == 1)


def make_answer(
    fact: Fact,
    top: tuple[str, ...],
    top_logp: Scores,
    rank: int | None,
    logp: float | None,
    choices: int | None,
    *,
    correct: bool,
) -> Answer:
    return Answer(
        probe=fact.probe,
        fact_id=fact.id,
        relation=fact.relation,
        subject=fact.subject,
        sub_label=fact.sub_label,
        prompt=fact.prompt,
        gold=fact.obj_label,
        predicted=top[0],
        correct=correct,
        rank=rank,
        logp_gold=logp,
        top5=top,
        top5_logp=tuple(float(value) for value in top_logp),
        choices=choices,
        popularity=fact.popularity,
    )


def with_distribution(answer: Answer, ids: Any, log_probs: Any, kl: float | None) -> Answer:
    return replace(answer, first_ids=ids, first_logp=log_probs, first_kl=kl)
