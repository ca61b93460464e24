"""Divergence, calibration, ranks and popularity, by hand and on random inputs."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compressknow.comparison.distributions import (
    LOGP_FLOOR,
    PERCENTILES,
    assign_popularity_bins,
    compute_brier,
    compute_ece,
    compute_kl,
    compute_mean_reciprocal_rank,
    compute_percentiles,
    compute_precision,
    name_popularity_bins,
)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max()
    return scores - np.log(np.exp(scores).sum())


scores = arrays.arrays(np.float64, 12, elements=st.floats(-30, 30))


class TestKL:
    def test_by_hand(self) -> None:
        # p = 1/2, 1/4, rest 1/4; q = 1/4, 1/4, rest 1/2: 0.5 ln 2 + 0 + 0.25 ln 0.5 = 0.25 ln 2.
        p, q = np.log([0.5, 0.25]), np.log([0.25, 0.25])
        assert float(compute_kl(p, q)) == pytest.approx(0.25 * math.log(2))

    def test_certain_against_even(self) -> None:
        assert float(compute_kl([0.0], [math.log(0.5)])) == pytest.approx(math.log(2), abs=1e-5)

    @given(scores)
    def test_equal_inputs_give_exactly_zero(self, values: np.ndarray) -> None:
        logp = log_softmax(values)[:8].astype(np.float32)
        assert float(compute_kl(logp, logp)) == 0.0

    @given(scores, scores)
    def test_never_negative_nor_infinite(self, first: np.ndarray, second: np.ndarray) -> None:
        p, q = (log_softmax(values)[:8].astype(np.float32) for values in (first, second))
        assert 0 <= float(compute_kl(p, q)) < math.inf

    @given(scores, scores)
    def test_never_above_the_divergence_over_the_whole_vocabulary(self, first: np.ndarray, second: np.ndarray) -> None:
        p, q = log_softmax(first / 10), log_softmax(second / 10)
        over_all = float(np.sum(np.exp(p) * (p - q)))
        assert float(compute_kl(p[:8], q[:8])) <= over_all + 1e-6

    def test_tiny_changes_do_not_cancel(self) -> None:
        # For q = p (1 + e) on one of two outcomes of 1/2 each, KL is e^2 / 2 to second order.
        change = 1e-7
        assert float(compute_kl([math.log(0.5)], [math.log(0.5) + change])) == pytest.approx(change**2 / 2, rel=1e-2)

    def test_stays_finite_where_a_token_is_impossible(self) -> None:
        value = float(compute_kl([math.log(0.5), -math.inf], [-math.inf, math.log(0.5)]))
        assert value == pytest.approx(0.5 * (math.log(0.5) - LOGP_FLOOR), rel=1e-3)

    def test_nan_gives_nan(self) -> None:
        assert math.isnan(float(compute_kl([math.log(0.5)], [math.nan])))

    def test_computes_each_row(self) -> None:
        p = np.log([[0.5, 0.25], [0.1, 0.2]])
        q = np.log([[0.25, 0.25], [0.1, 0.2]])
        assert compute_kl(p, q) == pytest.approx([0.25 * math.log(2), 0])


class TestCalibration:
    def test_ece_by_hand(self) -> None:
        # Guo et al. (2017), equation 3, 15 bins: ten answers in (14/15, 1] at 0.95 of which 8 are right, ten in
        # (7/15, 8/15] at 0.5 of which 6 are right: 0.5 |0.8 - 0.95| + 0.5 |0.6 - 0.5|.
        confidence = [0.95] * 10 + [0.5] * 10
        correct = [True] * 8 + [False] * 2 + [True] * 6 + [False] * 4
        assert compute_ece(confidence, correct) == pytest.approx(0.125)

    def test_bins_include_their_upper_edge(self) -> None:
        # 1/15 lies in the first bin, (0, 1/15], and cannot even out with what lies above it.
        assert compute_ece([1 / 15] * 10 + [1 / 15 + 1e-9] * 10, [True] * 10 + [False] * 10) == pytest.approx(0.5)
        assert compute_ece([0.0] * 20, [False] * 20) == 0

    def test_brier_by_hand(self) -> None:
        assert compute_brier([0.8] * 20, [True] * 15 + [False] * 5) == pytest.approx((15 * 0.04 + 5 * 0.64) / 20)

    @given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=20, max_size=50))
    def test_ece_is_within_zero_and_one_in_any_order(self, rows: list[tuple[float, bool]]) -> None:
        value = compute_ece(*zip(*rows, strict=True))
        assert 0 <= value <= 1
        random.Random(0).shuffle(rows)
        assert compute_ece(*zip(*rows, strict=True)) == pytest.approx(value)


class TestRanks:
    def test_a_missing_rank_counts_as_infinite(self) -> None:
        assert compute_mean_reciprocal_rank([1, None, 4]) == pytest.approx(1.25 / 3)
        assert compute_precision(5, [1, None, 6, 5]) == 0.5

    def test_no_ranks_have_no_mean(self) -> None:
        assert compute_mean_reciprocal_rank([None, None]) is None
        assert compute_mean_reciprocal_rank([]) is None
        assert compute_precision(5, []) is None

    def test_percentiles_by_hand(self) -> None:
        percentiles = compute_percentiles(range(101), PERCENTILES)
        assert percentiles == {"p1": 1, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99}


class TestPopularityBins:
    def test_five_bins_of_equal_size_most_popular_first(self) -> None:
        names = assign_popularity_bins([float(value) for value in range(100, 0, -1)])
        expected = ("top 20 %", "20 to 40 %", "40 to 60 %", "60 to 80 %", "bottom 20 %")
        assert names == [name for name in expected for _ in range(20)]

    def test_fewer_bins_for_fewer_facts(self) -> None:
        assert set(assign_popularity_bins([float(value) for value in range(45)])) == {"top 50 %", "bottom 50 %"}

    def test_no_bins_for_few_facts_or_a_single_popularity(self) -> None:
        assert set(assign_popularity_bins([float(value) for value in range(39)])) == {None}
        assert set(assign_popularity_bins([1.0] * 100)) == {None}
        assert assign_popularity_bins([]) == []

    @pytest.mark.parametrize(("sizes", "bins"), [((30, 70), [30, 70]), ((37, 37, 36, 90), [74, 36, 90])])
    def test_bins_of_equal_popularities_are_about_even(self, sizes: tuple[int, ...], bins: list[int]) -> None:
        names = assign_popularity_bins([-float(place) for place, size in enumerate(sizes) for _ in range(size)])
        assert Counter(names) == dict(zip(name_popularity_bins(len(bins)), bins, strict=True))

    def test_facts_without_popularity_are_in_no_bin(self) -> None:
        names = assign_popularity_bins([None, *(float(value) for value in range(40)), math.nan])
        assert names[0] is None
        assert names[-1] is None
        assert None not in names[1:-1]

    @given(st.lists(st.integers(1, 30), min_size=40, max_size=300))
    def test_ties_stay_together_and_no_bin_is_small(self, values: list[int]) -> None:
        names = assign_popularity_bins([float(value) for value in values])
        by_value = {value: {n for n, v in zip(names, values, strict=True) if v == value} for value in values}
        assert all(len(bins) == 1 for bins in by_value.values())
        assert all(names.count(name) >= 20 for name in set(names) - {None})
