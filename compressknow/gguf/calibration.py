"""An importance matrix made of a text: what each weight of a checkpoint reads of it, by the names of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compressknow.compress.calibrate.gathering import Key
from compressknow.compress.calibrate.observe import input_statistics
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.calibrate.text import CalibrationText, calibration_text
from compressknow.compress.steps import Calibration
from compressknow.gguf.importance import Floats, Importance
from compressknow.gguf.tensors import Tensors
from compressknow.model.loading import open_complete
from compressknow.quiet import Begin

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
            checkpoint, tree, text.batches, threads=threads, folder=folder, told=advance or max
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
