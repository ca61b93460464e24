"""Parse the header of a GGUF file, and write it again with any content."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

TEXT, LIST = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_ALIGNED = 32


@dataclass
class Parts:
    """A file: `entries` are key, type and value, `tensors` name, shape, type and offset; a list is type and values.

    `counts`, if set, is the number of tensors and of entries that the header announces.
    """

    entries: list[list[Any]] = field(default_factory=list)
    tensors: list[list[Any]] = field(default_factory=list)
    body: bytes = b""
    counts: tuple[int, int] | None = None

    def set(self, key: str, kind: int, value: Any) -> Parts:
        """Add a key to the metadata, or change its value."""
        self.entries = [entry for entry in self.entries if entry[0] != key.encode()]
        self.entries.append([key.encode(), kind, value])
        return self

    def join(self) -> bytes:
        tensors, entries = self.counts or (len(self.tensors), len(self.entries))
        header = b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)
        header += b"".join(
            _pack_text(key) + struct.pack("<I", kind) + _pack_value(kind, value) for key, kind, value in self.entries
        )
        for name, shape, kind, offset in self.tensors:
            header += _pack_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        return header + b"\0" * (-len(header) % _ALIGNED) + self.body


def parse_gguf(content: bytes) -> Parts:
    """Return the parts of a sound file whose tensors have the default alignment."""
    reader = _Reader(content)
    _, tensors, entries = reader.read_numbers("4xIQQ")
    parts = Parts()
    for _ in range(entries):
        key = reader.read_text()
        (kind,) = reader.read_numbers("I")
        parts.entries.append([key, kind, reader.read_value(kind)])
    for _ in range(tensors):
        name = reader.read_text()
        (dimensions,) = reader.read_numbers("I")
        parts.tensors.append([name, list(reader.read_numbers(f"{dimensions}Q")), *reader.read_numbers("IQ")])
    parts.body = content[-(-reader.position // _ALIGNED) * _ALIGNED :]
    return parts


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content, self.position = content, 0

    def read_numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._content, self.position)
        self.position += struct.calcsize(f"<{form}")
        return found

    def read_text(self) -> bytes:
        (length,) = self.read_numbers("Q")
        self.position += length
        return self._content[self.position - length : self.position]

    def read_value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.read_text()
        if kind == LIST:
            inner, count = self.read_numbers("IQ")
            return inner, [self.read_value(inner) for _ in range(count)]
        return self.read_numbers(NUMBERS[kind])[0]


def _pack_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _pack_value(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _pack_text(value)
    if kind == LIST:
        inner, values = value
        head = struct.pack("<IQ", inner, len(values))
        if inner in NUMBERS:
            return head + struct.pack(f"<{len(values)}{NUMBERS[inner]}", *values)
        return head + b"".join(_pack_value(inner, each) for each in values)
    return struct.pack(f"<{NUMBERS[kind]}", value)
