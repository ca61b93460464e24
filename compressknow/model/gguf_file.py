"""GGUF files: headers, checked before the gguf package's reader opens them, and tensors by group and type.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from compressknow.base.errors import CheckpointError
from compressknow.base.packages import require
from compressknow.base.reading import NotReadable, group_by, open_regular
from compressknow.model.structure import MOST_BLOCKS, NOT_LINEAR
from compressknow.model.tensors import StoredTensor

MAGIC = b"GGUF"
# The tokenizer of a model with 262,144 tokens and half a million merges has 1.3 million values.
MOST_VALUES, MOST_TENSORS = 2_000_000, 200_000
# Limits on counts, as in `compressknow.model.meta`.
MOST = {"block_count": MOST_BLOCKS, "expert_count": 10_000}
_ALIGNMENT = "general.alignment"
_BLOCK = re.compile(r"blk\.(\d+)\.")
_TEXT, _LIST = 8, 9
# struct's letters for numeric types of values, by their GGUF numbers.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
# Tensor types that are plain floats, by their GGUF numbers.
_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
_MOST_DIMENSIONS, _MOST_BYTES_OF_A_NAME = 4, 1 << 16


class TruncatedFile(NotReadable):
    """File that ends before its announced contents, or is not a GGUF file at all."""


def check_whole(path: Path) -> None:
    """Raise CheckpointError if a file is cut short or not a GGUF file; the runtime reports other faults."""
    try:
        check_gguf(path)
    except TruncatedFile as error:
        raise CheckpointError(f"{path} is damaged: {error}.", hint="Download or export it again.") from None
    except (NotReadable, OSError):
        return


def check_gguf(path: Path) -> None:
    """Raise NotReadable if a file is not a GGUF file, would take minutes or gigabytes to read in Python, or has
    misplaced tensors; OSError if it cannot be opened."""
    read_header(path).check_places()


def list_plain_tensors(path: Path) -> list[StoredTensor]:
    """Return the tensors of a GGUF file that are plain floats, row-major. Raises the errors of `check_gguf`."""
    header = read_header(path)
    stored = [
        StoredTensor(name, _PLAIN[kind], shape[::-1], path, header.data_start + offset)
        for name, shape, kind, offset in header.tensors
        if kind in _PLAIN
    ]
    return [each for each in stored if each.offset + each.nbytes <= header.size]


def read_header(path: Path) -> _Header:
    """Read the header of a GGUF file. Raises NotReadable and OSError as `check_gguf` does."""
    with open_regular(path) as file:
        try:
            return _Header(file)
        except (struct.error, RecursionError):
            raise TruncatedFile("it is cut short") from None


class _Header:
    """Header of a GGUF file; `tensors` has the name, shape, type number and offset of each."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self._values = 0
        self._alignment, self._blocks = 32, MOST["block_count"]
        if self._file.read(4) != MAGIC:
            raise TruncatedFile("it is not a GGUF file")
        _version, tensors, entries = self._number("I"), self._number("Q"), self._number("Q")
        if tensors > MOST_TENSORS or entries > MOST_VALUES:
            raise NotReadable(f"its header announces {tensors:,} tensors and {entries:,} values")
        for _ in range(entries):
            self._entry()
        self.tensors = [self._tensor() for _ in range(tensors)]
        self.data_start = self._aligned(self._file.tell())

    def _entry(self) -> None:
        key = self._text()
        value = self._value(self._number("I"))
        if key == _ALIGNMENT:
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise NotReadable(f"its tensors are aligned to {value}, which is not a power of two")
            self._alignment = value
        name = key.rpartition(".")[2]
        if name in MOST and isinstance(value, int):
            if value > MOST[name]:
                raise NotReadable(f"its {name} is {value:,}, but the maximum is {MOST[name]:,}")
            if name == "block_count":
                self._blocks = value

    def _value(self, kind: int) -> Any:
        """Read a number; skip a text or a list, and return None."""
        self._values += 1
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            self._skip(self._number("Q"))
        elif kind == _LIST:
            self._list()
        else:
            raise NotReadable(f"a value in it is of type {kind}")
        return None

    def _list(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if self._values + count > MOST_VALUES:
            raise NotReadable(f"a list in it has {count:,} values")
        if kind in _NUMBERS:
            self._values += count
            self._skip(count * struct.calcsize(_NUMBERS[kind]))
            return
        for _ in range(count):
            self._value(kind)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise NotReadable(f"a tensor in it has {dimensions:,} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape, self._number("I"), self._number("Q")

    def check_places(self) -> None:
        """Raise NotReadable unless tensors are contiguous, as llama.cpp requires, and the last ends within the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        sizes = {kind.value: GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
        end = 0
        for name, shape, kind, offset in self.tensors:
            block = int(match[1][:9]) if (match := _BLOCK.match(name)) else -1
            if block >= self._blocks:
                raise NotReadable(f"it has a tensor of block {block:,}, but its block_count is {self._blocks}")
            if kind not in sizes:
                raise NotReadable(f"a tensor in it is of type {kind}, which is unknown")
            if offset != self._aligned(end):
                raise NotReadable(f"a tensor in it starts at {offset:,}, but the one before it ends at {end:,}")
            values, nbytes = sizes[kind]
            end = offset + math.prod(shape) // values * nbytes
        if self.tensors and self.data_start + end > self.size:
            raise TruncatedFile("it is cut short")

    def _aligned(self, offset: int) -> int:
        return -(-offset // self._alignment) * self._alignment

    def _number(self, letter: str) -> Any:
        """Read an int, or a float for the letters f and d."""
        form = f"<{letter}"
        return struct.unpack(form, self._file.read(struct.calcsize(form)))[0]

    def _text(self) -> str:
        length = self._number("Q")
        if length > _MOST_BYTES_OF_A_NAME:
            raise NotReadable(f"a name in it has {length:,} bytes")
        return self._file.read(length).decode("utf-8", "replace")

    def _skip(self, count: int) -> None:
        if count > self.size - self._file.tell():
            raise TruncatedFile("it is cut short")
        self._file.seek(count, os.SEEK_CUR)


EMBEDDING, UNPLACED = "embedding", "other"
ORDER = ("attention", "feed-forward", "final", EMBEDDING, UNPLACED, "vision", NOT_LINEAR)
# By llama.cpp's names of tensors (llama-arch.cpp, clip-impl.h); positions and routers have no group.
_SIDE = r"(?:enc\.|dec\.)?"
NAMED = (
    ("attention", re.compile(_SIDE + r"blk\.\d+\.(?:cross_)?attn_(?!norm|rel_b|.*_norm)")),
    ("feed-forward", re.compile(_SIDE + r"blk\.\d+\.ffn_(?!norm|gate_inp|.*_norm)")),
    ("final", re.compile(r"output\.(?:weight|bias)")),
    ("vision", re.compile(r"[av]\.blk\.")),
)


@dataclass(frozen=True)
class Tensor:
    """Tensor of a GGUF file, with `shape` in llama.cpp's order: the length of a row comes first."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """Return the number of its block in its stack; None outside blocks."""
        match = re.match(r"(?:(?:enc|dec|a|v)\.)?" + _BLOCK.pattern, self.name)
        return int(match[1]) if match else None


def read_gguf(path: Path, mode: Literal["r", "r+"] = "r") -> Any:
    """Return a `gguf.GGUFReader` with the file's memory map as `mapped`. Its `data`, which it slices a million times
    for a vocabulary, is a plain array of the same bytes, which takes a third of the time."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, mapped: Any) -> None:
            self.mapped, self._array = mapped, mapped.view(np.ndarray)

    return Reader(path, mode)


def open_gguf(path: Path) -> Any:
    """Open a user's file with `read_gguf`. Raises CheckpointError if it is damaged."""
    require("gguf")
    try:
        check_gguf(path)
        return read_gguf(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a GGUF file: {error}.", hint="Download or export it again."
        ) from None


def list_tensors(*readers: Any) -> dict[str, Tensor]:
    """Return the tensors of a file by name, from all its parts, without reading their values."""
    return {
        each.name: Tensor(each.name, each.tensor_type.name.lower(), tuple(map(int, each.shape)), int(each.n_bytes))
        for reader in readers
        for each in reader.tensors
    }


def count_by_type(tensors: Iterable[Tensor]) -> dict[str, dict[str, int]]:
    """Count tensors, parameters and bytes by type."""
    return {
        kind: {"tensors": len(each), "parameters": sum(t.numel for t in each), "bytes": sum(t.nbytes for t in each)}
        for kind, each in group_by(tensors, lambda tensor: tensor.type).items()
    }


def find_groups(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the group of each tensor, by name; a tied embedding counts as the final layer."""
    is_tied = not any(name.startswith("output.") for name in tensors)

    def find_group(tensor: Tensor) -> str:
        if len(tensor.shape) < 2:
            return NOT_LINEAR
        if tensor.name.startswith("token_embd."):
            return "final" if is_tied else EMBEDDING
        return next((group for group, pattern in NAMED if pattern.match(tensor.name)), UNPLACED)

    return {name: find_group(tensor) for name, tensor in tensors.items()}


def read_value(reader: Any, key: str) -> Any:
    """Return the value of a key in a file's metadata; None if it has no such key."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


# ``model-00002-of-00005.gguf``, as llama.cpp's gguf-split names parts.
PART = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def list_parts(path: Path) -> list[Path]:
    """Return the existing parts of a split GGUF, given its first one; for others, just the file.

    >>> [part.name for part in list_parts(Path("model.gguf"))]
    ['model.gguf']
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = (f"{match['prefix']}-{number:05}-of-{count:05}.gguf" for number in range(1, min(count, 10_000) + 1))
    return [part for name in names if (part := path.with_name(name)).is_file()] or [path]


def check_parts(path: Path) -> None:
    """Raise CheckpointError for a part of a split GGUF file that is not the first, or if others are missing."""
    match = PART.fullmatch(path.name)
    if match is None or not path.is_file():
        return
    count = int(match["count"])
    first = path.with_name(f"{match['prefix']}-00001-of-{count:05}.gguf")
    if int(match["number"]) != 1:
        raise CheckpointError(
            f"{path} is part {int(match['number'])} of {count} of a split GGUF file.",
            hint=f"Give the first part, {first.name}; the others are read from the same folder.",
        )
    present = len(list_parts(path))
    if present < count:
        raise CheckpointError(
            f"{path} is the first of {count} parts, and its folder lacks {count - present} of them.",
            hint="Download all parts into one folder.",
        )
