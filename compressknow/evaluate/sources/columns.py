"""Rows of facts: reading JSON Lines and CSV with limits on their size, and finding columns by name."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compressknow.base.errors import UsageError, suggest_word
from compressknow.base.reading import NotReadable, compute_sha256, find_lone_surrogate, parse_json, read_lines
from compressknow.evaluate.facts import ARTS, GEOGRAPHY, OBJECT, PEOPLE, map_relations

# The escape of a lone surrogate.
_LONE_SURROGATE = re.compile(rb"\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]", re.IGNORECASE)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line number, object or, for an invalid line, column and error). Raises UsageError if it cannot be read."""
    try:
        # Lines end only at "\n", not at U+2028 and the like, where str.splitlines would break JSON texts.
        for number, line in enumerate(read_lines(path), start=1):
            content = line.removeprefix(codecs.BOM_UTF8)
            if content.strip():
                yield number, _parse_line(content)
    except (OSError, NotReadable) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def read_csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line number, row) of a CSV file with a header, as `read_json_lines` does: empty cells are left out,
    `candidates` are separated by ``|``, `popularity` is a number. Raises UsageError if the file cannot be read."""
    lines = (line.removeprefix(codecs.BOM_UTF8).decode("utf-8") + "\n" for line in read_lines(path))
    table = csv.DictReader(lines, strict=True, skipinitialspace=True)
    try:
        if len(table.fieldnames or ()) == 1:
            raise UsageError(f"{path} cannot be read: its first line has no comma.", hint="Separate columns by commas.")
        names = [name for name in table.fieldnames or () if name]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"{path} has two columns {duplicate!r}.", hint="Give them different names.")
        for row in table:
            number = table.reader.line_num
            if None in row:
                yield number, "more cells than the header has columns"
            else:
                yield number, {key: parse_cell(key, text) for key, text in row.items() if text and text.strip()}
    except UnicodeDecodeError:
        raise UsageError(f"{path} cannot be read: it is not UTF-8.", hint="Save it as CSV UTF-8.") from None
    except csv.Error as error:
        line = f"line {table.reader.line_num}"
        raise UsageError(f"{path} cannot be read, {line}: {error}.", hint="Save it as CSV.") from None
    except (OSError, NotReadable) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def parse_cell(key: str, text: Any) -> Any:
    if not isinstance(text, str):
        return text
    if key == "candidates":
        return text.split("|")
    if key != "popularity":
        return text
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        return f"column {error.start + 1}: not UTF-8"
    except json.JSONDecodeError as error:
        return f"column {error.colno}: not JSON: {error.msg}"
    except ValueError:
        return "column 1: JSON that is nested too deeply, or has a number of too many digits"
    if not isinstance(value, dict):
        return "column 1: not a JSON object {...}"
    if b"\\u" in line and (escape := find_lone_surrogate(json.dumps(value, ensure_ascii=False))):
        match = _LONE_SURROGATE.search(line)
        return f"column {match.start() + 1 if match else 1}: {escape} is half of a character"
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all objects of a JSON Lines file. Raise UsageError, with line and column, at the first invalid line."""
    rows = []
    for number, row in read_json_lines(path):
        if isinstance(row, str):
            raise UsageError(f"{path}, line {number}, {row}.", hint="The file is damaged: get it again.")
        rows.append(row)
    return rows


