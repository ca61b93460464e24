"""Intervals and tests of proportions: published examples, and properties of all counts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressknow.comparison.intervals import (
    adjust_holm,
    average_relations,
    correct_for_chance,
    estimate_difference,
    estimate_proportion,
    run_mcnemar,
)
from compressknow.comparison.records import Counts, Estimate

cells = st.builds(Counts, *[st.integers(0, 200)] * 4)


def round_interval(estimate: Estimate, digits: int = 4) -> list[float]:
    return [round(number, digits) for number in (estimate.low, estimate.high)]


class TestProportion:
    @pytest.mark.parametrize(
        ("part", "whole", "interval"),
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
        [
            (81, 263, [0.2553, 0.3662]),
            (15, 148, [0.0624, 0.1605]),
            (0, 20, [0.0000, 0.1611]),
            (1, 29, [0.0061, 0.1718]),
        ],
    )
    def test_wilson_as_published(self, part: int, whole: int, interval: list[float]) -> None:
        assert round_interval(estimate_proportion(part, whole)) == interval

    def test_no_facts_have_no_value(self) -> None:
        assert estimate_proportion(0, 0) == Estimate(None)

    @given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_interval_contains_the_share_and_stays_in_bounds(self, counts: tuple[int, int]) -> None:
        estimate = estimate_proportion(*counts)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.low < estimate.high


class TestPairedDifference:
    @pytest.mark.parametrize(
        ("counts", "value", "interval"),
        [
            # Cavo et al. (2012), in Fagerland, Lydersen and Laake (2017), "Statistical Analysis of Contingency
            # Tables", chapter 8: phi is positive after its correction.
            (Counts(both=59, lost=16, gained=6, neither=80), -0.0621, [-0.1186, -0.0046]),
            # Altman et al. (2000), "Statistics with Confidence", table 6.2 (as p1 - p2 there: 0.011 to 0.226).
            (Counts(both=14, lost=5, gained=0, neither=22), -0.1220, [-0.2265, -0.0115]),
        ],
    )
    def test_newcombe_as_published(self, counts: Counts, value: float, interval: list[float]) -> None:
        estimate = estimate_difference(counts)
        assert (round(estimate.value, 4), round_interval(estimate)) == (value, interval)

    def test_by_hand_where_the_correction_makes_phi_zero(self) -> None:
        # Bentur et al. (2009): 1 * 12 - 7 * 1 = 5 < 21 / 2, so phi is 0 and the distances add as squares.
        before, after = estimate_proportion(8, 21), estimate_proportion(2, 21)
        low = -6 / 21 - np.hypot(after.value - after.low, before.high - before.value)
        high = -6 / 21 + np.hypot(after.high - after.value, before.value - before.low)
        assert round_interval(estimate_difference(Counts(1, 7, 1, 12))) == [round(low, 4), round(high, 4)]

    def test_no_change_is_zero_and_still_uncertain(self) -> None:
        estimate = estimate_difference(Counts(both=10))
        assert estimate.low < estimate.value == 0 < estimate.high

    def test_no_facts_have_no_difference(self) -> None:
        assert estimate_difference(Counts()) == Estimate(None)

    @given(cells)
    def test_interval_contains_the_difference(self, counts: Counts) -> None:
        estimate = estimate_difference(counts)
        if counts.n:
            assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1

    @given(cells)
    def test_swapping_the_models_turns_the_sign(self, counts: Counts) -> None:
        swapped = Counts(counts.both, counts.gained, counts.lost, counts.neither)
        first, second = estimate_difference(counts), estimate_difference(swapped)
        if counts.n:
            assert (first.value, first.low, first.high) == pytest.approx((-second.value, -second.high, -second.low))


class TestMcNemar:
    @pytest.mark.parametrize(
        ("lost", "gained", "p"),
        # Exact conditional test of the tables above, in Fagerland, Lydersen and Laake (2017), chapter 8.
        [(16, 6, 0.052479), (7, 1, 0.070313)],
    )
    def test_as_published(self, lost: int, gained: int, p: float) -> None:
        assert run_mcnemar(Counts(both=5, lost=lost, gained=gained, neither=9)) == pytest.approx(p, abs=1e-6)

    def test_all_changes_are_losses(self) -> None:
        assert run_mcnemar(Counts(lost=10)) == pytest.approx(2 / 2**10)

    def test_no_change_is_no_evidence(self) -> None:
        assert run_mcnemar(Counts(both=3)) == 1.0
        assert run_mcnemar(Counts(lost=4, gained=3)) == 1.0  # As sums of floats, both tails are 0.9999999999999999.
        assert run_mcnemar(Counts()) is None

    @given(cells)
    def test_is_a_probability_and_symmetric(self, counts: Counts) -> None:
        p = run_mcnemar(counts)
        assert p == run_mcnemar(Counts(counts.both, counts.gained, counts.lost, counts.neither))
        assert p is None if not counts.n else 0 < p <= 1
        if counts.lost == counts.gained and counts.n:
            assert p == 1.0


class TestHolm:
    def test_by_hand(self) -> None:
        # 4 * 0.005; 3 * 0.01; 2 * 0.03; then 1 * 0.04, which may not be below its predecessor.
        assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_missing_p_values_are_not_counted(self) -> None:
        assert adjust_holm([None, 0.5, None]) == [None, 0.5, None]
        assert adjust_holm([]) == []

    @given(st.lists(st.floats(0, 1), min_size=1))
    def test_keeps_the_order_and_lies_between_p_and_bonferroni(self, p_values: list[float]) -> None:
        adjusted = adjust_holm(p_values)
        pairs = sorted(zip(p_values, adjusted, strict=True))
        assert [a for _, a in pairs] == sorted(adjusted)
        assert all(p <= a <= min(1.0, p * len(p_values)) for p, a in pairs)


class TestAboveChance:
    def test_what_guessing_keeps_is_zero(self) -> None:
        assert correct_for_chance(Estimate(0.5, 0.4, 0.6), 0.5).value == 0

    def test_all_kept_stays_all_kept(self) -> None:
        assert correct_for_chance(Estimate(1.0, 0.9, 1.0), 0.5) == Estimate(1.0, 0.8, 1.0)

    @pytest.mark.parametrize("chance", [None, 1.0])
    def test_needs_a_chance_below_one(self, chance: float | None) -> None:
        assert correct_for_chance(Estimate(0.9, 0.8, 1.0), chance) == Estimate(None)

    @given(st.integers(0, 50), st.integers(1, 50), st.floats(0, 0.99))
    def test_stays_ordered_and_never_above_the_raw_share(self, both: int, lost: int, chance: float) -> None:
        kept = estimate_proportion(both, both + lost)
        adjusted = correct_for_chance(kept, chance)
        assert 0 <= adjusted.low <= adjusted.value <= adjusted.high <= 1
        assert adjusted.value <= kept.value + 1e-9


class TestMacro:
    relations = (Counts(50, 10, 5, 35), Counts(3, 1, 0, 1), Counts(0, 0, 0, 20))

    def test_means_over_relations_by_hand(self) -> None:
        before, after, difference = average_relations(self.relations)
        assert before.value == pytest.approx((0.60 + 0.8 + 0) / 3)
        assert after.value == pytest.approx((0.55 + 0.6 + 0) / 3)
        assert difference.value == pytest.approx((-0.05 - 0.2 + 0) / 3)

    def test_result_is_deterministic(self) -> None:
        assert average_relations(self.relations) == average_relations(self.relations)

    def test_memory_does_not_grow_with_relations(self) -> None:
        relations = [Counts(5, 2, 1, number % 7) for number in range(150)]
        tracemalloc.start()
        try:
            average_relations(relations)
            assert tracemalloc.get_traced_memory()[1] < 32e6
        finally:
            tracemalloc.stop()

    def test_interval_matches_resampled_facts(self) -> None:
        # Draw the facts of each relation with replacement, both answers together.
        generator = np.random.default_rng(0)
        means = []
        for _ in range(2000):
            relation_means = []
            for c in self.relations:
                change = np.repeat([0, -1, 1, 0], [c.both, c.lost, c.gained, c.neither])
                relation_means.append(generator.choice(change, size=c.n).mean())
            means.append(np.mean(relation_means))
        difference = average_relations(self.relations)[2]
        assert [difference.low, difference.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.015)

    def test_answers_stay_paired(self) -> None:
        # Both models answer alike: their accuracies vary from sample to sample, but never their difference.
        before, _, difference = average_relations([Counts(both=10, neither=10)])
        assert before.low < before.value < before.high
        assert difference == Estimate(0.0)

    def test_changes_that_even_out_leave_no_residue(self) -> None:
        # Of 10 facts each: 1 / 10 + 2 / 10 - 3 / 10 is 6e-17 in floats.
        relations = [Counts(5, gained=1, neither=4), Counts(5, gained=2, neither=3), Counts(5, lost=3, neither=2)]
        assert average_relations(relations)[2].value == 0

    def test_relations_without_facts_do_not_count(self) -> None:
        assert average_relations([]) == average_relations([Counts()]) == (Estimate(None),) * 3
        assert average_relations([Counts(both=1), Counts(neither=1)])[0] == Estimate(0.5)

    @given(st.lists(cells, min_size=1, max_size=5))
    def test_value_is_the_difference_of_the_values(self, relations: list[Counts]) -> None:
        before, after, difference = average_relations(relations)
        if before.value is not None:
            assert difference.value == pytest.approx(after.value - before.value)
            for estimate in (before, after, difference):
                assert estimate.low is None or estimate.low <= estimate.high
