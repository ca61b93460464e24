"""GPTQ: round column by column, and let the columns that follow make up for the error (Frantar et al. 2022, arXiv
2210.17323, algorithm 1), with scales that are given and stay as they are.

Columns whose inputs have the largest squares are rounded first, while most others are left to make up for them. As the
scales do not depend on that order, each column keeps the scale of its own group.
"""

from __future__ import annotations

import torch

from compressknow.compress.calibrate.compensation import BLOCK, FINE, Level, compensate, inverse_of
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.schemes import Scheme
from compressknow.compress.schemes.rounding import nearest


def gptq(
    values: torch.Tensor,
    scales: torch.Tensor,
    scheme: Scheme,
    inputs: InputStatistics,
    fixed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights [out, in] to codes of a scheme's grid, of the same shape.

    Rows do not depend on each other: a block of them gives what all would. The weights are left as they are.

    Parameters
    ----------
    values : float32, or of 16 bits; the work is done in float32.
    scales : of the rows given: [out, 1], [1] or [out, groups].
    inputs : with products.
    fixed : bool [out, in], weights that were pruned: they stay zero, and their part of the error is made up for too.

    Raises CompressknowError naming the layer where X^T X cannot be inverted.
    """
    inverse = inverse_of(inputs, by_activation=True)
    assert inverse.order is not None
    columns = values.to(torch.float32).T[inverse.order]
    codes: list[torch.Tensor] = []
    zero = None if fixed is None else fixed.T[inverse.order]
    of_groups = scales.to(torch.float32).reshape(-1, scales.shape[-1]).T.contiguous()
    groups = (inverse.order * len(of_groups) // len(columns)).tolist()

    def settle(column: int, found: torch.Tensor) -> torch.Tensor:
        scale = of_groups[groups[column]][:, None]
        kept = found if zero is None else found.masked_fill(zero[column], 0)
        codes.append(nearest(kept[:, None], scale, scheme)[:, 0])
        return scheme.dequantize(codes[-1][:, None], scale)[:, 0]

    compensate(columns, inverse.factor, [Level(BLOCK), Level(FINE)], settle)
    return torch.stack([codes[place] for place in inverse.order.argsort().tolist()], 1)
