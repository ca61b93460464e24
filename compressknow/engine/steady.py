"""Float layers beside int8 ones: a row gets the same bits, whatever rows come with it.

Matrix products of few rows run in kernels that add in another order (with torch's MKL: fewer than 4 rows a thread), so
that a sum's last bit depends on the size of the batch. In a model of floats it stays a last bit. Where activations are
rounded to integers afterwards, it may move one to the next integer, and layers after that make much of it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

# Rows are filled up to a multiple of this: enough for each of 1 to 16 threads (AMD EPYC, AVX-512, torch 2.13).
ROWS = 4


class SteadyLinear(nn.Linear):
    """A Linear that takes [..., in] and gives [..., out], computed on a multiple of `ROWS` rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        filled = functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))
        return super().forward(filled)[: len(rows)].reshape(*x.shape[:-1], self.out_features)


def steady(model: nn.Module) -> None:
    """Make each plain Linear of a model such a layer, in place; its weights, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SteadyLinear
