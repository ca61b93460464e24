"""Compare two models on one text, token by token: perplexity, divergence, and where greedy continuations differ.

Definitions and standard errors follow llama.cpp's perplexity tool (tools/perplexity/perplexity.cpp, function
`kl_divergence`), so that figures are comparable: a mean's error is sqrt((E[x^2] - E[x]^2) / (n - 1)), a perplexity's
error is that of the mean negative log-likelihood times the perplexity, and the two models' covariance is subtracted
from the error of their ratio. Tokens of a text are correlated, so true errors are somewhat larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compressknow.comparison.distributions import compute_percentiles
from compressknow.comparison.records import GreedyDivergence, Measurement, Perplexity, TextChange, TextFigures
from compressknow.evaluate.records import OTHER_TOKENS, Chunk

# Percentiles as in llama.cpp's output, by their names in report.json.
PERCENTILES = {
    **{"min": 0.0, "p0_1": 0.1, "p1": 1.0, "p5": 5.0, "p10": 10.0, "p50": 50.0},
    **{"p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0},
}


def compute_perplexity(chunks: Sequence[Chunk]) -> Perplexity:
    """Compute the perplexity of one model."""
    nll = _join(chunks, "logp") * -1
    mean = measure_mean(nll)
    value = math.inf if mean.value >= 700 else math.exp(mean.value)
    per_byte = None
    # All chunks have a length, or none does.
    if total := sum(chunk.bytes or 0 for chunk in chunks):
        scale = len(nll) / total / math.log(2)
        per_byte = Measurement(mean.value * scale, mean.error * scale)
    return Perplexity(Measurement(value, value * mean.error), len(nll), per_byte)


def has_same_tokens(original: Sequence[Chunk], compressed: Sequence[Chunk]) -> bool:
    """Return whether both models were scored on the same tokens."""
    return [chunk.number for chunk in original] == [chunk.number for chunk in compressed] and all(
        np.array_equal(one.ids, other.ids) for one, other in zip(original, compressed, strict=True)
    )


def compare_tokens(original: Sequence[Chunk], compressed: Sequence[Chunk]) -> TextChange:
    """Compare one model with the other, over the same tokens."""
    before, after = (_join(chunks, "logp") for chunks in (original, compressed))
    kl = np.concatenate([chunk.kl for chunk in compressed if chunk.kl is not None] or [np.array([])])
    is_complete = len(kl) == len(after)
    change = np.exp(after) - np.exp(before)
    # The error of the mean of paired differences, which includes the covariance.
    log_ratio = measure_mean(before - after)
    ratio = math.inf if log_ratio.value >= 700 else math.exp(log_ratio.value)
    one, other = compute_perplexity(original).value, compute_perplexity(compressed).value
    covariance = float(np.mean((before - before.mean()) * (after - after.mean())))
    spread = float(np.std(before) * np.std(after))
    mean_covariance = covariance / max(len(before) - 1, 1) if len(before) > 10 else 0.0
    squared_error = one.error**2 + other.error**2 - 2 * one.value * other.value * mean_covariance
    squares = measure_mean(change**2)
    same_top = np.concatenate([a.top == b.top for a, b in zip(original, compressed, strict=True)])
    share = float(same_top.mean())
    rms = math.sqrt(squares.value)
    return TextChange(
        ratio=Measurement(ratio, ratio * log_ratio.error),
        log_ratio=log_ratio,
        difference=Measurement(other.value - one.value, math.sqrt(squared_error) if squared_error > 0 else 0.0),
        correlation=covariance / spread if spread > 0 else None,
        kl=measure_mean(kl) if is_complete else None,
        kl_percentiles=compute_percentiles(kl, PERCENTILES) if is_complete else None,
        same_top=Measurement(share, math.sqrt(share * (1 - share) / (len(same_top) - 1)) if len(same_top) > 1 else 0.0),
        change=measure_mean(change),
        change_rms=Measurement(rms, squares.error / (2 * rms) if rms else 0.0),
        change_percentiles=compute_percentiles(change, PERCENTILES),
        divergent=_compare_greedy(original, compressed),
    )


def compare_text(
    text: str, context: int, divergence: str, original: Sequence[Chunk], compressed: Sequence[Chunk]
) -> TextFigures:
    """Return all figures of one text, the first model taken as the original; see `TextFigures`."""
    same_tokens = divergence != OTHER_TOKENS and has_same_tokens(original, compressed)
    return TextFigures(
        text=text,
        context=context,
        chunks=len(original),
        divergence=divergence if same_tokens else OTHER_TOKENS,
        original=compute_perplexity(original),
        compressed=compute_perplexity(compressed),
        moved=compare_tokens(original, compressed) if same_tokens else None,
    )


def measure_mean(values: np.ndarray) -> Measurement:
    """Return mean and standard error, as llama.cpp's `mean_and_uncertainty` does: 0 for ten values or fewer.

    >>> measure_mean(np.arange(11.0))
    Measurement(value=5.0, error=1.0)
    """
    variance = float(np.var(values))
    error = math.sqrt(variance / (len(values) - 1)) if variance > 0 and len(values) > 10 else 0.0
    return Measurement(float(np.mean(values)), error)


def _compare_greedy(original: Sequence[Chunk], compressed: Sequence[Chunk]) -> GreedyDivergence | None:
    pairs = [(one.greedy, other.greedy) for one, other in zip(original, compressed, strict=True)]
    pairs = [pair for pair in pairs if len(pair[0]) and len(pair[0]) == len(pair[1])]
    if not pairs:
        return None
    differences = [np.flatnonzero(one != other) for one, other in pairs]
    first = sorted(int(positions[0]) + 1 for positions in differences if len(positions))
    return GreedyDivergence(len(pairs), max(len(one) for one, _ in pairs), len(pairs) - len(first), tuple(first))


def _join(chunks: Sequence[Chunk], name: str) -> np.ndarray:
    return np.concatenate([getattr(chunk, name) for chunk in chunks]).astype(np.float64)
