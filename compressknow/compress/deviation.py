"""How far one tensor's values are from another's: both read block by block, in the memory of two blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressknow.compress.blocks import READABLE, Block, Reader, matrix_shape
from compressknow.compress.difference_records import Sums
from compressknow.compress.quantize import dequantize
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor, byte_view


@dataclass(frozen=True)
class Values:
    """A parameter's values as a checkpoint stores them: a tensor and, of an int8 one, its scale."""

    tensor: StoredTensor
    scale: StoredTensor | None = None

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes + (self.scale.nbytes if self.scale else 0)


def is_scale_of(scale: StoredTensor, tensor: StoredTensor) -> bool:
    """Whether a scale is one number for the tensor or one for each of its rows."""
    return scale.dtype in FLOAT_DTYPES and scale.numel in (1, matrix_shape(tensor.shape)[0])


def deviation(reader: Reader, a: Values, b: Values) -> tuple[Sums, bool]:
    """The sums of two tensors of one shape, taken in float64, and whether they are stored alike to the bit."""
    scale_a, scale_b = _scale(reader, a), _scale(reader, b)
    alike = a.tensor.dtype == b.tensor.dtype and _same(scale_a, scale_b)
    sums, same = Sums(), alike
    # torch reads no tensor without elements.
    blocks = zip(reader.blocks(a.tensor), reader.blocks(b.tensor), strict=True) if a.tensor.numel else ()
    for block_a, block_b in blocks:
        equal = alike and _same(block_a.values, block_b.values)
        x = _floats(block_a, scale_a)
        sums += _sums(x, x if equal else _floats(block_b, scale_b))
        same = same and equal
    return sums, same


def _scale(reader: Reader, values: Values) -> torch.Tensor | None:
    """float32 scales, [rows, 1] or [1, 1]."""
    if values.scale is None:
        return None
    buffer = torch.empty(values.scale.numel, 1, dtype=READABLE[values.scale.dtype])
    reader.files.read_into(values.scale, byte_view(buffer), 0)
    return buffer.to(torch.float32)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # As bytes: NaN is unlike itself, and zeros of both signs are alike.
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _floats(block: Block, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return block.values.to(torch.float64)
    return dequantize(block.values, scale if len(scale) == 1 else scale[block.rows]).to(torch.float64)


def _sums(x: torch.Tensor, y: torch.Tensor) -> Sums:
    zeros, energy = _zeros(x), _energy(x)
    if x is y:
        return Sums(x.numel(), zeros, zeros, energy, energy)
    change = y - x
    return Sums(x.numel(), zeros, _zeros(y), energy, _energy(y), _energy(change), float(change.abs().max()))


def _zeros(x: torch.Tensor) -> int:
    return x.numel() - int(torch.count_nonzero(x))


def _energy(x: torch.Tensor) -> float:
    return float(torch.dot(x.reshape(-1), x.reshape(-1)))
