"""Blocks of rows of a stored tensor, small, and read one at a time into one buffer.

The block size is fixed, so that sums over blocks do not depend on threads or memory; it fits a core's caches, where
the many passes of pruning and quantizing cost a tenth of what they cost over a whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.errors import CheckpointError
from compressknow.compress.pool import Pool
from compressknow.model.tensors import DTYPE_SIZES, FLOAT_DTYPES, OpenFiles, StoredTensor, byte_view, torch_dtype

BLOCK_ELEMENTS = 1 << 18
FLOATS = (*FLOAT_DTYPES, "F64", "F8_E4M3", "F8_E5M2")
# What is read, be it only for a comparison.
READABLE = (*FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL")
# An element as an integer, and its bits without a float's sign.
INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class BitLayout(NamedTuple):
    """Bits of a float as an integer: without the sign they order as the magnitudes do, infinity and NaN last."""

    integer: torch.dtype
    bits: int
    infinity: int


BIT_LAYOUTS = {
    torch.float32: BitLayout(torch.int32, 31, 0x7F800000),
    torch.bfloat16: BitLayout(torch.int16, 15, 0x7F80),
    torch.float16: BitLayout(torch.int16, 15, 0x7C00),
}


Progress = Callable[[int], None]


@dataclass(frozen=True)
class Reader:
    """Reader of tensors: its threads, open files, and what is called with the number of bytes after each read."""

    pool: Pool
    files: OpenFiles
    progress: Progress

    def blocks(
        self,
        tensor: StoredTensor,
        *,
        whole: bool = False,
        columns: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[Block]:
        """Yield the blocks of a tensor (of a dtype in READABLE), in order, or all of it as one; ends with Stopped where
        the pool was stopped.

        Parameters
        ----------
        columns : blocks have as many rows as those of a tensor that is so wide.
        rows : those of its rows alone, numbered anew.
        """
        count, width = matrix_shape(tensor.shape)
        count = count if rows is None else len(rows)
        height = max(1, count if whole else min(count, BLOCK_ELEMENTS // max(columns or width, 1)))
        buffer = torch.empty(height, width, dtype=torch_dtype(tensor.dtype))
        raw, row_bytes = byte_view(buffer), width * tensor.itemsize
        for first in range(0, count, height):
            last = min(first + height, count)
            if rows is None:
                self.files.read_into(tensor, raw[: (last - first) * row_bytes], first * row_bytes)
            for i, row in enumerate(rows[first:last] if rows else ()):
                self.files.read_into(tensor, raw[i * row_bytes : (i + 1) * row_bytes], row * row_bytes)
            block = Block(first, buffer[: last - first])
            self.pool.check()
            yield block
            self.progress(block.values.nbytes)


@dataclass(frozen=True)
class Block:
    """Rows `first_row` and on of a tensor seen as a matrix: `values` [rows, columns] in its own dtype, a view of a
    buffer that the next block overwrites."""

    first_row: int
    values: torch.Tensor

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.values.shape[0])


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a tensor as one matrix: columns are its last dimension, stacked matrices in turn."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def view_bits(values: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    """View the bits of a block as integers, in the same memory. (On integers and masks numpy is several times
    faster.)"""
    return values.view(BIT_LAYOUTS[values.dtype].integer).numpy()


def magnitude_keys(values: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    """Return non-negative integers that order as the magnitudes of `values` do, of the same shape."""
    bits = view_bits(values)
    keys: npt.NDArray[np.signedinteger] = bits & bits.dtype.type((1 << BIT_LAYOUTS[values.dtype].bits) - 1)
    return keys


def raw_keys(raw: memoryview, dtype: str) -> npt.NDArray[np.signedinteger]:
    """Return an integer per element of `raw` bytes in a safetensors dtype: 0 where the element is zero, of either
    sign."""
    size = DTYPE_SIZES[dtype]
    elements = np.frombuffer(raw, dtype=INTEGERS[size])
    return elements & INTEGERS[size]((1 << (8 * size - 1)) - 1) if dtype in FLOATS else elements


def check_finite(largest_key: int, values_dtype: torch.dtype, tensor: StoredTensor) -> None:
    """Raise CheckpointError naming the tensor where its largest magnitude key is infinity or NaN."""
    infinity = BIT_LAYOUTS[values_dtype].infinity
    if largest_key >= infinity:
        what = "an infinity" if largest_key == infinity else "NaN"
        raise CheckpointError(
            f"{tensor.name} in {tensor.file.name} holds {what}.",
            why="Scales and thresholds depend on its largest weight, so it cannot be compressed.",
            hint="Find a sound copy of the checkpoint, or repair the tensor.",
        )
