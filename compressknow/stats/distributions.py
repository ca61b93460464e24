"""What answers' probabilities and ranks tell beyond right and wrong: divergence, calibration, ranks, percentiles."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from compressknow.evaluate.answers import LOGP_FLOOR

# What float32 log-probabilities of 256 tokens leave undecided of the rest's probability: their rounding errors add up
# to about the entropy times 2^-24. A rest below this is indistinguishable from none.
REST_FLOOR = 2.0**-21
CALIBRATION_BINS = 15
CALIBRATION_FACTS = 20
POPULARITY_BINS = 5
POPULARITY_FACTS = 20
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def kl_divergence(original: ArrayLike, compressed: ArrayLike) -> np.ndarray:
    """KL(original || compressed) in nats, on the partition into the given tokens and all the rest.

    By the inequality for sums of logarithms this never exceeds the divergence over the whole vocabulary, and falls
    short of it only by what moved within the rest (Cover and Thomas 2006, theorem 2.7.1). Each term is taken as
    p log(p/q) - p + q, which is the same sum where both add up to 1, but has no negative terms: so rounding cannot
    make the result negative, and equal inputs give exactly 0.

    Parameters
    ----------
    original, compressed : log-probabilities (natural logarithm) of the same tokens, shape (..., tokens).

    Returns
    -------
    float64, shape (...); NaN where an input holds NaN.

    >>> import math
    >>> round(float(kl_divergence([math.log(0.5)], [math.log(0.25)])), 6)  # 0.5 ln 2 + 0.5 ln (2/3)
    0.143841
    """
    logp, logq = (_with_rest(np.asarray(side, dtype=np.float64)) for side in (original, compressed))
    p = np.exp(logp)
    # q - p as p (e^(log q - log p) - 1): close distributions do not cancel. Below 1e-43 p counts for nothing.
    change = logq - logp
    terms = p * (np.expm1(change) - change)
    return np.asarray(np.maximum(terms, 0.0).sum(axis=-1))


def rest_of(logp: ArrayLike) -> np.ndarray:
    """The probability that log-probabilities of shape (..., tokens) leave to all other tokens, 0 to 1, shape (...).

    >>> import math
    >>> float(rest_of([math.log(0.5), math.log(0.25)]))
    0.25
    """
    return np.asarray(np.clip(1.0 - np.exp(np.asarray(logp, dtype=np.float64)).sum(axis=-1), 0.0, 1.0))


def _with_rest(logp: np.ndarray) -> np.ndarray:
    """Log-probabilities with that of the rest, 1 - sum, appended."""
    logp = np.maximum(logp, LOGP_FLOOR)
    total = np.exp(logp).sum(axis=-1, keepdims=True)
    rest = np.log(np.maximum(1.0 - total, REST_FLOOR))
    return np.concatenate([logp, rest], axis=-1)


def ece(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Expected calibration error: |share right - mean confidence| of 15 bins of equal width, weighted by their facts
    (Guo et al. 2017, "On calibration of modern neural networks", equation 3). None below 20 facts.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if len(sure) < CALIBRATION_FACTS:
        return None
    # Bin m holds ((m - 1) / M, m / M], as in the paper; 0 itself goes to the first.
    bins = np.clip(np.ceil(sure * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=right - sure, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(sure))


def brier(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Mean squared difference of the confidence in the given answer from 1 where it is right, from 0 where it is wrong
    (Brier 1950). None below 20 facts, as for the calibration error beside it.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    return float(np.mean((sure - right) ** 2)) if len(sure) >= CALIBRATION_FACTS else None


def mean_reciprocal_rank(ranks: Sequence[int | None]) -> float | None:
    """Mean of 1 / rank of the gold. A gold that is no possible answer (None) has no rank however far one looks, and
    counts as 0; where no fact has a rank, ranks do not apply to the probe and there is no mean.

    >>> mean_reciprocal_rank([1, 2, None, 4]), mean_reciprocal_rank([None, None])
    (0.4375, None)
    """
    reciprocal = [1 / rank for rank in ranks if rank is not None]
    return sum(sorted(reciprocal)) / len(ranks) if reciprocal else None


def precision_at(k: int, ranks: Sequence[int | None]) -> float | None:
    """Share of facts whose gold is among the k most likely answers; None as for `mean_reciprocal_rank`.

    >>> precision_at(5, [1, 5, 6, None])
    0.5
    """
    known = [rank for rank in ranks if rank is not None]
    return sum(rank <= k for rank in known) / len(ranks) if known else None


def percentiles(values: ArrayLike) -> Mapping[str, float] | None:
    """Percentiles 1 to 99 by linear interpolation, {"p1": ..., "p50": ...}; None where there are no values.

    >>> percentiles([0, 10])["p25"]
    2.5
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return None
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(numbers, PERCENTILES), strict=True)}


def popularity_bins(popularity: Sequence[float | None]) -> list[str | None]:
    """The bin of each fact, most popular first: "top 20 %", "20 to 40 %", ... "bottom 20 %"; None where it has none.

    Bins are of about equal size, five or as many as leave 20 facts in each; facts as popular as each other stay
    together. With fewer than two such bins no fact has one.
    """
    values = np.array([np.nan if value is None else value for value in popularity], dtype=np.float64)
    known = np.isfinite(values)
    distinct, position, sizes = np.unique(-values[known], return_inverse=True, return_counts=True)
    middle = (np.cumsum(sizes) - sizes / 2) / max(known.sum(), 1)
    for bins in range(min(POPULARITY_BINS, int(known.sum()) // POPULARITY_FACTS, len(distinct)), 1, -1):
        chosen = np.minimum((middle * bins).astype(int), bins - 1)[position]
        if np.bincount(chosen, minlength=bins).min() >= POPULARITY_FACTS:
            names = np.full(len(values), None, dtype=object)
            names[known] = np.array(bin_names(bins), dtype=object)[chosen]
            return list(names)
    return [None] * len(values)


def bin_names(bins: int) -> list[str]:
    """Names of popularity bins, most popular first.

    >>> bin_names(3)
    ['top 33 %', '33 to 67 %', 'bottom 33 %']
    """
    edges = [round(100 * index / bins) for index in range(bins + 1)]
    between = [f"{low} to {high} %" for low, high in itertools.pairwise(edges[1:-1])]
    return [f"top {edges[1]} %", *between, f"bottom {100 - edges[-2]} %"]
