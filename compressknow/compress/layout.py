"""The weight files of an output, laid out before any is written: each tensor's file and offset, each file's header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from compressknow.compress.plan import PlannedTensor
from compressknow.model.checkpoint import SAFETENSORS
from compressknow.model.tensors import DTYPE_SIZES, StoredTensor

# transformers refuses a file without it.
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes go."""

    file: str
    offset: int


@dataclass(frozen=True)
class Layout:
    """`headers` gives each file's first bytes, `sizes` its whole size, `places` the place of each tensor by name."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, Place]
    index: dict[str, Any] | None


def lay_out(tensors: Sequence[PlannedTensor], shards: Sequence[str]) -> Layout:
    """One safetensors file for each of the source's weight files of which tensors are left, with an index where there
    are several.

    Within a file tensors are sorted by the width of their dtype, widest first, as the safetensors library does: so
    each lies aligned without holes, which the format forbids.
    """
    shard_of = {tensor.name: _shard_of(tensor.source, shards) for tensor in tensors}
    names = _file_names([shard for shard in shards if shard in shard_of.values()])
    by_file: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {name: [] for name in names.values()}
    for tensor in tensors:
        by_file[names[shard_of[tensor.name]]] += [(name, part.dtype, part.shape) for name, part in tensor.written]
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, Place] = {}
    for file, entries in by_file.items():
        entries.sort(key=lambda entry: -DTYPE_SIZES[entry[1]])
        headers[file], sizes[file], offsets = lay_out_file(entries)
        places |= {name: Place(file, offset) for name, offset in offsets.items()}
    return Layout(headers, sizes, places, _index(places, headers, sizes) if len(headers) > 1 else None)


def _file_names(shards: Sequence[str]) -> dict[str, str]:
    if len(shards) == 1:
        return {shards[0]: SAFETENSORS}
    return {shard: f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards)}


def _shard_of(source: StoredTensor, shards: Sequence[str]) -> str:
    # A shard may lie in a folder of its own: its name is as much of the path's end as the index gives.
    parts, names = source.file.parts, {PurePath(shard).as_posix(): shard for shard in shards}
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next(names[end] for end in ends if end in names)


def lay_out_file(entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int, dict[str, int]]:
    """A file's first bytes, its whole size, and the offset of each tensor (name, dtype, shape), in this order: the
    widest dtypes first, so that each lies aligned."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    position = 0
    for name, dtype, shape in entries:
        size = DTYPE_SIZES[dtype]
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name, _, _ in entries}
    return len(text).to_bytes(8, "little") + text, start + position, offsets


def _index(places: Mapping[str, Place], headers: Mapping[str, bytes], sizes: Mapping[str, int]) -> dict[str, Any]:
    total = sum(sizes.values()) - sum(map(len, headers.values()))
    weight_map = {name: place.file for name, place in sorted(places.items())}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
