"""Figures of answers beyond right and wrong: divergence, ranks, confidence, grades of knowledge, wordings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compressknow.comparison.intervals import estimate_proportion
from compressknow.comparison.records import Confidence, Counts, GradeCounts, ReliabilityBin, Tertile
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
    """Compute KL(original || compressed) in nats, float64 (...), from natural log-probabilities of the same tokens,
    (..., tokens), with all other tokens as one, the rest; NaN if an input has NaN.

    By the log sum inequality this never exceeds the divergence over the whole vocabulary, and is smaller only by
    changes within the rest (Cover and Thomas 2006, theorem 2.7.1). Each term is computed as p log(p/q) - p + q, which
    has the same sum if both add up to 1, but no negative terms: rounding cannot make the result negative, and equal
    inputs give exactly 0.

    >>> import math
    >>> round(float(compute_kl([math.log(0.5)], [math.log(0.25)])), 6)  # 0.5 ln 2 + 0.5 ln (2/3)
    0.143841
    """
    logp, logq = (_append_rest(np.asarray(each, dtype=np.float64)) for each in (original, compressed))
    p = np.exp(logp)
    # q - p as p (e^(log q - log p) - 1), without cancellation for close distributions; p below 1e-43 is negligible.
    change = logq - logp
    terms = p * (np.expm1(change) - change)
    return np.asarray(np.maximum(terms, 0.0).sum(axis=-1))


def compute_rest(logp: ArrayLike) -> np.ndarray:
    """Return the remaining probability (0 to 1), shape (...), given log-probabilities of shape (..., tokens).

    >>> import math
    >>> float(compute_rest([math.log(0.5), math.log(0.25)]))
    0.25
    """
    return np.asarray(np.clip(1.0 - np.exp(np.asarray(logp, dtype=np.float64)).sum(axis=-1), 0.0, 1.0))


def _append_rest(logp: np.ndarray) -> np.ndarray:
    """Append the log-probability of the rest, 1 - sum, to log-probabilities."""
    logp = np.maximum(logp, LOGP_FLOOR)
    total = np.exp(logp).sum(axis=-1, keepdims=True)
    rest = np.log(np.maximum(1.0 - total, REST_FLOOR))
    return np.concatenate([logp, rest], axis=-1)


def compute_ece(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Compute the expected calibration error: |share right - mean confidence| of 15 bins of equal width, weighted by
    their facts (Guo et al. 2017, "On calibration of modern neural networks", equation 3)."""
    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    gaps = np.bincount(_assign_bins(confidence), weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _assign_bins(confidence: np.ndarray) -> np.ndarray:
    # Bin m is ((m - 1) / M, m / M], as in the paper; 0 belongs to the first.
    bins: np.ndarray = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    return bins


def compute_brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Compute the mean squared difference between confidence in an answer and its correctness, 1 or 0 (Brier 1950)."""
    return float(np.mean((np.asarray(confidence, dtype=np.float64) - np.asarray(correct, dtype=np.float64)) ** 2))


def compute_mean_reciprocal_rank(ranks: Sequence[int | None]) -> float | None:
    """Return the mean of 1 / rank of the gold. A gold that is not a possible answer (None) counts as 0; if no fact has
    a rank, ranks do not apply to the probe, and the mean is None.

    >>> compute_mean_reciprocal_rank([1, 2, None, 4]), compute_mean_reciprocal_rank([None, None])
    (0.4375, None)
    """
    reciprocal = [1 / rank for rank in ranks if rank is not None]
    return sum(sorted(reciprocal)) / len(ranks) if reciprocal else None


def compute_precision(k: int, ranks: Sequence[int | None]) -> float | None:
    """Return the share of facts whose gold is among the k most likely answers; None if no fact has a rank.

    >>> compute_precision(5, [1, 5, 6, None])
    0.5
    """
    known = [rank for rank in ranks if rank is not None]
    return sum(rank <= k for rank in known) / len(ranks) if known else None


def compute_percentiles(values: np.ndarray | Sequence[float], percentiles: Mapping[str, float]) -> dict[str, float]:
    """Return percentiles (0 to 100) by name, with linear interpolation, as in llama.cpp's `percentile`.

    >>> compute_percentiles([0, 10], {"p25": 25})
    {'p25': 2.5}
    """
    return dict(zip(percentiles, map(float, np.percentile(values, list(percentiles.values()))), strict=True))


def assign_popularity_bins(popularity: Sequence[float | None]) -> list[str | None]:
    """Return each fact's popularity bin: "top 20 %", "20 to 40 %", ... "bottom 20 %". There are at most five, of about
    equal size and 20 facts or more; equally popular facts share one. With fewer than two, facts have None."""
    values = np.array([np.nan if value is None else value for value in popularity], dtype=np.float64)
    known = np.isfinite(values)
    for bins in range(min(POPULARITY_BINS, int(known.sum()) // POPULARITY_FACTS), 1, -1):
        if (assigned := _split_evenly(values[known], bins, POPULARITY_FACTS)) is not None:
            names = np.full(len(values), None, dtype=object)
            names[known] = np.array(name_popularity_bins(bins), dtype=object)[assigned]
            return list(names)
    return [None] * len(values)


def _split_evenly(values: np.ndarray, parts: int, fewest: int) -> np.ndarray | None:
    """Return the part of each value, 0 for the largest, with equal values in the same; None if a part is too small."""
    _, position, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    middle = (np.cumsum(sizes) - sizes / 2) / len(values)
    assigned: np.ndarray = np.minimum((middle * parts).astype(int), parts - 1)[position]
    return assigned if np.bincount(assigned, minlength=parts).min() >= fewest else None


def name_popularity_bins(bins: int) -> list[str]:
    """Return the names of popularity bins, most popular first.

    >>> name_popularity_bins(3)
    ['top 33 %', '33 to 67 %', 'bottom 33 %']
    """
    edges = [round(100 * index / bins) for index in range(bins + 1)]
    between = [f"{low} to {high} %" for low, high in pairwise(edges[1:-1])]
    return [f"top {edges[1]} %", *between, f"bottom {100 - edges[-2]} %"]


THIRDS = ("most confident third", "middle third", "least confident third")
FEWEST = 10  # minimum of known facts in a third


def get_confidence(answer: Answer) -> float | None:
    """Return the probability of a model's answer among all possible ones, 0 to 1: the softmax of their scores. None if
    any text is possible, if the sum over all answers is not known (older versions), or if the model returns NaN."""
    logp, total = answer.top5_logp, answer.total_logp
    if answer.choices is None or not logp or not math.isfinite(logp[0]):
        return None
    if total is None and answer.choices <= len(logp):
        total = logp[0] + math.log(math.fsum(math.exp(other - logp[0]) for other in logp))
    return math.exp(min(logp[0] - total, 0.0)) if total is not None and math.isfinite(total) else None


def compare_confidence(pairs: Sequence[tuple[Answer, Answer]]) -> Confidence | None:
    """Compare the confidence of both models, over the facts for which both have one; None below 20 of these."""
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


def split_by_confidence(confidence: np.ndarray, kept: np.ndarray) -> tuple[Tertile, ...]:
    """Return knowledge kept by thirds of the original's confidence in the facts that it knew, the most confident first.
    Facts of equal confidence are in the same third; () if a third would have too few facts."""
    assigned = _split_evenly(confidence, len(THIRDS), FEWEST)
    if assigned is None:
        return ()
    thirds = []
    for index, name in enumerate(THIRDS):
        of_third, kept_here = confidence[assigned == index], kept[assigned == index]
        counts = Counts(both=int(kept_here.sum()), lost=int((~kept_here).sum()))
        estimate = estimate_proportion(counts.both, len(kept_here))
        thirds.append(Tertile(name, float(of_third.min()), float(of_third.max()), counts, estimate))
    return tuple(thirds)


def compute_reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[ReliabilityBin, ...]:
    """Return the share of right answers by confidence, in bins of equal width (Guo et al. 2017, section 2)."""
    bins = _assign_bins(confidence)
    facts, hits = (np.bincount(bins, weights=w, minlength=CALIBRATION_BINS) for w in (None, right.astype(float)))
    total = np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS)
    return tuple(
        ReliabilityBin(int(n), int(hit), float(sum_ / n) if n else None)
        for n, hit, sum_ in zip(facts, hits, total, strict=True)
    )


def count_grades(pairs: Sequence[tuple[Answer, Answer]]) -> GradeCounts | None:
    """Count facts by the grades of both models; None if an answer has none (tasks, answers of older versions)."""
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
    counts = Counter(answer.grade for answer in answers)
    return {grade: counts[grade] for grade in GRADES}


def _is_written(answers: Iterable[Answer]) -> bool:
    return any(answer.produced is not None for answer in answers)


def count_pairs(pairs: Sequence[tuple[Answer, Answer]]) -> Counts:
    """Count facts that both models know, that were lost, that were gained, and that neither knows."""
    both = sum(a.correct and b.correct for a, b in pairs)
    before, after = sum(a.correct for a, _ in pairs), sum(b.correct for _, b in pairs)
    return Counts(both, before - both, after - both, len(pairs) - before - after + both)


def compare_wordings(original: Sequence[Answer], compressed: Sequence[Answer]) -> dict[str, Any]:
    """Return the figures of each of several wordings of a probe, from all answers, as fields of `ProbeFigures`."""
    after = {answer.fact_id: answer for answer in compressed}
    pairs = [(answer, after[answer.fact_id]) for answer in original if answer.fact_id in after]
    templates = sorted({answer.template for answer, _ in pairs if answer.template is not None})
    if len(templates) < 2:
        return {}
    by_template = {}
    for number in templates:
        counts = count_pairs([pair for pair in pairs if pair[0].template == number])
        by_template[number] = counts, estimate_proportion(counts.both, counts.known_before)
    return {"by_template": by_template, "consistency": tuple(map(measure_consistency, zip(*pairs, strict=True)))}


def measure_consistency(answers: Iterable[Answer]) -> float | None:
    """Return the mean share of a fact's pairs of wordings with the same answer (Elazar et al. 2021, "Measuring and
    Improving Consistency in Pretrained Language Models", section 3); None if no fact has two wordings."""
    shares = []
    for wordings in group_by_fact(answers).values():
        equal = [one.predicted == other.predicted for one, other in combinations(wordings, 2)]
        if equal:
            shares.append(sum(equal) / len(equal))
    return math.fsum(shares) / len(shares) if shares else None
