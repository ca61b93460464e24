"""Rows of facts: JSON Lines and CSV read within bounds, and columns found by their names."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressknow.base.errors import UsageError, suggest_word
from compressknow.base.reading import NotReadable, compute_sha256, find_lone_surrogate, parse_json, read_lines
from compressknow.evaluate.facts import ARTS, GEOGRAPHY, OBJECT, PEOPLE, map_relations

# The escape of half a surrogate pair without the other half.
_HALF = re.compile(rb"\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]", re.IGNORECASE)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (number of the line, its object) or, where a line holds none, (number, what is wrong and in which column).
    Raises UsageError if the file cannot be read."""
    try:
        # Lines end at "\n" alone: JSON texts may hold U+2028 and the like, at which str.splitlines would break them.
        for number, line in enumerate(read_lines(path), start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield number, _parse_line(content)
    except (OSError, NotReadable) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def read_csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line number, row) of a CSV file with a header, as `read_json_lines` does: empty cells are left out,
    `candidates` are parted by ``|``, `popularity` is a number. Raises UsageError if the file cannot be read."""
    lines = (line.removeprefix(codecs.BOM_UTF8).decode("utf-8") + "\n" for line in read_lines(path))
    table = csv.DictReader(lines, strict=True, skipinitialspace=True)
    try:
        if len(table.fieldnames or ()) == 1:
            raise UsageError(f"{path} cannot be read: its first line has no comma.", hint="Separate columns by commas.")
        names = [name for name in table.fieldnames or () if name]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"{path} has two columns {twice!r}.", hint="Give each a name of its own.")
        for row in table:
            number = table.reader.line_num
            if None in row:
                yield number, "more cells than the header has columns"
            else:
                yield number, {key: parse_cell(key, text) for key, text in row.items() if text and text.strip()}
    except UnicodeDecodeError:
        raise UsageError(f"{path} cannot be read: it is not UTF-8.", hint="Save it as CSV UTF-8.") from None
    except csv.Error as error:
        where = f"line {table.reader.line_num}"
        raise UsageError(f"{path} cannot be read, {where}: {error}.", hint="Save it as CSV.") from None
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
        return "column 1: not JSON that can be read: nested too deeply, or a number of too many digits"
    if not isinstance(value, dict):
        return "column 1: a JSON object {...} belongs here"
    if b"\\u" in line and (escape := find_lone_surrogate(json.dumps(value, ensure_ascii=False))):
        found = _HALF.search(line)
        return f"column {found.start() + 1 if found else 1}: {escape} is half of a character"
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all objects of the file. Raise UsageError, with line and column, at the first line that holds none."""
    rows = []
    for number, row in read_json_lines(path):
        if isinstance(row, str):
            raise UsageError(f"{path}, line {number}, {row}.", hint="The file is damaged: get it again.")
        rows.append(row)
    return rows


def hash_files(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    """Map file names relative to `folder`, with forward slashes, to the files' sha256 in hexadecimal."""
    return {path.relative_to(folder).as_posix(): compute_sha256(path) for path in paths}


KEYS = ("subject", "object", "prompt", "template", "relation", "id", "popularity", "candidates", "school-subject")


@dataclass(frozen=True)
class Columns:
    """`of` is {one of `KEYS`: name of a column}; `of["template"]` may be a template itself. `templates` are those by
    relation, where no column holds any; `known_as` names the kind of table that was recognised."""

    of: Mapping[str, str]
    templates: Mapping[str, str]
    known_as: str | None

    @property
    def fixed_template(self) -> str | None:
        template = self.of.get("template", "")
        return template if OBJECT in template else None

    @property
    def names(self) -> list[str]:
        """Return the columns to read, each once."""
        return list(dict.fromkeys(name for name in self.of.values() if name != self.fixed_template))


# Domains of PopQA's properties, with underscores for spaces.
POPQA = map_relations(
    {
        GEOGRAPHY: "capital capital_of country",
        PEOPLE: "place_of_birth father mother occupation religion",
        ARTS: "author composer director genre producer screenwriter",
    }
)
# PopQA asks questions ("What is Henry Feilden's occupation?"); these say the same with a blank at the end.
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
_OWN = {**_LABELS, "popularity": "popularity", "candidates": "candidates", "school-subject": "subject"}
# Kind of table: (columns by which it is known, the columns of each key in order of preference, templates by relation).
# LAMA's copies on the hub have the template and a sentence of the text in each row; the official code uses templates.
_KNOWN: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "PopQA": (
        "subj prop obj s_pop",
        {"subject": "subj", "object": "obj", "relation": "prop", "id": "id", "popularity": "s_pop"},
        _POPQA_TEMPLATES,
    ),
    "facts": ("prompt obj_label", {**_OWN, "prompt": "prompt"}, {}),
    "LAMA by template": ("template sub_label obj_label", {**_OWN, "template": "template"}, {}),
    "LAMA by sentence": ("masked_sentence obj_label", {**_LABELS, "prompt": "masked_sentence"}, {}),
}


def parse_columns(options: Iterable[str]) -> dict[str, str]:
    """Parse ``KEY=COLUMN`` texts. Raise UsageError for another form, an unknown key and one given twice.

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


def choose_columns(there: Iterable[str], wanted: Mapping[str, str], where: str) -> Columns:
    """Choose from the columns `there`: as for a table that is known, but what is `wanted` comes first. Raises
    UsageError, which lists the columns there are, where one is not there or too few are named to make facts."""
    present = set(there)
    for key in wanted:
        check_key(key)
    kind, recognized, templates = _recognise(present)
    if {"prompt", "template"} & set(wanted):
        # A prompt or template named by the user replaces that of the known table.
        recognized = {key: name for key, name in recognized.items() if key not in ("prompt", "template")}
        templates = {}
    columns = Columns({**recognized, **wanted}, templates, kind)
    listing = f"Its columns are {', '.join(sorted(present))}." if present else "It has no columns."
    if missing := [name for name in columns.names if name not in present]:
        raise UsageError(f"{where} has no column {missing[0]!r}.", listing)
    by_template = "prompt" not in columns.of and ("template" in columns.of or columns.templates)
    for key in ("object", "subject" if by_template else "prompt"):
        if key not in columns.of:
            raise UsageError(f"{where}: which column is the {key}?", listing, f"Say --map {key}=COLUMN.")
    return columns


def _recognise(present: set[str]) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """Return the kind of table (None of one that is not known), the column of each key, and templates by relation."""
    for kind, (known_by, keys, templates) in _KNOWN.items():
        if present.issuperset(known_by.split()):
            there = {key: [name for name in names.split() if name in present] for key, names in keys.items()}
            return kind, {key: names[0] for key, names in there.items() if names}, templates
    return None, {}, {}
