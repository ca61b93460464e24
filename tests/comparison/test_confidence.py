"""Confidence of models: thirds of facts, confidently wrong answers and reliability, by hand and against the ECE."""

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
from tests.pages.answering import compare_rows, make_answer, make_rows


def make_confident_answer(number: int, probability: float, correct: bool, **changes: object) -> object:
    logp = (math.log(probability), *(math.log((1 - probability) / 7),) * 4)
    return make_answer(number, correct, top5_logp=logp, **changes)


def make_pairs(facts: int = 90) -> list[tuple[object, object]]:
    """Make pairs: the original knows two of three facts, more confidently each, and the first third is lost."""
    pairs = []
    for number in range(facts):
        knows = number % 3 > 0
        before = make_confident_answer(number, (number + 1) / (facts + 1), knows)
        pairs.append((before, make_confident_answer(number, 0.9 if number % 4 else 0.2, knows and number >= facts / 3)))
    return pairs


def test_thirds_of_the_known_facts_by_hand() -> None:
    confidence = compare_confidence(make_pairs())
    assert [third.name for third in confidence.thirds] == list(THIRDS)
    assert [(third.counts.both, third.counts.lost) for third in confidence.thirds] == [(20, 0), (20, 0), (0, 20)]
    assert confidence.thirds[2].kept == estimate_proportion(0, 20)
    # Facts 1, 2, 4, 5, ... are known; the last third of them are 1 to 29.
    assert (confidence.thirds[2].low, confidence.thirds[2].high) == pytest.approx((2 / 91, 30 / 91))
    assert confidence.thirds[0].low > confidence.thirds[1].high > confidence.thirds[1].low > confidence.thirds[2].high


def test_counts_confidently_wrong_answers() -> None:
    confidence = compare_confidence(make_pairs())
    assert confidence.median == pytest.approx(0.5)
    # The original is wrong on 0, 3, ... 87, and above the median on those from 45.
    assert (confidence.wrong_original, confidence.confidently_wrong_original) == (30, 15)
    # The compressed model is wrong on all below 30 and on every third from 30. Its 0.9 for three of four numbers is
    # above the original's median, not its own.
    assert (confidence.wrong_compressed, confidence.confidently_wrong_compressed) == (50, 22 + 15)
    # Where all have the same confidence, none is above the median.
    alike = compare_confidence(
        [(make_confident_answer(n, 0.5, n % 3 > 0), make_confident_answer(n, 0.5, n % 2 > 0)) for n in range(30)]
    )
    assert (alike.confidently_wrong_original, alike.confidently_wrong_compressed) == (0, 0)


def test_reliability_adds_up_to_the_calibration_error() -> None:
    pairs = make_pairs()
    confidence = compare_confidence(pairs)
    for side, bins in enumerate((confidence.reliability_original, confidence.reliability_compressed)):
        facts = sum(bin.facts for bin in bins)
        error = sum(abs(bin.right - bin.facts * bin.confidence) for bin in bins if bin.facts) / facts
        answers = [pair[side] for pair in pairs]
        assert error == pytest.approx(compute_ece([get_confidence(a) for a in answers], [a.correct for a in answers]))
        assert facts == len(pairs)


def test_equal_confidences_share_a_third() -> None:
    known = np.array([0.9] * 30 + [0.5] * 30 + [0.1] * 30)
    thirds = split_by_confidence(known, np.arange(90) % 2 == 0)
    assert [(third.low, third.high, third.counts.n) for third in thirds] == [
        (0.9, 0.9, 30),
        (0.5, 0.5, 30),
        (0.1, 0.1, 30),
    ]
    # Two values do not make three thirds, however many facts there are.
    assert split_by_confidence(np.array([0.9] * 50 + [0.1] * 50), np.ones(100, dtype=bool)) == ()


def test_too_few_facts_have_no_thirds() -> None:
    few, enough = (np.linspace(0.1, 0.9, number) for number in (3 * FEWEST - 1, 3 * FEWEST))
    assert split_by_confidence(few, few > 0) == ()
    assert len(split_by_confidence(enough, enough > 0)) == 3


def test_needs_probabilities_and_twenty_facts() -> None:
    free = [
        (make_confident_answer(n, 0.5, True, choices=None), make_confident_answer(n, 0.5, True, choices=None))
        for n in range(50)
    ]
    broken = [(make_confident_answer(n, 0.5, True), make_answer(n, True, top5_logp=(math.nan,) * 5)) for n in range(50)]
    assert (
        compare_confidence(free)
        is compare_confidence(broken)
        is compare_confidence([])
        is compare_confidence(make_pairs()[:19])
        is None
    )


def test_figures_of_a_probe_include_confidence() -> None:
    rows = make_rows(60, 10, 5, 25)
    figures = compare_rows(*rows)
    assert figures.confidence == compare_confidence(list(zip(*rows, strict=True)))
