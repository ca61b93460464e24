"""Ranking: the best candidates, found exactly without finishing most of them, and the answer that their scores make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressknow.evaluate.answers import Answer
from compressknow.evaluate.facts import Fact

TOP = 5
# The most probability that unfinished candidates may have together.
TAIL = 1e-3
Scores = NDArray[np.float64]
# Pairs (index of the contest, index of the candidate) and a bar for each -> scores, [pairs]: those of the whole
# candidates, and of candidates that fall below their bar what shows that they do.
Finish = Callable[[list[tuple[int, int]], Scores], Scores]


@dataclass
class Ranking:
    """Candidates of one fact, and what is known of their scores.

    Attributes
    ----------
    scores : [candidates], natural logarithms; upper bounds where `finished` is False.
    finished : [candidates], whether the score is certainly that of the whole candidate.
    gold : index of the object.
    summed : whether the sum of all candidates' probabilities is wanted too.
    """

    scores: Scores
    finished: NDArray[np.bool_]
    gold: int
    summed: bool = True

    def compute_bar(self) -> float | None:
        """Return what a candidate must reach to matter: the lowest of the object's score, that of the fifth best and,
        for the sum, an even part of the tail of what is finished. None while they are not known. It only rises."""
        known = self.scores[self.finished]
        if not self.finished[self.gold] or len(known) < min(TOP, len(self.scores)):
            return None
        bar = np.fmin(self.scores[self.gold], np.sort(known)[-min(TOP, len(known))])
        return float(np.fmin(bar, sum_logs(known) + math.log(TAIL / len(self.scores))) if self.summed else bar)

    def compute_total(self) -> float | None:
        """Return the logarithm of the sum of all candidates' probabilities, short of `TAIL` of it at most; None if
        that is not known. Which candidates are finished depends on their scores alone, so that it is the same in any
        batch."""
        return sum_logs(self.scores[self.finished]) if self.summed or self.finished.all() else None

    def find_wanted(self) -> NDArray[np.intp]:
        """Return candidates to score further: the object and the leaders, then all that reach the bar; none at last."""
        if (bar := self.compute_bar()) is not None:
            return np.flatnonzero(~self.finished & (self.scores >= bar))
        leaders = np.zeros(len(self.scores), dtype=bool)
        leaders[self.sort()[:TOP]] = True
        leaders[self.gold] = True
        return np.flatnonzero(leaders & ~self.finished)

    def sort(self) -> NDArray[np.intp]:
        """Return candidates from the most likely one down; equal ones in their own order."""
        return np.argsort(-self.scores, kind="stable")


def sum_logs(scores: Scores) -> float:
    """Return the logarithm of the sum of probabilities whose logarithms these are."""
    # A model that produces NaN has none.
    with np.errstate(invalid="ignore"):
        return float(np.logaddexp.reduce(scores))


def find_rank(gold: int, scores: Scores) -> int | None:
    """Return the rank of the object, from 1; ties go to the earlier candidate. None if its score is NaN: a broken model
    knows nothing."""
    if np.isnan(scores[gold]):
        return None
    return int(1 + np.sum(scores > scores[gold]) + np.sum(scores[:gold] == scores[gold]))


def rank_candidates(rankings: Sequence[Ranking], finish: Finish) -> None:
    """Score as few tokens as make the best five, the object's rank and the sum certain, in place."""
    while pairs := [(index, int(place)) for index, ranking in enumerate(rankings) for place in ranking.find_wanted()]:
        known = {index: rankings[index].compute_bar() for index, _ in pairs}
        bars = np.array([-np.inf if (bar := known[index]) is None else bar for index, _ in pairs])
        scores = finish(pairs, bars)
        # One that has fallen below its bar may not be whole, and need not be.
        for (index, place), score, whole in zip(pairs, scores, ~(scores < bars), strict=True):
            rankings[index].scores[place] = score
            rankings[index].finished[place] = whole


def find_best(scores: Scores) -> Any:
    """Return indices of the five best, equal ones in their own order, [5]."""
    near = np.argpartition(-scores, TOP - 1)[:TOP] if len(scores) > TOP else np.arange(len(scores))
    if not np.isnan(scores[near]).any():
        # Equal scores at the edge: all of them are looked at, so that their order alone decides.
        near = np.flatnonzero(scores >= scores[near].min())
    return near[np.argsort(-scores[near], kind="stable")][:TOP]


def make_choice(fact: Fact, ranking: Ranking) -> Answer:
    assert fact.candidates is not None
    best = ranking.sort()[:TOP]
    words = tuple(fact.candidates[index] for index in best)
    rank = find_rank(ranking.gold, ranking.scores)
    return make_answer(
        fact,
        words,
        ranking.scores[best],
        correct=rank == 1,
        rank=rank,
        logp_gold=float(ranking.scores[ranking.gold]),
        choices=len(fact.candidates),
        total_logp=ranking.compute_total(),
    )


def make_answer(fact: Fact, top: tuple[str, ...], top_logp: Scores, **scored: Any) -> Answer:
    """Return the answer to a fact: the best answers with their log-probabilities, and other fields of it."""
    return Answer(
        probe=fact.probe,
        fact_id=fact.id,
        relation=fact.relation,
        subject=fact.subject,
        sub_label=fact.sub_label,
        prompt=fact.prompt,
        gold=fact.obj_label,
        predicted=top[0],
        top5=top,
        top5_logp=tuple(float(value) for value in top_logp),
        popularity=fact.popularity,
        template=fact.template,
        **scored,
    )
