"""Power of facts: the smallest loss that so many show, and a gate that may be looked at after every fact.

All with one power, 80 %. Facts that hang together tell less: they count as the independent ones that tell as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from compressknow.comparison.intervals import INDEPENDENT, Design, compute_normal_quantile, compute_wilson
from compressknow.comparison.records import Counts, EarlyStop, Estimate

# The chance of a wrong answer that is allowed, by the test and at a gate, is the level.
POWER, LEVEL = 0.8, 0.05
# The loss for which a report says how many facts would show it, as a share of what was known.
SMALL = 0.02
# No probe has so many facts.
_MOST = 1 << 17
_STANDARD_DEVIATIONS = 6


def compute_power(known: float, loss: float, gained: float, unknown: float) -> float:
    """Return the chance that the exact McNemar test, two-sided at 5 %, shows a net loss.

    Of all facts a share is lost and a share gained, independently. So the number of changed facts is binomial, and of
    these the number of lost ones is binomial again; summed over all that the test rejects (Duffy 1984, "Asymptotic and
    exact power for the McNemar test and its analogue with R controls per case", Biometrics 40, 1005-1015).

    Parameters
    ----------
    known, unknown : facts that the original knows and does not know.
    loss : net loss as a share of the known facts, 0 to 1: so many more are lost than gained.
    gained : facts gained for each known one, 0 or more; as many are lost besides the net loss.
    """
    from scipy.special import bdtr

    facts = max(1, round(known + unknown))
    up, down = gained * known, (gained + loss) * known
    # Correlated facts count as fewer independent ones: not a whole number, which rounding of all of them may exceed.
    if not 0 < up + down <= known + unknown + 1e-9:
        return 0.0
    changed, chances = _list_binomial(facts, min(1.0, (up + down) / facts))
    most = _find_most_gained(changed)
    shown = most >= 0
    if not shown.any():
        return 0.0
    seen = bdtr(most[shown], changed[shown], up / (up + down))
    return float((chances[shown] * seen).sum())


def _list_binomial(trials: int, chance: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers that are not all but impossible, and the probability of each."""
    from scipy.special import gammaln, xlog1py, xlogy

    middle, spread = trials * chance, _STANDARD_DEVIATIONS * math.sqrt(trials * chance * (1 - chance)) + 20
    k = np.arange(max(0, math.floor(middle - spread)), min(trials, math.ceil(middle + spread)) + 1)
    ways = gammaln(trials + 1) - gammaln(k + 1) - gammaln(trials - k + 1)
    return k, np.exp(ways + xlogy(k, chance) + xlog1py(trials - k, -chance))


def _find_most_gained(changed: np.ndarray) -> np.ndarray:
    """Return how many of so many changed facts may be gained for the test to show a loss; -1 where none may."""
    from scipy.special import bdtr

    # The normal approximation is less than one off: the whole number below it, and its neighbours.
    guess = np.floor((changed - 1 - compute_normal_quantile(1 - LEVEL) * np.sqrt(changed)) / 2)
    found = np.full(len(changed), -1.0)
    for k in (guess - 1, guess, guess + 1):
        fits = (k >= 0) & (k <= changed)
        fits[fits] = 2 * bdtr(k[fits], changed[fits], 0.5) < LEVEL
        found = np.where(fits, k, found)
    return found


def find_smallest_loss(counts: Counts, design: Design = INDEPENDENT) -> float | None:
    """Return the smallest net loss, as a share of the known facts, that these facts show with a power of 80 %; None
    where even the loss of all would not show.

    Facts are taken to be gained as often as they were: what a compression flips both ways hides a loss.

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
    """Return how many known facts, of the same relations, show a net loss of `SMALL` with a power of 80 %, were facts
    gained and unknown in the same proportion; None if no number does, or no probe has as many.

    >>> count_facts_to_show(Counts(both=185)), count_facts_to_show(Counts(both=169, lost=16, gained=19, neither=96))
    (394, 4514)
    """
    known, gained = counts.known_before, _share_gained(counts)
    if not known:
        return None
    unknown = (counts.n - known) / known

    def shows(number: int) -> bool:
        alone = number / design.discount(number / known)
        return compute_power(alone, SMALL, gained, unknown * alone) >= POWER

    return _find_least(shows)


def count_facts_to_decide(counts: Counts, gate: float, design: Design = INDEPENDENT) -> int | None:
    """Return how many known facts, of the same relations, it takes for the interval of knowledge kept to lie on one
    side of the gate in about 80 of 100 samples (one fact more or less moves that by some points), were the share kept
    what it is here; None if no number does, or no probe has as many.

    >>> count_facts_to_decide(Counts(both=90, lost=10), 0.95), count_facts_to_decide(Counts(both=95, lost=5), 0.95)
    (185, None)
    """
    share, known = counts.kept, counts.known_before
    if share is None:
        return None
    z, unlucky = compute_normal_quantile(0.95), compute_normal_quantile(2 * POWER - 1)

    def decides(number: int) -> bool:
        alone = number / design.discount(number / known)
        away = unlucky * math.sqrt(share * (1 - share) / alone)
        low, high = compute_wilson(min(1.0, max(0.0, share - away if share > gate else share + away)), alone, z)
        return low >= gate if share > gate else high < gate

    return _find_least(decides) if share != gate else None


def _share_gained(counts: Counts) -> float:
    return counts.gained / counts.known_before if counts.known_before else 0.0


def _find_least(enough: Callable[[int], bool]) -> int | None:
    """Return the number at which it begins to be enough, where more is enough too; found by doubling and halving."""
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# The fractions of the capital that are bet, each by a player of its own: from 1/2 to 1/1024, in half octaves.
FRACTIONS = 2.0 ** -np.arange(1.0, 10.5, 0.5)
_STEPS = 30
# Gates are distinguished up to this denominator: more facts than any probe has.
_FINEST = 1 << 20


def decide_gate(gate: float, known: np.ndarray, kept: np.ndarray, of: int) -> EarlyStop | None:
    """Decide whether the share kept of all facts lies at the gate or above, as soon as that is known; None before.

    The share is that of the known ones among all `of` facts, which are drawn one by one, each only once, in random
    order. Two players bet, one that the share is above the gate and one that it is below. If it is the gate itself,
    neither can expect to win, and the chance that one ever multiplies its capital by 2 / LEVEL is at most LEVEL / 2,
    however often one looks (Ville's inequality): whoever does has refuted the gate. This is the hedged capital of
    Waudby-Smith and Ramdas 2023 ("Estimating means of bounded random variables by betting", JRSS B, arXiv 2010.09686,
    section 4.4) for draws without replacement (section 5.1), with capital spread over fixed fractions (section B.4,
    dKelly). When all facts are drawn, the share is known exactly.

    `known` and `kept` say of each fact drawn so far, in order (bool), whether the original knows it, and the compressed
    model too.
    """
    both, drawn = known & kept, len(known)
    above, below = compute_capitals(known, both, gate, of)
    won = np.log(2 / LEVEL)
    crossed = np.maximum(above, below) >= won
    if not crossed.any() and (drawn < of or not known.any()):
        return None
    facts = int(crossed.argmax()) + 1 if crossed.any() else drawn
    known, both = known[:facts], both[:facts]
    share = float(both.sum() / max(known.sum(), 1))
    met = bool(above[facts - 1] > below[facts - 1]) if crossed.any() else share >= gate
    # The shares that neither player has refuted: what each has won falls, or rises, with the gate.
    low = _find_end(lambda other: bool((compute_capitals(known, both, other, of)[0] >= won).any()), 0.0, share)
    high = _find_end(lambda other: bool((compute_capitals(known, both, other, of)[1] >= won).any()), 1.0, share)
    low, high = (max(low, gate), high) if met else (low, min(high, gate))
    return EarlyStop(gate, LEVEL, facts, int(known.sum()), of, Estimate(share, min(low, share), max(high, share)), met)


def compute_capitals(known: np.ndarray, both: np.ndarray, gate: float, of: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logarithms of what both players have after each fact, [..., facts]: of the one that bets on a share above
    the gate, and of the one that bets on a share below. Each begins with 1. `known` and `both` are in the order of
    drawing (bool), [..., facts].

    What a fact adds is kept - gate where it is known, else nothing: over all facts this comes to nothing if the share
    is the gate. So the mean of what is left is known before each draw, and a bet on a higher one is fair.
    """
    # The gate as a fraction, everything as whole numbers: sums of floats leave a residue, by which a share exactly on
    # the gate could seem impossible one fact before the end.
    part, whole = Fraction(gate).limit_denominator(_FINEST).as_integer_ratio()
    added = known * (whole * both.astype(np.int64) - part)
    before, remaining = np.cumsum(added, axis=-1) - added, of - np.arange(added.shape[-1])
    value, mean = added + part, part * remaining - before
    return _compute_capital(value, mean, remaining), _compute_capital(
        whole - value, whole * remaining - mean, remaining
    )


def _compute_capital(value: np.ndarray, mean: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Return the logarithm of what is won by bets that a value is larger than mean / remaining. Where that mean cannot
    be, the bet is won forever."""
    possible = mean > 0
    odds = np.where(possible, value * remaining, 1) / np.where(possible, mean, 1)
    bets = FRACTIONS.reshape(-1, *[1] * odds.ndim)
    won = np.log1p(bets * (odds - 1)).cumsum(axis=-1)
    capital = np.logaddexp.reduce(won, axis=0) - np.log(len(FRACTIONS))
    refuted = (mean < 0) | (~possible & (value > 0))
    return np.where(np.logical_or.accumulate(refuted, axis=-1), np.inf, capital)


def _find_end(refuted: Callable[[float], bool], far: float, near: float) -> float:
    """Return where, from the far end to the near one, gates are no longer refuted."""
    if not refuted(far):
        return far
    for _ in range(_STEPS):
        middle = (far + near) / 2
        far, near = (middle, near) if refuted(middle) else (far, middle)
    return far
