"""Power of a number of facts: the smallest detectable loss, and a gate that may be checked after every fact.

The power is always 80 %. Correlated facts count as the effective number of independent ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from compressknow.comparison.intervals import INDEPENDENT, Design, compute_normal_quantile, compute_wilson
from compressknow.comparison.records import Counts, EarlyStop, Estimate

# LEVEL is the allowed probability of a wrong result, of the test and at a gate.
POWER, LEVEL = 0.8, 0.05
SMALL = 0.02  # the loss for which the required facts are reported, as a share of the known facts
# More facts than any probe has.
_MOST = 1 << 17
_STANDARD_DEVIATIONS = 6


def compute_power(known: float, loss: float, gained: float, unknown: float) -> float:
    """Return the probability that the exact McNemar test, two-sided at 5 %, detects a net loss, given as a share (0 to
    1) of the `known` facts, for as many that the original knows and `unknown` others. `gained` (0 or more) facts per
    known one are gained, and as many lost in addition.

    Facts are lost and gained independently. So the number of changed facts is binomial, as is the number of lost ones
    among these; the result is the sum over all outcomes that the test rejects (Duffy 1984, "Asymptotic and exact power
    for the McNemar test and its analogue with R controls per case", Biometrics 40, 1005-1015).
    """
    from scipy.special import bdtr

    facts = max(1, round(known + unknown))
    up, down = gained * known, (gained + loss) * known
    # The effective number of facts is not an integer, so that `facts`, which is rounded, may exceed it.
    if not 0 < up + down <= known + unknown + 1e-9:
        return 0.0
    changed, chances = _list_binomial(facts, min(1.0, (up + down) / facts))
    most = _find_most_gained(changed)
    detectable = most >= 0
    if not detectable.any():
        return 0.0
    detected = bdtr(most[detectable], changed[detectable], up / (up + down))
    return float((chances[detectable] * detected).sum())


def _list_binomial(trials: int, chance: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of successes whose probability is not negligible, and the probability of each."""
    from scipy.special import gammaln, xlog1py, xlogy

    middle, spread = trials * chance, _STANDARD_DEVIATIONS * math.sqrt(trials * chance * (1 - chance)) + 20
    k = np.arange(max(0, math.floor(middle - spread)), min(trials, math.ceil(middle + spread)) + 1)
    ways = gammaln(trials + 1) - gammaln(k + 1) - gammaln(trials - k + 1)
    return k, np.exp(ways + xlogy(k, chance) + xlog1py(trials - k, -chance))


def _find_most_gained(changed: np.ndarray) -> np.ndarray:
    """Return the maximum of gained facts among the changed ones for the test to detect a loss; -1 if it cannot."""
    from scipy.special import bdtr

    # The normal approximation is less than one off: the integer below it, and its neighbours.
    guess = np.floor((changed - 1 - compute_normal_quantile(1 - LEVEL) * np.sqrt(changed)) / 2)
    most = np.full(len(changed), -1.0)
    for k in (guess - 1, guess, guess + 1):
        fits = (k >= 0) & (k <= changed)
        fits[fits] = 2 * bdtr(k[fits], changed[fits], 0.5) < LEVEL
        most = np.where(fits, k, most)
    return most


def find_smallest_loss(counts: Counts, design: Design = INDEPENDENT) -> float | None:
    """Return the smallest net loss, as a share of the known facts, that is detected with a power of 80 %; None if not
    even the loss of all would be.

    Facts are assumed to be gained at the observed rate, since changes in both directions hide a loss.

    >>> counts = Counts(both=169, lost=16, gained=19, neither=96)
    >>> round(find_smallest_loss(counts), 3), find_smallest_loss(Counts(both=5))
    (0.121, None)
    """
    gained, discount = _share_gained(counts), design.discount()
    known, unknown = counts.known_before / discount, (counts.n - counts.known_before) / discount
    low, high = 0.0, max(0.0, 1.0 - gained)
    if not known or compute_power(known, high, gained, unknown) < POWER:
        return None
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if compute_power(known, middle, gained, unknown) >= POWER else (middle, high)
    return high


def count_facts_to_show(counts: Counts, design: Design = INDEPENDENT) -> int | None:
    """Return the number of known facts, in the same relations, that detects a net loss of `SMALL` with a power of 80 %
    at the same rates of gained and unknown facts; None if there is none that a probe could have.

    >>> count_facts_to_show(Counts(both=185)), count_facts_to_show(Counts(both=169, lost=16, gained=19, neither=96))
    (394, 4514)
    """
    known, gained = counts.known_before, _share_gained(counts)
    if not known:
        return None
    unknown = (counts.n - known) / known

    def suffices(number: int) -> bool:
        effective = number / design.discount(number / known)
        return compute_power(effective, SMALL, gained, unknown * effective) >= POWER

    return _find_least(suffices)


def count_facts_to_decide(counts: Counts, gate: float, design: Design = INDEPENDENT) -> int | None:
    """Return the number of known facts, in the same relations, for which the interval of knowledge kept is on one side
    of the gate in 80 of 100 samples, if the true share is the observed one; None if there is none that a probe could
    have.

    >>> count_facts_to_decide(Counts(both=90, lost=10), 0.95), count_facts_to_decide(Counts(both=95, lost=5), 0.95)
    (185, None)
    """
    share, known = counts.kept, counts.known_before
    if share is None:
        return None
    z, unlucky = compute_normal_quantile(0.95), compute_normal_quantile(2 * POWER - 1)

    def suffices(number: int) -> bool:
        effective = number / design.discount(number / known)
        deviation = unlucky * math.sqrt(share * (1 - share) / effective)
        observed = share - deviation if share > gate else share + deviation
        low, high = compute_wilson(min(1.0, max(0.0, observed)), effective, z)
        return low >= gate if share > gate else high < gate

    return _find_least(suffices) if share != gate else None


def _share_gained(counts: Counts) -> float:
    return counts.gained / counts.known_before if counts.known_before else 0.0


def _find_least(suffices: Callable[[int], bool]) -> int | None:
    """Return the smallest number that suffices, by doubling and bisection, or None; all larger ones suffice too."""
    high = 1
    while not suffices(high):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


# Fractions of the capital to bet, each by one part of it: from 1/2 to 1/1024, in half octaves.
FRACTIONS = 2.0 ** -np.arange(1.0, 10.5, 0.5)
_STEPS = 30
_FINEST = 1 << 20  # largest denominator of a gate as a fraction: more facts than any probe has


def decide_gate(gate: float, known: np.ndarray, kept: np.ndarray, of: int) -> EarlyStop | None:
    """Decide whether the share kept of all facts is at least the gate, as soon as possible; None if it is still open.
    `known` and `kept` (bool) are whether the original, and the compressed model, knows each fact so far, in random
    order without replacement, of all `of`.

    Two players bet, one that the share of kept facts among known ones is above the gate, and one that it is below. If
    it equals the gate, the probability that one ever multiplies its capital by 2 / LEVEL is at most LEVEL / 2, however
    often one looks (Ville's inequality): a player who does has refuted the gate. This is the hedged capital of
    Waudby-Smith and Ramdas 2023 ("Estimating means of bounded random variables by betting", JRSS B, arXiv 2010.09686,
    sections 4.4 and 5.1), spread over fixed fractions (section B.4, dKelly). When all facts are drawn, the share is
    known exactly.
    """
    both, drawn = known & kept, len(known)
    above, below = compute_capitals(known, both, gate, of)
    bar = np.log(2 / LEVEL)
    crossed = np.maximum(above, below) >= bar
    if not crossed.any() and (drawn < of or not known.any()):
        return None
    facts = int(crossed.argmax()) + 1 if crossed.any() else drawn
    known, both = known[:facts], both[:facts]
    share = float(both.sum() / max(known.sum(), 1))
    met = bool(above[facts - 1] > below[facts - 1]) if crossed.any() else share >= gate
    # The shares that neither player has refuted; one's capital decreases with the gate, the other's increases.
    low = _find_end(lambda other: bool((compute_capitals(known, both, other, of)[0] >= bar).any()), 0.0, share)
    high = _find_end(lambda other: bool((compute_capitals(known, both, other, of)[1] >= bar).any()), 1.0, share)
    low, high = (max(low, gate), high) if met else (low, min(high, gate))
    return EarlyStop(gate, LEVEL, facts, int(known.sum()), of, Estimate(share, min(low, share), max(high, share)), met)


def compute_capitals(known: np.ndarray, both: np.ndarray, gate: float, of: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithm of the capital, 1 at first, of the player that bets on a share above the gate, and of the
    one that bets on one below, after each fact, [..., facts]; `known` and `both` (bool) are in the order of drawing.

    Each known fact adds kept - gate, others add 0; over all facts the sum is 0 if the share equals the gate. So the
    mean of the remaining facts is known before each draw, which makes a bet on a higher value fair.
    """
    # Use the gate as a fraction, and integers throughout: rounded sums of floats could make a share exactly at the gate
    # seem impossible one fact before the end.
    part, whole = Fraction(gate).limit_denominator(_FINEST).as_integer_ratio()
    added = known * (whole * both.astype(np.int64) - part)
    before, remaining = np.cumsum(added, axis=-1) - added, of - np.arange(added.shape[-1])
    value, mean = added + part, part * remaining - before
    above = _compute_capital(value, mean, remaining)
    return above, _compute_capital(whole - value, whole * remaining - mean, remaining)


def _compute_capital(value: np.ndarray, mean: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Return the logarithm of what bets win that a value exceeds mean / remaining: all, if that mean cannot be."""
    possible = mean > 0
    odds = np.where(possible, value * remaining, 1) / np.where(possible, mean, 1)
    bets = FRACTIONS.reshape(-1, *[1] * odds.ndim)
    growth = np.log1p(bets * (odds - 1)).cumsum(axis=-1)
    capital = np.logaddexp.reduce(growth, axis=0) - np.log(len(FRACTIONS))
    refuted = (mean < 0) | (~possible & (value > 0))
    return np.where(np.logical_or.accumulate(refuted, axis=-1), np.inf, capital)


def _find_end(refuted: Callable[[float], bool], far: float, near: float) -> float:
    """Return the gate, between `far` and `near`, at which gates are no longer refuted."""
    if not refuted(far):
        return far
    for _ in range(_STEPS):
        middle = (far + near) / 2
        far, near = (middle, near) if refuted(middle) else (far, middle)
    return far
