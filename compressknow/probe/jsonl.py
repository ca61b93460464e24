"""JSON lines: one object a line, UTF-8 with or without a byte order mark, blank lines skipped."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compressknow.errors import UsageError
from compressknow.reading import MOST_VALUES, NotReadable, parse_json, read_lines, sha256_of, values_in


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(number of the line, its object) or, where a line holds none, (number, what is wrong and in which column).

    Raises UsageError where the file cannot be read.
    """
    values = 0
    try:
        # Lines end at "\n" alone: JSON texts may hold U+2028 and the like, at which str.splitlines would break them.
        for number, line in enumerate(read_lines(path), start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            values += values_in(content)
            if values > MOST_VALUES:
                raise NotReadable(f"its lines hold more than {MOST_VALUES:,} values")
            if content.strip():
                yield number, _parsed(content)
    except (OSError, NotReadable) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        return f"column {error.start + 1}: not UTF-8"
    except json.JSONDecodeError as error:
        return f"column {error.colno}: not JSON: {error.msg}"
    except ValueError:
        return "column 1: not JSON that can be read: nested too deeply, or a number of too many digits"
    if not isinstance(value, dict):
        return "column 1: a JSON object {...} belongs here"
    return _half_character(line, value) or value


def _half_character(line: bytes, value: dict[str, Any]) -> str | None:
    """Where one half of a surrogate pair stands alone, as only an escape can: no file could hold that text."""
    if b"\\u" not in line:
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(error.object[error.start]):04x}"
        return f"column {line.lower().find(escape.encode()) + 1}: {escape} is half of a character"
    return None


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
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
