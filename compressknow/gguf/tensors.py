"""Tensors of a GGUF file and the checkpoint's weights: which is in which, by the name map of llama.cpp's gguf package;
these weights as plain floats for llama.cpp's converter; and which of them it did not reorder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressknow.base.errors import UnsupportedError, UsageError, suggest_word
from compressknow.base.reading import group_by
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.output import lay_out_file, list_carried_files
from compressknow.compress.weights import StoredWeights, Values
from compressknow.model.checkpoint import SAFETENSORS, Checkpoint
from compressknow.model.gguf_file import EMBEDDING, ORDER, UNPLACED, Tensor, count_by_type, list_tensors
from compressknow.model.manifest import CARD_NAME
from compressknow.model.structure import NOT_LINEAR, SCOPES, LinearWeight, compile_pattern, list_scopes, select
from compressknow.model.tensors import DTYPE_SIZES, FLOAT_DTYPES, OpenFiles, view_bytes

# GGUF merges experts into one tensor, which checkpoints may store one by one.
EXPERT = re.compile(r"experts\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
# Bytes that a file has beyond the intermediate one: what llama.cpp adds, and each of our keys.
_METADATA, _RULE = 4096, 48
ALIGNMENT = 32


@dataclass(frozen=True)
class Tensors:
    """Tensors of a GGUF file and the checkpoint that it was made from: for each tensor, the Linear weights that it
    consists of, and the names that the checkpoint stores these under. `start` is the size before the tensors."""

    source: StoredWeights
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, tuple[LinearWeight, ...]]
    stored: Mapping[str, tuple[str, ...]]
    start: int = 0

    @cached_property
    def groups(self) -> dict[str, str]:
        """Return the group of each tensor: that of its Linear weights; a tied embedding belongs to the final layer."""
        return {name: self._get_group(tensor) for name, tensor in self.tensors.items()}

    def _get_group(self, tensor: Tensor) -> str:
        if tensor.name in self.weights:
            return self.weights[tensor.name][0].group or UNPLACED
        if tensor.name.startswith("token_embd."):
            return EMBEDDING
        return NOT_LINEAR if len(tensor.shape) < 2 else UNPLACED

    def find_by_scope(self, scope: str) -> list[str]:
        """Return the tensors in a scope. Raises UsageError if there are none."""
        selected = {weight.parameter for weight in select(self.source.structure, (scope,), "quantize")}
        return [name for name, each in self.weights.items() if any(weight.parameter in selected for weight in each)]

    def find_by_pattern(self, text: str, option: str) -> list[str]:
        """Return the tensors whose name a regular expression matches. Raises UsageError if there are none."""
        pattern = compile_pattern(option, text)
        names = [name for name, tensor in self.tensors.items() if len(tensor.shape) > 1 and pattern.search(name)]
        if not names:
            scopes = list_scopes(self.source.structure)
            kinds = dict.fromkeys(re.sub(r"\d+", "N", name) for name in self.groups if "norm" not in name)
            raise UsageError(
                f"{option} {text!r} is not a scope, and matches no tensor of the GGUF file.",
                hint=f"{suggest_word(text, scopes)}Choose from {', '.join(scopes)}. Tensors (N stands for a number): "
                f"{', '.join(kind for kind in kinds if kind.endswith('.weight'))}.",
            )
        return names


def resolve_types(tensors: Tensors, types: Iterable[tuple[str, str]], option: str = "--type-of") -> dict[str, str]:
    """Return the type of each tensor that a rule matches, by the last one that does. Raises UsageError for a rule that
    matches none."""
    return {
        name: kind
        for target, kind in types
        for name in (tensors.find_by_scope(target) if target in SCOPES else tensors.find_by_pattern(target, option))
    }


def describe_tensors(reader: Any, source: StoredWeights) -> Tensors:
    """Return the content of an open GGUF file, except the values of its weights."""
    tensors, name_map = list_tensors(reader), _get_name_map(reader)
    parts = group_by(source.loaded_to, source.loaded_to.__getitem__)
    # Ordered sets: a tensor may hold several weights (experts, merged projections), and a weight be in several tensors.
    weights: dict[str, dict[LinearWeight, None]] = {}
    stored: dict[str, dict[str, None]] = {}
    for weight in source.structure.linears if name_map else ():
        supplier = source.supply.get(weight.parameter)
        for name in parts.get(weight.parameter) or ([supplier.name] if supplier else []):
            for each in (name, weight.parameter):
                tensor = name_map.get_name(EXPERT.sub("experts.", each), try_suffixes=_SUFFIXES)
                if tensor in tensors:
                    weights.setdefault(tensor, {})[weight] = None
                    stored.setdefault(tensor, {})[name] = None
                    break
    by_tensor = {name: tuple(each) for name, each in weights.items()}
    return Tensors(
        source, tensors, by_tensor, {name: tuple(each) for name, each in stored.items()}, int(reader.data_offset)
    )


def _get_name_map(reader: Any) -> Any:
    """Return the name map of the file's architecture; None if the gguf package does not know it."""
    import gguf

    name = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    arch = next((arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    blocks = [field.contents() for key, field in reader.fields.items() if key.endswith("block_count")]
    return gguf.get_tensor_name_map(arch, max(blocks, default=0)) if arch is not None else None


def count_by_group(tensors: Tensors, types: Mapping[str, str] | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Count tensors, parameters and bytes by group and type; `types` are those chosen in a dry run, if any."""
    import gguf

    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.tensors.items():
        if types and (kind := types.get(name, tensor.type)) != tensor.type:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
            tensor = replace(tensor, type=kind, nbytes=tensor.numel // block * size)
        groups.setdefault(tensors.groups[name], []).append(tensor)
    return {group: count_by_type(groups[group]) for group in ORDER if group in groups}


def align(nbytes: int) -> int:
    """Return the bytes of a tensor in a file, with padding.

    >>> align(18), align(64)
    (32, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def is_matrix(tensors: Tensors, name: str) -> bool:
    """Return whether llama.cpp quantizes a tensor: a Linear weight, or the token embedding."""
    return name in tensors.weights or name == "token_embd.weight"


def measure_overhead(tensors: Tensors) -> int:
    """Return an upper bound of the bytes of all but the matrices: vocabulary, norms, metadata, rules for types."""
    names = [name for name in tensors.tensors if is_matrix(tensors, name)]
    others = sum(align(each.nbytes) for name, each in tensors.tensors.items() if name not in names)
    rules = sum(len(name) + _RULE for name in names)
    return tensors.start + others + rules + _METADATA


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
