"""Importance matrix: the weight of each input channel when llama.cpp rounds a tensor.

It is the mean square of the channel's inputs, the diagonal of X^T X over the tokens, as in Wanda. llama.cpp's tools
store it in a GGUF file (llama.cpp, tools/imatrix/imatrix.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from compressknow.base.errors import CheckpointError, UsageError
from compressknow.base.reading import open_regular
from compressknow.model.gguf_file import MAGIC, check_gguf, read_gguf, read_value

if TYPE_CHECKING:
    from compressknow.base.progress import Begin
    from compressknow.compress.calibrate.gathering import InputStatistics, Key
    from compressknow.compress.calibrate.text import CalibrationText
    from compressknow.compress.steps import Calibration
    from compressknow.gguf.tensors import Tensors
    from compressknow.model.gguf_file import Tensor

Floats = npt.NDArray[np.float32]
Statistics: TypeAlias = "Mapping[Key, InputStatistics]"
SUMS, COUNTS = ".in_sum2", ".counts"
_KIND = "imatrix"
_MODELS = "compressknow.models"
_HINT = "Give the matrix of this model, or --calibration to compute it."
# Limits for files of the old form: more entries, and longer names, than any model has.
_MOST_ENTRIES, _MOST_NAME = 1 << 16, 1 << 10


@dataclass(frozen=True)
class Importance:
    """Importance matrix of a model.

    Attributes
    ----------
    sums : by tensor name, the sums of squares, float32 [matrices, in]; one matrix, except for experts, which are one
        row [1, matrices * in] in a file of the older form.
    counts : number of tokens in these sums, float32 [matrices].
    datasets : names of the texts, as `name_text` gives them.
    chunks, chunk : number of sequences, and tokens per sequence.
    models : fingerprints of the checkpoint that it was computed with, and of its original; empty in a file of
        llama.cpp's tools.
    """

    sums: Mapping[str, Floats]
    counts: Mapping[str, Floats]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk: int = 0
    models: tuple[str, ...] = ()

    def means(self) -> dict[str, Floats]:
        """Return means, float32 [matrices * in], by tensor name, contiguous, for llama.cpp."""
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].reshape(-1, 1)
            values = np.where(counts > 0, sums / np.maximum(counts, 1), 1)
            means[name] = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        return means


def gather_inputs(
    source: Path, calibration: Calibration, *, threads: int | None, begin: Begin, trust_remote_code: bool
) -> tuple[Statistics, CalibrationText]:
    """Run a checkpoint of floats over a text; return the statistics of its layers' inputs, and the text. `begin` begins
    the stages ``sample`` or ``text``, and ``gather``. Raises as `read_calibration_text` and `observe` do."""
    from compressknow.compress.calibrate.text import read_calibration_text
    from compressknow.compress.calibrate.walk import observe
    from compressknow.model.loading import open_complete

    checkpoint, tree = open_complete(source, trust_remote_code=trust_remote_code)
    with begin(calibration.work) as advance:
        text = read_calibration_text(source, tree, calibration, trust_remote_code=trust_remote_code, advance=advance)
    statistics: dict[Key, InputStatistics] = {}
    with begin("gather") as advance:
        observe(
            checkpoint, tree, [text.batches], lambda seen, *_: statistics.update(seen), threads=threads, advance=advance
        )
    return statistics, text


def build_importance(
    tensors: Tensors, statistics: Statistics, text: CalibrationText, same_channels: Iterable[str]
) -> Importance:
    """Return the importance matrix of a GGUF file; `same_channels` are the tensors with the checkpoint's input
    channels, in the same order."""
    from compressknow.compress.calibrate.gathering import Key
    from compressknow.compress.calibrate.text import LEAST_TOKENS

    sums, counts = {}, {}
    for name in same_channels:
        tensor, parameter = tensors.tensors[name], tensors.weights[name][0].parameter
        matrices = tensor.shape[2] if len(tensor.shape) > 2 else 1
        # An expert that read fewer tokens gets equal importance for all channels.
        least = LEAST_TOKENS if matrices > 1 else 1
        inputs = [statistics.get(Key(parameter, matrix)) for matrix in range(matrices)]
        known = [
            each if each and each.tokens >= least and len(each.squares) == tensor.shape[0] else None for each in inputs
        ]
        if any(known):
            zeros = np.zeros(tensor.shape[0], np.float32)
            sums[name] = np.stack([each.squares.numpy().astype(np.float32) if each else zeros for each in known])
            counts[name] = np.array([each.tokens if each else 0 for each in known], np.float32)
    sequences = [sequence for batch in text.batches for sequence in batch["input_ids"]]
    name = name_text(text.source, text.seed, text.sha256)
    return Importance(sums, counts, (name,), len(sequences), len(sequences[0]))


def build_equal_importance(tensors: Tensors) -> Importance:
    """Return an importance matrix of a GGUF file that weighs all channels alike."""
    shapes = {name: tensors.tensors[name].shape for name in tensors.weights}
    sums = {name: np.ones((prod(shape[2:]), shape[0]), np.float32) for name, shape in shapes.items()}
    return Importance(sums, {name: np.ones(len(each), np.float32) for name, each in sums.items()})


def name_text(source: str, seed: int, sha256: str) -> str:
    """Name a calibration text in a matrix."""
    return f"{source}, seed {seed}, sha256 {sha256}"


def write_importance(importance: Importance, path: Path) -> None:
    """Write a matrix in the format of llama-imatrix, which llama-quantize reads."""
    import gguf

    writer = gguf.GGUFWriter(path, _KIND)
    writer.add_type(_KIND)
    writer.add_array("imatrix.datasets", list(importance.datasets))
    writer.add_uint32("imatrix.chunk_count", importance.chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk)
    writer.add_array(_MODELS, list(importance.models))
    for name in sorted(importance.sums):
        writer.add_tensor(name + SUMS, importance.sums[name])
        writer.add_tensor(name + COUNTS, importance.counts[name].reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_importance(path: Path) -> Importance:
    """Read llama.cpp's importance matrix, in GGUF or the older format (``.dat``). Raises UsageError if there is no such
    file, CheckpointError if it is not one."""
    try:
        with open_regular(path) as file:
            is_gguf = file.read(4) == MAGIC
        return _read_matrix(path) if is_gguf else _read_dat(path)
    except FileNotFoundError:
        raise UsageError(f"--imatrix {path}: no such file.") from None
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not an importance matrix: {error}.",
            hint="Give a file that llama-imatrix or --imatrix-out wrote.",
        ) from None


def _read_matrix(path: Path) -> Importance:
    check_gguf(path)
    reader = read_gguf(path)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    names = [name.removesuffix(SUMS) for name in stored if name.endswith(SUMS)]
    if not names:
        raise ValueError(f"it has no tensor *{SUMS}")
    counts = {name: np.array(stored[name + COUNTS], np.float32).reshape(-1) for name in names}
    sums = {name: np.array(stored[name + SUMS], np.float32).reshape(len(counts[name]), -1) for name in names}
    datasets, models = (tuple(map(str, read_value(reader, key) or ())) for key in ("imatrix.datasets", _MODELS))
    chunks, chunk = (int(read_value(reader, f"imatrix.{key}") or 0) for key in ("chunk_count", "chunk_size"))
    return Importance(sums, counts, datasets, chunks, chunk, models)


def _read_dat(path: Path) -> Importance:
    """Read entries, each a name, the number of calls, and the means times this number. The text's name may follow."""
    sums: dict[str, Floats] = {}
    counts: dict[str, Floats] = {}
    with open_regular(path) as file:

        def read_number(most: int) -> int:
            (value,) = struct.unpack("<i", file.read(4))
            if not 0 <= value <= most:
                raise ValueError(f"a number in it is {value}")
            return int(value)

        for _ in range(read_number(_MOST_ENTRIES)):
            name = file.read(read_number(_MOST_NAME)).decode()
            calls, width = read_number(1 << 30), read_number(1 << 28)
            values = np.frombuffer(file.read(4 * width), "<f4")
            if len(values) != width:
                raise ValueError("it is cut short")
            sums[name], counts[name] = values.reshape(1, -1).astype(np.float32), np.array([max(calls, 1)], np.float32)
    if not sums:
        raise ValueError("it is empty")
    return Importance(sums, counts)


def check_source(importance: Importance, sources: Sequence[str], path: str) -> None:
    """Raise CheckpointError if a matrix names its models, and these include neither this one nor its original."""
    if importance.models and not set(importance.models) & set(sources):
        raise CheckpointError(
            f"{path} is of another model: it names {importance.models[0][:16]}, and this one is {sources[0][:16]}.",
            "These are SHA-256 of the checkpoints. Shapes may be equal if weights are not.",
            _HINT,
        )


def check_model(importance: Importance, tensors: Mapping[str, Tensor], path: str) -> None:
    """Raise CheckpointError if a matrix was computed with another model, with other layers or widths."""
    fitting = [name for name in importance.sums if name in tensors]
    for name in fitting:
        tensor = tensors[name]
        needed = tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        if importance.sums[name].size != needed:
            raise CheckpointError(
                f"{path} is of another model: {name} has {importance.sums[name].size:,} channels in it, and "
                f"{needed:,} here.",
                hint=_HINT,
            )
    if not fitting:
        raise CheckpointError(f"{path} is of another model: none of its tensors is in this one.", hint=_HINT)
