"""Reading stored tensors in pieces, so that no tensor need be in memory whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from compressknow.model.tensors import StoredTensor


class OpenFiles:
    """Descriptors of the files being read, opened once each; safe to share between threads (reads give offsets)."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_into(self, tensor: StoredTensor, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        tensor.read_into(buffer, start, None if tensor.loaded is not None else self.descriptor(tensor.file))

    def chunks(self, tensor: StoredTensor, size: int) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most `size`, each valid until the next is asked for."""
        buffer = memoryview(bytearray(min(size, tensor.nbytes)))
        for start in range(0, tensor.nbytes, size):
            piece = buffer[: min(size, tensor.nbytes - start)]
            self.read_into(tensor, piece, start)
            yield piece

    def descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            # Two threads may open the same file at once; the first to register it wins.
            if (kept := self._descriptors.setdefault(file, opened)) != opened:
                os.close(opened)
            return kept
        return self._descriptors[file]
