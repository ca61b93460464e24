"""What could have been seen: power against simulated models, by hand, and what so many facts show."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from compressknow.stats.intervals import mcnemar, proportion
from compressknow.stats.power import POWER, facts_for, facts_to_decide, power, smallest_loss
from compressknow.stats.records import Counts

SIMULATED = 4000
COUNTS = [Counts(169, 16, 19, 96), Counts(185), Counts(2311, 89, 41, 1580), Counts(60, 9, 3, 20)]


def shown(known: int, loss: float, gained: float, unknown: int) -> float:
    """How often the exact McNemar test shows a loss, of models that lose and gain facts with these chances."""
    facts = known + unknown
    up, down = gained * known / facts, (gained + loss) * known / facts
    drawn = np.random.default_rng(7).multinomial(facts, [down, up, 1 - up - down], size=SIMULATED)
    seen = [lost > won and mcnemar(Counts(lost=lost, gained=won)) < 0.05 for lost, won, _ in drawn.tolist()]
    return sum(seen) / SIMULATED


@pytest.mark.parametrize("counts", COUNTS)
def test_the_smallest_loss_is_seen_in_four_of_five_simulated_models(counts: Counts) -> None:
    loss = smallest_loss(counts)
    assert loss is not None
    known = counts.known_before
    seen = shown(known, loss, counts.gained / known, counts.n - known)
    # Three standard errors of a simulated share.
    assert abs(seen - POWER) < 3 * math.sqrt(POWER * (1 - POWER) / SIMULATED)


@pytest.mark.parametrize("counts", COUNTS)
def test_as_many_facts_as_it_says_see_a_loss_of_two_points(counts: Counts) -> None:
    known = facts_for(counts)
    assert known is not None
    unknown = round((counts.n - counts.known_before) / counts.known_before * known)
    seen = shown(known, 0.02, counts.gained / counts.known_before, unknown)
    assert abs(seen - POWER) < 3 * math.sqrt(POWER * (1 - POWER) / SIMULATED)


def test_by_hand_where_nothing_is_gained() -> None:
    # The test shows a loss from six lost facts on: 2 / 2^6 is below 5 %, 2 / 2^5 is not.
    assert power(100, 0.08, 0.0, 50) == pytest.approx(binom.sf(5, 150, 8 / 150))
    assert smallest_loss(Counts(both=5)) is None
    assert smallest_loss(Counts(both=6)) == pytest.approx(POWER ** (1 / 6), abs=1e-4)


def test_no_loss_is_shown_less_often_than_the_level() -> None:
    assert 0 < power(1000, 0.0, 0.05, 400) < 0.025


@pytest.mark.parametrize(("known", "unknown", "gained"), [(40, 20, 0.0), (185, 115, 0.1), (2400, 1600, 0.03)])
def test_larger_losses_are_seen_more_often(known: int, unknown: int, gained: float) -> None:
    seen = [power(known, loss, gained, unknown) for loss in np.linspace(0, 0.9, 20)]
    assert all(less <= more + 1e-9 for less, more in itertools.pairwise(seen))
    assert seen[-1] > 0.99


def test_gained_facts_hide_a_loss() -> None:
    assert smallest_loss(Counts(both=180, lost=5, gained=20, neither=80)) > 2 * smallest_loss(Counts(both=180, lost=5))


def test_nothing_known_shows_nothing() -> None:
    assert (smallest_loss(Counts(gained=3, neither=9)), facts_for(Counts(gained=3, neither=9))) == (None, None)
    assert smallest_loss(Counts(both=10, lost=1, gained=40, neither=100)) is None


@pytest.mark.parametrize(("share", "gate"), [(0.914, 0.9), (0.914, 0.95), (0.5, 0.8), (1.0, 0.99)])
def test_as_many_facts_as_it_says_decide(share: float, gate: float) -> None:
    number = facts_to_decide(share, gate)
    assert number is not None
    kept = proportion(round(share * number), number)
    assert kept.high < gate or kept.low >= gate


def test_a_share_that_is_the_gate_is_never_decided() -> None:
    assert facts_to_decide(0.9, 0.9) is None
