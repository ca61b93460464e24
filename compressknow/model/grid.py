"""Whether a checkpoint's weights lie on a coarse grid already: unpacked from a file of few bits, for one.

Such a model is reproduced by the type that it was unpacked from, whatever its bits are worth elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from compressknow.model.tensors import FLOAT_DTYPES, OpenFiles, StoredTensor

# Neighbours in a row that share scales in all formats of few bits, and the values that 4 bits tell apart. Of 32 weights
# in bfloat16 that were not rounded, 31 differ.
GROUP, MOST_VALUES = 32, 16
# Of a group, what must not be zero: of few weights that were not pruned few values would say nothing.
FEWEST = 24
# Rows that are read of each matrix.
ROWS = 16


class Grid(NamedTuple):
    """How many matrices of how many lie on one: none of their groups of 32 has more different weights than `values`."""

    weights: int
    of: int
    values: int


def grid_of(tensors: Iterable[StoredTensor]) -> Grid | None:
    """Return how many stored matrices lie on a grid; None where none does. Some rows of each are read."""
    matrices = [each for each in tensors if each.dtype in FLOAT_DTYPES and len(each.shape) == 2]
    with OpenFiles() as files:
        counts = [_most_values(files, each) for each in matrices if each.shape[1] % GROUP == 0]
    found = [count for count in counts if count is not None and count <= MOST_VALUES]
    return Grid(len(found), len(counts), max(found)) if found else None


def _most_values(files: OpenFiles, tensor: StoredTensor) -> int | None:
    """The most different weights in any group of some rows; None where all groups are mostly zeros."""
    rows, columns = tensor.shape
    width = columns * tensor.itemsize
    content = bytearray(width)
    most = None
    for row in range(0, rows, max(1, rows // ROWS)):
        files.read_into(tensor, memoryview(content), row * width)
        # Values are told apart by their bits; the sign of a zero is none.
        bits = np.sort(np.frombuffer(content, f"u{tensor.itemsize}").reshape(-1, GROUP), axis=1)
        told = bits[(bits << 1 != 0).sum(axis=1) >= FEWEST]
        if len(told):
            most = max(most or 0, int((np.diff(told, axis=1) != 0).sum(axis=1).max()) + 1)
    return most
