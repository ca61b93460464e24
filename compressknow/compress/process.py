"""The inner loop: one tensor from its source file to its output file, block by block, measured on the way."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from compressknow.compress.blocks import (
    FLOATS,
    Block,
    Progress,
    Reader,
    bits_of,
    check_finite,
    magnitude_keys,
    raw_keys,
)
from compressknow.compress.layout import Layout
from compressknow.compress.plan import PlannedTensor
from compressknow.compress.pool import Pool
from compressknow.compress.prune import BlockMask, BoolArray, Mask
from compressknow.compress.quantize import dequantize, per_channel, quantize, scales_of
from compressknow.compress.recipe import Scheme
from compressknow.files import new_file, write_at
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor, byte_view, torch_dtype
from compressknow.reading import open_regular

COPY_BYTES = 1 << 20
FLUSH_SECONDS = 0.1
# Below it float32 loses digits of the squares it is a sum of.
SMALLEST_ENERGY = 1e-24


@dataclass(frozen=True)
class Measured:
    """What was found and done in one tensor.

    `norm` is ||original|| (Frobenius; 0 of a tensor that holds no floats), `relative_error` ||written - original|| /
    ||original||, the written weights dequantized; `sha256` is that of the written bytes, `scale_sha256` that of its
    scales where it has any.
    """

    zeros_before: int
    zeros: int
    pruned: int
    norm: float
    relative_error: float
    sha256: str
    scale_sha256: str | None = None


class OutputFiles:
    """The weight files of an output, made at their full size before any work: a full disk shows at once."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._layout = layout
        self._descriptors: dict[str, int] = {}
        try:
            for name in layout.sizes:
                self._create(folder, name)
        except BaseException:
            self._close_files()
            raise
        self._complete = threading.Event()
        self._flush_error: OSError | None = None
        self._flusher = threading.Thread(target=self._flush, daemon=True)
        self._flusher.start()

    def _create(self, folder: Path, name: str) -> None:
        descriptor = self._descriptors[name] = new_file(folder / name, self._layout.sizes[name])
        write_at(descriptor, memoryview(self._layout.headers[name]), 0)

    def _flush(self) -> None:
        """Send to the disk what is written while the rest is computed, instead of waiting for it all at the end."""
        try:
            while not self._complete.wait(FLUSH_SECONDS):
                for descriptor in self._descriptors.values():
                    os.fsync(descriptor)
        except OSError as error:
            # Linux tells a descriptor of a failed write once: a later fsync would succeed.
            self._flush_error = error

    def writer(self, tensor_name: str) -> TensorWriter:
        place = self._layout.places[tensor_name]
        return TensorWriter(partial(write_at, self._descriptors[place.file]), place.offset)

    def sync(self, pool: Pool) -> None:
        """Wait until all that was written would survive a power cut."""
        self._complete.set()
        self._flusher.join()
        if self._flush_error is not None:
            raise self._flush_error
        pool.map(os.fsync, self._descriptors.values())

    def close(self) -> None:
        """Close the files, complete or not."""
        self._complete.set()
        self._flusher.join()
        self._close_files()

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


class TensorWriter:
    """Puts a tensor's bytes, in order, from `offset` on, hashing them."""

    def __init__(self, put: Callable[[memoryview, int], None], offset: int) -> None:
        self._put, self._position = put, offset
        self._digest = hashlib.sha256()

    def write(self, values: torch.Tensor) -> None:
        self.write_bytes(byte_view(values.contiguous()))

    def write_bytes(self, data: memoryview) -> None:
        self._digest.update(data)
        self._put(data, self._position)
        self._position += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class Output(Protocol):
    """Where the tensors of a conversion go."""

    def writer(self, tensor_name: str) -> TensorWriter: ...


