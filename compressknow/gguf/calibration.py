"""An importance matrix made of a text: what each weight of a checkpoint reads of it, by the names of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from compressknow.base.progress import Begin
from compressknow.compress.blocks import Reader
from compressknow.compress.calibrate.gathering import Key
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.calibrate.text import CalibrationText, calibration_text
from compressknow.compress.calibrate.walk import input_statistics
from compressknow.compress.pool import Pool
from compressknow.compress.steps import Calibration
from compressknow.gguf.importance import Floats, Importance
from compressknow.gguf.plain import Plain
from compressknow.gguf.tensors import Tensors
from compressknow.model.loading import open_complete
from compressknow.model.tensors import OpenFiles

# An expert that read fewer tokens is taken to read all channels alike.
LEAST_TOKENS = 32


class Seen(NamedTuple):
    """What the layers of a checkpoint have read of a text."""

    statistics: dict[Key, InputStatistics]
    text: CalibrationText


def see(
    source: Path, calibration: Calibration, folder: Path, *, threads: int | None, begin: Begin, trust_remote_code: bool
) -> Seen:
    """Run a checkpoint of floats over a text. Raises what `calibration_text` and `input_statistics` do.

    Parameters
    ----------
    folder : where large hidden states lie meanwhile.
    begin : begins the stages ``sample`` or ``text``, and ``gather``.
    """
    checkpoint, tree = open_complete(source, trust_remote_code=trust_remote_code)
    with begin(calibration.work) as advance:
        text = calibration_text(
            source,
            tree,
            **asdict(calibration),
            trust_remote_code=trust_remote_code,
            advance=advance,
        )
    with begin("gather") as advance:
        statistics = input_statistics(
            checkpoint, tree, text.batches, threads=threads, folder=folder, on_progress=advance or max
        )
    return Seen(statistics, text)


def importance_of(tensors: Tensors, seen: Seen, same_channels: Iterable[str]) -> Importance:
    """The matrix of a GGUF file.

    Parameters
    ----------
    same_channels : the tensors whose input channels are those of the checkpoint, in its order.
    """
    sums, counts = {}, {}
    for name in same_channels:
        tensor, weight = tensors.tensors[name], tensors.weights[name][0]
        matrices = tensor.shape[2] if len(tensor.shape) > 2 else 1
        found = [seen.statistics.get(Key(weight.parameter, matrix)) for matrix in range(matrices)]
        known = [each if _is_known(each, tensor.shape[0], matrices) else None for each in found]
        if any(known):
            sums[name] = np.stack([_squares(each, tensor.shape[0]) for each in known])
            counts[name] = np.array([each.tokens if each else 0 for each in known], np.float32)
    sequences = [sequence for batch in seen.text.batches for sequence in batch["input_ids"]]
    return Importance(sums, counts, (seen.text.source,), len(sequences), len(sequences[0]))


def _is_known(seen: InputStatistics | None, width: int, matrices: int) -> bool:
    least = LEAST_TOKENS if matrices > 1 else 1
    return seen is not None and seen.tokens >= least and len(seen.squares) == width


def _squares(seen: InputStatistics | None, width: int) -> Floats:
    return np.zeros(width, np.float32) if seen is None else seen.squares.numpy().astype(np.float32)


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
