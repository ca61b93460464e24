"""A tensor where it lies: file, offset, dtype and shape. Its bytes are read only when asked for."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Bytes an element, by the safetensors name of the dtype.
DTYPE_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
FLOAT_DTYPES = ("F32", "F16", "BF16")


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in the same memory."""
    import torch

    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


@dataclass(frozen=True)
class StoredTensor:
    """A row-major tensor in a file (`dtype` by its safetensors name), or in `loaded` bytes where the file's form
    cannot be read in place (a PyTorch file of before 1.6, a tensor saved transposed)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    loaded: memoryview | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPE_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def rows(self, name: str, rows: range) -> StoredTensor:
        """Some consecutive rows of it, as a tensor of that name in the same place."""
        row = self.nbytes // self.shape[0]
        start, stop = rows.start * row, rows.stop * row
        loaded = None if self.loaded is None else self.loaded[start:stop]
        return replace(self, name=name, shape=(len(rows), *self.shape[1:]), offset=self.offset + start, loaded=loaded)

    def read_into(self, buffer: memoryview, start: int, descriptor: int | None) -> None:
        """Fill `buffer` (bytes) from byte `start` of the tensor; `descriptor` is its file, open for reading.

        Raises CheckpointError where the file ends before the buffer is full.
        """
        if self.loaded is not None:
            buffer[:] = self.loaded[start : start + len(buffer)]
            return
        assert descriptor is not None
        position, done = self.offset + start, 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], position + done)
            if count == 0:
                raise CheckpointError(f"{self.file} ended while {self.name} was read: it changed under the conversion.")
            done += count