@dataclass(frozen=True)
class Work(Reader):
    """A reader that writes what it makes of a tensor into the output."""

    output: Output

    def write(self, planned: PlannedTensor, mask: Mask | None) -> Measured:
        """Write one tensor of the output. Raises CheckpointError where a weight is NaN or infinite."""
        if planned.in_scope:
            return self._compress(planned, mask)
        return self._copy(planned)

    def _compress(self, planned: PlannedTensor, mask: Mask | None) -> Measured:
        source, tally = planned.source, _Tally()
        whole_scale = self._tensor_scale(planned, mask)
        block_mask = mask.start() if mask else None
        writer, scales = self.output.writer(planned.name), []
        for block in self.blocks(source):
            absmax = tally.prune(block, block_mask, source)
            if planned.scheme is None:
                writer.write(tally.keep(block.values))
            else:
                scale = scales_of(absmax, planned.scheme) if whole_scale is None else whole_scale
                scales.append(scale)
                writer.write(tally.quantize(block.values, scale, planned.scheme))
        scale_sha256 = None
        if planned.scheme is not None:
            scale = torch.cat(scales) if whole_scale is None else whole_scale
            for name in planned.scale_names:
                scale_writer = self.output.writer(name)
                scale_writer.write(scale)
                scale_sha256 = scale_writer.sha256
        return tally.measured(writer.sha256, scale_sha256)

    def _tensor_scale(self, planned: PlannedTensor, mask: Mask | None) -> torch.Tensor | None:
        """The one scale [1] of a tensor whose scheme has one, which takes a pass of its own."""
        if planned.scheme is None or per_channel(planned.scheme):
            return None
        block_mask, largest = mask.start() if mask else None, torch.zeros(1, dtype=torch_dtype(planned.source.dtype))
        for block in self.blocks(planned.source):
            largest = torch.maximum(largest, _Tally().prune(block, block_mask, planned.source).max())
        return scales_of(largest, planned.scheme)

    def _copy(self, planned: PlannedTensor) -> Measured:
        source, writer, zeros, energy = planned.source, self.output.writer(planned.name), 0, 0.0
        for piece in self.files.chunks(source, COPY_BYTES):
            self.pool.check()
            keys = raw_keys(piece, source.dtype)
            zeros += keys.size - int(np.count_nonzero(keys))
            if planned.weight and source.dtype in FLOAT_DTYPES:
                check_finite(int(keys.max(initial=0)), torch_dtype(source.dtype), source)
            if source.dtype in FLOATS and piece:
                energy += _energy(torch.frombuffer(piece, dtype=torch_dtype(source.dtype))[None])
            writer.write_bytes(piece)
            self.progress(len(piece))
        # A mask that is kept beside the weights may hold infinities.
        norm = math.sqrt(energy) if math.isfinite(energy) else 0.0
        return Measured(zeros, zeros, 0, norm, 0.0, writer.sha256)


class _Tally:
    """Counts and energies (sums of squares) of a tensor, added up over its blocks in their order."""

    def __init__(self) -> None:
        self.zeros_before = self.zeros = self.pruned = 0
        self.energy = self.error_energy = 0.0

    def prune(self, block: Block, mask: BlockMask | None, source: StoredTensor) -> torch.Tensor:
        """Zero a block's pruned weights in place; its rows' largest magnitudes [rows, 1] after that."""
        values = block.values
        keys = magnitude_keys(values)
        largest = keys.max(axis=1, initial=0)
        check_finite(int(largest.max(initial=0)), values.dtype, source)
        self.zeros_before += keys.size - int(np.count_nonzero(keys))
        self.energy += _energy(values)
        if mask is not None:
            pruned = mask(block)
            self.pruned += int(np.count_nonzero(pruned))
            # Summed by itself: what the energy falls by is lost in its rounding where little is pruned.
            self.error_energy += _energy(_take(values, pruned))
            largest = magnitude_keys(values).max(axis=1, initial=0)
        return torch.from_numpy(largest).view(values.dtype)[:, None]

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        self.zeros += values.numel() - int(np.count_nonzero(magnitude_keys(values)))
        return values

    def quantize(self, values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        quantized = quantize(values, scales, scheme)
        self.zeros += quantized.numel() - int(np.count_nonzero(quantized.numpy()))
        error = _energy(dequantize(quantized, scales).sub_(values.to(torch.float32)))
        if math.isinf(error):
            # Of a weight near the largest float, the nearest int8 step may lie beyond it.
            exact = quantized.to(torch.float64) * scales.to(torch.float64) - values.to(torch.float64)
            error = float(exact.square_().sum())
        self.error_energy += error
        return quantized

    def measured(self, sha256: str, scale_sha256: str | None) -> Measured:
        error = math.sqrt(self.error_energy / self.energy) if self.energy else 0.0
        norm = math.sqrt(self.energy)
        return Measured(self.zeros_before, self.zeros, self.pruned, norm, error, sha256, scale_sha256)


def _take(values: torch.Tensor, pruned: BoolArray) -> torch.Tensor:
    """Zero the pruned weights of a block; a copy that holds only them."""
    # As a product with the inverted mask, on bits: a masked copy of so irregular a mask takes ten times as long.
    bits = bits_of(values)
    taken = bits.copy()
    np.bitwise_and(bits, (pruned.view(np.int8) - np.int8(1)).astype(bits.dtype), out=bits)
    np.bitwise_xor(taken, bits, out=taken)
    return torch.from_numpy(taken).view(values.dtype)


def _energy(values: torch.Tensor) -> float:
    """The sum of squares of a block [rows, columns]."""
    energy = float(torch.linalg.vector_norm(values.to(torch.float32), dim=1).to(torch.float64).square_().sum())
    in_range = SMALLEST_ENERGY < energy < math.inf
    return energy if in_range else float(values.to(torch.float64).square_().sum())


def hash_file(pool: Pool, path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(COPY_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            pool.check()
            digest.update(buffer[:count])
            if progress:
                progress(count)
    return digest.hexdigest()
