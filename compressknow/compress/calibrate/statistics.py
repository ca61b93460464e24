"""Statistics of the inputs of one Linear, which calibration gathers, and pruning and rounding read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Statistics of the inputs X [tokens, in] of one Linear on the calibration text.

    Linears that read the same tensor share one: do not change it.

    Attributes
    ----------
    name : of the module, for errors.
    tokens : rows of X.
    squares : float32 [in], the sum of x^2 over rows: the diagonal of `products`.
    peaks : float32 [in], the largest magnitudes; None if nothing needs them.
    products : float32 [in, in], X^T X; None if nothing needs them.
    """

    name: str
    tokens: int
    squares: torch.Tensor
    peaks: torch.Tensor | None = None
    products: torch.Tensor | None = None
