"""Shares of facts: intervals, tests and averages over relations. Pure functions of counts; scipy does the work.

Confidence intervals are two-sided, 95 % where no other level is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compressknow.comparison.records import Counts, Estimate

# A change is called real below this p-value.
SIGNIFICANT = 0.05
RESAMPLES = 10_000
SEED = 0
_QUANTILES = (2.5, 97.5)


def proportion(part: int, whole: int, level: float = 0.95) -> Estimate:
    """Return part / whole with its Wilson score interval (Wilson 1927); nothing where `whole` is 0.

    >>> estimate = proportion(81, 263)  # Newcombe (1998a), table I
    >>> round(estimate.low, 4), round(estimate.high, 4)
    (0.2553, 0.3662)
    """
    if not whole:
        return Estimate(None)
    return Estimate(part / whole, *wilson(part / whole, whole, normal_quantile(level)))


def normal_quantile(level: float) -> float:
    """Return how many standard errors a two-sided interval of that level reaches to each side."""
    # scipy.stats has these intervals too, but takes longer to import than all the rest of a report.
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def wilson(share: float, number: float, z: float) -> tuple[float, float]:
    """Return the ends of Wilson's interval of a share of so many facts, `z` standard errors to each side."""
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    low, high = ((share + z * z / (2 * number) + side * spread) / (1 + z * z / number) for side in (-1, 1))
    # Rounding may put a bound a hair on the wrong side of the proportion, or of 0 and 1.
    return (max(0.0, min(low, share)) if share else 0.0), (min(1.0, max(high, share)) if share < 1 else 1.0)


def paired_difference(counts: Counts, level: float = 0.95) -> Estimate:
    """Return the accuracy of the compressed model less that of the original, (c - b) / n, with Newcombe's interval.

    Method 10 of Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based
    on paired data", Statistics in Medicine 17, 2635-2650: the Wilson intervals of both proportions, squared and added,
    less the part that their correlation phi (corrected for continuity) explains.

    >>> estimate = paired_difference(Counts(both=59, lost=16, gained=6, neither=80))
    >>> [round(number, 4) for number in (estimate.value, estimate.low, estimate.high)]
    [-0.0621, -0.1186, -0.0046]
    """
    n = counts.n
    if not n:
        return Estimate(None)
    after, before = counts.known_after / n, counts.known_before / n
    z = normal_quantile(level)
    (low_after, high_after), (low_before, high_before) = wilson(after, n, z), wilson(before, n, z)
    phi, value = _correlate(counts), (counts.gained - counts.lost) / n
    below = _add_squares(after - low_after, high_before - before, phi)
    above = _add_squares(high_after - after, before - low_before, phi)
    return Estimate(value, max(-1.0, value - below), min(1.0, value + above))


def _correlate(counts: Counts) -> float:
    """Return the correlation of the two models' being right, corrected for continuity as Newcombe's method 10 does; 0
    where one of them is always or never right.
    """
    n = counts.n
    margins = math.prod([counts.known_before, n - counts.known_before, counts.known_after, n - counts.known_after])
    if not margins:
        return 0.0
    product = counts.both * counts.neither - counts.lost * counts.gained
    return (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins)


