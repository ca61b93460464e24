"""How two GGUF files of one architecture differ, by what llama.cpp's own gguf package makes of their blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressknow.base.errors import CompressknowError
from compressknow.base.progress import Advance, count_progress
from compressknow.comparison.differences import ConfigChange, Difference, StructureChange, Sums, TensorDifference
from compressknow.comparison.weights import sums_of
from compressknow.compress.pool import Pool
from compressknow.model.gguf_file import EMBEDDING, NOT_LINEAR, Tensor, groups_of, open_gguf, tensors_of, value_of

# Values of a tensor that are unpacked at a time.
_VALUES = 1 << 22
# Of a value that is longer, its hash is told.
_LONGEST = 80
# What the types are, and who made the file, is told elsewhere.
_NOISE = (
    "GGUF.",
    "general.name",
    "general.file_type",
    "general.quantization_version",
    "compressknow.",
    "quantize.",
    "split.",
)


def gguf_difference(
    a: Sequence[Path], b: Sequence[Path], *, threads: int | None = None, advance: Advance | None = None
) -> Difference:
    """Compare what two GGUF files hold, each of one part or several.

    Raises
    ------
    CheckpointError : one of them is damaged.
    CompressknowError : they are of different architectures.
    """
    readers = [[open_gguf(part) for part in parts] for parts in (a, b)]
    kinds = [str(value_of(own[0], "general.architecture")) for own in readers]
    if kinds[0] != kinds[1]:
        raise CompressknowError(
            f"{a[0].name} and {b[0].name} cannot be compared: they are of different architectures.",
            f"{a[0].name} is {kinds[0]}, {b[0].name} is {kinds[1]}: their weights cannot be matched.",
            "Compare files made from the same original.",
        )
    described = [{name: t for reader in own for name, t in tensors_of(reader).items()} for own in readers]
    stored = [{each.name: each for reader in own for each in reader.tensors} for own in readers]
    both = [name for name, t in described[0].items() if (o := described[1].get(name)) and o.shape == t.shape]
    groups = groups_of(described[0])
    add = count_progress(advance, sum(each[name].nbytes for each in described for name in both))

    def compared(name: str) -> TensorDifference | None:
        one, other = (each[name] for each in described)
        try:
            sums, same = _deviation(*(each[name] for each in stored))
        except NotImplementedError:
            # A type that the gguf package cannot unpack.
            return None
        finally:
            add(one.nbytes + other.nbytes)
        return _difference(groups[name], one, other, sums, same)

    with Pool(threads) as pool:
        found = dict(zip(both, pool.map(compared, both), strict=True))
    packed = {name for name, made in found.items() if made is None}
    return Difference(
        architecture=kinds[0],
        config=tuple(_changes(readers[0][0], readers[1][0])),
        structure=tuple(_structure(described[0], described[1], packed)),
        tensors=tuple(made for made in found.values() if made is not None),
    )


def _difference(group: str, a: Tensor, b: Tensor, sums: Sums, same: bool) -> TensorDifference:
    # As of a checkpoint: an embedding is no Linear layer, and a vector is none.
    linear = group not in (EMBEDDING, NOT_LINEAR)
    in_block = linear and a.layer is not None
    return TensorDifference(
        name=a.name,
        group=group if linear else NOT_LINEAR,
        stack=None,
        layer=a.layer if in_block else None,
        module=a.name.split(".", 2)[2].removesuffix(".weight") if in_block else None,
        shape=a.shape[::-1],
        dtype_a=a.type,
        dtype_b=b.type,
        bytes_a=a.nbytes,
        bytes_b=b.nbytes,
        same_bytes=same,
        sums=sums,
    )


def _deviation(a: Any, b: Any) -> tuple[Sums, bool]:
    """The sums of two tensors of one shape, unpacked piece by piece, and whether they are stored alike to the bit."""
    rows_a, rows_b = (each.data.reshape(-1, each.data.shape[-1]) for each in (a, b))
    same = a.tensor_type == b.tensor_type and np.array_equal(rows_a.view(np.uint8), rows_b.view(np.uint8))
    sums, step = Sums(), max(_VALUES // int(a.shape[0]), 1)
    for start in range(0, len(rows_a), step):
        x = _floats(rows_a[start : start + step], a.tensor_type)
        sums += sums_of(x, x if same else _floats(rows_b[start : start + step], b.tensor_type))
    return sums, same


def _floats(rows: Any, kind: Any) -> torch.Tensor:
    """float64."""
    import gguf

    return torch.from_numpy(np.ascontiguousarray(gguf.dequantize(rows, kind)).astype(np.float64))


def _structure(a: Mapping[str, Tensor], b: Mapping[str, Tensor], packed: set[str]) -> Iterator[StructureChange]:
    for name in dict.fromkeys([*a, *b]):
        one, other = _told(a.get(name)), _told(b.get(name))
        if name not in b or name not in a:
            yield StructureChange(name, "missing" if name in a else "added", one, other)
        elif a[name].shape != b[name].shape:
            yield StructureChange(name, "reshaped", one, other)
        elif name in packed:
            yield StructureChange(name, "packed", one, other)
        elif a[name].type != b[name].type:
            yield StructureChange(name, "retyped", one, other)


def _told(tensor: Tensor | None) -> str:
    return "-" if tensor is None else f"{tensor.type} {list(tensor.shape[::-1])}"


def _changes(a: Any, b: Any) -> Iterator[ConfigChange]:
    before, after = (dict(_settings(each)) for each in (a, b))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield ConfigChange(key, before.get(key), after.get(key))


def _settings(reader: Any) -> Iterator[tuple[str, str]]:
    for key, field in reader.fields.items():
        if not key.startswith(_NOISE):
            said = json.dumps(field.contents(), ensure_ascii=False, default=str)
            short = f"{len(said):,} characters, {hashlib.sha256(said.encode('utf-8', 'replace')).hexdigest()[:16]}"
            yield key, said if len(said) <= _LONGEST else short
