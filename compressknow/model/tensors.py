"""Stored tensors: headers of safetensors files and PyTorch files, whose pickled code is never run, and their bytes."""

from __future__ import annotations

import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from compressknow.base.errors import CheckpointError
from compressknow.base.reading import open_regular, parse_json
from compressknow.base.system import open_to_read, read_at

if TYPE_CHECKING:
    import torch


# Bytes per element and torch's name of a dtype, by its safetensors name.
_DTYPES = {
    **{"F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16")},
    **{"F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"), "F8_E8M0": (1, "float8_e8m0fnu")},
    **{"I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8")},
    **{"U64": (8, "uint64"), "U32": (4, "uint32"), "U16": (2, "uint16"), "U8": (1, "uint8")},
    **{"C64": (8, "complex64"), "BOOL": (1, "bool")},
}
DTYPE_SIZES = {name: size for name, (size, _) in _DTYPES.items()}
TORCH_NAMES = {name: torch_name for name, (_, torch_name) in _DTYPES.items()}
# Dtypes that can be compressed.
FLOAT_DTYPES = ("F32", "F16", "BF16")


def get_torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, in the same memory."""
    import torch

    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


@dataclass(frozen=True)
class StoredTensor:
    """Row-major tensor in a file (`dtype` by its safetensors name), or in `loaded` bytes if it cannot be read in place
    (a PyTorch file from before 1.6, or a tensor saved transposed)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    loaded: memoryview | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPE_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def rows(self, name: str, rows: range) -> StoredTensor:
        """Return some of its consecutive rows as a tensor with another name, in the same place."""
        row = self.nbytes // self.shape[0]
        start, stop = rows.start * row, rows.stop * row
        loaded = None if self.loaded is None else self.loaded[start:stop]
        return replace(self, name=name, shape=(len(rows), *self.shape[1:]), offset=self.offset + start, loaded=loaded)


# The largest finite magnitude of each float dtype, as the bits of a float without the sign.
_LARGEST = {
    **{"F64": 0x7FEF_FFFF_FFFF_FFFF, "F32": 0x7F7F_FFFF, "F16": 0x7BFF, "BF16": 0x7F7F},
    **{"F8_E5M2": 0x7B, "F8_E4M3": 0x7E},
}


def find_not_finite(raw: memoryview, tensor: StoredTensor) -> str | None:
    """Return "NaN" or "an infinity" if a piece of a tensor's bytes has one, else None."""
    import numpy as np

    if (largest := _LARGEST.get(tensor.dtype)) is None:
        return None
    whole = len(raw) - len(raw) % tensor.itemsize
    bits = np.frombuffer(raw[:whole], f"u{tensor.itemsize}")
    magnitude = int((bits & bits.dtype.type((1 << (8 * tensor.itemsize - 1)) - 1)).max(initial=0))
    # E4M3 has no infinity.
    is_infinity = magnitude == largest + 1 and tensor.dtype != "F8_E4M3"
    return None if magnitude <= largest else "an infinity" if is_infinity else "NaN"


class OpenFiles:
    """Descriptors of open files, each opened once. Threads can share them, since each read gives its offset."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_into(self, tensor: StoredTensor, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on. Raises CheckpointError if the file ends before."""
        if tensor.loaded is not None:
            buffer[:] = tensor.loaded[start : start + len(buffer)]
        elif read_at(self._open(tensor.file), buffer, tensor.offset + start) < len(buffer):
            raise CheckpointError(f"{tensor.file} ended while {tensor.name} was read: the file was changed.")

    def chunks(self, tensor: StoredTensor, size: int) -> Iterator[memoryview]:
        """Yield the tensor's bytes in pieces of at most `size`, each valid until the next is requested."""
        buffer = memoryview(bytearray(min(size, tensor.nbytes)))
        for start in range(0, tensor.nbytes, size):
            piece = buffer[: min(size, tensor.nbytes - start)]
            self.read_into(tensor, piece, start)
            yield piece

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            opened = open_to_read(file)
            # Two threads may open the same file at once; the first to register it wins.
            if self._descriptors.setdefault(file, opened) != opened:
                os.close(opened)
        return self._descriptors[file]


COMPARE_BYTES = 1 << 22


def has_same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two stored tensors have the same dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if (one.file, one.offset) == (other.file, other.offset):
        return True
    with OpenFiles() as files:
        chunks = zip(files.chunks(one, COMPARE_BYTES), files.chunks(other, COMPARE_BYTES), strict=True)
        return all(left == right for left, right in chunks)


# Neighbours in a row that share scales in all low-bit formats, and the number of values that 4 bits can have. Of 32
# weights in bfloat16 that were not rounded, 31 differ.
GRID_NEIGHBOURS, GRID_VALUES = 32, 16
# Groups with fewer nonzero weights than this are skipped: pruned groups have few values anyway.
GRID_NONZERO = 24
# Approximate number of rows that are read of each matrix.
GRID_ROWS = 16


