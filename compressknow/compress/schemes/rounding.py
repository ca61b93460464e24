"""From weights to the codes of a scheme's grid, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compressknow.compress.schemes import Scheme

# Takes the weights of a block [rows, columns], their scales, and the scheme whose grid they are to lie on; gives its
# codes, of the same shape. The block is left as it is.
Rounding = Callable[[torch.Tensor, torch.Tensor, Scheme], torch.Tensor]


def nearest(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Each weight to the value of the grid that is nearest to it in units of its scale, ties to even."""
    return scheme.round(scheme.steps(values, scales))


def per_column(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales that broadcast over [rows, columns], of those that neighbouring columns may share [rows, groups]."""
    groups = scales.shape[-1]
    return scales if groups == 1 else scales.repeat_interleave(columns // groups, dim=-1)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 values of codes and scales that broadcast over them."""
    return codes.to(torch.float32).mul_(scales.to(torch.float32))
