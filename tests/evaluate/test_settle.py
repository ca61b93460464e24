"""Rankings: the best five, rank and score of the object are exact, the sum nearly; few candidates are finished."""

from __future__ import annotations

from itertools import accumulate, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressknow.evaluate.scoring.ranking import TAIL, TOP, Ranking, find_best, find_rank, rank_candidates, sum_logs

# Few values, so that many scores are equal; exact in binary, so that their sums are exact.
LOG_PROBS = st.sampled_from([0.0, -0.25, -0.5, -1.0, -1.0, -2.0, -4.0, -8.0])
CANDIDATE = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)
TREE = st.fixed_dictionaries({path: LOG_PROBS for size in (1, 2, 3, 4) for path in product(range(3), repeat=size)})


def score_beginnings(tree: dict, ids: tuple[int, ...]) -> list[float]:
    """Return the score of each beginning of a candidate."""
    return list(accumulate(tree[ids[: size + 1]] for size in range(len(ids))))


def make_ranking(tree: dict, candidates: list, gold: int) -> tuple[Ranking, np.ndarray]:
    """Make a ranking of candidates by the log-probabilities of their tokens; return it and the scores of all."""
    scores = np.array([score_beginnings(tree, ids)[-1] for ids in candidates])
    bounds = np.array([tree[ids[:1]] for ids in candidates])
    return Ranking(bounds, np.array([len(ids) == 1 for ids in candidates]), gold % len(candidates)), scores


@given(st.data(), st.lists(TREE, min_size=1, max_size=3))
def test_a_ranking_equals_brute_force(data: st.DataObject, trees: list) -> None:
    rankings, all_scores, beginnings = [], [], []
    for tree in trees:
        candidates = data.draw(st.lists(CANDIDATE, min_size=1, max_size=20))
        ranking, scores = make_ranking(tree, candidates, data.draw(st.integers(0, 19)))
        rankings.append(ranking)
        all_scores.append(scores)
        beginnings.append([score_beginnings(tree, ids) for ids in candidates])
    seen = set()

    def finish(pairs: list[tuple[int, int]], bars: np.ndarray) -> np.ndarray:
        assert not seen & set(pairs), "a candidate is scored twice"
        assert all(not rankings[index].finished[candidate] for index, candidate in pairs)
        seen.update(pairs)
        paths = [beginnings[index][candidate] for index, candidate in pairs]
        # A candidate is scored up to the first token at which it falls below its bar.
        below_bar = [[score for score in path if score < bar] for path, bar in zip(paths, bars, strict=True)]
        return np.array([below[0] if below else path[-1] for path, below in zip(paths, below_bar, strict=True)])

    rank_candidates(rankings, finish)
    for ranking, scores in zip(rankings, all_scores, strict=True):
        best = np.argsort(-scores, kind="stable")
        assert list(ranking.sort()[:TOP]) == list(best[:TOP])
        assert list(ranking.scores[best[:TOP]]) == list(scores[best[:TOP]])
        assert ranking.scores[ranking.gold] == scores[ranking.gold]
        assert find_rank(ranking.gold, ranking.scores) == list(best).index(ranking.gold) + 1
        assert sum_logs(scores) - 1.01 * TAIL <= ranking.compute_total() <= sum_logs(scores) + 1e-12


def test_candidates_that_cannot_reach_the_best_five_or_the_object_are_not_finished() -> None:
    # Before it is finished, the sixth could equal the fifth.
    bounds = np.array([-1.0, -1.5, -2.0, -2.5, -3.0, -3.5, *(-10.0 - np.arange(94))])
    ranking = Ranking(bounds, np.zeros(100, dtype=bool), 1, summed=False)
    finished = []

    def finish(pairs: list[tuple[int, int]], bars: np.ndarray) -> np.ndarray:
        finished.extend(candidate for _, candidate in pairs)
        return np.array([ranking.scores[candidate] - 0.5 for _, candidate in pairs])

    rank_candidates([ranking], finish)
    assert sorted(finished) == [0, 1, 2, 3, 4, 5]
    assert ranking.compute_total() is None


def test_the_sum_finishes_candidates_that_may_exceed_their_part_of_the_tail() -> None:
    bounds = -np.arange(1.0, 101.0)
    ranking = Ranking(bounds, np.zeros(100, dtype=bool), 0)

    def finish(pairs: list[tuple[int, int]], bars: np.ndarray) -> np.ndarray:
        return np.array([bounds[candidate] - (candidate == 11) for _, candidate in pairs])

    rank_candidates([ranking], finish)
    # Of a sum of 0.58, a hundredth of a thousandth is e^-12.05: the twelfth might exceed it, but falls below.
    assert np.flatnonzero(ranking.finished).tolist() == list(range(11))
    assert np.exp(ranking.compute_total()) == pytest.approx(1 / (np.e - 1), rel=TAIL)


def test_candidates_that_may_outrank_the_object_are_finished() -> None:
    bounds = -np.arange(1.0, 101.0)
    ranking = Ranking(bounds, np.zeros(100, dtype=bool), 49)
    finished = set()

    def finish(pairs: list[tuple[int, int]], bars: np.ndarray) -> np.ndarray:
        finished.update(candidate for _, candidate in pairs)
        return np.array([ranking.scores[candidate] - 0.25 for _, candidate in pairs])

    rank_candidates([ranking], finish)
    assert finished == set(range(50))
    assert find_rank(49, ranking.scores) == 50


def test_candidates_of_one_token_are_not_finished() -> None:
    def finish(pairs: list[tuple[int, int]], bars: np.ndarray) -> np.ndarray:
        raise AssertionError(pairs)

    rank_candidates([Ranking(np.array([-2.0, -1.0]), np.array([True, True]), 0)], finish)


@pytest.mark.parametrize("gold", [0, 2])
def test_nan_scores_give_no_rank(gold: int) -> None:
    ranking = Ranking(np.full(9, np.nan), np.zeros(9, dtype=bool), gold)
    rank_candidates([ranking], lambda _, bars: np.full(len(bars), np.nan))
    assert find_rank(gold, ranking.scores) is None


def test_among_equal_scores_the_earlier_candidate_comes_first() -> None:
    scores = np.array([-1.0, -1.0, -0.5, -1.0])
    assert [find_rank(index, scores) for index in range(4)] == [2, 3, 1, 4]
    many = -np.random.default_rng(0).integers(0, 4, (20, 50)).astype(float)
    assert [find_best(row).tolist() for row in many] == np.argsort(-many, axis=1, kind="stable")[:, :TOP].tolist()
