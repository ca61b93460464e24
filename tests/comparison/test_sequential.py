"""Gates that stop early: their error rate by simulation, a plain reference, and how soon they stop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressknow.comparison.power import FRACTIONS, LEVEL, compute_capitals, decide_gate
from tests.long import long

RUNS = 2000
THRESHOLD = math.log(2 / LEVEL)


def draw_orders(facts: int, known: int, kept: int, runs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw random orders of the same facts; return which are known and which are kept, [runs, facts]."""
    order = np.argsort(np.random.default_rng(seed).random((runs, facts)), axis=1)
    return order < known, order < kept


@pytest.mark.parametrize(
    ("facts", "known", "kept"),
    [(1000, 600, 540), (1000, 600, 300), (500, 500, 475), (400, 80, 64), (300, 200, 198), (60, 40, 30)],
)
def test_at_the_gate_few_runs_decide_early(facts: int, known: int, kept: int) -> None:
    decided = 0
    for seed in range(4):
        runs = draw_orders(facts, known, kept, RUNS // 4, seed)
        above, below = compute_capitals(*runs, kept / known, facts)
        # After the last fact every run decides, and correctly.
        decided += int((np.maximum(above, below)[:, :-1] >= THRESHOLD).any(axis=1).sum())
    assert decided / RUNS <= LEVEL


def test_near_the_gate_few_runs_are_wrong() -> None:
    known, kept = draw_orders(400, 250, 220, RUNS)
    for gate, wrong_side in ((0.87, 1), (0.89, 0)):
        capital = compute_capitals(known, kept, gate, 400)
        first = [np.where((side >= THRESHOLD).any(axis=1), (side >= THRESHOLD).argmax(axis=1), 400) for side in capital]
        assert (first[wrong_side] < first[1 - wrong_side]).mean() <= LEVEL / 2


@long
def test_the_confidence_sequence_covers_the_share_of_all_facts() -> None:
    known, kept = draw_orders(400, 250, 220, 400)
    stops = [decide_gate(0.8, *run, 400) for run in zip(known, kept, strict=True)]
    covered = sum(stop.kept.low <= 0.88 <= stop.kept.high for stop in stops)
    assert covered / len(stops) >= 1 - LEVEL


# SmolLM2-135M-Instruct and the demo's conversion of it, on the first of atlas's 4,021 facts in the order of seed 0:
# 3 where both models know the fact, 2 where it is lost, 1 where it is gained, else 0.
SMOLLM2 = (
    "0033330303320330230000220301332230333333333033003233333333033330333000002313100100330330333323033030"
    "3330033300323300300003000302133003330303323230330032330333330030323033303300330322300230333203030330"
    "3033332333200333320333300313010033033330330300031023033330103333333233233003303131030000003303103032"
    "1030013103333030333033303230330333010033323200302303331303103332030000302023033330210030333000103320"
    "3032333000303000303333003330300333203001300321323313132030000133020033330033330000233303001332000330"
    "3333200003303332333333332033333303030330330321303133333300330313003333023133330103203033033300330033"
    "3031332333333"
)


@pytest.mark.parametrize(("gate", "facts", "met"), [(0.8, 595, True), (0.99, 23, False)])
def test_a_gate_on_real_answers_takes_less_than_a_third_of_the_facts(gate: float, facts: int, met: bool) -> None:
    codes = np.array([int(code) for code in SMOLLM2])
    stop = decide_gate(gate, codes >= 2, codes % 2 == 1, 4021)
    assert stop is not None
    assert (stop.facts, stop.met) == (facts, met)
    assert stop.facts < stop.of / 3


def compute_capitals_plainly(known: np.ndarray, kept: np.ndarray, gate: float, of: int) -> list[tuple[float, float]]:
    """Compute the capital of both players, fact by fact."""
    purses, seen, after = [[1.0, 1.0] for _ in FRACTIONS], 0.0, []
    for number, (knows, keeps) in enumerate(zip(known, kept, strict=True)):
        value, mean = (float(keeps) - gate if knows else 0.0), -seen / (of - number)
        for purse, bet in zip(purses, FRACTIONS, strict=True):
            purse[0] *= 1 + bet / (gate + mean) * (value - mean)
            purse[1] *= 1 - bet / (1 - gate - mean) * (value - mean)
        seen += value
        after.append(tuple(math.fsum(purse[side] for purse in purses) / len(purses) for side in (0, 1)))
    return after


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(200, 800).map(lambda part: part / 1000), st.integers(1, 30))
def test_capitals_match_a_plain_reference(seed: int, gate: float, number: int) -> None:
    random = np.random.default_rng(seed)
    known = random.random(number) < 0.7
    kept = known & (random.random(number) < 0.6)
    above, below = compute_capitals(known, kept, gate, 200)
    expected = np.log(compute_capitals_plainly(known, kept, gate, 200))
    assert np.stack([above, below], axis=1) == pytest.approx(expected, abs=1e-8)


