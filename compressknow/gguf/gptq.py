"""GPTQ onto the grids of llama.cpp, in place in a GGUF file: block by block, while the model runs over a text.

A block of weights in a GGUF file has scales (and minima), and a code of a few bits for each weight. The scales come
from llama.cpp's search on the block after compensation of all earlier errors; then the codes are chosen on that grid
(Frantar et al. 2022, arXiv 2210.17323, algorithm 1). llama.cpp reads such a file like any other.

A layer also compensates part of the errors of the layers before it (`compensation.find_moves`).

The file already has its types and sizes, from llama.cpp; only codes and scales change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.progress import Begin
from compressknow.base.reading import group_by
from compressknow.compress.blocks import Pool
from compressknow.compress.calibrate.compensation import BLOCK, FINE, Level, compensate, factor_inverse, find_moves
from compressknow.compress.calibrate.gathering import InputStatistics, Key
from compressknow.compress.calibrate.text import BATCH_TOKENS, LEAST_TOKENS
from compressknow.compress.calibrate.walk import Batches, observe
from compressknow.gguf.grids import Bytes, dequantize, quantize
from compressknow.gguf.importance import Floats
from compressknow.gguf.tensors import Tensors
from compressknow.model.gguf_file import read_gguf
from compressknow.model.loading import open_complete

# Weights to round at a time.
_MOST = 1 << 23


class Field(NamedTuple):
    """Position of some bits of each code in a block: `bits` of them, from bit `low` on, in the bytes from `offset` on.
    A byte has bits of codes that are `width` apart, the first code's lowest (ggml-quants.c)."""

    offset: int
    low: int
    bits: int
    width: int


@dataclass(frozen=True)
class CodeLayout:
    """Layout of a type's codes.

    Attributes
    ----------
    width : weights in a block.
    codes : smallest and largest code. A weight is its block's offset plus its code times the step.
    levels : values of the codes in steps, in place of the codes and the offset; None if they are linear.
    has_zero : whether the grid of every block has 0.
    """

    width: int
    codes: tuple[int, int]
    fields: tuple[Field, ...]
    levels: tuple[int, ...] | None = None
    has_zero: bool = False


# Values of the 16 codes of iq4_nl and iq4_xs.
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LAYOUTS = {
    "q4_0": CodeLayout(32, (0, 15), (Field(2, 0, 4, 16),), has_zero=True),
    "q4_1": CodeLayout(32, (0, 15), (Field(4, 0, 4, 16),)),
    "q5_0": CodeLayout(32, (0, 31), (Field(6, 0, 4, 16), Field(2, 4, 1, 1)), has_zero=True),
    "q5_1": CodeLayout(32, (0, 31), (Field(8, 0, 4, 16), Field(4, 4, 1, 1))),
    "q8_0": CodeLayout(32, (-127, 127), (Field(2, 0, 8, 32),), has_zero=True),
    "iq4_nl": CodeLayout(32, (0, 15), (Field(2, 0, 4, 16),), _NONLINEAR),
    "iq4_xs": CodeLayout(256, (0, 15), (Field(8, 0, 4, 16),), _NONLINEAR),
    "q2_k": CodeLayout(256, (0, 3), (Field(16, 0, 2, 32),)),
    "q3_k": CodeLayout(256, (0, 7), (Field(32, 0, 2, 32), Field(0, 2, 1, 32)), has_zero=True),
    "q4_k": CodeLayout(256, (0, 15), (Field(16, 0, 4, 32),)),
    "q5_k": CodeLayout(256, (0, 31), (Field(48, 0, 4, 32), Field(16, 4, 1, 32))),
    "q6_k": CodeLayout(256, (0, 63), (Field(0, 0, 4, 64), Field(128, 4, 2, 32)), has_zero=True),
}