def find_grid(tensors: Iterable[StoredTensor]) -> dict[str, int] | None:
    """Count the stored matrices that already lie on a coarse grid, for example because they were unpacked from few
    bits, by reading some rows of each. Returns their number (``weights``), ``of`` how many, and ``values``, the most
    distinct values in a group of 32; None if none does."""
    matrices = [each for each in tensors if each.dtype in FLOAT_DTYPES and len(each.shape) == 2]
    with OpenFiles() as files:
        counts = [_count_most_values(files, each) for each in matrices if each.shape[1] % GRID_NEIGHBOURS == 0]
    on_grid = [count for count in counts if count is not None and count <= GRID_VALUES]
    return {"weights": len(on_grid), "of": len(counts), "values": max(on_grid)} if on_grid else None


def _count_most_values(files: OpenFiles, tensor: StoredTensor) -> int | None:
    """Return the largest number of different weights in any group of some rows; None if all are mostly zeros."""
    import numpy as np

    rows, columns = tensor.shape
    width = columns * tensor.itemsize
    chosen = range(0, rows, max(1, rows // GRID_ROWS))
    content = bytearray(len(chosen) * width)
    for number, row in enumerate(chosen):
        files.read_into(tensor, memoryview(content)[number * width : (number + 1) * width], row * width)
    # Values are compared by their bits; the shift drops the sign, so that negative zeros count as zeros.
    bits = np.sort(np.frombuffer(content, f"u{tensor.itemsize}").reshape(-1, GRID_NEIGHBOURS), axis=1)
    groups = bits[(bits << 1 != 0).sum(axis=1) >= GRID_NONZERO]
    return int((np.diff(groups, axis=1) != 0).sum(axis=1).max()) + 1 if len(groups) else None


# The reference implementation rejects longer headers too.
MAX_HEADER_BYTES = 100_000_000
# 200,000 tensors of two dimensions, with twelve JSON values each.
MAX_HEADER_VALUES = 2_400_000
METADATA = "__metadata__"
# Metadata that transformers requires.
PT_FORMAT = {"format": "pt"}
# The start of the text that replaces each large file in a clone without git-lfs.
LFS_POINTER = b"version "


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of their data. Raises CheckpointError if it is
    truncated, its header is invalid, or its tensors do not fill the data exactly."""
    header, data_start = _load(path)
    try:
        tensors = [_parse_tensor(path, name, entry, data_start) for name, entry in header.items() if name != METADATA]
    except (ValueError, KeyError, TypeError) as error:
        raise _report_damage(path, f"its header cannot be read ({error})") from None
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position, size = data_start, path.stat().st_size
    for tensor in tensors:
        if tensor.offset != position:
            raise _report_damage(path, f"{tensor.name} starts at byte {tensor.offset:,}, expected {position:,}")
        position += tensor.nbytes
    if position != size:
        raise _report_damage(
            path, f"its tensors end at byte {position:,}, the file at {size:,}: it is truncated or padded"
        )
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, such as ``{"format": "pt"}``. Raises as `read_header` does."""
    metadata: dict[str, str] = _load(path)[0].get(METADATA, {})
    return metadata


def _load(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file, parsed, and the offset at which the data starts."""
    try:
        opened = open_regular(path)
    except ValueError as error:
        raise _report_damage(path, str(error)) from None
    with opened as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start == LFS_POINTER:
            raise CheckpointError(
                f"{path} is a git-lfs pointer, a text instead of the weights.",
                hint="Run `git lfs pull` in its folder, or download it again.",
            )
        length = int.from_bytes(start, "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise _report_damage(path, f"its header claims {length:,} bytes, but the file has {size:,}")
        raw = file.read(length)
    try:
        header = parse_json(raw, most_values=MAX_HEADER_VALUES, pairs=_refuse_repeated_keys)
    except ValueError as error:
        raise _report_damage(path, f"its header cannot be read ({error})") from None
    metadata = header.get(METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _report_damage(path, "its header is not a JSON object of tensors by name")
    return header, 8 + length


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs in it twice")
    return entries


def _parse_tensor(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    name.encode()  # Raises for half a surrogate pair, which could not be written again.
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_SIZES:
        raise ValueError(f"dtype {dtype!r} of {name} is unknown")
    if not isinstance(shape, list) or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name} has a shape or offsets that are not whole numbers")
    if end - start != math.prod(shape) * DTYPE_SIZES[dtype]:
        raise ValueError(f"{name} has shape {shape} but {end - start} bytes")
    return StoredTensor(name, dtype, tuple(shape), path, data_start + start)


def _report_damage(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound safetensors file: {why}.", hint="Download or save it again.")


# A record's local header in a zip archive: its signature, and the lengths of the two fields that follow.
LOCAL_HEADER = struct.Struct("<4s22xHH")
ENCRYPTED = 0x2061
# 200,000 tensors, with some 150 bytes each in the pickle.
MAX_PICKLE_BYTES = 32_000_000
# Limits on expanding compressed tensors, or repeats by strides of 0: times the file's size, plus bytes.
EXPANSION, MAX_EXPANDED_BYTES = 4, 256_000_000
_NAMES_BY_TORCHS = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a PyTorch checkpoint by name, in its order. In zip archives with plain storages (PyTorch
    1.6 and later), only the offsets are read; other tensors, or those not row-major, are loaded into memory. Raises
    CheckpointError if the pickle contains more than tensors (it could run code), is damaged, or holds no flat state
    dict."""
    if records := _list_records_in_place(path):
        state = _load_pickle(path, map_location="meta")
        if all(_is_in_place(records, tensor) for tensor in state.values()):
            return {name: _make_stored(path, name, tensor, in_place=True) for name, tensor in state.items()}
    state = _load_pickle(path, map_location="cpu")
    _check_expanded(path, state)
    return {name: _make_stored(path, name, tensor, in_place=False) for name, tensor in state.items()}


def _check_packed(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raise CheckpointError for an archive that unpacks to far more than its size: weights compress to half at best."""
    size = path.stat().st_size
    if (unpacked := sum(entry.file_size for entry in entries)) > EXPANSION * size + MAX_EXPANDED_BYTES:
        raise CheckpointError(
            f"{path} has {size:,} bytes, but would unpack to {unpacked:,}: refused.",
            hint="Save it again with torch.save or, better, as safetensors, in an isolated environment.",
        )
    pickled = next((entry for entry in entries if entry.filename.endswith(".pkl")), None)
    if pickled and pickled.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: {pickled.filename} has {pickled.file_size:,} bytes, but may have at most {MAX_PICKLE_BYTES:,}.",
            hint="Save only model.state_dict(), with save_pretrained.",
        )


def _check_expanded(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError for tensors that would take far more memory than the file's size."""
    copied = sum(t.numel() * t.element_size() for t in state.values() if not t.is_contiguous())
    if copied > EXPANSION * path.stat().st_size + MAX_EXPANDED_BYTES:
        raise CheckpointError(
            f"{path}: its tensors would take {copied:,} bytes of memory, far more than the file holds.",
            hint="Save it again as safetensors, in an isolated environment.",
        )


def _load_pickle(path: Path, map_location: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        state: dict[str, torch.Tensor] = torch.load(path, map_location=map_location, weights_only=True)
    except NotImplementedError:  # torch 2.15 validates sparse tensors, even on meta, where they have no data.
        state = {}
    except Exception as error:  # A damaged pickle may fail anywhere inside torch.
        raise _report_unreadable(path, error) from None
    is_flat = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for name, value in state.items()
    )
    if not is_flat or not state:
        raise CheckpointError(
            f"{path} holds no flat state dict (tensor by name).",
            hint="Save model.state_dict() with save_pretrained, without optimizer or trainer state around it.",
        )
    return state


def _report_unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    if isinstance(error, pickle.UnpicklingError):
        # Do not pass on torch's message, which advises to load the file without the check.
        reason = "its pickle cannot be read"
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            return CheckpointError(
                f"{path} is refused: its pickle contains more than tensors, and loading it could run code.",
                why=f"It refers to {match.group(1)}.",
                hint="Save it again as safetensors, in an isolated environment.",
            )
    return CheckpointError(f"{path} is not a sound PyTorch checkpoint: {reason}.", hint="Download or save it again.")


def _list_records_in_place(path: Path) -> dict[int, int]:
    """Return the uncompressed records of a zip archive: size in bytes by offset; none if the file is not such an
    archive, or has the other byte order. Raises as `_check_packed` does."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            _check_packed(path, entries)
            # Reading all entries but the storages checks their checksums, which torch does not.
            small = {entry.filename: archive.read(entry) for entry in entries if "/data/" not in entry.filename}
            if any(order.decode() != sys.byteorder for name, order in small.items() if name.endswith("/byteorder")):
                return {}
            plain = [e for e in entries if e.compress_type == zipfile.ZIP_STORED and not e.flag_bits & ENCRYPTED]
            return {_find_data_offset(file, entry): entry.file_size for entry in plain}
    except CheckpointError:
        raise
    except Exception:  # A damaged archive may fail anywhere; torch reports the fault later.
        return {}


def _find_data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    # The local header repeats the name and has extra fields (padding) of its own.
    file.seek(entry.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile
    return entry.header_offset + LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _is_in_place(records: dict[int, int], tensor: torch.Tensor) -> bool:
    """Return whether a tensor on the meta device is row-major, and its storage is a record of the file."""
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    return tensor.is_contiguous() and offset is not None and storage.nbytes() == records.get(offset)


def _make_stored(path: Path, name: str, tensor: torch.Tensor, *, in_place: bool) -> StoredTensor:
    dtype = _NAMES_BY_TORCHS.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has dtype {tensor.dtype}, which safetensors cannot hold.", hint="Save it in another dtype."
        )
    shape = tuple(tensor.shape)
    if in_place:
        storage = tensor.untyped_storage()
        assert storage._checkpoint_offset is not None
        offset = storage._checkpoint_offset + int(tensor.storage_offset()) * tensor.element_size()
        return StoredTensor(name, dtype, shape, path, offset)
    # Tensors that share memory have the same address as offset; a transposed one, copied here, has its own.
    loaded = tensor.contiguous()
    return StoredTensor(name, dtype, shape, path, loaded.data_ptr(), view_bytes(loaded))