def test_capitals_are_monotonic_in_the_gate() -> None:
    """The gates that remain possible are an interval."""
    known, kept = draw_orders(300, 200, 170, 1)
    gates = np.linspace(0.05, 0.99, 60)
    capitals = [compute_capitals(known[0, :120], kept[0, :120], gate, 300) for gate in gates]
    above, below = (np.minimum([pair[side] for pair in capitals], 100.0) for side in (0, 1))
    assert (np.diff(above, axis=0) <= 1e-9).all()
    assert (np.diff(below, axis=0) >= -1e-9).all()


@pytest.mark.parametrize("gate", [0.8, 0.99])
def test_a_gate_far_from_the_share_takes_less_than_a_third_of_the_facts(gate: float) -> None:
    # The numbers of atlas, and of what SmolLM2 knows and keeps without pruning.
    known, kept = draw_orders(4021, 2480, 2270, 20)
    numbers = [decide_gate(gate, *run, 4021).facts for run in zip(known, kept, strict=True)]
    assert max(numbers) < 4021 / 3


def test_after_all_facts_the_share_itself_decides() -> None:
    known, kept = np.ones(10, dtype=bool), np.arange(10) < 9
    assert decide_gate(0.9, known[:5], kept[:5], 10) is None
    for gate, met in ((0.9, True), (0.91, False)):
        stop = decide_gate(gate, known, kept, 10)
        assert (stop.facts, stop.of, stop.known, stop.kept.value, stop.met) == (10, 10, 10, 0.9, met)
        assert stop.kept.low >= gate if met else stop.kept.high <= gate


def test_a_gate_that_is_certain_is_decided_at_once() -> None:
    everything = np.ones(40, dtype=bool)
    # One lost fact is enough for 100 %, and one that is kept for 0 %.
    assert decide_gate(1.0, everything, np.arange(40) != 7, 1000).facts == 8
    assert decide_gate(0.0, everything, np.arange(40) == 7, 1000).facts == 8
    # 40 of 42 facts are kept, which is at least half.
    assert decide_gate(0.5, everything, everything, 42).met


def test_a_share_equal_to_the_gate_is_possible_until_the_last_fact() -> None:
    # 3,333 of 3,999 is not a float: sums of floats leave a residue, which decided such runs one fact before the end.
    known, kept = draw_orders(4000, 3999, 3333, 300)
    for rows in np.split(np.arange(300), 6):
        above, below = compute_capitals(known[rows], kept[rows], 3333 / 3999, 4000)
        assert np.isfinite(above[:, :-1]).all()
        assert np.isfinite(below[:, :-1]).all()


def test_facts_that_the_original_does_not_know_decide_nothing() -> None:
    nothing = np.zeros(50, dtype=bool)
    assert decide_gate(0.9, nothing, nothing, 100) is None
    assert decide_gate(0.9, nothing, nothing, 50) is None


def test_the_interval_lies_on_the_side_of_the_decision() -> None:
    known, kept = draw_orders(2000, 1200, 1100, 10)
    for gate in (0.8, 0.99):
        for run in zip(known, kept, strict=True):
            stop = decide_gate(gate, *run, 2000)
            assert stop.facts < 2000
            assert stop.kept.low <= stop.kept.value <= stop.kept.high
            assert stop.kept.low >= gate if stop.met else stop.kept.high <= gate
