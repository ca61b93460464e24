"""Importance matrix made of a text: what each weight of a checkpoint reads in it, by the names of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
from compressknow.compress.calibrate.walk import observe
from compressknow.compress.pool import Pool
from compressknow.compress.steps import Calibration
from compressknow.gguf.importance import Importance
from compressknow.gguf.plain import Plain
from compressknow.gguf.tensors import Tensors
from compressknow.model.loading import open_complete
from compressknow.model.tensors import OpenFiles

# Sums of squares over rows, float64 [matrices, in].
Energies = npt.NDArray[np.float64]
# An expert that read fewer tokens is taken to read all channels alike.
LEAST_TOKENS = 32
_TOLERANCE = 1e-6
_EXPERT = re.compile(r"experts\.(\d+)\.")
# Weights of a GGUF file that are unpacked at a time.
_BLOCK = 1 << 22


class LayerInputs(NamedTuple):
    """Inputs that the layers of a checkpoint read in a text, and that text."""

    statistics: dict[Key, InputStatistics]
    text: CalibrationText


def gather_inputs(
    source: Path, calibration: Calibration, folder: Path, *, threads: int | None, begin: Begin, trust_remote_code: bool
) -> LayerInputs:
    """Run a checkpoint of floats over a text. Raises what `calibration_text` and `observe` do.

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
    statistics: dict[Key, InputStatistics] = {}
    with begin("gather") as advance:
        observe(
            checkpoint,
            tree,
            [text.batches],
            lambda seen, _: statistics.update(seen),
            threads=threads,
            folder=folder,
            on_progress=advance or max,
        )
    return LayerInputs(statistics, text)


def build_importance(tensors: Tensors, inputs: LayerInputs, same_channels: Iterable[str]) -> Importance:
    """Return the importance matrix of a GGUF file.

    Parameters
    ----------
    same_channels : the tensors whose input channels are those of the checkpoint, in its order.
    """
    sums, counts = {}, {}
    for name in same_channels:
        tensor, parameter = tensors.tensors[name], tensors.weights[name][0].parameter
        matrices = tensor.shape[2] if len(tensor.shape) > 2 else 1
        read = [inputs.statistics.get(Key(parameter, matrix)) for matrix in range(matrices)]
        known = [each if each and _is_known(each, tensor.shape[0], matrices) else None for each in read]
        if any(known):
            unknown = np.zeros(tensor.shape[0], np.float32)
            sums[name] = np.stack([each.squares.numpy().astype(np.float32) if each else unknown for each in known])
            counts[name] = np.array([each.tokens if each else 0 for each in known], np.float32)
    sequences = [sequence for batch in inputs.text.batches for sequence in batch["input_ids"]]
    return Importance(sums, counts, (inputs.text.source,), len(sequences), len(sequences[0]))


def _is_known(statistics: InputStatistics, width: int, matrices: int) -> bool:
    least = LEAST_TOKENS if matrices > 1 else 1
    return statistics.tokens >= least and len(statistics.squares) == width


def find_same_channels(exact: Path, tensors: Tensors, plain: Sequence[Plain]) -> list[str]:
    """Return the names of tensors whose input channels are those of the checkpoint, in its order.

    Parameters
    ----------
    exact : the GGUF file, in 32 or 16 bits.
    plain : the weights of the checkpoint.
    """
    import gguf

    by_name = {each.name: each for each in plain}
    names = []
    with Pool(1) as pool, OpenFiles() as files:
        reader = Reader(pool, files, lambda _: None)
        for tensor in gguf.GGUFReader(exact).tensors:
            parts = [by_name[name] for name in tensors.stored.get(tensor.name, ()) if name in by_name]
            if parts and _has_channels_of(parts, tensor, reader):
                names.append(tensor.name)
    return names


def _has_channels_of(parts: Sequence[Plain], tensor: Any, reader: Reader) -> bool:
    """Return whether a tensor has the energies of what a checkpoint stores for it, with channels along either axis."""
    stored = _sum_tensor_squares(tensor)
    by_part = [_sum_plain_squares(part, reader) for part in sorted(parts, key=_get_expert)]
    for own in zip(*by_part, strict=True):
        if len(tensor.shape) > 2:
            energies = np.concatenate(own)
        elif len({each.shape for each in own}) == 1:
            energies = np.sum(own, axis=0)
        else:
            continue
        if stored.shape == energies.shape and np.allclose(stored, energies, rtol=_TOLERANCE, atol=0):
            return True
    return False


def _get_expert(plain: Plain) -> int:
    expert = _EXPERT.search(plain.name)
    return int(expert[1]) if expert else 0


def _sum_tensor_squares(tensor: Any) -> Energies:
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


def _sum_plain_squares(plain: Plain, reader: Reader) -> tuple[Energies, Energies]:
    """Return the energies with channels along the last axis, and along the one before it."""
    *_, height, columns = plain.shape
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
    return last, first.reshape(matrices, height)
