"""Tensors of a GGUF file, the weights of a checkpoint in each, and these weights as the converter reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.errors import UnsupportedError, UsageError, did_you_mean
from compressknow.compress.blocks import Reader
from compressknow.compress.output import lay_out_file, list_carried_files
from compressknow.compress.pool import Pool
from compressknow.compress.weights import Side, Values
from compressknow.model.checkpoint import SAFETENSORS, Checkpoint
from compressknow.model.gguf_file import EMBEDDING, NOT_LINEAR, ORDER, UNPLACED, Tensor, tensors_of
from compressknow.model.manifest import CARD_NAME
from compressknow.model.structure import SCOPES, compile_pattern, scope_names, select
from compressknow.model.tensors import DTYPE_SIZES, FLOAT_DTYPES, OpenFiles, byte_view

if TYPE_CHECKING:
    from compressknow.model.structure import LinearWeight


# Experts that are stored one by one are one tensor in GGUF.
_EXPERT = re.compile(r"experts\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
# Of a file, beside what the one in between has: what llama.cpp adds of its own, and our keys.
_METADATA, _RULE = 4096, 48
ALIGNMENT = 32


@dataclass(frozen=True)
class Tensors:
    """Content of a GGUF file, and the weights of the checkpoint that it was made of.

    Attributes
    ----------
    weights : by the name of a tensor of the file, the Linear weights that it is, or is made of.
    stored : by the same, the names under which the checkpoint stores these.
    """

    side: Side
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, tuple[LinearWeight, ...]]
    stored: Mapping[str, tuple[str, ...]]

    @cached_property
    def groups(self) -> dict[str, str]:
        """Return the group of each tensor: Linear weights have theirs; a tied embedding is the final layer too."""
        return {name: self._get_group(tensor) for name, tensor in self.tensors.items()}

    def _get_group(self, tensor: Tensor) -> str:
        if tensor.name in self.weights:
            return self.weights[tensor.name][0].group or UNPLACED
        if tensor.name.startswith("token_embd."):
            return EMBEDDING
        return NOT_LINEAR if len(tensor.shape) < 2 else UNPLACED

    def find_by_scope(self, scope: str) -> list[str]:
        """Return the tensors that a scope takes. Raises UsageError where it takes none."""
        taken = {weight.parameter for weight in select(self.side.structure, (scope,), "quantize")}
        return [name for name, own in self.weights.items() if any(weight.parameter in taken for weight in own)]

    def find_by_pattern(self, text: str) -> list[str]:
        """Return the tensors whose name a regular expression matches. Raises UsageError where it matches none."""
        pattern = compile_pattern("--type-of", text)
        names = [name for name, tensor in self.tensors.items() if len(tensor.shape) > 1 and pattern.search(name)]
        if not names:
            scopes = scope_names(self.side.structure)
            kinds = dict.fromkeys(re.sub(r"\d+", "N", name) for name in self.groups if "norm" not in name)
            raise UsageError(
                f"--type-of {text!r} is no scope, and matches no tensor of the GGUF file.",
                hint=f"{did_you_mean(text, scopes)}There is {', '.join(scopes)}. Tensors (N stands for a number): "
                f"{', '.join(kind for kind in kinds if kind.endswith('.weight'))}.",
            )
        return names


def resolve_types(tensors: Tensors, types: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the type of each tensor that a rule names; of several rules the last holds.

    Raises UsageError for a rule that names none.
    """
    return {
        name: chosen
        for which, chosen in types
        for name in (tensors.find_by_scope(which) if which in SCOPES else tensors.find_by_pattern(which))
    }