def hash_files(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    """Map file names relative to `folder`, with forward slashes, to sha256 in hexadecimal."""
    return {path.relative_to(folder).as_posix(): compute_sha256(path) for path in paths}


KEYS = ("subject", "object", "prompt", "template", "relation", "id", "popularity", "candidates", "school-subject")


# Domains of PopQA's properties, with underscores for spaces.
POPQA = map_relations(
    {
        GEOGRAPHY: "capital capital_of country",
        PEOPLE: "place_of_birth father mother occupation religion",
        ARTS: "author composer director genre producer screenwriter",
    }
)
# Sentences with a blank at the end in place of PopQA's questions ("What is Henry Feilden's occupation?").
_POPQA_NOUNS = (
    "author capital color composer country director father genre mother occupation producer religion screenwriter"
)
_POPQA_TEMPLATES = {
    **{noun: f"The {noun} of [X] is [Y]." for noun in _POPQA_NOUNS.split()},
    "capital of": "[X] is the capital of [Y].",
    "place of birth": "The place where [X] was born is [Y].",
    "sport": "The sport that [X] plays is [Y].",
}

_LABELS = {"subject": "sub_label sub", "object": "obj_label", "relation": "predicate_id pred relation", "id": "uuid id"}
_FACTS_FILE = {**_LABELS, "popularity": "popularity", "candidates": "candidates", "school-subject": "subject"}
# Kind of table: (columns that identify it, the columns of each key in order of preference, templates by relation).
# LAMA's copies on the Hub have a template and a sentence in each row; templates come first, as in the official code.
_KNOWN: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "PopQA": (
        "subj prop obj s_pop",
        {"subject": "subj", "object": "obj", "relation": "prop", "id": "id", "popularity": "s_pop"},
        _POPQA_TEMPLATES,
    ),
    "facts": ("prompt obj_label", {**_FACTS_FILE, "prompt": "prompt", "template": "template"}, {}),
    "LAMA by template": ("template sub_label obj_label", {**_FACTS_FILE, "template": "template"}, {}),
    "LAMA by sentence": ("masked_sentence obj_label", {**_LABELS, "prompt": "masked_sentence"}, {}),
}


def parse_columns(options: Iterable[str]) -> dict[str, str]:
    """Parse texts like ``KEY=COLUMN``. Raise UsageError if one is invalid, or a key is unknown or repeated.

    >>> parse_columns(["object=obj_label", "template=[X] was born in [Y]."])
    {'object': 'obj_label', 'template': '[X] was born in [Y].'}
    """
    columns: dict[str, str] = {}
    for option in options:
        key, equals, column = (part.strip() for part in option.partition("="))
        if not equals or not column:
            raise UsageError(f"--map takes KEY=COLUMN: {option!r}.", hint=f"The keys are {', '.join(KEYS)}.")
        check_key(key)
        if key in columns:
            raise UsageError(f"--map names {key} twice.")
        columns[key] = column
    return columns


def check_key(key: str) -> None:
    if key not in KEYS:
        near = suggest_word(key, KEYS)
        raise UsageError(f"--map: unknown key {key!r}.", hint=f"{near}The keys are {', '.join(KEYS)}.")


class Columns:
    """Columns of a table of facts: those of the user's `mapping`, then as for a recognized kind of table. Raises
    UsageError, which lists the columns, if one does not exist or facts need more of them.

    `of` is {one of `KEYS`: name of a column}; `of["template"]` may be a template itself. `templates` are templates by
    relation, if no column has any; `names` are the columns to read; `known_as` is the recognized kind of table."""

    def __init__(self, names: Iterable[str], mapping: Mapping[str, str], where: str) -> None:
        present = set(names)
        for key in mapping:
            check_key(key)
        self.known_as, recognized, self.templates = _recognize(present)
        if {"prompt", "template"} & set(mapping):
            # The user's prompt or template replaces both.
            recognized = {key: name for key, name in recognized.items() if key not in ("prompt", "template")}
            self.templates = {}
        self.of = {**recognized, **mapping}
        template = self.of.get("template", "")
        self.fixed_template = template if OBJECT in template else None
        self.names = list(dict.fromkeys(name for name in self.of.values() if name != self.fixed_template))
        listing = f"Its columns are {', '.join(sorted(present))}." if present else "It has no columns."
        if missing := [name for name in self.names if name not in present]:
            raise UsageError(f"{where} has no column {missing[0]!r}.", listing)
        by_template = "prompt" not in self.of and ("template" in self.of or self.templates)
        for key in ("object", "subject" if by_template else "prompt"):
            if key not in self.of:
                raise UsageError(f"{where}: which column is the {key}?", listing, f"Say --map {key}=COLUMN.")


def _recognize(present: set[str]) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """Return the kind of table (None if it is not recognized), the column of each key, and templates by relation."""
    for kind, (required, keys, templates) in _KNOWN.items():
        if present.issuperset(required.split()):
            columns = {key: [name for name in names.split() if name in present] for key, names in keys.items()}
            return kind, {key: names[0] for key, names in columns.items() if names}, templates
    return None, {}, {}
