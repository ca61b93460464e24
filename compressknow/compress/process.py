"""Inner loop of a conversion: one tensor from its source file to its output, block by block, measured on the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.errors import CompressknowError
from compressknow.base.reading import open_regular
from compressknow.compress.blocks import (
    FLOATS,
    Block,
    Pool,
    Progress,
    Reader,
    check_finite,
    make_magnitude_keys,
    make_raw_keys,
    view_bits,
)
from compressknow.compress.pruning import METHODS, Mask, Pruned
from compressknow.compress.schemes import SCALE, SCHEMES, Rounding, Scheme, Stored, repeat_scales, round_to_nearest
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor, get_torch_dtype, view_bytes

if TYPE_CHECKING:
    from compressknow.compress.plan import PlannedTensor
    from compressknow.compress.weights import Values

COPY_BYTES = 1 << 20
# Below it float32 loses digits of the squares it is a sum of.
SMALLEST_ENERGY = 1e-24


@dataclass(frozen=True)
class Measured:
    """Counts and hashes of what was found and done in one tensor.

    `norm` is ||original|| (Frobenius; 0 of a tensor that holds no floats), `relative_error` ||written - original|| /
    ||original||, the written weights dequantized; `sha256` is that of the written values, `beside` those of its scales
    and what else its scheme stores, by suffix. `refilled` counts the zeros of the source that are none any more.
    """

    zeros_before: int
    zeros: int
    pruned: int
    norm: float
    relative_error: float
    sha256: str
    beside: Mapping[str, str] = field(default_factory=dict)
    refilled: int = 0


class TensorWriter:
    """Writer of a tensor's bytes, in order, from `offset` on, which hashes them."""

    def __init__(self, put: Callable[[memoryview, int], None], offset: int) -> None:
        self._put, self._position = put, offset
        self._digest = hashlib.sha256()

    def write(self, values: torch.Tensor) -> None:
        self.write_bytes(view_bytes(values.contiguous()))

    def write_bytes(self, data: memoryview) -> None:
        self._digest.update(data)
        self._put(data, self._position)
        self._position += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Work(Reader):
    """Reader that writes what it makes of a tensor into the output, where `writer` opens its place, by its name.
    `unfitted` is, by the name of a source that was fitted anew, what it was before: its error is measured from there.
    """

    writer: Callable[[str], TensorWriter]
    unfitted: Mapping[str, Values] = field(default_factory=dict)

    def write(
        self,
        planned: PlannedTensor,
        mask: Mask | None,
        *,
        whole: bool = False,
        rounding: Rounding = round_to_nearest,
        fit: Callable[[torch.Tensor, torch.Tensor, Scheme], torch.Tensor] | None = None,
        factors: torch.Tensor | None = None,
        see: Callable[[slice, torch.Tensor], object] | None = None,
    ) -> Measured:
        """Write one tensor of the output.

        Parameters
        ----------
        whole : as one block: what is done to a row needs what was learned of all, or takes long to begin.
        rounding : to the grid of its scheme.
        fit : gives the scales of groups [rows, groups] in place of those that their largest magnitudes give.
        factors : what its input channels [columns] are multiplied with before they are rounded.
        see : called with the rows of each block and its values as written (float32, dequantized).

        Raises CheckpointError where a weight is NaN or infinite.
        """
        before, scheme = self.unfitted.get(planned.source.name), planned.scheme
        if not planned.in_scope and before is None:
            return self._copy(planned)
        silent = Reader(self.pool, self.files, lambda _: None)
        unfitted = None if before is None else before.blocks(silent, planned.source.shape[-1], whole=whole)
        tally, values = _Tally(planned, mask, unfitted), planned.stored[0]
        writer = self.writer(planned.name + values.suffix)
        if scheme is None:
            for block in self.blocks(planned.source, whole=whole):
                tally.prune(block)
                writer.write(tally.keep(block.values))
                if see:
                    see(block.rows, block.values)
            return tally.summarize(writer.sha256, {})
        shared = self._compute_tensor_scale(planned, scheme, mask) if scheme.scale_per == "tensor" else None
        span = scheme.scale_per if isinstance(scheme.scale_per, int) else None
        scales_of_blocks = []
        for block in self.blocks(planned.source, whole=whole):
            absmax, weights = tally.prune(block, span), block.values
            if factors is not None:
                weights = (weights.to(torch.float32) * factors).to(weights.dtype)
                absmax = torch.from_numpy(_find_largest(make_magnitude_keys(weights), span)).view(weights.dtype)
            with SCHEMES.explain_failures(scheme.name):
                scales = scheme.scales(absmax) if shared is None else shared
                if fit and span:
                    scales = fit(weights, scales, scheme)
                codes = rounding(weights, scales, scheme)
                tally.quantize(block.values, codes, scales, scheme, factors)
                rows = _check_stored(scheme.pack(codes), planned, values, len(weights))
            writer.write(rows)
            if see:
                see(block.rows, scheme.dequantize(codes, scales))
            scales_of_blocks.append(scales)
        scales = torch.cat(scales_of_blocks) if shared is None else shared
        return tally.summarize(writer.sha256, self._write_beside(planned, scheme, scales))

    def _write_beside(self, planned: PlannedTensor, scheme: Scheme, scales: torch.Tensor) -> dict[str, str]:
        """Write what a scheme stores beside the values of a tensor; return the hashes, by suffix."""
        hashes: dict[str, str] = {}
        with SCHEMES.explain_failures(scheme.name):
            if not bool((scales > 0).all() & torch.isfinite(scales).all()):
                raise ValueError("it gives scales that are zero or no numbers")
            made = {**scheme.constants(planned.source.shape), SCALE: scales}
            for part in planned.stored[1:]:
                stored = _check_stored(made[part.suffix], planned, part, part.shape[0])
                for name in planned.names(part):
                    writer = self.writer(name)
                    writer.write(stored)
                    hashes[part.suffix] = writer.sha256
        return hashes

    def write_divided(self, planned: PlannedTensor, values: torch.Tensor, factors: torch.Tensor) -> Measured:
        """Write a tensor that others make up for: `values` of its dtype, which times `factors` are what it was."""
        original = next(self.blocks(planned.source, whole=True)).values.reshape(values.shape)
        writer, energy = self.writer(planned.name), _sum_squares(original[None])
        writer.write(values)
        error = _sum_squares((values.to(torch.float32) * factors - original.to(torch.float32))[None])
        before, after = (each.numel() - int(torch.count_nonzero(each)) for each in (original, values))
        relative = math.sqrt(error / energy) if energy else 0.0
        return Measured(before, after, 0, math.sqrt(energy), relative, writer.sha256)

    def _compute_tensor_scale(self, planned: PlannedTensor, scheme: Scheme, mask: Mask | None) -> torch.Tensor:
        """Compute the one scale [1] of a tensor, which takes a pass of its own."""
        tally, largest = _Tally(planned, mask), torch.zeros(1, dtype=get_torch_dtype(planned.source.dtype))
        for block in self.blocks(planned.source):
            largest = torch.maximum(largest, tally.prune(block).max())
        with SCHEMES.explain_failures(scheme.name):
            return scheme.scales(largest)

    def _copy(self, planned: PlannedTensor) -> Measured:
        source, writer, zeros, energy = planned.source, self.writer(planned.name), 0, 0.0
        for piece in self.files.chunks(source, COPY_BYTES):
            self.pool.check()
            keys = make_raw_keys(piece, source.dtype)
            zeros += keys.size - int(np.count_nonzero(keys))
            if planned.weight and source.dtype in FLOAT_DTYPES:
                check_finite(int(keys.max(initial=0)), get_torch_dtype(source.dtype), source)
            if source.dtype in FLOATS and piece:
                energy += _sum_squares(torch.frombuffer(piece, dtype=get_torch_dtype(source.dtype))[None])
            writer.write_bytes(piece)
            self.progress(len(piece))
        # A mask that is kept beside the weights may hold infinities.
        norm = math.sqrt(energy) if math.isfinite(energy) else 0.0
        return Measured(zeros, zeros, 0, norm, 0.0, writer.sha256)


