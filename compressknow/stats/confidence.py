"""How sure models are of their answers: kept by the original's confidence, wrong with confidence, and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compressknow.evaluate.answers import Answer
from compressknow.stats.distributions import CALIBRATION_BINS, CALIBRATION_FACTS
from compressknow.stats.intervals import proportion
from compressknow.stats.records import Confidence, Counts, ReliabilityBin, Third

THIRDS = ("most confident third", "middle third", "least confident third")
# Known facts of a third, at least.
FEWEST = 10


def has_confidence(answer: Answer) -> bool:
    """Whether the answer has a probability among all that the model could have given. Where any text may be given there
    is none. A model that broke computes NaN: a warning says so, and no mean may be made of it.
    """
    logp = answer.top5_logp
    return bool(logp) and math.isfinite(logp[0]) and math.isfinite(_total_of(answer))


def confidence_of(answer: Answer) -> float:
    """The probability that the model gives to its answer among all possible ones, 0 to 1: the softmax of their scores.
    As text, a long answer has a tiny probability even where the model has no doubt.
    """
    return math.exp(min(answer.top5_logp[0] - _total_of(answer), 0.0))


def _total_of(answer: Answer) -> float:
    """The logarithm of the sum over all possible answers; NaN where it is not known. Five are all there are in answers
    of older versions, which do not tell it.
    """
    logp = answer.top5_logp
    if answer.choices is None or not logp:
        return math.nan
    if answer.total_logp is None and answer.choices <= len(logp):
        return logp[0] + math.log(math.fsum(math.exp(other - logp[0]) for other in logp))
    return math.nan if answer.total_logp is None else answer.total_logp


def confidence(pairs: Sequence[tuple[Answer, Answer]]) -> Confidence | None:
    """What the confidence of both models tells, over the facts for which both have one; None below 20 of these."""
    usable = [pair for pair in pairs if all(map(has_confidence, pair))]
    if len(usable) < CALIBRATION_FACTS:
        return None
    before, after = (np.array([confidence_of(answer) for answer in side]) for side in zip(*usable, strict=True))
    knew, keeps = (np.array([answer.correct for answer in side]) for side in zip(*usable, strict=True))
    median = float(np.median(before))
    return Confidence(
        thirds=thirds(before[knew], keeps[knew]),
        median=median,
        wrong_original=int((~knew).sum()),
        wrong_compressed=int((~keeps).sum()),
        confidently_wrong_original=int((before[~knew] > median).sum()),
        confidently_wrong_compressed=int((after[~keeps] > median).sum()),
        reliability_original=reliability(before, knew),
        reliability_compressed=reliability(after, keeps),
    )


def thirds(sure: np.ndarray, kept: np.ndarray) -> tuple[Third, ...]:
    """Knowledge kept by thirds of the original's confidence, the most confident first; facts of one confidence stay
    together. Nothing where that leaves a third with too few facts.

    Parameters
    ----------
    sure, kept : of each fact that the original knew, its confidence, and whether the compressed model knows it too.
    """
    distinct, position, sizes = np.unique(-sure, return_inverse=True, return_counts=True)
    if len(distinct) < len(THIRDS):
        return ()
    middle = (np.cumsum(sizes) - sizes / 2) / len(sure)
    chosen = np.minimum((middle * len(THIRDS)).astype(int), len(THIRDS) - 1)[position]
    if np.bincount(chosen, minlength=len(THIRDS)).min() < FEWEST:
        return ()
    return tuple(_third(name, sure[chosen == place], kept[chosen == place]) for place, name in enumerate(THIRDS))


def _third(name: str, sure: np.ndarray, kept: np.ndarray) -> Third:
    both = int(kept.sum())
    counts = Counts(both=both, lost=len(kept) - both)
    return Third(name, float(sure.min()), float(sure.max()), counts, proportion(both, len(kept)))


def reliability(sure: np.ndarray, right: np.ndarray) -> tuple[ReliabilityBin, ...]:
    """Share of right answers by confidence, in the bins of the calibration error (Guo et al. 2017, section 2): of equal
    width, from 0 to 1.
    """
    bins = np.clip(np.ceil(sure * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    facts, hits = (np.bincount(bins, weights=w, minlength=CALIBRATION_BINS) for w in (None, right.astype(float)))
    total = np.bincount(bins, weights=sure, minlength=CALIBRATION_BINS)
    return tuple(
        ReliabilityBin(int(n), int(hit), float(sum_ / n) if n else None)
        for n, hit, sum_ in zip(facts, hits, total, strict=True)
    )
