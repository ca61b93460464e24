"""How sure models are: thirds, wrong with confidence, and calibration, by hand and against the calibration error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressknow.comparison.distributions import (
    FEWEST,
    THIRDS,
    compare_confidence,
    compute_ece,
    get_confidence,
    split_by_confidence,
)
from compressknow.comparison.intervals import estimate_proportion
from compressknow.comparison.paired import compare_probe
from tests.pages.answering import make_answer, make_entry, make_rows


def sure(number: int, probability: float, correct: bool, **changes: object) -> object:
    logp = (math.log(probability), *(math.log((1 - probability) / 7),) * 4)
    return make_answer(number, correct, top5_logp=logp, **changes)


def pairs(facts: int = 90) -> list[tuple[object, object]]:
    """The original knows two thirds; its confidence rises with the number, and what is lost is of low confidence."""
    found = []
    for number in range(facts):
        knows = number % 3 > 0
        before = sure(number, (number + 1) / (facts + 1), knows)
        found.append((before, sure(number, 0.9 if number % 2 else 0.2, knows and number >= facts / 3)))
    return found


def test_thirds_of_the_known_facts_by_hand() -> None:
    told = compare_confidence(pairs())
    assert [third.name for third in told.thirds] == list(THIRDS)
    assert [(third.counts.both, third.counts.lost) for third in told.thirds] == [(20, 0), (20, 0), (0, 20)]
    assert told.thirds[2].kept == estimate_proportion(0, 20)
    # Facts 1, 2, 4, 5, ... are known: the last third of these are 1 to 29.
    assert (told.thirds[2].low, told.thirds[2].high) == pytest.approx((2 / 91, 30 / 91))
    assert told.thirds[0].low > told.thirds[1].high > told.thirds[1].low > told.thirds[2].high


def test_confidently_wrong_by_hand() -> None:
    told = compare_confidence(pairs())
    assert told.median == pytest.approx(0.5)
    # Wrong of the original are 0, 3, ... 87, above the median those from 45 on.
    assert (told.wrong_original, told.confidently_wrong_original) == (30, 15)
    # Of the compressed model all below 30, and every third from 30 on; it is sure of the odd ones.
    assert (told.wrong_compressed, told.confidently_wrong_compressed) == (50, 25)
    # Where all are as sure, none is surer than the median.
    alike = compare_confidence([(sure(n, 0.5, n % 3 > 0), sure(n, 0.5, n % 2 > 0)) for n in range(30)])
    assert (alike.confidently_wrong_original, alike.confidently_wrong_compressed) == (0, 0)


def test_reliability_adds_up_to_the_calibration_error() -> None:
    found = pairs()
    for side, bins in enumerate(
        (compare_confidence(found).reliability_original, compare_confidence(found).reliability_compressed)
    ):
        facts = sum(each.facts for each in bins)
        error = sum(abs(each.right - each.facts * each.confidence) for each in bins if each.facts) / facts
        answers = [pair[side] for pair in found]
        assert error == pytest.approx(compute_ece([get_confidence(a) for a in answers], [a.correct for a in answers]))
        assert facts == len(found)


def test_facts_of_one_confidence_stay_together() -> None:
    known = np.array([0.9] * 30 + [0.5] * 30 + [0.1] * 30)
    told = split_by_confidence(known, np.arange(90) % 2 == 0)
    assert [(third.low, third.high, third.counts.n) for third in told] == [
        (0.9, 0.9, 30),
        (0.5, 0.5, 30),
        (0.1, 0.1, 30),
    ]
    # Two values make no three thirds, however many facts there are.
    assert split_by_confidence(np.array([0.9] * 50 + [0.1] * 50), np.ones(100, dtype=bool)) == ()


def test_too_few_facts_have_no_thirds() -> None:
    few, enough = (np.linspace(0.1, 0.9, number) for number in (3 * FEWEST - 1, 3 * FEWEST))
    assert split_by_confidence(few, few > 0) == ()
    assert len(split_by_confidence(enough, enough > 0)) == 3


def test_without_probabilities_of_answers_nothing_is_told() -> None:
    free = [(sure(n, 0.5, True, choices=None), sure(n, 0.5, True, choices=None)) for n in range(50)]
    broken = [(sure(n, 0.5, True), make_answer(n, True, top5_logp=(math.nan,) * 5)) for n in range(50)]
    assert (
        compare_confidence(free)
        is compare_confidence(broken)
        is compare_confidence([])
        is compare_confidence(pairs()[:19])
        is None
    )


def test_it_is_among_the_figures_of_a_probe() -> None:
    rows = make_rows(60, 10, 5, 25)
    figures = compare_probe(*rows, make_entry(), make_entry(), probe="atlas", ran_in="")
    assert figures.confidence == compare_confidence(list(zip(*rows, strict=True)))