def read_pruned(reader: Reader, planned: PlannedTensor, mask: Mask) -> torch.Tensor:
    """Return the values of a tensor once it is pruned, float32 of its shape."""
    tally, values = _Tally(planned, mask), torch.empty(planned.source.shape)
    rows = values.view(-1, values.shape[-1])
    for block in reader.blocks(planned.source):
        tally.prune(block)
        rows[block.rows] = block.values
    return values


def _check_stored(made: torch.Tensor, planned: PlannedTensor, part: Stored, rows: int) -> torch.Tensor:
    """Return what a scheme made. Raises ValueError where it would not fit its place in the file."""
    dtype, shape = get_torch_dtype(part.dtype), (rows, *part.shape[1:])
    if made.dtype != dtype or tuple(made.shape) != shape:
        stored = f"it stores {list(made.shape)} of {made.dtype} for {planned.name}"
        raise ValueError(f"{stored} where it says {list(shape)} of {dtype}")
    return made


class _Tally:
    """Counts and energies (sums of squares) of a tensor, added up over its blocks in their order."""

    def __init__(self, planned: PlannedTensor, mask: Mask | None, unfitted: Iterator[Block] | None = None) -> None:
        self._source, self._unfitted = planned.source, unfitted
        self._explain_failures = partial(METHODS.explain_failures, planned.prune.method if planned.prune else "")
        with self._explain_failures():
            self._mask = mask.start() if mask else None
        self.zeros_before = self.zeros = self.pruned = self.refilled = 0
        self.energy = self.error_energy = 0.0
        # Of a block that was given new values, those that it had: how far apart they are is no sum of single steps.
        self._original: torch.Tensor | None = None

    def prune(self, block: Block, span: int | None = None) -> torch.Tensor:
        """Zero a block's pruned weights in place; return the largest magnitudes [rows, groups] after that, of each
        `span` columns of a row, by default all."""
        values = block.values
        keys = make_magnitude_keys(values)
        largest = _find_largest(keys, span)
        check_finite(int(largest.max(initial=0)), values.dtype, self._source)
        self._original = next(self._unfitted).values if self._unfitted else None
        before = keys if self._original is None else make_magnitude_keys(self._original)
        self.zeros_before += before.size - int(np.count_nonzero(before))
        self.energy += _sum_squares(values if self._original is None else self._original)
        if self._mask is not None:
            with self._explain_failures():
                chosen = self._mask(block)
                pruned = _check_mask(chosen, values, self._source)
            self.pruned += int(np.count_nonzero(pruned))
            if isinstance(chosen, Pruned):
                replaced = _replace(values, chosen, self._source)
                self._original = replaced if self._original is None else self._original
            elif self._original is not None:
                _take(values, pruned)
            else:
                # Summed by itself: what the energy falls by is lost in its rounding where little is pruned.
                self.error_energy += _sum_squares(_take(values, pruned))
            largest = _find_largest(make_magnitude_keys(values), span)
        return torch.from_numpy(largest).view(values.dtype)

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        self.zeros += values.numel() - int(np.count_nonzero(make_magnitude_keys(values)))
        if self._original is not None:
            self._count_refilled(values)
            self.error_energy += _sum_squares(values.to(torch.float32) - self._original.to(torch.float32))
        return values

    def quantize(
        self,
        values: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        scheme: Scheme,
        factors: torch.Tensor | None,
    ) -> None:
        """Count what was rounded, and how far it is from what it was. Values that were multiplied with `factors` first
        are compared without these, which something else makes up for."""
        # numpy has no floats of 8 bits.
        numbers = codes if codes.dtype == torch.int8 else codes.to(torch.float32)
        self.zeros += numbers.numel() - int(np.count_nonzero(numbers.numpy()))
        original = values if self._original is None else self._original
        self._count_refilled(numbers)
        written = scheme.dequantize(codes, scales)
        if factors is not None:
            written.div_(factors)
        error = _sum_squares(written.sub_(original.to(torch.float32)))
        if math.isinf(error):
            # Of a weight near the largest float, the nearest step may lie beyond it.
            spread = repeat_scales(scales, codes.shape[-1])
            exact = codes.to(torch.float64) * spread.to(torch.float64) - original.to(torch.float64)
            error = float(exact.square_().sum())
        self.error_energy += error

    def _count_refilled(self, written: torch.Tensor) -> None:
        """Count the zeros that have values now. Only new values fill any: rounding leaves zeros alone."""
        if self._original is not None:
            self.refilled += int(torch.count_nonzero((self._original == 0) & (written != 0)))

    def summarize(self, sha256: str, beside: Mapping[str, str]) -> Measured:
        error = math.sqrt(self.error_energy / self.energy) if self.energy else 0.0
        norm = math.sqrt(self.energy)
        return Measured(self.zeros_before, self.zeros, self.pruned, norm, error, sha256, beside, self.refilled)


