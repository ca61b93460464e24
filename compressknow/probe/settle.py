"""The best candidates, found exactly without finishing most of them.

A candidate's score is a sum of log-probabilities, one a token, so that it only falls with each token: the score of its
first token is an upper bound of the whole. Candidates whose bound lies below what is known already are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOP = 5
Scores = NDArray[np.float64]


@dataclass
class Contest:
    """The candidates of one fact.

    Attributes
    ----------
    scores : [candidates], natural logarithms; upper bounds where `finished` is False.
    finished : [candidates], whether the score is that of the whole candidate.
    gold : index of the object.
    """

    scores: Scores
    finished: NDArray[np.bool_]
    gold: int

    def wanted(self) -> NDArray[np.intp]:
        """Candidates that must be finished next: the object and the leaders; then all that may outrank the object; then
        all that may be among the best five. Empty when these and the object's rank are certain.
        """
        known = self.scores[self.finished]
        if not self.finished[self.gold] or len(known) < min(TOP, len(self.scores)):
            leaders = np.zeros(len(self.scores), dtype=bool)
            leaders[self.order()[:TOP]] = True
            leaders[self.gold] = True
            return np.flatnonzero(leaders & ~self.finished)
        fifth = np.sort(known)[-min(TOP, len(known))]
        for bar in (self.scores[self.gold], fifth):
            if len(rivals := np.flatnonzero(~self.finished & (self.scores >= bar))):
                return rivals
        return np.array([], dtype=np.intp)

    def order(self) -> NDArray[np.intp]:
        """Candidates from the most likely one down; equal ones in their own order."""
        return np.argsort(-self.scores, kind="stable")


def rank_of(gold: int, scores: Scores) -> int | None:
    """1 for the most likely answer; among equal ones the earlier comes first, whichever is the object. None where the
    model computes no number for it (NaN): a broken model knows nothing.
    """
    if np.isnan(scores[gold]):
        return None
    return int(1 + np.sum(scores > scores[gold]) + np.sum(scores[:gold] == scores[gold]))


def settle(contests: Sequence[Contest], finish: Callable[[list[tuple[int, int]]], Scores]) -> None:
    """Finish as few candidates as make the best five and the object's rank certain in each contest.

    Parameters
    ----------
    contests : changed in place.
    finish : pairs (index of the contest, index of the candidate) -> the scores of these whole candidates, [pairs].
    """
    open_contests = set(range(len(contests)))
    while open_contests:
        pairs = []
        for index in sorted(open_contests):
            wanted = contests[index].wanted()
            if not len(wanted):
                open_contests.discard(index)
            pairs += [(index, int(candidate)) for candidate in wanted]
        for (index, candidate), score in zip(pairs, finish(pairs) if pairs else (), strict=True):
            contests[index].scores[candidate] = score
            contests[index].finished[candidate] = True
