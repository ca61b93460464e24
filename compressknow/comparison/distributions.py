"""Figures of answers beyond right and wrong: divergence, ranks, confidence, grades of knowing, wordings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import ArrayLike

from compressknow.comparison.intervals import estimate_proportion
from compressknow.comparison.records import Confidence, Counts, GradeCounts, ReliabilityBin, Tertile, WordingFigures
from compressknow.evaluate.answers import GRADES, LOGP_FLOOR, Answer
from compressknow.evaluate.grades import group_by_fact

# Uncertainty of the rest's probability from float32 log-probabilities of 256 tokens: their rounding errors add up to
# about the entropy times 2^-24. A rest below this cannot be told from none.
REST_FLOOR = 2.0**-21
CALIBRATION_BINS = 15
CALIBRATION_FACTS = 20
POPULARITY_BINS = 5
POPULARITY_FACTS = 20
PERCENTILES = {f"p{number}": number for number in (1, 5, 25, 50, 75, 95, 99)}


def compute_kl(original: ArrayLike, compressed: ArrayLike) -> np.ndarray:
    """Compute KL(original || compressed) in nats, float64 (...), from log-probabilities (natural logarithm) of the same
    tokens, (..., tokens), on the partition into these and all the rest; NaN where an input holds NaN.

    By the inequality for sums of logarithms this never exceeds the divergence over the whole vocabulary, and falls
    short of it only by what moved within the rest (Cover and Thomas 2006, theorem 2.7.1). Each term is taken as
    p log(p/q) - p + q, which is the same sum where both add up to 1, but has no negative terms: so rounding cannot
    make the result negative, and equal inputs give exactly 0.

    >>> import math
    >>> round(float(compute_kl([math.log(0.5)], [math.log(0.25)])), 6)  # 0.5 ln 2 + 0.5 ln (2/3)
    0.143841
    """
    logp, logq = (_append_rest(np.asarray(side, dtype=np.float64)) for side in (original, compressed))
    p = np.exp(logp)
    # q - p as p (e^(log q - log p) - 1): close distributions do not cancel. Below 1e-43 p counts for nothing.
    change = logq - logp
    terms = p * (np.expm1(change) - change)
    return np.asarray(np.maximum(terms, 0.0).sum(axis=-1))


def compute_rest(logp: ArrayLike) -> np.ndarray:
    """Return the probability (0 to 1), shape (...), that log-probabilities of shape (..., tokens) leave to all others.

    >>> import math
    >>> float(compute_rest([math.log(0.5), math.log(0.25)]))
    0.25
    """
    return np.asarray(np.clip(1.0 - np.exp(np.asarray(logp, dtype=np.float64)).sum(axis=-1), 0.0, 1.0))


def _append_rest(logp: np.ndarray) -> np.ndarray:
    """Append that of the rest, 1 - sum, to log-probabilities."""
    logp = np.maximum(logp, LOGP_FLOOR)
    total = np.exp(logp).sum(axis=-1, keepdims=True)
    rest = np.log(np.maximum(1.0 - total, REST_FLOOR))
    return np.concatenate([logp, rest], axis=-1)


def compute_ece(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Compute the expected calibration error: |share right - mean confidence| of 15 bins of equal width, weighted by
    their facts (Guo et al. 2017, "On calibration of modern neural networks", equation 3)."""
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    gaps = np.bincount(_assign_bins(sure), weights=right - sure, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(sure))


