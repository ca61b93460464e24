"""Where a calibration text comes from, and the texts that a file or a data set holds, one after the other."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from compressknow.errors import CompressknowError, UsageError
from compressknow.reading import NotReadable, check_regular, half_character, open_regular, parse_json, read_lines
from compressknow.tables import load_tables

Kind = Literal["self", "file", "hf"]
SELF, HUB = "self", "hf:"
# The key of a JSON line, and the column of a table, that hold a text.
KEY = "text"
# A set's own text to learn from comes first: facts are asked of the others.
_SPLITS = ("train", "validation", "test")
_PIECE = 1 << 16
_ROWS_AT_ONCE = 256
FORMS = "Give self (the model's own samples), FILE.txt, FILE.jsonl or hf:DATASET."


class Passage(NamedTuple):
    """A piece of text; `begins` where it is the first of a text, so that a separator goes before it."""

    text: str
    begins: bool


def kind_of(source: str) -> Kind:
    """What `source` names: ``self``, a file or a data set. Looks at no file, and imports nothing large.

    Raises UsageError where it is none of these.

    >>> [kind_of(source) for source in ("self", "notes.txt", "rows.jsonl", "hf:wikitext:wikitext-2-raw-v1")]
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
    """Raise UsageError where the file that `source` names is not there, CompressknowError where it is another kind of
    file."""
    path = Path(source).expanduser()
    try:
        check_regular(path)
    except FileNotFoundError:
        raise UsageError(f"There is no calibration text {path}.", hint=FORMS) from None
    except NotReadable as error:
        raise CompressknowError(f"{path} cannot be read: {error}.") from None
    except OSError as error:
        raise CompressknowError(f"{path} cannot be read.", error.strerror) from None


def passages(source: str, most: int) -> Iterator[Passage]:
    """The texts of a ``.txt`` file (one text), a ``.jsonl`` file (one a line) or ``hf:DATASET`` (one a row), in order.

    Blank ones are left out. No more is read than is asked for, and that must be found in the first `most` bytes.
    Raises UsageError where the file or set is not found, CompressknowError where it cannot be read, or where there is
    more of it.
    """
    if source.startswith(HUB):
        yield from _of_some(_rows(source.removeprefix(HUB)), most, source)
        return
    check_file(source)
    path = Path(source).expanduser()
    try:
        found = _lines(path) if path.suffix.lower() == ".jsonl" else _pieces(path)
        yield from _of_some(found, most, str(path))
    except UnicodeDecodeError:
        raise CompressknowError(f"{path} is not UTF-8.", hint="Save it as UTF-8, and try again.") from None
    except NotReadable as error:
        raise CompressknowError(f"{path} cannot be read: {error}.") from None
    except OSError as error:
        raise CompressknowError(f"{path} cannot be read.", error.strerror) from error


# A passage, nothing where it is blank, and what was read for it.
_Read = tuple[Passage | None, int]


def _of_some(found: Iterator[_Read], most: int, source: str) -> Iterator[Passage]:
    left = most
    for passage, read in found:
        if left < 0:
            raise CompressknowError(
                f"{source} has too few tokens in its first {most:,} bytes.",
                hint="Give a text of words, or fewer --calibration-tokens.",
            )
        left -= read
        if passage:
            yield passage


def _pieces(path: Path) -> Iterator[_Read]:
    """Whole lines of about 64 K characters together: what is tokenized at once."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
        begins = True
        while piece := file.read(_PIECE):
            piece += file.readline(_PIECE)
            yield Passage(piece, begins), len(piece)
            begins = False


def _lines(path: Path) -> Iterator[_Read]:
    for number, line in enumerate(read_lines(path), start=1):
        text = _text_of(path, number, line)
        yield (Passage(text, True) if text else None), len(line) + 1


def _text_of(path: Path, number: int, line: bytes) -> str:
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
    if b"\\u" in line and (half := half_character(text)):
        raise CompressknowError(f"{path}, line {number}: {half} is half of a character.", hint="Save it as UTF-8.")
    return text if text.strip() else ""


def _rows(dataset: str) -> Iterator[_Read]:
    table = _split_of(load_tables(dataset), dataset)
    column = _column_of(table, dataset)
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for text in batch.column(column).to_pylist():
            yield (Passage(text, True) if text and text.strip() else None), len(text or "") + 1


def _split_of(splits: dict[str, Any], dataset: str) -> Any:
    name = next((name for name in _SPLITS if name in splits), None)
    if name is None and len(splits) > 1:
        raise UsageError(
            f"hf:{dataset} has none of the splits {', '.join(_SPLITS)}, but {', '.join(splits)}.",
            hint='Save the one you want as a .jsonl file of {"text": "..."}.',
        )
    return splits[name] if name else next(iter(splits.values()))


def _column_of(table: Any, dataset: str) -> str:
    """``text``, or the only column of texts."""
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
