"""Inner loop of a conversion: convert one tensor from its source file to its output, block by block, and measure it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.errors import CompressknowError
from compressknow.base.reading import COPY_BYTES
from compressknow.compress.blocks import (
    FLOATS,
    Block,
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

# Below this sum of squares, float32 may lose digits of the squares.
SMALLEST_ENERGY = 1e-24


@dataclass(frozen=True)
class TensorStats:
    """Counts, errors and hashes of one converted tensor.

    `norm` is ||original|| (Frobenius; 0 if it holds no floats), `relative_error` ||written - original|| / ||original||
    with the written weights dequantized. `sha256` is the hash of the written values, `other_sha256` has those of its
    scales and anything else its scheme stores, by suffix. `refilled` counts zeros of the source that became non-zero.
    """

    zeros_before: int
    zeros: int
    pruned: int
    norm: float
    relative_error: float
    sha256: str
    other_sha256: Mapping[str, str] = field(default_factory=dict)
    refilled: int = 0


class TensorWriter:
    """Writer of a tensor's bytes, in order from `offset` on, which also hashes them."""

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
class TensorConverter(Reader):
    """Converter of single tensors, which reads, prunes, quantizes and writes each; `writer` makes its writer, by name.

    `unfitted` holds the original values of refitted sources, by name, from which their errors are measured.
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
    ) -> TensorStats:
        """Write one tensor of the output.

        Parameters
        ----------
        whole : process it as one block, if rows depend on each other or each call of `rounding` is slow to start.
        rounding : rounds values to the grid of the scheme.
        fit : computes the scales of groups [rows, groups], instead of taking those from the largest magnitudes.
        factors : multipliers of input channels [columns], applied before rounding.
        see : called with the rows of each block and its values as written, dequantized.

        Raises CheckpointError if a weight is NaN or infinite, CompressknowError if its `factors` make it so.
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
                if not bool(torch.isfinite(absmax).all()):
                    raise CompressknowError(
                        f"Smoothing {planned.source.name} gives infinity.", hint="Leave --smooth out."
                    )
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
        return tally.summarize(writer.sha256, self._write_scales(planned, scheme, scales))

    def _write_scales(self, planned: PlannedTensor, scheme: Scheme, scales: torch.Tensor) -> dict[str, str]:
        """Write the scales and anything else a scheme stores for a tensor; return the hashes, by suffix."""
        hashes: dict[str, str] = {}
        with SCHEMES.explain_failures(scheme.name):
            if not bool((scales > 0).all() & torch.isfinite(scales).all()):
                raise ValueError("it returns scales that are zero or not finite")
            values = {**scheme.constants(planned.source.shape), SCALE: scales}
            for part in planned.stored[1:]:
                stored = _check_stored(values[part.suffix], planned, part, part.shape[0])
                for name in planned.names(part):
                    writer = self.writer(name)
                    writer.write(stored)
                    hashes[part.suffix] = writer.sha256
        return hashes

    def write_divided(
        self, planned: PlannedTensor, values: torch.Tensor, factors: torch.Tensor, offset: float
    ) -> TensorStats:
        """Write `values`, a tensor whose sum with `offset` is divided by `factors`, in its dtype. Other tensors
        compensate for the division."""
        original = next(self.blocks(planned.source, whole=True)).values.reshape(values.shape)
        writer, energy = self.writer(planned.name), _sum_squares(original[None])
        writer.write(values)
        restored = (values.to(torch.float32) + offset) * factors - offset
        error = _sum_squares((restored - original.to(torch.float32))[None])
        before, after = (each.numel() - int(torch.count_nonzero(each)) for each in (original, values))
        relative = math.sqrt(error / energy) if energy else 0.0
        return TensorStats(before, after, 0, math.sqrt(energy), relative, writer.sha256)

    def _compute_tensor_scale(self, planned: PlannedTensor, scheme: Scheme, mask: Mask | None) -> torch.Tensor:
        """Compute the single scale [1] of a whole tensor, in an extra pass."""
        tally, largest = _Tally(planned, mask), torch.zeros(1, dtype=get_torch_dtype(planned.source.dtype))
        for block in self.blocks(planned.source):
            largest = torch.maximum(largest, tally.prune(block).max())
        with SCHEMES.explain_failures(scheme.name):
            return scheme.scales(largest)

    def _copy(self, planned: PlannedTensor) -> TensorStats:
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
        # An attention mask stored with the weights may hold infinities.
        norm = math.sqrt(energy) if math.isfinite(energy) else 0.0
        return TensorStats(zeros, zeros, 0, norm, 0.0, writer.sha256)


def read_pruned(reader: Reader, planned: PlannedTensor, mask: Mask) -> torch.Tensor:
    """Return the values of a tensor after pruning, float32 of its shape."""
    tally, values = _Tally(planned, mask), torch.empty(planned.source.shape)
    rows = values.view(-1, values.shape[-1])
    for block in reader.blocks(planned.source):
        tally.prune(block)
        rows[block.rows] = block.values
    return values


def _check_stored(tensor: torch.Tensor, planned: PlannedTensor, part: Stored, rows: int) -> torch.Tensor:
    """Return a tensor that a scheme made. Raises ValueError if it does not have the announced dtype and shape."""
    dtype, shape = get_torch_dtype(part.dtype), (rows, *part.shape[1:])
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        stored = f"it stores {list(tensor.shape)} of {tensor.dtype} for {planned.name}"
        raise ValueError(f"{stored}, but announced {list(shape)} of {dtype}")
    return tensor


