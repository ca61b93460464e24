"""PyTorch .bin checkpoints, read without running their pickle and, where the format allows, without loading them."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.errors import CheckpointError
from compressknow.model.tensors import StoredTensor, byte_view

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
}


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a PyTorch checkpoint by name, in its order.

    Files of PyTorch 1.6 and later are zip archives of plain storages: only the offsets are read. Older ones, and
    tensors that are not row-major, are loaded into memory.

    Raises
    ------
    CheckpointError : the pickle wants more than tensors (it could run code), is damaged, or holds no flat state dict.
    """
    in_place = zipfile.is_zipfile(path) and _native_byte_order(path)
    state = _load(path, map_location="meta" if in_place else "cpu")
    if in_place and not all(_has_offset(tensor) for tensor in state.values()):
        in_place, state = False, _load(path, map_location="cpu")
    size = path.stat().st_size
    tensors = {name: _stored(path, name, tensor, in_place) for name, tensor in state.items()}
    for tensor in tensors.values():
        if in_place and tensor.offset + tensor.nbytes > size:
            raise CheckpointError(f"{path} is damaged: {tensor.name} lies beyond its end.", hint="Download it again.")
    return tensors


def _load(path: Path, map_location: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        state: Any = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: its pickle asks for more than tensors, and loading it could run code.",
            why=str(error).splitlines()[0],
            hint="Save it again as safetensors, in an environment that you trust it in.",
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a sound PyTorch checkpoint: {str(error).splitlines()[0] if str(error) else error!r}",
            hint="Download or save it again.",
        ) from None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} holds no flat state dict (tensor by name).",
            hint="Save model.state_dict() with save_pretrained, without optimizer or trainer state around it.",
        )
    return state


def _native_byte_order(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        records = [name for name in archive.namelist() if name.endswith("/byteorder")]
        return all(archive.read(name).decode() == sys.byteorder for name in records)


def _has_offset(tensor: torch.Tensor) -> bool:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return tensor.is_contiguous() and offset is not None


def _stored(path: Path, name: str, tensor: torch.Tensor, in_place: bool) -> StoredTensor:

    dtype = DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{path}: {name} has dtype {tensor.dtype}, which safetensors cannot hold.")
    shape = tuple(tensor.shape)
    if in_place:
        storage = tensor.untyped_storage()
        assert storage._checkpoint_offset is not None
        offset = storage._checkpoint_offset + int(tensor.storage_offset()) * tensor.element_size()
        return StoredTensor(name, dtype, shape, path, offset)
    loaded = byte_view(tensor.contiguous())
    return StoredTensor(name, dtype, shape, path, tensor.data_ptr(), loaded)
