"""Read PyTorch .bin checkpoints without running their pickle and, where the format allows, without loading them."""

from __future__ import annotations

import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from compressknow.base.errors import CheckpointError
from compressknow.model.tensors import TORCH_NAMES, StoredTensor, byte_view

if TYPE_CHECKING:
    import torch

# A record's own header in a zip archive: its signature, and the lengths of the two fields that follow.
LOCAL_HEADER = struct.Struct("<4s22xHH")
ENCRYPTED = 0x2061
# A tensor takes some 150 bytes in the pickle: 200,000 tensors.
MAX_PICKLE_BYTES = 32_000_000
# Of what is compressed, or repeated by strides of 0: so many times the file's size, and so many bytes more.
EXPANSION, MAX_EXPANDED_BYTES = 4, 256_000_000
_NAMES_BY_TORCHS = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a PyTorch checkpoint by name, in its order.

    Files of PyTorch 1.6 and later are zip archives of plain storages: only the offsets are read. Older ones, and
    tensors that are not row-major, are loaded into memory.

    Raises CheckpointError where the pickle wants more than tensors (it could run code), is damaged, or holds no flat
    state dict.
    """
    _check_packed(path)
    records = _records_in_place(path)
    state = _load(path, map_location="meta" if records else "cpu")
    in_place = bool(records)
    if in_place and not all(_lies_in(records, tensor) for tensor in state.values()):
        in_place, state = False, _load(path, map_location="cpu")
    if not in_place:
        _check_expanded(path, state)
    return {name: _stored(path, name, tensor, in_place) for name, tensor in state.items()}


def _check_packed(path: Path) -> None:
    """Raise CheckpointError for an archive that unpacks to far more than lies in it.

    torch.save compresses nothing. Other tools may, and weights compress to a half at best: a few megabytes that
    unpack to gigabytes are no weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # No archive, or a damaged one: torch will say.
        return
    size = path.stat().st_size
    if (unpacked := sum(entry.file_size for entry in entries)) > EXPANSION * size + MAX_EXPANDED_BYTES:
        raise CheckpointError(
            f"{path} has {size:,} bytes and would unpack to {unpacked:,}: refused.",
            hint="Save it again with torch.save or, better, as safetensors, in an environment that you trust it in.",
        )
    pickled = next((entry for entry in entries if entry.filename.endswith(".pkl")), None)
    if pickled and pickled.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: {pickled.filename} has {pickled.file_size:,} bytes, and can have {MAX_PICKLE_BYTES:,} at most.",
            hint="Save model.state_dict() alone, with save_pretrained.",
        )


def _check_expanded(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError for tensors that would take far more memory, each written out, than the file has bytes
    (strides of 0)."""
    copied = sum(t.numel() * t.element_size() for t in state.values() if not t.is_contiguous())
    if copied > EXPANSION * path.stat().st_size + MAX_EXPANDED_BYTES:
        raise CheckpointError(
            f"{path}: its tensors take {copied:,} bytes when they are written out, far more than the file holds.",
            hint="Save it again as safetensors, in an environment that you trust it in.",
        )


def _load(path: Path, map_location: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        state: Any = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # A damaged pickle may fail anywhere inside torch.
        raise _unreadable(path, error) from None
    if not isinstance(state, dict) or not state or not all(_is_entry(*item) for item in state.items()):
        raise CheckpointError(
            f"{path} holds no flat state dict (tensor by name).",
            hint="Save model.state_dict() with save_pretrained, without optimizer or trainer state around it.",
        )
    return state


def _is_entry(name: Any, value: Any) -> bool:
    import torch

    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    # torch's own message leads with advice to load the file without the check: not ours to pass on.
    wanted = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if wanted:
        return CheckpointError(
            f"{path} is refused: its pickle contains more than tensors, and loading it could run code.",
            why=f"It refers to {wanted.group(1)}.",
            hint="Save it again as safetensors, in an environment that you trust it in.",
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = "its pickle cannot be read" if isinstance(error, pickle.UnpicklingError) else (lines or [repr(error)])[0]
    return CheckpointError(f"{path} is not a sound PyTorch checkpoint: {reason}.", hint="Download or save it again.")


def _records_in_place(path: Path) -> dict[int, int]:
    """Return the records of a zip archive that lie in it as they are: size in bytes by offset.

    Empty where the file is no such archive, or was written on a machine of the other byte order.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            # All but the storages: reading them compares their checksums, which torch does not.
            small = {entry.filename: archive.read(entry) for entry in entries if "/data/" not in entry.filename}
            if any(order.decode() != sys.byteorder for name, order in small.items() if name.endswith("/byteorder")):
                return {}
            plain = [e for e in entries if e.compress_type == zipfile.ZIP_STORED and not e.flag_bits & ENCRYPTED]
            return {_data_offset(file, entry): entry.file_size for entry in plain}
    except Exception:  # A damaged archive may fail anywhere; what is wrong with it, torch will say.
        return {}


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    # The local header repeats the name and has extra fields (padding) of its own.
    file.seek(entry.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile
    return entry.header_offset + LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _lies_in(records: dict[int, int], tensor: torch.Tensor) -> bool:
    """Return whether a tensor on the meta device is row-major, and its storage a record of the file."""
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    return tensor.is_contiguous() and offset is not None and storage.nbytes() == records.get(offset)


def _stored(path: Path, name: str, tensor: torch.Tensor, in_place: bool) -> StoredTensor:
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
    # Its address tells tensors that share their memory; a transposed one, copied here, is not the same as its source.
    loaded = tensor.contiguous()
    return StoredTensor(name, dtype, shape, path, loaded.data_ptr(), byte_view(loaded))
