"""Intervals over relations: their coverage by simulation, and what must hold for all counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressknow.stats.clusters import FEWEST, difference_by_cluster, kept_by_cluster, ratio
from compressknow.stats.intervals import proportion
from compressknow.stats.paired import certainty
from compressknow.stats.records import Counts, Estimate
from tests.long import one_in

SIMULATED = 1000
relations = st.lists(st.builds(Counts, *[st.integers(0, 30)] * 4), max_size=12)


def covered(clusters: int, kept: float, icc: float) -> tuple[float, float]:
    """How often the interval over relations, and the simple one, hold the true share of facts kept.

    The share kept of each relation is drawn from a beta distribution, which gives its facts the correlation `icc`.
    """
    drawn, concentration = np.random.default_rng(14), 1 / icc - 1
    over_relations = simple = 0
    for _ in range(SIMULATED):
        known = drawn.integers(10, 60, clusters)
        both = drawn.binomial(known, drawn.beta(kept * concentration, (1 - kept) * concentration, clusters))
        found, alone = ratio(both.tolist(), known.tolist()), proportion(int(both.sum()), int(known.sum()))
        over_relations += found.low is not None and found.low <= kept <= found.high
        simple += alone.low <= kept <= alone.high
    return over_relations / SIMULATED, simple / SIMULATED


@pytest.mark.parametrize(("clusters", "kept", "icc"), one_in(3, [(40, 0.85, 0.1), (63, 0.92, 0.05), (25, 0.9, 0.03)]))
def test_95_of_100_intervals_hold_the_true_share(clusters: int, kept: float, icc: float) -> None:
    over_relations, simple = covered(clusters, kept, icc)
    assert 0.93 <= over_relations <= 0.97
    # What the simple interval leaves out is not small.
    assert simple < 0.9


def test_facts_that_hang_together_tell_less() -> None:
    alike = [Counts(both=18, lost=2)] * 10 + [Counts(both=17, lost=3)] * 10
    apart = [Counts(both=20)] * 10 + [Counts(both=15, lost=5)] * 10
    near, far = (kept_by_cluster(each) for each in (alike, apart))
    assert near.value == far.value == 0.875
    assert far.high - far.low > 3 * (near.high - near.low)


def test_one_relation_has_no_clusters() -> None:
    assert kept_by_cluster([Counts(both=90, lost=10)]) == Estimate(0.9)
    assert certainty([Counts(both=90, lost=10), Counts(neither=5)]).relations == 1


def test_few_relations_have_no_interval() -> None:
    few = [Counts(both=9 + number, lost=1) for number in range(FEWEST)]
    assert kept_by_cluster(few[1:]).low is None
    assert kept_by_cluster(few).low is not None


def test_relations_of_which_nothing_was_known_say_nothing_of_what_was_kept() -> None:
    known = [Counts(both=9 + number, lost=number) for number in range(8)]
    assert kept_by_cluster([*known, Counts(neither=50)]) == kept_by_cluster(known)
    assert difference_by_cluster([*known, Counts(neither=50)]) != difference_by_cluster(known)


@settings(max_examples=40, deadline=None)
@given(relations)
def test_the_figure_lies_in_its_interval_and_both_in_bounds(counts: list[Counts]) -> None:
    total = sum(counts, Counts())
    for found, value, least in (
        (kept_by_cluster(counts), total.kept, 0),
        (difference_by_cluster(counts), (total.gained - total.lost) / total.n if total.n else None, -1),
    ):
        assert found.value == value
        if found.low is not None:
            assert least <= found.low <= found.value <= found.high <= 1


def test_the_same_counts_give_the_same_interval() -> None:
    counts = [Counts(both=9 + number, lost=number % 3) for number in range(9)]
    assert kept_by_cluster(counts) == kept_by_cluster(counts)