def _find_largest(keys: npt.NDArray[np.signedinteger], span: int | None) -> npt.NDArray[np.signedinteger]:
    """Return the largest keys [rows, groups] of each `span` columns, by default of all."""
    groups = keys[:, None] if span is None else keys.reshape(len(keys), -1, span)
    largest: npt.NDArray[np.signedinteger] = groups.max(axis=2, initial=0)
    return largest


def _check_mask(
    chosen: npt.NDArray[np.bool_] | Pruned, values: torch.Tensor, source: StoredTensor
) -> npt.NDArray[np.bool_]:
    """Return the pruned weights of a block. Raises TypeError where a method gave something of another form."""
    mask, new = chosen if isinstance(chosen, Pruned) else (chosen, values)
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != tuple(values.shape):
        raise TypeError(f"its mask for {source.name} is no bool array of numpy, {list(values.shape)}")
    if not new.is_floating_point() or new.shape != values.shape:
        raise TypeError(f"its values for {source.name} are no floats, {list(values.shape)}")
    return mask


def _replace(values: torch.Tensor, pruned: Pruned, source: StoredTensor) -> torch.Tensor:
    """Give a block its new values, the pruned ones zero; return those that it had."""
    before = values.clone()
    values.copy_(pruned.values).masked_fill_(torch.from_numpy(pruned.mask), 0)
    if not bool(torch.isfinite(values).all()):
        raise CompressknowError(f"What pruning makes of {source.name} holds NaN or an infinity.")
    return before


def _take(values: torch.Tensor, pruned: npt.NDArray[np.bool_]) -> torch.Tensor:
    """Zero the pruned weights of a block; return a copy that holds only them."""
    # As a product with the inverted mask, on bits: a masked copy of so irregular a mask takes ten times as long.
    bits = view_bits(values)
    taken = bits.copy()
    np.bitwise_and(bits, (pruned.view(np.int8) - np.int8(1)).astype(bits.dtype), out=bits)
    np.bitwise_xor(taken, bits, out=taken)
    return torch.from_numpy(taken).view(values.dtype)


def _sum_squares(values: torch.Tensor) -> float:
    """Return the sum of squares of a block [rows, columns]."""
    energy = float(torch.linalg.vector_norm(values.to(torch.float32), dim=1).to(torch.float64).square_().sum())
    in_range = SMALLEST_ENERGY < energy < math.inf
    return energy if in_range else float(values.to(torch.float64).square_().sum())


def hash_file(pool: Pool, path: Path, progress: Progress | None = None) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(COPY_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            pool.check()
            digest.update(buffer[:count])
            if progress:
                progress(count)
    return digest.hexdigest()