def round_gptq(weight: torch.Tensor, kind: str, inputs: InputStatistics) -> Bytes:
    """Return weights [out, in] as the bytes of a tensor of a type of `LAYOUTS`, uint8 [out, bytes per row].

    Zeros were pruned. They stay zero if the type has a zero, and other columns compensate for their errors too.

    Parameters
    ----------
    weight : float32; not changed.
    inputs : must have products; if it has a drift, the layer compensates part of it.

    Raises CompressknowError, which names the layer, if X^T X cannot be inverted.
    """
    layout = LAYOUTS[kind]
    # Blocks with the largest inputs first, and likewise the columns in each.
    blocks = inputs.squares.reshape(-1, layout.width)
    first = torch.argsort(blocks.sum(dim=1), descending=True, stable=True)
    within = torch.argsort(blocks, dim=1, descending=True, stable=True)
    order = (first[:, None] * layout.width + within[first]).reshape(-1)
    factor = factor_inverse(inputs, order)
    importance = (inputs.squares / max(inputs.tokens, 1)).to(torch.float32)
    step = max(_MOST // weight.shape[1], 1)
    parts = []
    for rows in torch.split(weight, step):
        columns, moves = rows.T[order].contiguous(), find_moves(rows, inputs, factor, order)
        zero = (columns == 0) & layout.has_zero
        if moves is not None:
            columns.addmm_(factor.T, moves)
        parts.append(_Rows(kind, layout, columns, zero, importance, order).round(factor))
    return np.concatenate(parts)


class _Rows:
    """Rows of a weight, which are rounded independently of others."""

    def __init__(
        self,
        kind: str,
        layout: CodeLayout,
        columns: torch.Tensor,
        zero: torch.Tensor,
        importance: torch.Tensor,
        order: torch.Tensor,
    ) -> None:
        self._kind, self._layout, self._order, self._importance = kind, layout, order, importance
        self._columns, self._zero = columns, zero
        self._codes = torch.empty(columns.shape, dtype=torch.int16)
        self._blocks: dict[int, Bytes] = {}
        self._levels = None if layout.levels is None else torch.tensor(layout.levels, dtype=torch.float32)
        self._offset = self._step = torch.empty(0)
        self._first = 0

    def round(self, factor: torch.Tensor) -> Bytes:
        """Return the rows as bytes, uint8 [rows, bytes per row]."""
        width = self._layout.width
        outer: list[Level] = [(BLOCK, None)] if width < BLOCK else []
        compensate(self._columns, factor, [*outer, (width, self._fix_grid), (FINE, None)], self._round_column)
        blocks = np.stack([self._blocks[number] for number in range(len(self._order) // width)], axis=1)
        rows = blocks.shape[0]
        codes = self._codes.T.contiguous().numpy().reshape(-1, width)
        return pack(blocks.reshape(len(codes), -1), codes, self._layout).reshape(rows, -1)

    def _fix_grid(self, first: int, values: torch.Tensor) -> None:
        """Set the grid of a block from its values [columns, rows]."""
        width = self._layout.width
        order = self._order[first : first + width]
        start = int(order.min())
        natural = torch.empty_like(values)
        natural[order - start] = values
        importance = self._importance[start : start + width]
        blocks = quantize(natural.T.numpy(), self._kind, importance.numpy())
        self._blocks[start // width] = blocks
        # Dequantizing two codes, or the one whose level is 1, gives the grid without knowing the format of scales.
        if self._layout.levels is None:
            self._offset = self._read_code(blocks, 0)[order - start]
            self._step = self._read_code(blocks, 1)[order - start] - self._offset
        else:
            self._step = self._read_code(blocks, self._layout.levels.index(1))[order - start]
        self._first = first

    def _read_code(self, blocks: Bytes, code: int) -> torch.Tensor:
        """Return the value of a code for each weight, float32 [width, rows]."""
        codes = np.full((len(blocks), self._layout.width), code, np.int16)
        packed = pack(blocks, codes, self._layout)
        return torch.from_numpy(dequantize(packed, self._kind, codes.shape)).T

    def _round_column(self, column: int, values: torch.Tensor) -> torch.Tensor:
        index = column - self._first
        values, step = values.masked_fill(self._zero[column], 0), self._step[index]
        inverse = torch.where(step == 0, 0, 1 / step)
        if self._levels is None:
            offset = self._offset[index]
            code = ((values - offset) * inverse).round_().clamp_(*self._layout.codes)
            rounded = offset + step * code
        else:
            code = torch.bucketize(values * inverse, (self._levels[1:] + self._levels[:-1]) / 2)
            rounded = step * self._levels[code]
        self._codes[self._order[column]] = code.to(torch.int16)
        return rounded


def pack(blocks: Bytes, codes: npt.NDArray[np.int16], layout: CodeLayout) -> Bytes:
    """Return blocks, uint8 [blocks, bytes], with their codes replaced by these, [blocks, width]; scales are kept."""
    packed = blocks.copy()
    for field in layout.fields:
        parts = 8 // field.bits
        mask = (1 << field.bits) - 1
        bits = ((codes >> field.low) & mask).astype(np.uint8).reshape(len(codes), -1, parts, field.width)
        stored = np.zeros((len(codes), bits.shape[1], field.width), np.uint8)
        for part in range(parts):
            stored |= bits[:, :, part] << np.uint8(part * field.bits)
        flat = stored.reshape(len(codes), -1)
        packed[:, field.offset : field.offset + flat.shape[1]] = flat
    return packed


def batch_sequences(sequences: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
    """Return token ids as batches of sequences of equal length, without padding."""
    return [
        {"input_ids": torch.tensor(group[start : start + rows])}
        for length, group in sorted(group_by(filter(None, sequences), len).items())
        for rows in [max(BATCH_TOKENS // length, 1)]
        for start in range(0, len(group), rows)
    ]


def round_file(
    output: Path,
    exact: Iterable[Any],
    tensors: Tensors,
    same_channels: Collection[str],
    source: Path,
    texts: Sequence[Batches],
    *,
    threads: int | None,
    begin: Begin,
    trust_remote_code: bool,
) -> int:
    """Round the tensors of types of `LAYOUTS` that enough tokens reach, overwrite them in `output`, and return their
    number.

    Parameters
    ----------
    exact : the same tensors from a file in 32 or 16 bits, which `tensors` describes.
    same_channels : names of tensors whose input channels have the same order as in the checkpoint.
    source : checkpoint of floats.
    texts : texts with equal weights.
    """
    import gguf

    checkpoint, tree = open_complete(source, trust_remote_code=trust_remote_code)
    file = read_gguf(output, "r+")
    quantized = {tensor.name: tensor for tensor in file.tensors}
    floats = {tensor.name: tensor for tensor in exact}
    # Parts of a merged tensor have the same inputs; a split one (gate and up of experts) is several tensors.
    names = group_by(same_channels, lambda name: tensors.weights[name][0].parameter)
    rounded: set[str] = set()

    def round_matrix(weights: Mapping[str, torch.Tensor], job: tuple[str, Key, InputStatistics]) -> None:
        name, (parameter, matrix), inputs = job
        kind, stored, values = quantized[name].tensor_type, quantized[name].data, floats[name].data
        if stored.ndim > 2:
            if inputs.tokens < LEAST_TOKENS:
                return
            stored, values = stored[matrix], values[matrix]
        # A copy, since torch takes no read-only array, such as one of a file.
        values = gguf.dequantize(values, floats[name].tensor_type).astype(np.float32, order="C")
        if (layout := kind.name.lower()) in LAYOUTS:
            stored[...] = round_gptq(torch.from_numpy(values), layout, inputs)
            rounded.add(name)
        if (weight := weights.get(parameter)) is not None and weight.dim() == 2:
            transposed = tensors.weights[name][0].transposed
            replace_rows(weight.T if transposed else weight, values, gguf.dequantize(stored, kind))

    def visit(seen: Mapping[Key, InputStatistics], weights: Mapping[str, torch.Tensor], pool: Pool) -> None:
        jobs = [(name, key, inputs) for key, inputs in seen.items() for name in names.get(key.parameter, ())]
        pool.map(partial(round_matrix, weights), jobs)

    with begin("round") as advance:
        observe(checkpoint, tree, texts, visit, products=True, pairs=True, threads=threads, advance=advance)
    file.mapped.flush()
    return len(rounded)


def replace_rows(weight: torch.Tensor, exact: Floats, rounded: Floats) -> None:
    """Overwrite rows of a weight, float32 [out, in], with their rounded values. Rows are found by their values, since
    the converter permutes them (Llama's queries and keys), splits and merges; rows that it changed are kept."""
    index_of = {row.tobytes(): index for index, row in enumerate(exact)}
    indices = [index_of.get(row.tobytes(), -1) for row in weight.numpy()]
    known = [number for number, index in enumerate(indices) if index >= 0]
    weight[known] = torch.from_numpy(rounded[[indices[number] for number in known]].astype(np.float32, copy=False))
