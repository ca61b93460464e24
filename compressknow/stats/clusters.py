"""Intervals that admit clusters: facts of one relation hang together, so that a relation, not a fact, is drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compressknow.stats.intervals import RESAMPLES, SEED
from compressknow.stats.records import Counts, Estimate

_TAIL = 0.025
# Fewer clusters tell too little of how clusters differ.
FEWEST = 5


def kept_by_cluster(relations: Sequence[Counts], seed: int = SEED) -> Estimate:
    """Knowledge kept, with its interval over relations; those of which the original knew nothing say nothing of it."""
    return ratio([c.both for c in relations], [c.known_before for c in relations], seed)


def difference_by_cluster(relations: Sequence[Counts], seed: int = SEED) -> Estimate:
    """Accuracy of the compressed model less that of the original over all facts, with its interval over relations."""
    return ratio([c.gained - c.lost for c in relations], [c.n for c in relations], seed)


def ratio(parts: Sequence[int], wholes: Sequence[int], seed: int = SEED) -> Estimate:
    """Sum of parts / sum of wholes over clusters, with its 95 % interval by bootstrap over the clusters.

    Whole clusters are drawn with replacement, `RESAMPLES` times, as Miller 2024 ("Adding error bars to evals",
    arXiv 2411.00640, section 2.2) says of questions that come in groups; the interval is BCa (Efron and Tibshirani
    1993, section 14.3) at the expanded levels of Hesterberg 2015 (The American Statistician 69, 371-386, section 5.2),
    without which an interval of few clusters is too narrow. Fewer than `FEWEST` clusters tell too little of how these
    differ, as do clusters that are all alike: there is no interval then.

    Parameters
    ----------
    parts, wholes : by cluster; clusters whose whole is 0 are left out.

    >>> ratio([9, 18, 9, 9, 9], [10, 20, 10, 10, 10]), ratio([9], [10])
    (Estimate(value=0.9, low=None, high=None), Estimate(value=0.9, low=None, high=None))
    """
    part, whole = (np.asarray(side, dtype=np.int64) for side in (parts, wholes))
    part, whole = part[whole > 0], whole[whole > 0]
    if not len(whole):
        return Estimate(None)
    value, number = float(part.sum() / whole.sum()), len(whole)
    # Of one ratio throughout, whatever is drawn; compared as whole numbers.
    if number < FEWEST or (part * whole[0] == part[0] * whole).all():
        return Estimate(value)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    samples = (drawn @ part) / (drawn @ whole)
    low, high = np.quantile(samples, _levels(samples, value, _acceleration(part, whole), number))
    return Estimate(value, min(float(low), value), max(float(high), value))


def _acceleration(part: np.ndarray, whole: np.ndarray) -> float:
    """Of BCa, by the jackknife over clusters."""
    without = (part.sum() - part) / (whole.sum() - whole)
    apart = without.mean() - without
    spread = float((apart**2).sum()) ** 1.5
    return float((apart**3).sum()) / (6 * spread) if spread else 0.0


def _levels(samples: np.ndarray, value: float, acceleration: float, clusters: int) -> list[float]:
    """The two quantiles of the samples that are the ends of the interval."""
    from scipy.special import ndtr, ndtri, stdtrit

    below = float((samples < value).mean() + (samples == value).mean() / 2)
    bias = float(ndtri(min(max(below, 0.5 / len(samples)), 1 - 0.5 / len(samples))))
    # Student's t in place of the normal quantile, and the spread of n - 1 rather than n.
    end = math.sqrt(clusters / (clusters - 1)) * float(stdtrit(clusters - 1, _TAIL))
    return [float(ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))) for z in (end, -end)]
