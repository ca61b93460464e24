"""Reading the header of a safetensors file: names, dtypes, shapes and offsets, never the data.

The format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON, data without holes).
The safetensors library gives no offsets, and streaming needs them.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from compressknow.errors import CheckpointError
from compressknow.model.tensors import DTYPE_SIZES, StoredTensor
from compressknow.reading import open_regular, parse_json

# The reference implementation refuses longer headers too. 200,000 tensors of two dimensions, each twelve marks.
MAX_HEADER_BYTES = 100_000_000
MAX_HEADER_VALUES = 2_400_000
METADATA = "__metadata__"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by name, in the order of their data.

    Raises
    ------
    CheckpointError : the file is truncated, its header is not valid, or its tensors do not fill the data exactly.
    """
    header, data_start = _load(path)
    try:
        tensors = [_tensor(path, name, entry, data_start) for name, entry in header.items() if name != METADATA]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from None
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(path, tensors, data_start, path.stat().st_size)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file says about itself, such as ``{"format": "pt"}``.

    Raises CheckpointError as `read_header` does where the header is not valid.
    """
    metadata: dict[str, str] = _load(path)[0].get(METADATA, {})
    return metadata


def _load(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it stands in the file, and the offset at which the data starts."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise _damaged(path, f"its header claims {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    try:
        header = parse_json(raw, most_values=MAX_HEADER_VALUES, pairs=_without_repetition)
    except ValueError as error:
        raise _damaged(path, f"its header cannot be read ({error})") from None
    if not isinstance(header, dict) or not _is_text_by_name(header.get(METADATA, {})):
        raise _damaged(path, "its header is no object of tensors by name")
    return header, 8 + length


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key stands in it twice")
    return entries


def _is_text_by_name(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _tensor(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    name.encode()  # Half a surrogate pair is no text: nothing could write it again.
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_SIZES:
        raise ValueError(f"dtype {dtype!r} of {name} is unknown")
    if not isinstance(shape, list) or not all(_is_size(number) for number in (*shape, start, end)):
        raise ValueError(f"{name} has a shape or offsets that are no whole numbers")
    if end - start != math.prod(shape) * DTYPE_SIZES[dtype]:
        raise ValueError(f"{name} has shape {shape} but {end - start} bytes")
    return StoredTensor(name, dtype, tuple(shape), path, data_start + start)


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 0


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise _damaged(path, f"{tensor.name} starts at byte {tensor.offset:,}, expected {position:,}")
        position += tensor.nbytes
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position:,}, the file at {size:,}: it is truncated or padded")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound safetensors file: {why}.", hint="Download or save it again.")
