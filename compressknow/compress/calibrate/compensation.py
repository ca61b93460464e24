"""Weights settled column by column, each column's error made up for by those that follow.

What GPTQ (arXiv 2210.17323, algorithm 1) and SparseGPT (arXiv 2301.00774, algorithm 1) share: with U the upper factor
of the inverse of X^T X, what column i loses, over U_ii, times row i of U is taken off the columns after it. That brings
||X (W - W')^T|| down the most. Columns come in blocks, whose errors reach the rest of the matrix as one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# Both papers' blocks; and finer ones, in which a column's error reaches the rest of its block.
BLOCK, FINE = 128, 16
# Takes the number of a column and its values [rows], and gives what it is to be.
Settle = Callable[[int, torch.Tensor], torch.Tensor]


class Level(NamedTuple):
    """Blocks of `width` columns; `begin`, if any, gets the number of the first column of each and its values [columns,
    rows], when all errors before it have reached them."""

    width: int
    begin: Callable[[int, torch.Tensor], None] | None = None


def compensate(columns: torch.Tensor, factor: torch.Tensor, levels: Sequence[Level], settle: Settle) -> None:
    """Settle all columns in order.

    Parameters
    ----------
    columns : the weights, transposed: float32 [in, out], contiguous. They are overwritten by errors over U_ii.
    factor : U, float32 [in, in] (`compressknow.compress.calibrate.inverse`).
    levels : blocks, the widest first, each of which holds whole blocks of the next.
    settle : is called for each column in order.
    """
    _pass(columns, factor, [*levels, Level(1)], settle, 0)


def _pass(columns: torch.Tensor, factor: torch.Tensor, levels: Sequence[Level], settle: Settle, first: int) -> None:
    """Settle columns `first` and on; `factor` is the part of U that is theirs."""
    (width, begin), *finer = levels
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        block, corner = columns[start:stop], factor[start:stop, start:stop]
        if begin is not None:
            begin(first + start, block)
        if finer:
            _pass(block, corner, finer, settle, first + start)
        else:
            block.sub_(settle(first + start, block[0])).div_(corner)
        columns[stop:].addmm_(factor[start:stop, stop:].T, block, alpha=-1)
