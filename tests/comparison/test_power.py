"""Power: against simulated models and by hand, and how many facts show a loss or decide a gate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
from scipy.stats import binom, norm, t

from compressknow.comparison.intervals import (
    INDEPENDENT,
    Design,
    design_of_change,
    estimate_proportion,
    run_mcnemar,
    run_paired_test,
)
from compressknow.comparison.power import (
    POWER,
    compute_power,
    count_facts_to_decide,
    count_facts_to_show,
    find_smallest_loss,
)
from compressknow.comparison.records import Counts
from tests.comparison.test_clusters import draw_chances

SIMULATED = 4000
COUNTS = [Counts(169, 16, 19, 96), Counts(185), Counts(2311, 89, 41, 1580), Counts(60, 9, 3, 20)]


def simulate_power(known: int, loss: float, gained: float, unknown: int) -> float:
    """Return how often the exact McNemar test shows a loss of models that lose and gain facts with these chances."""
    facts = known + unknown
    up, down = gained * known / facts, (gained + loss) * known / facts
    rng = np.random.default_rng(7).multinomial(facts, [down, up, 1 - up - down], size=SIMULATED)
    seen = [lost > won and run_mcnemar(Counts(lost=lost, gained=won)) < 0.05 for lost, won, _ in rng.tolist()]
    return sum(seen) / SIMULATED


@pytest.mark.parametrize("counts", COUNTS)
def test_the_smallest_loss_is_shown_with_the_intended_power(counts: Counts) -> None:
    loss = find_smallest_loss(counts)
    assert loss is not None
    known = counts.known_before
    power = simulate_power(known, loss, counts.gained / known, counts.n - known)
    # Three standard errors of the simulated power.
    assert abs(power - POWER) < 3 * math.sqrt(POWER * (1 - POWER) / SIMULATED)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_counted_facts_show_a_loss_of_two_points(counts: Counts) -> None:
    known = count_facts_to_show(counts)
    assert known is not None
    unknown = round((counts.n - counts.known_before) / counts.known_before * known)
    power = simulate_power(known, 0.02, counts.gained / counts.known_before, unknown)
    assert abs(power - POWER) < 3 * math.sqrt(POWER * (1 - POWER) / SIMULATED)


def test_power_without_gains_by_hand() -> None:
    # The test shows a loss from six lost facts on: 2 / 2^6 is below 5 %, 2 / 2^5 is not.
    assert compute_power(100, 0.08, 0.0, 50) == pytest.approx(binom.sf(5, 150, 8 / 150))
    assert find_smallest_loss(Counts(both=5)) is None
    assert find_smallest_loss(Counts(both=6)) == pytest.approx(POWER ** (1 / 6), abs=1e-4)


def test_correlated_facts_show_a_loss_where_all_are_known() -> None:
    # The 200 known facts count as 115.1 independent ones.
    counts, design = Counts(both=190, lost=10), Design(1.6, 10, 30)
    other = find_smallest_loss(counts + Counts(neither=5), design)
    assert find_smallest_loss(counts, design) == pytest.approx(other, abs=1e-3)


def test_power_without_a_loss_is_below_the_level() -> None:
    assert 0 < compute_power(1000, 0.0, 0.05, 400) < 0.025


@pytest.mark.parametrize(("known", "unknown", "gained"), [(40, 20, 0.0), (185, 115, 0.1), (2400, 1600, 0.03)])
def test_power_grows_with_the_loss(known: int, unknown: int, gained: float) -> None:
    powers = [compute_power(known, loss, gained, unknown) for loss in np.linspace(0, 0.9, 20)]
    assert all(less <= more + 1e-9 for less, more in itertools.pairwise(powers))
    assert powers[-1] > 0.99


def test_gained_facts_hide_a_loss() -> None:
    assert find_smallest_loss(Counts(both=180, lost=5, gained=20, neither=80)) > 2 * find_smallest_loss(
        Counts(both=180, lost=5)
    )


def test_without_known_facts_no_loss_is_shown() -> None:
    assert (find_smallest_loss(Counts(gained=3, neither=9)), count_facts_to_show(Counts(gained=3, neither=9))) == (
        None,
        None,
    )
    assert find_smallest_loss(Counts(both=10, lost=1, gained=40, neither=100)) is None


@pytest.mark.parametrize(("both", "lost", "gate"), [(914, 86, 0.9), (914, 86, 0.95), (50, 50, 0.8), (97, 3, 0.99)])
def test_the_counted_facts_decide_a_gate_with_the_intended_power(both: int, lost: int, gate: float) -> None:
    counts = Counts(both, lost)
    number = count_facts_to_decide(counts, gate)
    assert number is not None
    kept = np.random.default_rng(3).binomial(number, counts.kept, SIMULATED)
    intervals = [estimate_proportion(int(each), number) for each in kept]
    decided = sum(not each.low < gate <= each.high for each in intervals) / SIMULATED
    # Numbers of facts are whole: one more lost moves the share of decided samples by some points.
    assert abs(decided - POWER) < 0.06


def test_a_share_equal_to_the_gate_is_never_decided() -> None:
    assert count_facts_to_decide(Counts(90, 10), 0.9) is None


@pytest.mark.parametrize("icc", [0.1, 0.3])
def test_the_smallest_loss_of_different_relations_is_shown_with_the_intended_power(icc: float) -> None:
    rng = np.random.default_rng(5)
    loss = find_median_smallest_loss(draw_relations(rng, icc, 0) for _ in range(60))
    samples = [draw_relations(rng, icc, loss) for _ in range(400)]
    shown = [run_paired_test(c) < 0.05 and sum(each.lost - each.gained for each in c) > 0 for c in samples]
    assert abs(sum(shown) / len(shown) - POWER) < 0.1


@pytest.mark.parametrize("icc", [0.1, 0.3])
def test_the_smallest_loss_of_relations_without_gains_is_shown_with_the_intended_power(icc: float) -> None:
    rng = np.random.default_rng(5)

    def lose(loss: float) -> list[Counts]:
        return [Counts(20 - lost, lost) for lost in rng.binomial(20, draw_chances(rng, loss, icc, 20)).tolist()]

    loss = find_median_smallest_loss(lose(0.03) for _ in range(60))
    samples = [lose(loss) for _ in range(400)]
    assert sum(run_paired_test(c) < 0.05 for c in samples) / len(samples) > POWER - 0.1


def find_median_smallest_loss(samples: Iterable[list[Counts]]) -> float:
    losses = [find_smallest_loss(sum(sample, Counts()), design_of_change(sample)) for sample in samples]
    return float(np.median([loss for loss in losses if loss is not None]))


def draw_relations(rng: np.random.Generator, icc: float, net: float, number: int = 40, facts: int = 40) -> list[Counts]:
    """Draw relations that know 60 % of their facts; each loses or gains those that change by its own chance."""
    known, mean, concentration = round(0.6 * facts), (0.06 + net) / (0.12 + net), 1 / icc - 1
    changed = rng.binomial(known, 0.12 + net, number)
    lost = rng.binomial(changed, rng.beta(mean * concentration, (1 - mean) * concentration, number))
    pairs = zip(lost.tolist(), (changed - lost).tolist(), strict=True)
    return [Counts(known - lost, lost, gained, facts - known - gained) for lost, gained in pairs]


def test_more_facts_of_very_different_relations_may_never_show_a_small_loss() -> None:
    alike = [Counts(both=36, lost=2, gained=2, neither=20)] * 20
    different = [Counts(both=36, lost=4, neither=20), Counts(both=36, gained=4, neither=20)] * 10
    needed = [count_facts_to_show(sum(c, Counts()), design=design_of_change(c)) for c in (alike, different)]
    assert needed[0] is not None
    assert needed[1] is None


@pytest.mark.parametrize("gate", [None, 0.9])
def test_correlated_relations_need_more_facts_by_their_design_effect(gate: float | None) -> None:
    """The design effect grows with the facts per relation, and Student's t replaces the normal quantile."""
    counts, correlation, size, degrees = Counts(both=220, lost=10, gained=5, neither=165), 0.001, 20, 19

    def count(design: Design) -> int:
        found = count_facts_to_show(counts, design) if gate is None else count_facts_to_decide(counts, gate, design)
        assert found is not None
        return found

    needed = count(Design(1 + (size - 1) * correlation, size, degrees))
    effect = 1 + (size * needed / counts.known_before - 1) * correlation
    effective = needed / effect / (t.ppf(0.975, degrees) / norm.ppf(0.975)) ** 2
    assert effective == pytest.approx(count(INDEPENDENT), abs=1)
    assert needed > 1.1 * effective


def test_relations_are_worth_at_least_a_fact_each_and_no_more_than_their_facts() -> None:
    # 394 independent facts show it. In these relations of four, that is less than one fact of each.
    assert count_facts_to_show(Counts(both=2000), Design(effect=3, size=4)) == 394
    # Even if all facts of a relation are lost together, 2,000 are worth 500.
    few = find_smallest_loss(Counts(both=2000), Design(effect=6, size=4))
    assert few == pytest.approx(find_smallest_loss(Counts(both=500)), abs=1e-4)
