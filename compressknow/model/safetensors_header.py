"""Reading the header of a safetensors file: names, dtypes, shapes and offsets, never the data.

The format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON, data without holes).
The safetensors library gives no offsets, and streaming needs them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from compressknow.errors import CheckpointError
from compressknow.model.tensors import DTYPE_SIZES, StoredTensor

# The reference implementation refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by name, in the order of their data.

    Raises
    ------
    CheckpointError : the file is truncated, its header is not valid, or its tensors do not fill the data exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise _damaged(path, f"its header claims {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from None
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if entry["dtype"] not in DTYPE_SIZES:
        raise ValueError(f"dtype {entry['dtype']!r} of {name} is unknown")
    if any(size < 0 for size in shape) or end - start != math.prod(shape) * DTYPE_SIZES[entry["dtype"]]:
        raise ValueError(f"{name} has shape {list(shape)} but {end - start} bytes")
    return StoredTensor(name, entry["dtype"], shape, path, data_start + start)


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
