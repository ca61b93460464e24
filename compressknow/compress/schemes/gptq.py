"""GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1) onto the grid of a scheme, with scales that stay as given.

Columns are rounded one by one, and those that follow make up for the error. Columns whose inputs have the largest
squares come first, while most others are left to make up for them; each keeps the scale of its own group.
"""

from __future__ import annotations

import torch

from compressknow.compress.calibrate.compensation import BLOCK, FINE, Level, compensate, get_inverse
from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.compress.schemes import Scheme, nearest


def gptq(
    values: torch.Tensor,
    scales: torch.Tensor,
    scheme: Scheme,
    inputs: InputStatistics,
    fixed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round weights [out, in] to codes of a scheme's grid, of the same shape; the weights are left as they are.

    Rows do not depend on each other: a block of them gives what all would.

    Parameters
    ----------
    values : float32, or of 16 bits; the work is done in float32.
    scales : of the rows given: [out, 1], [1] or [out, groups].
    inputs : with products.
    fixed : bool [out, in], weights that were pruned: they stay zero, and other columns make up for their error too.

    Raises CompressknowError naming the layer where X^T X cannot be inverted.
    """
    factor, order = get_inverse(inputs, by_activation=True)
    columns = values.to(torch.float32).T[order]
    codes: list[torch.Tensor] = []
    zero = None if fixed is None else fixed.T[order]
    group_scales = scales.to(torch.float32).reshape(-1, scales.shape[-1]).T.contiguous()
    groups = (order * len(group_scales) // len(columns)).tolist()

    def settle(column: int, current: torch.Tensor) -> torch.Tensor:
        scale = group_scales[groups[column]][:, None]
        current = current if zero is None else current.masked_fill(zero[column], 0)
        codes.append(nearest(current[:, None], scale, scheme)[:, 0])
        return scheme.dequantize(codes[-1][:, None], scale)[:, 0]

    compensate(columns, factor, [Level(BLOCK), Level(FINE)], settle)
    return torch.stack([codes[place] for place in order.argsort().tolist()], 1)