def _assign_bins(sure: np.ndarray) -> np.ndarray:
    # Bin m holds ((m - 1) / M, m / M], as in the paper; 0 itself goes to the first.
    bins: np.ndarray = np.clip(np.ceil(sure * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    return bins


def compute_brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Compute the mean squared difference of the confidence in the given answer from 1 where it is right, from 0 where
    it is wrong (Brier 1950)."""
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    return float(np.mean((sure - right) ** 2))


def compute_mean_reciprocal_rank(ranks: Sequence[int | None]) -> float | None:
    """Return the mean of 1 / rank of the gold. A gold that is not a possible answer (None) has no rank however far one
    looks, and counts as 0; where no fact has a rank, ranks do not apply to the probe and there is no mean.

    >>> compute_mean_reciprocal_rank([1, 2, None, 4]), compute_mean_reciprocal_rank([None, None])
    (0.4375, None)
    """
    reciprocal = [1 / rank for rank in ranks if rank is not None]
    return sum(sorted(reciprocal)) / len(ranks) if reciprocal else None


def compute_precision(k: int, ranks: Sequence[int | None]) -> float | None:
    """Return the share of facts whose gold is among the k most likely answers; None as of their reciprocal rank.

    >>> compute_precision(5, [1, 5, 6, None])
    0.5
    """
    known = [rank for rank in ranks if rank is not None]
    return sum(rank <= k for rank in known) / len(ranks) if known else None


def compute_percentiles(values: np.ndarray | Sequence[float], percentiles: Mapping[str, float]) -> dict[str, float]:
    """Return percentiles (0 to 100) by name, by linear interpolation, as llama.cpp's `percentile` has them too.

    >>> compute_percentiles([0, 10], {"p25": 25})
    {'p25': 2.5}
    """
    return dict(zip(percentiles, map(float, np.percentile(values, list(percentiles.values()))), strict=True))


def assign_popularity_bins(popularity: Sequence[float | None]) -> list[str | None]:
    """Return the bin of each fact: "top 20 %" (of popularity), "20 to 40 %", ... "bottom 20 %"; None if it has none.

    Bins are of about equal size, five or as many as leave 20 facts in each; facts as popular as each other stay
    together. With fewer than two such bins no fact has one.
    """
    values = np.array([np.nan if value is None else value for value in popularity], dtype=np.float64)
    known = np.isfinite(values)
    for bins in range(min(POPULARITY_BINS, int(known.sum()) // POPULARITY_FACTS), 1, -1):
        if (chosen := _split_evenly(values[known], bins, POPULARITY_FACTS)) is not None:
            names = np.full(len(values), None, dtype=object)
            names[known] = np.array(name_popularity_bins(bins), dtype=object)[chosen]
            return list(names)
    return [None] * len(values)


def _split_evenly(values: np.ndarray, parts: int, fewest: int) -> np.ndarray | None:
    """Return the part of each value, from 0, the largest first, equal values in one; None if one has too few."""
    _, position, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    middle = (np.cumsum(sizes) - sizes / 2) / len(values)
    chosen: np.ndarray = np.minimum((middle * parts).astype(int), parts - 1)[position]
    return chosen if np.bincount(chosen, minlength=parts).min() >= fewest else None


def name_popularity_bins(bins: int) -> list[str]:
    """Return the names of popularity bins, most popular first.

    >>> name_popularity_bins(3)
    ['top 33 %', '33 to 67 %', 'bottom 33 %']
    """
    edges = [round(100 * index / bins) for index in range(bins + 1)]
    between = [f"{low} to {high} %" for low, high in pairwise(edges[1:-1])]
    return [f"top {edges[1]} %", *between, f"bottom {100 - edges[-2]} %"]


THIRDS = ("most confident third", "middle third", "least confident third")
# Known facts of a third, at least.
FEWEST = 10


def get_confidence(answer: Answer) -> float | None:
    """Return the probability that the model gives to its answer among all possible ones, 0 to 1: the softmax of their
    scores. As text, a long answer has a tiny probability even where the model has no doubt.

    None if any text may be given; where the sum over all is not known, in answers of older versions to more than
    five; and of a broken model: it produces NaN, which have no mean, and a warning says so.
    """
    logp, total = answer.top5_logp, answer.total_logp
    if answer.choices is None or not logp or not math.isfinite(logp[0]):
        return None
    if total is None and answer.choices <= len(logp):
        total = logp[0] + math.log(math.fsum(math.exp(other - logp[0]) for other in logp))
    return math.exp(min(logp[0] - total, 0.0)) if total is not None and math.isfinite(total) else None


def compare_confidence(pairs: Sequence[tuple[Answer, Answer]]) -> Confidence | None:
    """Compare how confident both models are, over the facts for which both have one; None below 20 of these."""
    known = [(get_confidence(one), get_confidence(other), one.correct, other.correct) for one, other in pairs]
    usable = [each for each in known if None not in each]
    if len(usable) < CALIBRATION_FACTS:
        return None
    before, after, knew, keeps = map(np.array, zip(*usable, strict=True))
    median = float(np.median(before))
    return Confidence(
        thirds=split_by_confidence(before[knew], keeps[knew]),
        median=median,
        wrong_original=int((~knew).sum()),
        wrong_compressed=int((~keeps).sum()),
        confidently_wrong_original=int((before[~knew] > median).sum()),
        confidently_wrong_compressed=int((after[~keeps] > median).sum()),
        reliability_original=compute_reliability(before, knew),
        reliability_compressed=compute_reliability(after, keeps),
        ece=(compute_ece(before, knew), compute_ece(after, keeps)),
        brier=(compute_brier(before, knew), compute_brier(after, keeps)),
    )


def split_by_confidence(sure: np.ndarray, kept: np.ndarray) -> tuple[Tertile, ...]:
    """Return knowledge kept by thirds of the original's confidence, the most confident first, of each fact that the
    original knew; facts of one confidence stay together. Nothing if that leaves a third with too few facts."""
    chosen = _split_evenly(sure, len(THIRDS), FEWEST)
    if chosen is None:
        return ()
    found = []
    for place, name in enumerate(THIRDS):
        own, still = sure[chosen == place], kept[chosen == place]
        counts = Counts(both=int(still.sum()), lost=int((~still).sum()))
        found.append(
            Tertile(name, float(own.min()), float(own.max()), counts, estimate_proportion(counts.both, len(still)))
        )
    return tuple(found)


def compute_reliability(sure: np.ndarray, right: np.ndarray) -> tuple[ReliabilityBin, ...]:
    """Return the share of right answers by confidence, in bins of equal width (Guo et al. 2017, section 2)."""
    bins = _assign_bins(sure)
    facts, hits = (np.bincount(bins, weights=w, minlength=CALIBRATION_BINS) for w in (None, right.astype(float)))
    total = np.bincount(bins, weights=sure, minlength=CALIBRATION_BINS)
    return tuple(
        ReliabilityBin(int(n), int(hit), float(sum_ / n) if n else None)
        for n, hit, sum_ in zip(facts, hits, total, strict=True)
    )


def count_grades(pairs: Sequence[tuple[Answer, Answer]]) -> GradeCounts | None:
    """Count facts by the grades of both models; None if some answer has none (tasks, answers of older versions)."""
    if not pairs or any(answer.grade is None for pair in pairs for answer in pair):
        return None
    before, after = zip(*pairs, strict=True)
    moved = Counter((str(one.grade), str(other.grade)) for one, other in pairs)
    lost = [other for one, other in pairs if one.correct and not other.correct]
    shown = [answer for answer in lost if answer.with_example is not None]
    return GradeCounts(
        original=_count_grades(before),
        compressed=_count_grades(after),
        moved={(one, other): moved[one, other] for one in GRADES for other in GRADES},
        written=(_is_written(before), _is_written(after)),
        shown=len(shown),
        back=sum(answer.with_example == answer.gold for answer in shown),
    )


def _count_grades(answers: Iterable[Answer]) -> dict[str, int]:
    found = Counter(answer.grade for answer in answers)
    return {grade: found[grade] for grade in GRADES}


def _is_written(answers: Iterable[Answer]) -> bool:
    return any(answer.produced is not None for answer in answers)


def compare_wordings(original: Sequence[Answer], compressed: Sequence[Answer]) -> WordingFigures | None:
    """Return the figures of each wording of a probe, before they are put together; None if there is only one."""
    after = {answer.fact_id: answer for answer in compressed}
    pairs = [(answer, after[answer.fact_id]) for answer in original if answer.fact_id in after]
    templates = sorted({answer.template for answer, _ in pairs if answer.template is not None})
    if len(templates) < 2:
        return None
    by_template = {}
    for number in templates:
        kinds = Counter((one.correct, other.correct) for one, other in pairs if one.template == number)
        counts = Counts(kinds[True, True], kinds[True, False], kinds[False, True], kinds[False, False])
        by_template[number] = counts, estimate_proportion(counts.both, counts.known_before)
    of_original, of_compressed = zip(*pairs, strict=True)
    return WordingFigures(by_template, (measure_consistency(of_original), measure_consistency(of_compressed)))


def measure_consistency(answers: Iterable[Answer]) -> float | None:
    """Return the share of pairs of wordings of one fact that get the same answer, over the facts with two or more
    wordings (Elazar et al. 2021, "Measuring and Improving Consistency in Pretrained Language Models", section 3). None
    where there is none."""
    shares = []
    for wordings in group_by_fact(answers).values():
        alike = [one.predicted == other.predicted for one, other in combinations(wordings, 2)]
        if alike:
            shares.append(sum(alike) / len(alike))
    return math.fsum(shares) / len(shares) if shares else None
