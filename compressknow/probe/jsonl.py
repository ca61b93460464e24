"""JSON lines: one object a line, UTF-8 with or without a byte order mark, blank lines skipped."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compressknow.errors import UsageError


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(number of the line, its object) or, where a line holds none, (number, what is wrong and in which column).

    Raises UsageError where the file cannot be read.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    # Lines end at "\n" alone: JSON texts may hold U+2028 and the like, at which str.splitlines would break them.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"column {error.start + 1}: not UTF-8"
    except json.JSONDecodeError as error:
        return f"column {error.colno}: not JSON: {error.msg}"
    except (ValueError, RecursionError):
        return "column 1: not JSON that can be read: nested too deeply, or a number of too many digits"
    return value if isinstance(value, dict) else "column 1: a JSON object {...} belongs here"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All objects of the file. Raises UsageError, with line and column, at the first line that holds none."""
    rows = []
    for number, row in json_lines(path):
        if isinstance(row, str):
            raise UsageError(f"{path}, line {number}, {row}.", hint="The file is damaged: get it again.")
        rows.append(row)
    return rows


def file_hashes(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    """File name relative to `folder`, with forward slashes -> sha256 of the file, in hexadecimal."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
