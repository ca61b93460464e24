"""Files that others wrote, read within bounds, and records checked for their form."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from compressknow.errors import CheckpointError

MIB = 1 << 20
# The most bytes of a file, by its kind. The index of a model of 100,000 tensors takes 15 MB, its manifest 70 MB; the
# largest tokenizers have 35 MB.
CONFIG, CARD, TABLE_OF_OPTIONS = 16 * MIB, MIB, MIB // 4
INDEX, MANIFEST, TOKENIZER = 64 * MIB, 256 * MIB, 256 * MIB
RECORD = 64 * MIB
FACTS, LINE = 1024 * MIB, MIB
# Values in one JSON file, or in all lines of a facts file: each takes up to 100 bytes of memory beside its text.
MOST_VALUES = 8_000_000
# Of whole numbers in records: whoever divides or multiplies these gets floats, which larger ones would not fit.
LARGEST = 1 << 256
_PIECE = MIB
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotReadable(ValueError):
    """A file that is no regular one, larger than its kind can be, or no JSON or TOML. The text says which."""


def open_regular(path: Path, most: int | None = None) -> BufferedReader:
    """Open a file for reading. Never waits, as opening a pipe would.

    Raises NotReadable where it is no regular file, or has more than `most` bytes; OSError where it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(descriptor), most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path, most: int | None = None) -> os.stat_result:
    """What the system says of a file. Raises NotReadable where another library could not read it safely; see
    `open_regular`."""
    status = path.stat()
    _check(status, most)
    return status


def _check(status: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise NotReadable(f"it is {kind}, not a regular file")
    if most is not None and status.st_size > most:
        raise NotReadable(f"it has {status.st_size:,} bytes, and such a file has at most {most:,}")


class FileState(NamedTuple):
    """By what a file is told from another one in its place, and from itself with other bytes."""

    device: int
    inode: int
    bytes: int
    written_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """Of what the system says of a file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def refuse_changed(states: Mapping[Path, FileState]) -> None:
    """Raise CheckpointError where files, by path, are not in the state in which they were opened."""
    for path, state in states.items():
        try:
            is_same = FileState.of(path.stat()) == state
        except OSError:
            is_same = False
        if not is_same:
            raise CheckpointError(
                f"{path} was replaced or changed while the model was read: nothing is kept.",
                hint="Repeat the command once nothing writes to the folder.",
            )


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises NotReadable or OSError."""
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise NotReadable(f"it has more than {most:,} bytes")
    return content


def read_text(path: Path, most: int) -> str:
    """A text in UTF-8. Raises NotReadable, UnicodeDecodeError (a ValueError as well) or OSError."""
    return read_bytes(path, most).decode("utf-8")


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a facts file, without their ends. Raises NotReadable or OSError; a line has at most `LINE` bytes."""
    with open_regular(path, FACTS) as file:
        number = 0
        while line := file.readline(LINE + 2):
            number += 1
            if len(line) > LINE + 1 or (len(line) == LINE + 1 and not line.endswith(b"\n")):
                raise NotReadable(f"line {number} is longer than {LINE:,} bytes")
            yield line.removesuffix(b"\n")


def read_json(path: Path, most: int) -> Any:
    """What a JSON file holds. Raises NotReadable, json.JSONDecodeError (a ValueError as well) or OSError."""
    return parse_json(read_bytes(path, most))


def parse_json(
    content: bytes, *, most_values: int = MOST_VALUES, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text in UTF-8; `pairs` makes an object of its keys and values.

    Raises NotReadable where it holds more than `most_values` values or is nested too deeply, ValueError where it is no
    JSON.
    """
    if values_in(content) > most_values:
        raise NotReadable(f"it holds more than {most_values:,} values")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise NotReadable("it is nested too deeply") from None


def half_character(text: str) -> str | None:
    r"""The escape of the first half of a surrogate pair that stands alone in a text, as a JSON escape can make it: no
    file could hold that.

    >>> half_character("a\ud83e"), half_character("a\U0001f999")
    ('\\ud83e', None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def values_in(content: bytes) -> int:
    """At least the number of values in a JSON text: each but the first follows a comma, a colon or a bracket."""
    return sum(content.count(mark) for mark in (b",", b":", b"[", b"{"))


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file of options holds. Raises NotReadable, tomllib.TOMLDecodeError (a ValueError too) or OSError."""
    try:
        return tomllib.loads(read_text(path, TABLE_OF_OPTIONS))
    except RecursionError:
        raise NotReadable("it is nested too deeply") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal, read in pieces. Raises NotReadable or OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", list: "list", dict: "object"}


def misfit(value: Any, form: Any, where: str = "it") -> str | None:
    """What in a value does not fit a form, and where; None where all does.

    >>> misfit({"n": [1, 2.5]}, {"n": [int], "name?": str})
    'n[1] is no whole number'
    """
    if isinstance(form, tuple):
        wrong = [misfit(value, each, where) for each in form]
        return None if None in wrong else _nearest(value, form, wrong)
    if form is None or isinstance(form, type):
        return None if _is(value, form) else f"{where} is {_no(form)}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        found = (misfit(entry, form[0], f"{where}[{i}]") for i, entry in enumerate(value))
        return next((wrong for wrong in found if wrong), None)
    if not isinstance(value, Mapping):
        return f"{where} is no object"
    return _misfit_object(value, form, "" if where == "it" else f"{where}.")


def _misfit_object(value: Mapping[str, Any], form: Mapping[Any, Any], prefix: str) -> str | None:
    if str in form:
        pairs = [(key, form[str]) for key in value]
    else:
        if missing := next((key for key in form if not key.endswith("?") and key not in value), None):
            return f"{prefix}{missing} is missing"
        pairs = [(name, form[key]) for key in form if (name := key.removesuffix("?")) in value]
    found = (misfit(value[key], each, f"{prefix}{key}") for key, each in pairs)
    return next((wrong for wrong in found if wrong), None)


def _is(value: Any, form: type | None) -> bool:
    if form is None or value is None:
        return value is form
    if isinstance(value, bool) or form is bool:
        return isinstance(value, bool) and form is bool
    if form in (int, float) and isinstance(value, int):
        return abs(value) <= LARGEST
    return math.isfinite(value) if form is float and isinstance(value, float) else isinstance(value, form)


def _no(form: type | None) -> str:
    return "not null" if form is None else f"no {_NAMES[form]}"


def _nearest(value: Any, forms: tuple[Any, ...], wrong: list[str | None]) -> str | None:
    """The complaint of the form that was probably meant: the first one of the value's kind."""
    kinds = [isinstance(value, (dict, list)) == isinstance(form, (dict, list)) for form in forms]
    return wrong[kinds.index(True) if True in kinds else 0]