def _add_squares(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def mcnemar(counts: Counts) -> float | None:
    """Run the exact two-sided McNemar test: the chance of so uneven a split of lost and gained facts, were a change as
    likely either way (McNemar 1947; a binomial test of the discordant pairs). 1 where nothing changed, None without
    facts.

    >>> mcnemar(Counts(both=1, lost=1, gained=7, neither=12))
    0.0703125
    """
    from scipy.special import bdtr

    if not counts.n:
        return None
    discordant = counts.lost + counts.gained
    # Both tails are alike. Where they meet, floats may add up to 0.9999999999999999.
    if abs(counts.lost - counts.gained) <= discordant % 2:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(counts.lost, counts.gained), discordant, 0.5)))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the plain mean of independent figures, with its interval: the distances to the ends of their intervals,
    squared and added (the MOVER of Zou and Donner 2008, Statistics in Medicine 27, 1693-1702). None where one has no
    value.

    >>> mean([Estimate(0.5, 0.2, 0.6), Estimate(0.7, 0.3, 0.7)])
    Estimate(value=0.6, low=0.35, high=0.65)
    """
    values = [estimate.value for estimate in estimates if estimate.value is not None]
    if not values or len(values) < len(estimates):
        return Estimate(None)
    middle = math.fsum(values) / len(values)
    bounds = [(e.low, e.high) for e in estimates if e.low is not None and e.high is not None]
    if len(bounds) < len(values):
        return Estimate(middle)
    below, above = (
        math.hypot(*(value - pair[side] for value, pair in zip(values, bounds, strict=True))) / len(values)
        for side in (0, 1)
    )
    return Estimate(*(round(number, 12) for number in (middle, middle - below, middle + above)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for their number, by Holm (1979), "A simple sequentially rejective multiple test procedure",
    Scandinavian Journal of Statistics 6, 65-70. None stays None and is not counted.

    >>> holm([0.01, 0.04, 0.03, None, 0.005])
    [0.03, 0.06, 0.06, None, 0.02]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def above_chance(kept: Estimate, chance: float | None) -> Estimate:
    """Return knowledge kept beyond what guessing would also have got right: (kept - g) / (1 - g), not below 0.

    A model that has forgotten a fact still answers it right with the guessing rate g (1 / number of candidates, its
    mean over the facts that the original knew). If the share k is truly kept, k + (1 - k) g is seen as kept: solved
    for k (Abbott 1925, "A method of computing the effectiveness of an insecticide", J. Econ. Entomology 18, 265-267;
    Cohen's kappa has the same form). The interval is carried through the same formula: g is known, not estimated.

    >>> above_chance(Estimate(0.75, 0.6, 0.9), chance=0.5)
    Estimate(value=0.5, low=0.2, high=0.8)
    """
    if kept.value is None or chance is None or chance >= 1:
        return Estimate(None)
    shares = (kept.value, kept.low, kept.high)
    # Rounded where floats hold no more, so that 0.6 at 0.5 is 0.2 and not 0.19999999999999996.
    beyond = (None if share is None else round((share - chance) / (1 - chance), 12) for share in shares)
    return Estimate(*(None if share is None else min(1.0, max(0.0, share)) for share in beyond))


def macro(relations: Sequence[Counts], seed: int = SEED) -> tuple[Estimate, Estimate, Estimate]:
    """Return the accuracy of the original, of the compressed model, and their difference, as means over relations;
    those without facts are left out.

    Intervals by a stratified paired bootstrap of `RESAMPLES` samples, percentiles 2.5 and 97.5 (Efron and Tibshirani
    1993, chapter 13). To draw a relation's facts anew, pairs kept together, is to draw its four counts from a
    multinomial distribution: so that is what is drawn, and the facts themselves are not needed. The order of relations
    matters for the drawing only. Where no resample differs from another (one fact a relation, say), nothing is known of
    the spread: there is no interval.
    """
    table = np.array([[c.both, c.lost, c.gained, c.neither] for c in relations if c.n], dtype=np.int64).reshape(-1, 4)
    if not len(table):
        return Estimate(None), Estimate(None), Estimate(None)
    sizes = table.sum(axis=1)
    drawn = np.random.default_rng(seed).multinomial(sizes, table / sizes[:, None], size=(RESAMPLES, len(table)))
    estimates = []
    for value, samples in zip(_average_relations(table, sizes), _average_relations(drawn, sizes), strict=True):
        ends = np.percentile(samples, _QUANTILES) if np.ptp(samples) else ()
        estimates.append(Estimate(float(value), *map(float, ends)))
    before, after, difference = estimates
    return before, after, difference


def _average_relations(counts: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Return means over relations, the last axis but one: accuracy before, after, and after less before."""
    both, lost, gained = counts[..., 0], counts[..., 1], counts[..., 2]
    return [(part / sizes).mean(axis=-1) for part in (both + lost, both + gained, gained - lost)]
