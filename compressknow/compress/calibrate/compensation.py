"""Compensation of errors by later columns, which GPTQ and SparseGPT share, and GPTQ for the grid of a scheme.

In GPTQ (arXiv 2210.17323, algorithm 1) and SparseGPT (arXiv 2301.00774, algorithm 1), with U the upper factor of the
inverse of X^T X, the error of column i divided by U_ii, times row i of U, is subtracted from the columns after it. This
minimizes ||X (W - W')^T||. Columns come in blocks, whose errors reach the rest of the matrix as one product.

GPTQ does not change the scales it is given; those of groups are fitted before (`fit_scales`). Columns whose inputs have
the largest squares come first, when most others can still compensate for them; each keeps the scale of its own group.

A layer's inputs come from layers that are already rounded. It compensates for part of their errors (GPTAQ, Li et al.
2025, arXiv 2504.02692): the text also runs through the original, and the layer's weights move towards those that would
give the original's outputs for the present inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compressknow.base.errors import CompressknowError
from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.compress.schemes import Scheme, round_to_nearest

# Shares of the mean of H's diagonal that are added to it, until it can be inverted (GPTQ, section 3.3: 1 %).
DAMPINGS = (0.01, 0.1)
# Smaller triangles are inverted at once.
TRIANGLE = 256


def factor_inverse(inputs: InputStatistics, order: torch.Tensor) -> torch.Tensor:
    """Return U, upper triangular, float32 [in, in], with (H + damping)^-1 = U^T U for the products H of the inputs, its
    rows and columns in this `order` (int64 [in]).

    Row i of U is the first row of the inverse of H without channels 0 to i - 1, divided by the root of its diagonal
    element (GPTQ, arXiv 2210.17323, section 3.3, step 3). Raises CompressknowError naming the layer if H cannot be
    inverted with any of `DAMPINGS`.
    """
    assert inputs.products is not None
    backwards = order.flip(0)
    for share in DAMPINGS:
        # In reversed order: with J H J = L L^T, J L^-1 J is the upper factor of H's inverse. This takes only one
        # decomposition; computing the inverse first would take two, and square the condition number.
        damped = inputs.products[backwards[:, None], backwards]
        damped.diagonal().add_(share * damped.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            _invert_in_place(lower)
            upper: torch.Tensor = lower.flip(0, 1)
            return upper
    raise CompressknowError(
        f"The statistics of the inputs of {inputs.name} cannot be inverted.",
        why=f"On {inputs.tokens:,} tokens of the calibration text, its inputs are all zero, or too large for float32.",
        hint="Use another or a longer calibration text, or leave the layer out with --exclude.",
    )


def get_inverse(inputs: InputStatistics, *, by_activation: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor of `factor_inverse`, and the order of its channels, int64 [in]; cached in the statistics.

    `by_activation` sorts channels by their squares, largest first (GPTQ's "activation order"), ties in their order.
    """
    with inputs.lock:
        if by_activation not in inputs.inverses:
            largest_first = torch.argsort(inputs.squares, descending=True, stable=True)
            order = largest_first if by_activation else torch.arange(len(largest_first))
            inputs.inverses[by_activation] = factor_inverse(inputs, order), order
        return inputs.inverses[by_activation]


def _invert_in_place(lower: torch.Tensor) -> None:
    """Invert a lower triangle in place, by halves, because products are faster than solving for all columns."""
    if len(lower) <= TRIANGLE:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False))
        return
    half = len(lower) // 2
    above, below, left = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_in_place(above)
    _invert_in_place(below)
    left.copy_(below @ (left @ above)).neg_()


# How far weights move towards full compensation, which would overfit the text: GPTAQ's own share, and less if the text
# has fewer tokens per channel than this.
_SHARE, _ENOUGH = 0.25, 4


def find_moves(
    weight: torch.Tensor, inputs: InputStatistics, factor: torch.Tensor, order: torch.Tensor
) -> torch.Tensor | None:
    """Return moves M, float32 [in, out], that bring the outputs of weights W [out, in] for the inputs X closer to those
    for the original's Y: by least squares, W^T + U^T M, in this order, is W + share W (Y - X)^T X (X^T X)^-1.

    None if the inputs have no drift. `factor` is U, the factor for X^T X in this order.
    """
    if inputs.drift is None:
        return None
    share = _SHARE * min(inputs.tokens / (_ENOUGH * len(order)), 1)
    return (factor @ (weight.to(torch.float32) @ inputs.drift)[:, order].T).mul_(share)


