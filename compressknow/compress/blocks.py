"""Threads that each process a tensor, with torch's own threads off, reading it in blocks of rows.

The size of blocks is fixed, so that sums over them do not depend on threads or memory. It fits a core's cache, where
the many passes of pruning and quantizing take a tenth of the time that they take over a whole tensor.
"""

from __future__ import annotations

import math
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.errors import CheckpointError
from compressknow.base.system import count_cores
from compressknow.compress.parameters import check_threads
from compressknow.model.tensors import DTYPE_SIZES, FLOAT_DTYPES, OpenFiles, StoredTensor, get_torch_dtype, view_bytes

BLOCK_ELEMENTS = 1 << 18
FLOATS = (*FLOAT_DTYPES, "F64", "F8_E4M3", "F8_E5M2")
# Dtypes that can be read, if only for a comparison.
READABLE = (*FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL")

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskStopped(Exception):
    """Exception that ends a task whose result is no longer needed."""


class Pool:
    """Thread pool whose first error stops the rest: long tasks call `check` between blocks.

    A signal handler may raise anywhere in the main thread. A lock written in Python would then stay locked, and threads
    that need it would hang (`concurrent.futures` does, once in some hundred interruptions). So the main thread uses
    only a queue written in C.

    `threads` is one per core by default. Raises UsageError if it is not at least 1.
    """

    def __init__(self, threads: int | None = None) -> None:
        check_threads(threads)
        self.threads = threads or count_cores()
        self._stopped = False
        self._torch_threads = torch.get_num_threads()
        self._started, self._ended = list[int](), list[bool]()
        self._wake: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        # A second signal may have ended the wait of `map`.
        self._stopped = True
        try:
            self._wait()
        finally:
            torch.set_num_threads(self._torch_threads)

    def map(self, task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]:
        """Return results in the order of `items`, in which tasks start, too. Raises the first error, after the running
        tasks have ended; then the pool can no longer be used."""
        self.check()
        jobs = list(items)
        numbered, results = enumerate(jobs), dict[int, Result]()
        errors = list[BaseException]()

        def work() -> None:
            try:
                torch.set_num_threads(1)
                for index, item in numbered:
                    self.check()
                    results[index] = task(item)
            except BaseException as error:
                errors.append(error)
                self._stopped = True
            self._ended.append(True)
            self._wake.put(None)

        threads = min(self.threads, len(jobs))
        try:
            # One call in C, which no signal can interrupt half-way.
            self._started.extend(map(start_new_thread, [work] * threads, [()] * threads))
            self._wait()
        except BaseException:
            self._stopped = True
            self._wait()
            raise
        if errors:
            raise errors[0]
        return [results[index] for index in range(len(jobs))]

    def _wait(self) -> None:
        while len(self._ended) < len(self._started):
            self._wake.get()

    def check(self) -> None:
        """Raise TaskStopped if another task has failed or the user has interrupted."""
        if self._stopped:
            raise TaskStopped


Progress = Callable[[int], None]


@dataclass(frozen=True)
class Reader:
    """Reader of tensors: its threads, open files, and the function to call with the number of bytes after each read."""

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
        """Yield a tensor (of a dtype in READABLE) block by block, or as one block if `whole`; only these `rows`,
        renumbered, if they are given. Blocks have as many rows as those of a tensor that is `columns` wide."""
        count, width = get_matrix_shape(tensor.shape)
        count = count if rows is None else len(rows)
        height = max(1, count if whole else min(count, BLOCK_ELEMENTS // max(columns or width, 1)))
        buffer = torch.empty(height, width, dtype=get_torch_dtype(tensor.dtype))
        raw, row_bytes = view_bytes(buffer), width * tensor.itemsize
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
    """Rows of a tensor seen as a matrix, from `first_row` on: `values` [rows, columns] in its dtype, in a buffer that
    the next block overwrites."""

    first_row: int
    values: torch.Tensor

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.values.shape[0])


def get_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a tensor as one matrix: columns are its last dimension, rows all others."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def view_bits(values: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    """View the bits of a block as integers, in the same memory; numpy is several times as fast with these."""
    return values.view(torch.int16 if values.itemsize == 2 else torch.int32).numpy()


def make_magnitude_keys(values: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    """Return non-negative integers that sort like the magnitudes of `values`, of the same shape."""
    bits = view_bits(values)
    keys: npt.NDArray[np.signedinteger] = bits & np.iinfo(bits.dtype).max
    return keys


def make_raw_keys(raw: memoryview, dtype: str) -> npt.NDArray[np.signedinteger]:
    """Return an integer per element of `raw` bytes of a safetensors dtype: 0 for zeros, and for negative zeros."""
    elements: npt.NDArray[np.signedinteger] = np.frombuffer(raw, f"i{DTYPE_SIZES[dtype]}")
    return elements & np.iinfo(elements.dtype).max if dtype in FLOATS else elements


def check_finite(largest_key: int, values_dtype: torch.dtype, tensor: StoredTensor) -> None:
    """Raise CheckpointError naming the tensor if its largest magnitude key is that of infinity or NaN."""
    # Without the sign, a float's bits sort like its magnitude, with NaN above infinity.
    infinity = int(make_magnitude_keys(torch.tensor([math.inf], dtype=values_dtype))[0])
    if largest_key >= infinity:
        what = "an infinity" if largest_key == infinity else "NaN"
        raise CheckpointError(
            f"{tensor.name} in {tensor.file.name} holds {what}.",
            why="The model is broken: its answers would be meaningless.",
            hint="Find an intact copy of the checkpoint, or repair the tensor.",
        )
