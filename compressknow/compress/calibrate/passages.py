"""Passages of a calibration text, read from a file or a data set."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.reading import (
    NotReadable,
    check_regular,
    find_lone_surrogate,
    load_tables,
    open_regular,
    parse_json,
    read_lines,
)

Kind = Literal["self", "file", "hf"]
SELF, HUB = "self", "hf:"
# The key of a JSON line, and the column of a table, that hold a text.
KEY = "text"
# The split to learn from comes first: facts are evaluated on the others.
_SPLITS = ("train", "validation", "test")
_PIECE = 1 << 16
_ROWS_AT_ONCE = 256
FORMS = "Give self (the model's own samples), FILE.txt, FILE.jsonl or hf:DATASET."


def find_kind(source: str) -> Kind:
    """Tell what `source` names, ``self``, a file or a data set, without looking at any file.

    Raises UsageError if it is none of these.

    >>> [find_kind(source) for source in ("self", "notes.txt", "rows.jsonl", "hf:wikitext:wikitext-2-raw-v1")]
    ['self', 'file', 'file', 'hf']
    """
    if source == SELF:
        return "self"
    if source.startswith(HUB) and source != HUB:
        return "hf"
    if Path(source).suffix.lower() in (".txt", ".jsonl"):
        return "file"
    raise UsageError(f"There is no calibration text {source!r}.", hint=FORMS)


def check_file(source: str) -> None:
    """Raise UsageError if the file that `source` names is not found, CompressknowError if it is no regular file."""
    path = Path(source).expanduser()
    try:
        check_regular(path)
    except FileNotFoundError:
        raise UsageError(f"There is no calibration text {path}.", hint=FORMS) from None
    except NotReadable as error:
        raise CompressknowError(f"{path} cannot be read: {error}.") from None
    except OSError as error:
        raise CompressknowError(f"{path} cannot be read.", error.strerror) from None


def read_passages(source: str) -> Iterator[tuple[str, bool]]:
    """Read the texts of a ``.txt`` file (one text), a ``.jsonl`` file (one per line) or ``hf:DATASET`` (one per row),
    but for blank ones: pieces of text, and whether each begins another one.

    Raises UsageError if the file or set is not found, CompressknowError if it cannot be read.
    """
    if source.startswith(HUB):
        yield from _read_rows(source.removeprefix(HUB))
        return
    check_file(source)
    path = Path(source).expanduser()
    try:
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(read_lines(path), start=1):
                if text := _parse_line(path, number, line):
                    yield text, True
        else:
            yield from _read_pieces(path)
    except UnicodeDecodeError:
        raise CompressknowError(f"{path} is not UTF-8.", hint="Save it as UTF-8, and try again.") from None
    except NotReadable as error:
        raise CompressknowError(f"{path} cannot be read: {error}.") from None
    except OSError as error:
        raise CompressknowError(f"{path} cannot be read.", error.strerror) from error


def _read_pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """Read whole lines of about 64 K characters together, which are tokenized at once."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
        begins = True
        while piece := file.read(_PIECE):
            yield piece + file.readline(_PIECE), begins
            begins = False


def _parse_line(path: Path, number: int, line: bytes) -> str:
    if not line.strip():
        return ""
    try:
        row = parse_json(line)
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise CompressknowError(f"{path}, line {number}: no JSON.", hint=f'Each line is {{"{KEY}": "..."}}.') from None
    if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
        raise CompressknowError(f'{path}, line {number}: no text under "{KEY}".', hint=f'Each is {{"{KEY}": "..."}}.')
    text: str = row[KEY]
    if b"\\u" in line and (half := find_lone_surrogate(text)):
        raise CompressknowError(f"{path}, line {number}: {half} is half of a character.", hint="Save it as UTF-8.")
    return text if text.strip() else ""


def _read_rows(dataset: str) -> Iterator[tuple[str, bool]]:
    table = _choose_split(load_tables(dataset), dataset)
    column = _choose_column(table, dataset)
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        yield from ((text, True) for text in batch.column(column).to_pylist() if text and text.strip())


def _choose_split(splits: dict[str, Any], dataset: str) -> Any:
    name = next((name for name in _SPLITS if name in splits), None)
    if name is None and len(splits) > 1:
        raise UsageError(
            f"hf:{dataset} has none of the splits {', '.join(_SPLITS)}, but {', '.join(splits)}.",
            hint='Save the one you want as a .jsonl file of {"text": "..."}.',
        )
    return splits[name] if name else next(iter(splits.values()))


def _choose_column(table: Any, dataset: str) -> str:
    """Choose ``text``, or the only column of texts."""
    texts = [name for name, kind in table.features.items() if getattr(kind, "dtype", "").endswith("string")]
    if KEY in texts:
        return KEY
    if len(texts) == 1:
        return str(texts[0])
    raise UsageError(
        f"hf:{dataset} has no column {KEY!r}, and {'several columns' if texts else 'no column'} of texts.",
        hint=f"Its columns are {', '.join(table.column_names)}. Save the one you want as a .jsonl file of "
        '{"text": "..."}.',
    )
