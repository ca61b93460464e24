"""Whether a tensor of a GGUF file has the input channels of the weight that it was made of, in the same order.

The converter may turn rows round (Llama's queries and keys), transpose, merge and stack. The energy of each input
channel, the sum of squares over all rows, survives that; it does not survive another order of channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressknow.compress.blocks import Reader
from compressknow.compress.pool import Pool
from compressknow.gguf.plain import Plain
from compressknow.gguf.tensors import Tensors
from compressknow.model.tensors import OpenFiles

Energies = npt.NDArray[np.float64]
_TOLERANCE = 1e-6
_EXPERT = re.compile(r"experts\.(\d+)\.")
_BLOCK = 1 << 22


def same_channels(exact: Path, tensors: Tensors, plain: Sequence[Plain]) -> list[str]:
    """The names of those tensors.

    Parameters
    ----------
    exact : the GGUF file, in 32 or 16 bits.
    plain : the weights of the checkpoint.
    """
    import gguf

    by_name = {each.name: each for each in plain}
    found = []
    with Pool(1) as pool, OpenFiles() as files:
        reader = Reader(pool, files, lambda _: None)
        for each in gguf.GGUFReader(exact).tensors:
            parts = [by_name[name] for name in tensors.stored.get(each.name, ()) if name in by_name]
            if parts and _alike(_of_tensor(each), _of_parts(parts, len(each.shape) > 2, reader)):
                found.append(each.name)
    return found


def _alike(one: Energies, other: Mapping[str, Energies]) -> bool:
    """The stored matrix may have its channels along either axis."""
    return any(
        one.shape == energies.shape and np.allclose(one, energies, rtol=_TOLERANCE, atol=0)
        for energies in other.values()
    )


def _of_tensor(tensor: Any) -> Energies:
    """float64 [matrices, in]."""
    import gguf

    data, width = tensor.data, int(tensor.shape[0])
    rows = data.reshape(-1, data.shape[-1])
    matrices = data.shape[0] if data.ndim > 2 else 1
    energies = np.zeros((matrices, width))
    height = len(rows) // matrices
    step = max(_BLOCK // width, 1)
    for matrix in range(matrices):
        for start in range(0, height, step):
            first = matrix * height + start
            piece = rows[first : min(first + step, (matrix + 1) * height)]
            energies[matrix] += np.square(gguf.dequantize(piece, tensor.tensor_type).astype(np.float64)).sum(axis=0)
    return energies


def _of_parts(parts: Sequence[Plain], stacked: bool, reader: Reader) -> dict[str, Energies]:
    """Of what a checkpoint stores for a tensor, with channels along the last axis and along the one before it."""
    made = [dict(_of_plain(each, reader)) for each in sorted(parts, key=_number)]
    join = np.concatenate if stacked else _summed
    return {axis: join([each[axis] for each in made]) for axis in ("last", "first") if all(axis in m for m in made)}


def _summed(energies: Sequence[Energies]) -> Energies:
    alike = len({each.shape for each in energies}) == 1
    return np.sum(energies, axis=0) if alike else np.zeros((0, 0))


def _number(plain: Plain) -> int:
    found = _EXPERT.search(plain.name)
    return int(found[1]) if found else 0


def _of_plain(plain: Plain, reader: Reader) -> Iterator[tuple[str, Energies]]:
    columns = plain.shape[-1]
    height = plain.shape[-2]
    matrices = plain.shape[0] if len(plain.shape) > 2 else 1
    last, first = np.zeros((matrices, columns)), np.zeros(matrices * height)
    for block, floats in plain.values.floats(reader):
        squares = np.square(floats.numpy())
        first[block.rows] = squares.sum(axis=1)
        for matrix in range(matrices):
            begin = matrix * height - block.first_row
            end = begin + height
            if begin < len(squares) and end > 0:
                last[matrix] += squares[max(begin, 0) : end].sum(axis=0)
    yield "last", last
    yield "first", first.reshape(matrices, height)