def read_tensors(path: Path, side: Side) -> Tensors:
    """Read what a GGUF file holds, but for its weights."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = tensors_of(reader)
    weights: dict[str, list[LinearWeight]] = {}
    stored: dict[str, dict[str, None]] = {}
    for weight, name, places in _map_weights(_get_name_map(reader), side, tensors):
        weights.setdefault(name, []).append(weight)
        stored.setdefault(name, {}).update(dict.fromkeys(places))
    return Tensors(
        side,
        tensors,
        {name: tuple(own) for name, own in weights.items()},
        {name: tuple(own) for name, own in stored.items()},
    )


def _get_name_map(reader: Any) -> Any:
    """Return the map of the file's architecture; None where this gguf package does not know it."""
    import gguf

    name = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    arch = next((arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    blocks = [field.contents() for key, field in reader.fields.items() if key.endswith("block_count")]
    return gguf.get_tensor_name_map(arch, max(blocks, default=0)) if arch is not None else None


def _map_weights(
    name_map: Any, side: Side, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[LinearWeight, str, list[str]]]:
    """Yield each Linear weight with a tensor that holds it or a part of it, and the names by which that is stored."""
    parts: dict[str, list[str]] = {}
    for stored, parameter in side.loaded_to.items():
        parts.setdefault(parameter, []).append(stored)
    for weight in side.structure.linears if name_map else ():
        supplier = side.supply.get(weight.parameter)
        own = parts.get(weight.parameter) or ([supplier.name] if supplier else [])
        held: dict[str, list[str]] = {}
        for name in own:
            mapped = (
                name_map.get_name(_EXPERT.sub("experts.", each), try_suffixes=_SUFFIXES)
                for each in (name, weight.parameter)
            )
            if (holder := next((each for each in mapped if each in tensors), None)) is not None:
                held.setdefault(holder, []).append(name)
        for holder, names in held.items():
            yield weight, holder, names


def count_by_group(tensors: Tensors, types: Mapping[str, str] | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Count tensors, parameters and bytes by group and type. `types` are those that a dry run has chosen."""
    import gguf

    summed: dict[str, dict[str, dict[str, int]]] = {}
    for name, tensor in tensors.tensors.items():
        kind, nbytes = tensor.type, tensor.nbytes
        if types and types.get(name, kind) != kind:
            kind = types[name]
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
            nbytes = tensor.numel // block * size
        counts = summed.setdefault(tensors.groups[name], {}).setdefault(
            kind, {"tensors": 0, "parameters": 0, "bytes": 0}
        )
        counts["tensors"] += 1
        counts["parameters"] += tensor.numel
        counts["bytes"] += nbytes
    return {group: summed[group] for group in ORDER if group in summed}


def align(nbytes: int) -> int:
    """Return the bytes that a tensor takes in a file.

    >>> align(18), align(64)
    (32, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def is_matrix(tensors: Tensors, name: str) -> bool:
    """Return whether llama.cpp rounds a tensor: the Linear weights, and the embedding of tokens."""
    return name in tensors.weights or name == "token_embd.weight"


def measure_overhead(exact: Path, tensors: Tensors) -> int:
    """Return bytes of a file beside its matrices, no fewer than they will be: vocabulary, norms and metadata, which
    includes the rules for its types."""
    import gguf

    names = [name for name in tensors.tensors if is_matrix(tensors, name)]
    others = sum(align(each.nbytes) for name, each in tensors.tensors.items() if name not in names)
    rules = sum(len(name) + _RULE for name in names)
    return int(gguf.GGUFReader(exact).data_offset) + others + rules + _METADATA


_INTEGERS = ("I64", "I32", "I16", "U8", "BOOL")
# Energies of input channels: float64 [matrices, in].
Energies = npt.NDArray[np.float64]
_TOLERANCE = 1e-6
# Weights of a GGUF file that are unpacked at a time.
_BLOCK = 1 << 22


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


def find_same_channels(exact: Path, tensors: Tensors, plain: Sequence[Plain]) -> list[str]:
    """Return the names of tensors whose input channels are those of the checkpoint, in its order.

    The converter may turn rows round (Llama's queries and keys), transpose, merge and stack. The energy of each input
    channel, the sum of squares over all rows, survives that; it does not survive another order of channels.

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
    ordered = sorted(parts, key=lambda part: int(expert[1]) if (expert := _EXPERT.search(part.name)) else 0)
    by_part = [_sum_plain_squares(part, reader) for part in ordered]
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
