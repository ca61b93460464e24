"""Plain floats of a checkpoint's weights, as llama.cpp's converter reads them: what was quantized is unpacked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from compressknow.base.errors import UnsupportedError
from compressknow.compress.blocks import Reader
from compressknow.compress.output import lay_out_file, list_carried_files
from compressknow.compress.weights import Side, Values
from compressknow.model.checkpoint import SAFETENSORS, Checkpoint
from compressknow.model.manifest import CARD_NAME
from compressknow.model.tensors import DTYPE_SIZES, FLOAT_DTYPES, byte_view

_INTEGERS = ("I64", "I32", "I16", "U8", "BOOL")


@dataclass(frozen=True)
class Plain:
    """Tensor to write: its name in the files, and its values. Integers become float32, in which they are multiplied
    with their scale; all else stays as it is."""

    name: str
    values: Values

    @property
    def dtype(self) -> str:
        return "F32" if self.values.scale else self.values.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.tensor.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * 4 if self.values.scale else self.values.tensor.nbytes


def list_plain_tensors(side: Side, checkpoint: Checkpoint) -> list[Plain]:
    """Return a checkpoint's tensors without quantization, by its stored names, in their order.

    Raises UnsupportedError where values cannot be read: another tool has packed them.
    """
    plain: dict[str, Plain] = {}
    for key, tensor in side.own.items():
        values = side.values(key)
        if values is None or not (values.scale or values.tensor.dtype in (*FLOAT_DTYPES, *_INTEGERS)):
            raise UnsupportedError(
                f"{tensor.name} is stored as {side.packed(key) or tensor.dtype}, which cannot be unpacked here.",
                hint="Export the original, or what `compressknow convert` wrote.",
            )
        plain[tensor.name] = Plain(tensor.name, values)
    for name in side.packed_weights():
        raise UnsupportedError(
            f"{name} is stored as {side.packed(name)}, which cannot be unpacked here.",
            hint="Export the original, or what `compressknow convert` wrote.",
        )
    place = {name: number for number, name in enumerate(checkpoint.tensors)}
    return sorted(plain.values(), key=lambda each: place.get(each.values.stored.name, len(place)))


def is_plain(checkpoint: Checkpoint) -> bool:
    """Return whether the converter reads a folder as it is: floats in safetensors, all of which belong to the
    checkpoint."""
    files = {path.name for path in checkpoint.folder.glob("model*.safetensors")}
    return (
        checkpoint.revision is None
        and files == set(checkpoint.shards)
        and "quantization_config" not in checkpoint.config
        and all(tensor.dtype in (*FLOAT_DTYPES, *_INTEGERS) for tensor in checkpoint.tensors.values())
    )


def choose_float_type(tensors: list[Plain]) -> str:
    """Return the smallest of ``F16``, ``BF16`` and ``F32`` that holds every matrix exactly."""
    dtypes = {each.dtype for each in tensors if len(each.shape) > 1 and each.dtype in FLOAT_DTYPES}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def write_plain(checkpoint: Checkpoint, tensors: list[Plain], reader: Reader, folder: Path) -> None:
    """Write a folder of plain weights, with the small files of the checkpoint; `reader` is told the bytes read."""
    folder.mkdir()
    for name in (*list_carried_files(checkpoint.folder), CARD_NAME):
        if (source := checkpoint.folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_bytes())
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    ordered = sorted(tensors, key=lambda each: -DTYPE_SIZES[each.dtype])
    with (folder / SAFETENSORS).open("xb") as file:
        file.write(lay_out_file([(each.name, each.dtype, each.shape) for each in ordered])[0])
        for tensor in ordered:
            for piece in _read_pieces(tensor, reader):
                file.write(byte_view(piece.contiguous()))


def _read_pieces(tensor: Plain, reader: Reader) -> Iterator[torch.Tensor]:
    if not prod(tensor.shape):
        return iter(())
    if tensor.values.scale is None:
        return (block.values for block in reader.blocks(tensor.values.stored))
    return (floats.to(torch.float32) for _, floats in tensor.values.floats(reader))
