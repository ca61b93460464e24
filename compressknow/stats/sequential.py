"""A gate on knowledge kept that may be looked at after every fact: a confidence sequence by betting."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from compressknow.stats.records import EarlyStop, Estimate

LEVEL = 0.05
# The fractions of the capital that are bet, each by a player of its own: from 1/2 to 1/1024, in half octaves.
FRACTIONS = 2.0 ** -np.arange(1.0, 10.5, 0.5)
_STEPS = 30
# Gates are told apart to this denominator: more facts than any probe has.
_FINEST = 1 << 20


def decide(known: np.ndarray, kept: np.ndarray, gate: float, of: int, *, level: float = LEVEL) -> EarlyStop | None:
    """Whether the share kept of all facts lies at the gate or above, as soon as that is known; None before.

    The share is that of the known ones among all `of` facts, which are drawn one by one, each only once, in random
    order. Two players bet, one that the share is above the gate and one that it is below. If it is the gate itself,
    neither can expect to win, and the chance that one ever multiplies its capital by 2 / level is at most level / 2,
    however often one looks (Ville's inequality): whoever does has refuted the gate. This is the hedged capital of
    Waudby-Smith and Ramdas 2023 ("Estimating means of bounded random variables by betting", JRSS B, arXiv 2010.09686,
    section 4.4) for draws without replacement (section 5.1), with capital spread over fixed fractions (section B.4,
    dKelly). When all facts are drawn, the share is known exactly.

    Parameters
    ----------
    known, kept : of each fact drawn so far, in order (bool): whether the original knows it, and the compressed model
        too.
    gate : 0 to 1.
    level : the chance of a wrong answer that is allowed.
    """
    both, drawn = known & kept, len(known)
    above, below = capitals(known, both, gate, of)
    crossed = np.maximum(above, below) >= np.log(2 / level)
    if not crossed.any() and (drawn < of or not known.any()):
        return None
    facts = int(crossed.argmax()) + 1 if crossed.any() else drawn
    known, both = known[:facts], both[:facts]
    share = float(both.sum() / max(known.sum(), 1))
    met = bool(above[facts - 1] > below[facts - 1]) if crossed.any() else share >= gate
    low, high = _interval(known, both, of, share, level)
    low, high = (max(low, gate), high) if met else (low, min(high, gate))
    return EarlyStop(gate, level, facts, int(known.sum()), of, Estimate(share, min(low, share), max(high, share)), met)


def decider(gate: float) -> Callable[[np.ndarray, np.ndarray, int], EarlyStop | None]:
    """`decide` at one gate."""
    return lambda known, kept, of: decide(known, kept, gate, of)


def capitals(known: np.ndarray, both: np.ndarray, gate: float, of: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of what both players have after each fact, [..., facts]: of the one that bets on a share above the
    gate, and of the one that bets on a share below. Each begins with 1.

    What a fact adds is kept - gate where it is known, else nothing: over all facts this comes to nothing if the share
    is the gate. So the mean of what is left is known before each draw, and a bet on a higher one is fair.

    Parameters
    ----------
    known, both : in the order of drawing (bool), [..., facts].
    """
    # The gate as a fraction, everything as whole numbers: sums of floats leave a residue, by which a share exactly on
    # the gate could seem impossible one fact before the end.
    part, whole = Fraction(gate).limit_denominator(_FINEST).as_integer_ratio()
    added = known * (whole * both.astype(np.int64) - part)
    before, remaining = np.cumsum(added, axis=-1) - added, of - np.arange(added.shape[-1])
    value, mean = added + part, part * remaining - before
    return _capital(value, mean, remaining), _capital(whole - value, whole * remaining - mean, remaining)


def _capital(value: np.ndarray, mean: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Return the logarithm of what is won by bets that a value is larger than mean / remaining. Where that mean cannot
    be, the bet is won for ever.
    """
    possible = mean > 0
    odds = np.where(possible, value * remaining, 1) / np.where(possible, mean, 1)
    bets = FRACTIONS.reshape(-1, *[1] * odds.ndim)
    won = np.log1p(bets * (odds - 1)).cumsum(axis=-1)
    capital = np.logaddexp.reduce(won, axis=0) - np.log(len(FRACTIONS))
    refuted = (mean < 0) | (~possible & (value > 0))
    return np.where(np.logical_or.accumulate(refuted, axis=-1), np.inf, capital)


def _interval(known: np.ndarray, both: np.ndarray, of: int, share: float, level: float) -> tuple[float, float]:
    """The shares that neither player has refuted: what each has won falls, or rises, with the gate, so that these are
    all between two ends.
    """
    won = np.log(2 / level)
    low = _end(lambda gate: bool((capitals(known, both, gate, of)[0] >= won).any()), 0.0, share)
    high = _end(lambda gate: bool((capitals(known, both, gate, of)[1] >= won).any()), 1.0, share)
    return low, high


def _end(refuted: Callable[[float], bool], far: float, near: float) -> float:
    """Where, from the far end to the near one, gates are no longer refuted."""
    if not refuted(far):
        return far
    for _ in range(_STEPS):
        middle = (far + near) / 2
        far, near = (middle, near) if refuted(middle) else (far, middle)
    return far
