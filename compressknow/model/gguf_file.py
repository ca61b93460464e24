"""What GGUF files hold: their tensors, by group of layers and by type, and what they say of themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressknow.errors import CheckpointError
from compressknow.libraries import require
from compressknow.model.gguf_header import check_gguf
from compressknow.model.summary import Inspection

EMBEDDING, NOT_LINEAR, UNPLACED = "embedding", "not-linear", "other"
ORDER = ("attention", "feed-forward", "final", EMBEDDING, UNPLACED, "vision", NOT_LINEAR)
# By the names that llama.cpp gives to tensors (llama-arch.cpp).
NAMED = (
    ("attention", re.compile(r"blk\.\d+\.attn_(?!norm|.*_norm)")),
    ("feed-forward", re.compile(r"blk\.\d+\.ffn_(?!norm|.*_norm)")),
    ("final", re.compile(r"output\.(?:weight|bias)")),
)
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: `shape` as llama.cpp writes it, the row's length first."""

    name: str
    type: str
    shape: tuple[int, ...]
    numel: int
    nbytes: int

    @property
    def layer(self) -> int | None:
        """The number of its block."""
        found = _BLOCK.match(self.name)
        return int(found[1]) if found else None


def open_gguf(path: Path) -> Any:
    """Return a `gguf.GGUFReader`, which maps the file. Raises CheckpointError where the file is damaged."""
    require("gguf")
    import gguf

    try:
        check_gguf(path)
        return gguf.GGUFReader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}.", hint="Download it again.") from None


def tensors_of(reader: Any) -> dict[str, Tensor]:
    """Return the tensors of a file by name; their values are not read."""
    return {
        each.name: Tensor(
            each.name,
            each.tensor_type.name.lower(),
            tuple(int(length) for length in each.shape),
            int(each.n_elements),
            int(each.n_bytes),
        )
        for each in reader.tensors
    }


def groups_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the group of each tensor by its name; a tied embedding is the final layer too."""
    tied = not any(name.startswith("output.") for name in tensors)
    return {name: _group(tensor, tied) for name, tensor in tensors.items()}


def _group(tensor: Tensor, tied: bool) -> str:
    if len(tensor.shape) < 2:
        return NOT_LINEAR
    if tensor.name.startswith("token_embd."):
        return "final" if tied else EMBEDDING
    return next((group for group, named in NAMED if named.match(tensor.name)), UNPLACED)


def value_of(reader: Any, key: str) -> Any:
    """Return what a file says of itself under a key; None where it says nothing."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def inspect_gguf(parts: Sequence[Path]) -> Inspection:
    """Summarize what a GGUF file is made of, in one part or several; no weights are read.

    Raises CheckpointError where it is damaged.
    """
    readers = [open_gguf(part) for part in parts]
    tensors = {name: tensor for reader in readers for name, tensor in tensors_of(reader).items()}
    groups = groups_of(tensors)
    stored = sum(tensor.numel for tensor in tensors.values())
    architecture = str(value_of(readers[0], "general.architecture"))
    made = {key: value_of(readers[0], f"compressknow.{key}") for key in ("setup", "source.name", "source.sha256")}
    return Inspection(
        {
            "model": parts[0].name,
            "architecture": architecture,
            "model_type": architecture,
            "bytes": sum(part.stat().st_size for part in parts),
            **({"made_of": {key: value for key, value in made.items() if value}} if any(made.values()) else {}),
            "groups": {
                group: _summary([tensor for name, tensor in tensors.items() if groups[name] == group])
                for group in ORDER
                if group in groups.values()
            },
            "scopes": {},
            "parameters": {"stored": stored, "used": stored},
            "tied": [],
            "unplaced": [],
            "opaque": {},
        }
    )


def _summary(tensors: Sequence[Tensor]) -> dict[str, Any]:
    stored = sum(tensor.numel for tensor in tensors)
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        counts = types.setdefault(tensor.type, {"tensors": 0, "parameters": 0, "bytes": 0})
        counts["tensors"] += 1
        counts["parameters"] += tensor.numel
        counts["bytes"] += tensor.nbytes
    return {
        **{"modules": len(tensors), "stored": stored, "used": stored, "types": types},
        "weights": [
            {"name": each.name, "shape": list(each.shape[::-1]), "dtype": each.type, "layer": each.layer}
            for each in tensors
        ],
    }
