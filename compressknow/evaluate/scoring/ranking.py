"""Ranking of candidates, which finds the best ones exactly without finishing most, and answers from their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
# Takes pairs (index of the ranking, index of the candidate) and a bar for each; returns scores, [pairs]: of whole
# candidates, or upper bounds below the bar.
Finish = Callable[[list[tuple[int, int]], Scores], Scores]


@dataclass
class Ranking:
    """Candidates of one fact, with what is known about their scores.

    `scores` [candidates] are natural logarithms, and upper bounds where `finished` is False, which says whether a score
    is certainly that of the whole candidate; `gold` is the index of the object. `summed` says whether to compute the
    sum of all candidates' probabilities too."""

    scores: Scores
    finished: NDArray[np.bool_]
    gold: int
    summed: bool = True

    def compute_bar(self) -> float | None:
        """Return the score that a candidate must reach to matter, which never decreases: the lowest of the object's,
        the fifth best and, for the sum, a candidate's part of `TAIL`. None until these are known."""
        known = self.scores[self.finished]
        if not self.finished[self.gold] or len(known) < min(TOP, len(self.scores)):
            return None
        bar = np.fmin(self.scores[self.gold], np.sort(known)[-min(TOP, len(known))])
        return float(np.fmin(bar, sum_logs(known) + math.log(TAIL / len(self.scores))) if self.summed else bar)

    def compute_total(self) -> float | None:
        """Return the logarithm of the sum of all candidates' probabilities, which is low by at most `TAIL` of it, or
        None if it is not known. It does not depend on the batch, since only scores determine which are finished."""
        return sum_logs(self.scores[self.finished]) if self.summed or self.finished.all() else None

    def find_unfinished(self) -> NDArray[np.intp]:
        """Return candidates to score next: the object and the leaders, then all that reach the bar, finally none."""
        if (bar := self.compute_bar()) is not None:
            return np.flatnonzero(~self.finished & (self.scores >= bar))
        leaders = np.zeros(len(self.scores), dtype=bool)
        leaders[self.sort()[:TOP]] = True
        leaders[self.gold] = True
        return np.flatnonzero(leaders & ~self.finished)

    def sort(self) -> NDArray[np.intp]:
        """Return indices of candidates from the most likely one down; equal ones in their original order."""
        return np.argsort(-self.scores, kind="stable")


def sum_logs(scores: Scores) -> float:
    """Return the logarithm of the sum of probabilities, given their logarithms."""
    # Allow NaN, which a broken model returns.
    with np.errstate(invalid="ignore"):
        return float(np.logaddexp.reduce(scores))


def find_rank(gold: int, scores: Scores) -> int | None:
    """Return the rank of the object, from 1; ties go to the earlier candidate. None for NaN, from a broken model."""
    if np.isnan(scores[gold]):
        return None
    return int(1 + np.sum(scores > scores[gold]) + np.sum(scores[:gold] == scores[gold]))


def rank_candidates(rankings: Sequence[Ranking], finish: Finish) -> None:
    """Score as few tokens as needed for the best five, the object's rank and the sum, in place."""
    while pairs := [(index, int(n)) for index, ranking in enumerate(rankings) for n in ranking.find_unfinished()]:
        bar_of = {index: rankings[index].compute_bar() for index, _ in pairs}
        bars = np.array([-np.inf if (bar := bar_of[index]) is None else bar for index, _ in pairs])
        scores = finish(pairs, bars)
        # A candidate below its bar may not be finished, and need not be.
        for (index, candidate), score, finished in zip(pairs, scores, ~(scores < bars), strict=True):
            rankings[index].scores[candidate] = score
            rankings[index].finished[candidate] = finished


def find_best(scores: Scores) -> Any:
    """Return indices of the five best, [5], equal ones in their original order."""
    best = np.argpartition(-scores, TOP - 1)[:TOP] if len(scores) > TOP else np.arange(len(scores))
    if not np.isnan(scores[best]).any():
        # Include all that are equal to the fifth, so that the first of them are chosen.
        best = np.flatnonzero(scores >= scores[best].min())
    return best[np.argsort(-scores[best], kind="stable")][:TOP]


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


def make_answer(fact: Fact, top: tuple[str, ...], top_logp: Iterable[float], **further: Any) -> Answer:
    """Return the answer to a fact from the best texts, their log-probabilities, and `further` fields."""
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
        **further,
    )