# Block size of both papers, and a finer one within these blocks.
BLOCK, FINE = 128, 16
# Takes the number of a column and its values [rows], and returns its final values.
Settle = Callable[[int, torch.Tensor], torch.Tensor]


# Width of blocks, and a function called with the number of the first column of each block and its values [columns,
# rows], after the errors of all columns before it were applied.
Level = tuple[int, Callable[[int, torch.Tensor], None] | None]


def compensate(
    columns: torch.Tensor, factor: torch.Tensor, levels: Sequence[Level], settle: Settle, first: int = 0
) -> None:
    """Set the final values of all columns in order, and compensate for their errors in later columns.

    Parameters
    ----------
    columns : the weights, transposed: float32 [in, out], contiguous. They are overwritten by errors divided by U_ii.
    factor : U, float32 [in, in], see `factor_inverse`.
    levels : blocks, the widest first, each made of whole blocks of the next; without any, single columns.
    settle : called for each column in order; they are numbered from `first` on.
    """
    width, begin = levels[0] if levels else (1, None)
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        block, corner = columns[start:stop], factor[start:stop, start:stop]
        if begin is not None:
            begin(first + start, block)
        if levels:
            compensate(block, corner, levels[1:], settle, first + start)
        else:
            block.sub_(settle(first + start, block[0])).div_(corner)
        columns[stop:].addmm_(factor[start:stop, stop:].T, block, alpha=-1)


# Multiples of the scales of the largest magnitudes: smaller scales round most weights better, but clip the largest. If
# all are equally good, the first is used.
_SHARES = tuple(percent / 100 for percent in (100, 108, 104, *range(96, 56, -4)))
# Number of weights processed at a time, which fit a core's cache.
_CHUNK = 1 << 18


def fit_scales(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme, inputs: InputStatistics) -> torch.Tensor:
    """Return the scales of groups of weights [out, in] with which rounding to nearest changes outputs least, [out,
    groups] in the dtype of `scales`, of which they are 60 to 108 %.

    For independent inputs, the squared error of a layer's outputs is the sum of the squared errors of its weights, each
    times the mean square of its input. This is a good criterion for GPTQ too, although it compensates for errors.
    """
    rows = max(_CHUNK // values.shape[1], 1)
    importance = (inputs.squares / max(inputs.tokens, 1)).reshape(scales.shape[1], -1)
    fitted = []
    for chunk, full in zip(torch.split(values, rows), torch.split(scales, rows), strict=True):
        best, least = full, torch.full(full.shape, torch.inf)
        for share in _SHARES:
            trial = full * share
            codes = round_to_nearest(chunk, trial, scheme)
            errors = scheme.dequantize(codes, trial).sub_(chunk.to(torch.float32)).square_()
            error = (errors.view(*full.shape, -1) * importance).sum(-1)
            best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
        fitted.append(best)
    return torch.cat(fitted)


def round_by_gptq(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme, inputs: InputStatistics) -> torch.Tensor:
    """Round weights [out, in] to codes of a scheme's grid, of the same shape, without changing the weights.

    Zeros were pruned, by this recipe or in the source. They stay zero, so that a pattern is preserved, and other
    columns compensate for their errors too. Rows do not depend on each other, so they can be rounded in blocks.

    Parameters
    ----------
    values : float32, or 16-bit floats; the computation is in float32.
    scales : those of these rows: [out, 1], [1] or [out, groups].
    inputs : statistics with products.

    Raises CompressknowError naming the layer if X^T X cannot be inverted.
    """
    factor, order = get_inverse(inputs, by_activation=True)
    columns, moves = values.to(torch.float32).T[order].contiguous(), find_moves(values, inputs, factor, order)
    if moves is not None:
        moves.mul_(factor.diagonal()[:, None])
    codes: list[torch.Tensor] = []
    zero = columns == 0
    group_scales = scales.to(torch.float32).reshape(-1, scales.shape[-1]).T.contiguous()
    groups = (order * len(group_scales) // len(columns)).tolist()

    def settle(column: int, current: torch.Tensor) -> torch.Tensor:
        scale = group_scales[groups[column]][:, None]
        # The error is that of the unmoved column, which gives later columns their part of the move.
        current = current if moves is None else current + moves[column]
        current = current.masked_fill(zero[column], 0)
        codes.append(round_to_nearest(current[:, None], scale, scheme)[:, 0])
        return scheme.dequantize(codes[-1][:, None], scale)[:, 0]

    compensate(columns, factor, [(BLOCK, None), (FINE, None)], settle)
    return torch.stack([codes[index] for index in order.argsort().tolist()], 1)
