"""A checkpoint's weights as plain floats for llama.cpp's converter, and which of them it did not reorder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.errors import UnsupportedError
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.output import lay_out_file, list_carried_files
from compressknow.compress.weights import StoredWeights, Values
from compressknow.gguf.tensors import EXPERT, Tensors
from compressknow.model.checkpoint import SAFETENSORS, Checkpoint
from compressknow.model.manifest import CARD_NAME
from compressknow.model.tensors import DTYPE_SIZES, FLOAT_DTYPES, OpenFiles, view_bytes

# Dtypes that the converter can read.
PLAIN_DTYPES = (*FLOAT_DTYPES, "I64", "I32", "I16", "U8", "BOOL")
# Energies of input channels: float64 [matrices, in].
Energies = npt.NDArray[np.float64]
_TOLERANCE = 1e-6
# Weights of a GGUF file to unpack at a time.
_BLOCK = 1 << 22


def get_dtype(values: Values) -> str:
    """Return the dtype of plain values: float32 for scaled integers, and otherwise the stored one."""
    return "F32" if values.scale else values.tensor.dtype


def list_plain_tensors(source: StoredWeights, checkpoint: Checkpoint) -> dict[str, Values]:
    """Return a checkpoint's tensors without quantization, by stored name, in the stored order. Raises UnsupportedError
    if values are in a packed form of another tool."""
    plain: dict[str, Values] = {}
    unreadable: dict[str, str | None] = {}
    for key, tensor in source.own.items():
        values = source.values(key)
        if values is not None and (values.scale or values.tensor.dtype in PLAIN_DTYPES):
            plain[tensor.name] = values
        else:
            unreadable[tensor.name] = source.packed(key) or tensor.dtype
    unreadable |= {name: source.packed(name) for name in source.packed_weights()}
    for name, kind in unreadable.items():
        raise UnsupportedError(
            f"{name} is stored as {kind}, which cannot be unpacked here.",
            hint="Export the original, or what `compressknow convert` wrote.",
        )
    index = {name: number for number, name in enumerate(checkpoint.tensors)}
    return dict(sorted(plain.items(), key=lambda item: index.get(item[1].stored.name, len(index))))


def write_plain(checkpoint: Checkpoint, tensors: Mapping[str, Values], reader: Reader, folder: Path) -> None:
    """Write a folder of plain weights, with the small files of the checkpoint; `reader` reports the bytes read."""
    folder.mkdir()
    for name in (*list_carried_files(checkpoint.folder), CARD_NAME):
        if (source := checkpoint.folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_bytes())
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    ordered = sorted(tensors.items(), key=lambda item: -DTYPE_SIZES[get_dtype(item[1])])
    with (folder / SAFETENSORS).open("xb") as file:
        file.write(lay_out_file([(name, get_dtype(values), values.shape) for name, values in ordered])[0])
        for _, values in ordered:
            for piece in _read_pieces(values, reader):
                file.write(view_bytes(piece.contiguous()))


def _read_pieces(values: Values, reader: Reader) -> Iterator[torch.Tensor]:
    if not values.tensor.numel:
        return iter(())
    if values.scale is None:
        return (block.values for block in reader.blocks(values.stored))
    return (floats.to(torch.float32) for _, floats in values.floats(reader))


def find_same_channels(exact: Iterable[Any], tensors: Tensors, plain: Mapping[str, Values]) -> list[str]:
    """Return the names of tensors of a GGUF file, `exact` in 32 or 16 bits, whose input channels have the same order as
    in the checkpoint.

    The converter may permute rows (Llama's queries and keys), transpose, merge and stack. That does not change the
    energy of each input channel, the sum of squares over all rows; another order of channels does.
    """
    names = []
    with Pool(1) as pool, OpenFiles() as files:
        reader = Reader(pool, files, lambda _: None)
        for tensor in exact:
            stored = [name for name in tensors.stored.get(tensor.name, ()) if name in plain]
            # Experts are stacked in the order of their numbers.
            stored.sort(key=lambda name: int(expert[1]) if (expert := EXPERT.search(name)) else 0)
            if stored and _has_channels_of([plain[name] for name in stored], tensor, reader):
                names.append(tensor.name)
    return names


def _has_channels_of(parts: Sequence[Values], tensor: Any, reader: Reader) -> bool:
    """Return whether a tensor has the channel energies of its parts in the checkpoint, along either of their axes."""
    expected = _sum_tensor_squares(tensor)
    by_part = [_sum_plain_squares(part, reader) for part in parts]
    for by_axis in zip(*by_part, strict=True):
        if len(tensor.shape) > 2:
            energies = np.concatenate(by_axis)
        elif len({each.shape for each in by_axis}) == 1:
            energies = np.sum(by_axis, axis=0)
        else:
            continue
        if expected.shape == energies.shape and np.allclose(expected, energies, rtol=_TOLERANCE, atol=0):
            return True
    return False


def _sum_tensor_squares(tensor: Any) -> Energies:
    import gguf

    data, width = tensor.data, int(tensor.shape[0])
    matrices = data if data.ndim > 2 else data.reshape(1, -1, data.shape[-1])
    energies = np.zeros((len(matrices), width))
    step = max(_BLOCK // width, 1)
    for total, rows in zip(energies, matrices, strict=True):
        for start in range(0, len(rows), step):
            piece = gguf.dequantize(rows[start : start + step], tensor.tensor_type)
            total += np.square(piece.astype(np.float64)).sum(axis=0)
    return energies


def _sum_plain_squares(plain: Values, reader: Reader) -> tuple[Energies, Energies]:
    """Return the energies with channels along the last axis, and along the one before it."""
    *_, height, columns = plain.shape
    matrices = plain.shape[0] if len(plain.shape) > 2 else 1
    last, first = np.zeros((matrices, columns)), np.zeros(matrices * height)
    for block, floats in plain.floats(reader):
        squares = np.square(floats.numpy())
        first[block.rows] = squares.sum(axis=1)
        for matrix in range(matrices):
            begin = matrix * height - block.first_row
            end = begin + height
            if begin < len(squares) and end > 0:
                last[matrix] += squares[max(begin, 0) : end].sum(axis=0)
    return last, first.reshape(matrices, height)
