"""The header of a GGUF file, checked before a reader written in Python takes it: that takes some 15 microseconds and
half a kilobyte for each value, believes what is said of where tensors lie, and builds as many blocks as it is told of.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from compressknow.errors import CheckpointError
from compressknow.model.scopes import MOST_BLOCKS
from compressknow.model.tensors import StoredTensor
from compressknow.reading import NotReadable, open_regular

MAGIC = b"GGUF"
# The tokenizer of a model with 262,144 tokens and half a million merges has 1.3 million values; other lists are by
# block, or of names.
MOST_VALUES, MOST_IN_A_LIST, MOST_TENSORS = 2_000_000, 1 << 16, 200_000
# Of what a model is built of, as in `compressknow.model.meta`.
MOST = {"block_count": MOST_BLOCKS, "expert_count": 10_000}
_TOKENIZER, _ALIGNMENT = b"tokenizer.", b"general.alignment"
_OF_A_BLOCK = re.compile(rb"blk\.(\d+)\.")
_TEXT, _LIST = 8, 9
# By the number of a type of values: struct's letter.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
# By the number of a type of tensors, those of plain floats.
_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
_MOST_DIMENSIONS, _MOST_NESTED, _MOST_BYTES_OF_A_NAME = 4, 4, 1 << 16


class CutShort(NotReadable):
    """A file that ends before what it says that it holds does, or that is no GGUF file at all."""


def refuse_cut_short(path: Path) -> None:
    """Raise CheckpointError where a GGUF file is cut short, or is none. What only this reader does not know passes: the
    runtime tells."""
    try:
        check_gguf(path)
    except CutShort as error:
        raise CheckpointError(f"{path} is damaged: {error}.", hint="Download or export it again.") from None
    except (NotReadable, OSError):
        return


def check_gguf(path: Path) -> None:
    """Raise NotReadable where a file is no GGUF file, where one in Python would read it in minutes or gigabytes, or
    where its tensors do not lie as it says; OSError where it cannot be opened.
    """
    with open_regular(path) as file:
        try:
            _Header(file).check()
        except struct.error:
            raise CutShort("it is cut short") from None


def plain_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a GGUF file that hold plain floats, row-major; none where its bytes are in the other order.

    Raises NotReadable and OSError as `check_gguf` does.
    """
    with open_regular(path) as file:
        try:
            return _Header(file).plain(path)
        except struct.error:
            raise NotReadable("it is cut short") from None


class _Tensor(NamedTuple):
    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    def __init__(self, file: BufferedReader) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self._order, self._values = "<", 0
        self._alignment, self._blocks = 32, MOST["block_count"]

    def check(self) -> None:
        self._check_places(self._read())

    def plain(self, path: Path) -> list[StoredTensor]:
        tensors = self._read()
        start = self._aligned(self._file.tell())
        stored = [
            StoredTensor(str(t.name, "utf-8", "replace"), _PLAIN[t.kind], t.shape[::-1], path, start + t.offset)
            for t in tensors
            if t.kind in _PLAIN and self._order == "<"
        ]
        return [each for each in stored if each.offset + each.nbytes <= self._size]

    def _read(self) -> list[_Tensor]:
        if self._file.read(4) != MAGIC:
            raise CutShort("it is no GGUF file")
        if not self._number("I") & 0xFFFF:
            # A version is a small number: its bytes are in the other order, and so is all else.
            self._order = ">"
        tensors, entries = self._number("Q"), self._number("Q")
        if tensors > MOST_TENSORS or entries > MOST_IN_A_LIST:
            raise NotReadable(f"it says that it holds {tensors:,} tensors and {entries:,} values")
        for _ in range(entries):
            self._entry()
        return [self._tensor() for _ in range(tensors)]

    def _entry(self) -> None:
        key = self._text()
        value = self._value(self._number("I"), key)
        if key == _ALIGNMENT:
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise NotReadable(f"its tensors are aligned to {value}, which is no power of two")
            self._alignment = value
        name = key.rpartition(b".")[2].decode("ascii", "replace")
        if name in MOST and isinstance(value, int):
            if value > MOST[name]:
                raise NotReadable(f"its {name} is {value:,}, and a model has at most {MOST[name]:,}")
            if name == "block_count":
                self._blocks = value

    def _value(self, kind: int, key: bytes, nested: int = 0) -> Any:
        """A number; None where it is a text or a list, which is passed over."""
        self._values += 1
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            self._skip(self._number("Q"))
        elif kind == _LIST and nested < _MOST_NESTED:
            self._list(key, nested)
        else:
            raise NotReadable(f"a value in it is of type {kind}")
        return None

    def _list(self, key: bytes, nested: int) -> None:
        kind, count = self._number("I"), self._number("Q")
        most = MOST_VALUES if key.startswith(_TOKENIZER) else MOST_IN_A_LIST
        if count > most or self._values + count > MOST_VALUES:
            raise NotReadable(f"a list in it has {count:,} values")
        if kind in _NUMBERS:
            self._values += count
            self._skip(count * struct.calcsize(_NUMBERS[kind]))
            return
        for _ in range(count):
            self._value(kind, key, nested + 1)

    def _tensor(self) -> _Tensor:
        name, dimensions = self._text(), self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise NotReadable(f"a tensor in it has {dimensions:,} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return _Tensor(name, shape, self._number("I"), self._number("Q"))

    def _check_places(self, tensors: list[_Tensor]) -> None:
        """One tensor follows the other, as llama.cpp demands it too, and the last ends in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        sizes = {kind.value: GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
        start, end = self._aligned(self._file.tell()), 0
        for tensor in tensors:
            if (found := _OF_A_BLOCK.match(tensor.name)) and int(found[1][:9]) >= self._blocks:
                raise NotReadable(
                    f"it has a tensor of block {int(found[1][:9]):,}, and says that it has {self._blocks}"
                )
            if tensor.kind not in sizes:
                raise NotReadable(f"a tensor in it is of type {tensor.kind}, which is not known")
            if tensor.offset != self._aligned(end):
                raise NotReadable(f"a tensor in it lies at {tensor.offset:,}, and the one before it ends at {end:,}")
            values, nbytes = sizes[tensor.kind]
            end = tensor.offset + math.prod(tensor.shape) // values * nbytes
        if tensors and start + end > self._size:
            raise CutShort("it is cut short")

    def _aligned(self, place: int) -> int:
        return -(-place // self._alignment) * self._alignment

    def _number(self, letter: str) -> Any:
        """An int, or a float of the letters f and d."""
        form = self._order + letter
        return struct.unpack(form, self._file.read(struct.calcsize(form)))[0]

    def _text(self) -> bytes:
        length = self._number("Q")
        if length > _MOST_BYTES_OF_A_NAME:
            raise NotReadable(f"a name in it has {length:,} bytes")
        return self._file.read(length)

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise CutShort("it is cut short")
        self._file.seek(count, os.SEEK_CUR)