class _Tally:
    """Counts and energies (sums of squares) of a tensor, added up over its blocks in order."""

    def __init__(self, planned: PlannedTensor, mask: Mask | None, unfitted: Iterator[Block] | None = None) -> None:
        self._source, self._unfitted = planned.source, unfitted
        self._explain_failures = partial(METHODS.explain_failures, planned.prune.method if planned.prune else "")
        with self._explain_failures():
            self._mask = mask.start() if mask else None
        self.zeros_before = self.zeros = self.pruned = self.refilled = 0
        self.energy = self.error_energy = 0.0
        # The old values of a block with new ones, whose error is not the sum of the errors of single steps.
        self._original: torch.Tensor | None = None

    def prune(self, block: Block, span: int | None = None) -> torch.Tensor:
        """Zero a block's pruned weights in place; return the largest remaining magnitudes [rows, groups]. A group is
        `span` columns of a row (by default all of them)."""
        values = block.values
        keys = make_magnitude_keys(values)
        largest = _find_largest(keys, span)
        check_finite(int(largest.max(initial=0)), values.dtype, self._source)
        self._original = next(self._unfitted).values if self._unfitted else None
        before = keys if self._original is None else make_magnitude_keys(self._original)
        self.zeros_before += before.size - int(np.count_nonzero(before))
        self.energy += _sum_squares(values if self._original is None else self._original)
        if self._mask is not None:
            version = values._version
            with self._explain_failures():
                chosen = self._mask(block)
                if values._version != version:
                    raise ValueError(f"its mask for {self._source.name} changes `block.values` in place")
                pruned = _check_mask(chosen, values, self._source)
            self.pruned += int(np.count_nonzero(pruned))
            if isinstance(chosen, Pruned):
                replaced = _replace(values, chosen, self._source)
                self._original = replaced if self._original is None else self._original
            elif self._original is not None:
                _extract(values, pruned)
            else:
                # If little is pruned, a difference of energies would be lost to rounding.
                self.error_energy += _sum_squares(_extract(values, pruned))
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
        """Count zeros and add up the error of rounded values. If the values were multiplied by `factors` first, divide
        these out, since other tensors compensate for them."""
        # numpy has no 8-bit floats.
        numbers = codes if codes.dtype == torch.int8 else codes.to(torch.float32)
        self.zeros += numbers.numel() - int(np.count_nonzero(numbers.numpy()))
        original = values if self._original is None else self._original
        self._count_refilled(numbers)
        written = scheme.dequantize(codes, scales)
        if factors is not None:
            written.div_(factors)
        error = _sum_squares(written.sub_(original.to(torch.float32)))
        if math.isinf(error):
            # A weight near the largest float may be rounded to a value beyond it.
            repeated = repeat_scales(scales, codes.shape[-1])
            exact = codes.to(torch.float64) * repeated.to(torch.float64)
            if factors is not None:
                exact.div_(factors)
            error = float(exact.sub_(original).square_().sum())
        self.error_energy += error

    def _count_refilled(self, written: torch.Tensor) -> None:
        """Count the zeros that became non-zero. Only new values can do that, since rounding keeps zeros."""
        if self._original is not None:
            self.refilled += int(torch.count_nonzero((self._original == 0) & (written != 0)))

    def summarize(self, sha256: str, other_sha256: Mapping[str, str]) -> TensorStats:
        error = math.sqrt(self.error_energy / self.energy) if self.energy else 0.0
        norm = math.sqrt(self.energy)
        return TensorStats(self.zeros_before, self.zeros, self.pruned, norm, error, sha256, other_sha256, self.refilled)


def _find_largest(keys: npt.NDArray[np.signedinteger], span: int | None) -> npt.NDArray[np.signedinteger]:
    """Return the largest key of each group of `span` columns [rows, groups]; by default, of each row."""
    groups = keys[:, None] if span is None else keys.reshape(len(keys), -1, span)
    largest: npt.NDArray[np.signedinteger] = groups.max(axis=2, initial=0)
    return largest


def _check_mask(
    chosen: npt.NDArray[np.bool_] | Pruned, values: torch.Tensor, source: StoredTensor
) -> npt.NDArray[np.bool_]:
    """Return which weights of a block are pruned. Raises TypeError if the method returned anything else."""
    mask, new = chosen if isinstance(chosen, Pruned) else (chosen, values)
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != tuple(values.shape):
        raise TypeError(f"its mask for {source.name} is not a boolean NumPy array of shape {list(values.shape)}")
    if not new.is_floating_point() or new.shape != values.shape:
        raise TypeError(f"its values for {source.name} are not floats of shape {list(values.shape)}")
    return mask


def _replace(values: torch.Tensor, pruned: Pruned, source: StoredTensor) -> torch.Tensor:
    """Replace a block's values, with zeros for pruned weights; return the old values."""
    before = values.clone()
    values.copy_(pruned.values).masked_fill_(torch.from_numpy(pruned.mask), 0)
    if not bool(torch.isfinite(values).all()):
        raise CompressknowError(f"Pruning {source.name} gives NaN or infinity.")
    return before


def _extract(values: torch.Tensor, pruned: npt.NDArray[np.bool_]) -> torch.Tensor:
    """Zero the pruned weights of a block; return a copy that holds only them."""
    # Bitwise operations are ten times as fast as indexing with such an irregular mask.
    bits = view_bits(values)
    extracted = bits.copy()
    np.bitwise_and(bits, (pruned.view(np.int8) - np.int8(1)).astype(bits.dtype), out=bits)
    np.bitwise_xor(extracted, bits, out=extracted)
    return torch.from_numpy(extracted).view(values.dtype)


def _sum_squares(values: torch.Tensor) -> float:
    """Return the sum of squares of a block [rows, columns]."""
    energy = float(torch.linalg.vector_norm(values.to(torch.float32), dim=1).to(torch.float64).square_().sum())
    in_range = SMALLEST_ENERGY < energy < math.inf
    return energy if in_range else float(values.to(torch.float64).square_().sum())
