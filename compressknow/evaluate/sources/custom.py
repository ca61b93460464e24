"""The user's own sources: facts in a file or a table, and running text.

``hf:NAME`` or ``hf:NAME:CONFIG`` is a data set on the Hub; ``hf:PATH`` is a folder (of data files, with or without
``:CONFIG``, or written by `save_to_disk`) or a .parquet, .json, .jsonl or .csv file. The user gives the columns, unless
the table is recognized: PopQA (``akariasai/PopQA``), LAMA's copies in Parquet, and tables with the columns of a facts
file (`facts:`).
"""

from __future__ import annotations

import contextlib
import difflib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressknow.base.errors import UsageError
from compressknow.base.files import escape_name, expand_home
from compressknow.base.reading import (
    SUFFIXES,
    NotReadable,
    check_regular,
    compute_sha256,
    is_path,
    load_tables,
    open_regular,
    parse_json,
)
from compressknow.evaluate.facts import (
    BLANK,
    GENERAL,
    OBJECT,
    SUBJECT,
    Fact,
    Probe,
    add_blank,
    check_blanks,
    collect_facts,
    fill,
    find_domain,
)
from compressknow.evaluate.sources import Options, ProbeSource
from compressknow.evaluate.sources.columns import (
    POPQA,
    Columns,
    parse_cell,
    read_csv_lines,
    read_json_lines,
)
from compressknow.evaluate.sources.sets import CONCEPTNET, LAMA
from compressknow.evaluate.text import CONTEXT, RunningText

FACTS_PROTOCOL = "facts/1"
_HINT = (
    f'A line needs at least {{"prompt": "The capital of France is {BLANK}.", "obj_label": "Paris"}}; '
    "compressknow probe --help shows all keys."
)
_TEXTS = ("prompt", "template", "obj_label", "sub_label", "relation", "subject")
_KEYS = (*_TEXTS, "id", "candidates", "popularity")
# Popularity is stored as a float, which cannot represent larger integers exactly.
_MOST_POPULAR = 1 << 53
# Maximum number of problems that a message lists.
_SHOWN = 5


class OwnFacts(ProbeSource):
    help = "your own facts"
    form = "FILE.jsonl"
    details = """\
A line of facts:FILE.jsonl, for example:
  {"relation": "capital", "subject": "geography", "sub_label": "France",
   "obj_label": "Paris", "prompt": "The capital of France is [MASK].",
   "candidates": ["Paris", "Rome", "Madrid"], "popularity": 68000000}
`prompt` and `obj_label` are required, the rest is optional. Instead of
`prompt` it may have `template` ("The capital of [X] is [Y].") with
`sub_label`. Without `candidates` the answer may be any text (for masked
models, any single token). facts:FILE.csv has these as columns, and
candidates as Paris|Rome|Madrid."""

    def named(self, part: str) -> str:
        """Return the file's name, since its contents do not depend on its folder."""
        return escape_name(Path(part).name)

    def meant(self, text: str) -> bool:
        return Path(text).suffix.lower() in (".jsonl", ".csv")

    def open(self, name: str, part: str, options: Options) -> Probe:  # noqa: ARG002
        """Read the facts of a file: JSON Lines with the keys `_KEYS`, or CSV with these as columns. Raises UsageError
        with file, line and key (or column, if a line is not JSON) of the first errors."""
        path = expand_home(part)
        if not path.exists():
            raise UsageError(
                f"There is no file {path}.", hint="facts: is followed by the path of a JSON Lines or CSV file."
            )
        _check_is_no_table(path, part)
        facts: dict[str, Fact] = {}
        lines: dict[str, int] = {}
        problems: list[str] = []
        for number, row in (read_csv_lines if path.suffix.lower() == ".csv" else read_json_lines)(path):
            # A table that is written as JSON Lines has a null for each empty cell.
            row = (
                row if isinstance(row, str) else {k: _strip(k, value) for k, value in row.items() if value is not None}
            )
            in_line = [row] if isinstance(row, str) else _find_problems(row)
            if not in_line and isinstance(row, dict):
                fact = _make_fact(row, number, name, escape_name(path.stem))
                if fact.id in facts:
                    in_line = [f"id: {fact.id!r} is also the id of line {lines[fact.id]}"]
                facts[fact.id], lines[fact.id] = fact, number
            problems += [f"line {number}, {problem}" for problem in in_line]
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            listed = "\n".join(f"  {line}" for line in problems[:_SHOWN] + more)
            raise UsageError(f"{path} cannot be read as facts:", listed, _HINT)
        if not facts:
            raise UsageError(f"{path} has no facts.", hint=_HINT)
        different, dropped = collect_facts(facts.values(), lambda fact: replace(fact, id=""), "repeats a line")
        return Probe(
            name=name,
            protocol=FACTS_PROTOCOL,
            facts=different,
            dropped=dropped,
            vocabulary="closed" if all(fact.candidates for fact in different) else "open",
            source={"files": {escape_name(path.name): compute_sha256(path)}},
        )


def _check_is_no_table(path: Path, part: str) -> None:
    """Raise UsageError for a file that only `hf:` reads."""
    kinds = {".parquet": ("a Parquet file", b"PAR1"), ".json": ("a JSON list", b"[")}
    if table := kinds.get(path.suffix.lower()):
        kind, start = table
        # A file that cannot be opened is reported when its lines are read.
        with contextlib.suppress(OSError, NotReadable), open_regular(path) as file:
            if file.read(64).lstrip().startswith(start):
                raise UsageError(f"{path} is {kind}, not JSON Lines or CSV.", hint=f"Pass hf:{part}, which reads it.")


def _strip(key: str, value: Any) -> Any:
    """Strip spaces around labels, which no model generates, but not around prompts, where they may be intended."""
    if isinstance(value, list):
        return [_strip(key, each) for each in value]
    return value.strip() if isinstance(value, str) and key not in ("prompt", "template") else value


def _find_problems(row: dict[str, Any]) -> list[str]:
    """List the problems of a line, each as ``KEY: problem``; those of types first, which the other checks rely on."""
    wrong = [f"{key}: must be a non-empty string" for key in _TEXTS if key in row and not _is_text(row[key])]
    if "id" in row and not _is_text(row["id"]) and type(row["id"]) is not int:
        wrong.append("id: must be a non-empty string")
    candidates, popularity = row.get("candidates"), row.get("popularity")
    if candidates is not None and not (isinstance(candidates, list) and all(map(_is_text, candidates))):
        wrong.append("candidates: must be a list of non-empty strings")
    if popularity is not None and not _is_popularity(popularity):
        wrong.append("popularity: must be a number above 0, and at most 2^53")
    if wrong:
        return wrong
    # Unknown keys are ignored, unless they look like misspelled ones.
    near = {key: difflib.get_close_matches(key.casefold(), _KEYS, n=1, cutoff=0.85) for key in row if key not in _KEYS}
    wrong += [f"{key}: unknown; did you mean {match[0]}?" for key, match in near.items() if match]
    if "obj_label" not in row:
        wrong.append("obj_label: missing")
    return [*wrong, *_check_prompt(row), *_check_candidates(row)]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_prompt(row: dict[str, Any]) -> list[str]:
    if "prompt" in row:
        count = add_blank(row["prompt"]).count(BLANK)
        return [] if count == 1 else [f"prompt: has {BLANK} {count} times, not once"]
    if "template" not in row:
        return ["prompt: missing, and no template either"]
    wrong = [] if "sub_label" in row else ["sub_label: missing; the template needs it"]
    if SUBJECT not in row["template"] or row["template"].count(OBJECT) != 1 or BLANK in row["template"]:
        wrong.append(f"template: must contain {SUBJECT}, and {OBJECT} once")
    elif BLANK in row.get("sub_label", ""):
        wrong.append(f"sub_label: contains {BLANK}")
    return wrong


def _check_candidates(row: dict[str, Any]) -> list[str]:
    candidates = row.get("candidates")
    if candidates is None:
        return []
    if len(candidates) < 2:
        return ["candidates: must be at least 2"]
    if len({unicodedata.normalize("NFC", each) for each in candidates}) < len(candidates):
        return ["candidates: one of them is repeated"]
    if "obj_label" in row and row["obj_label"] not in candidates:
        return [f"candidates: the object {row['obj_label']!r} is not among them"]
    return []


def _make_fact(row: dict[str, Any], number: int, probe: str, stem: str) -> Fact:
    relation, subject = row.get("relation", stem), row.get("sub_label", "")
    candidates = tuple(row["candidates"]) if row.get("candidates") is not None else None
    prompt = add_blank(row["prompt"]) if "prompt" in row else fill(row["template"], subject)
    return Fact(
        id=str(row.get("id", f"{relation}/{number}")),
        probe=probe,
        relation=relation,
        subject=row.get("subject", GENERAL),
        sub_label=subject,
        obj_label=row["obj_label"],
        prompt=prompt,
        candidates=candidates,
        popularity=row.get("popularity"),
    )


HUB_PROTOCOL = "hf/1"
# Default splits in order of preference.
_SPLITS = ("test", "validation", "train")
_ROWS_AT_ONCE = 10_000
# Domains of relations in recognized tables.
DOMAINS = LAMA | CONCEPTNET | POPQA


class Hub(ProbeSource):
    help = "a Hub data set, or a local Parquet, JSON or CSV file"
    form = "DATASET"
    takes = frozenset({"columns", "split"})

    def named(self, part: str) -> str:
        """Return the name on the Hub, or that of a file or folder, since facts do not depend on where it is."""
        # The current folder, ".", has no name.
        return (escape_name(Path(part).name) or part) if is_path(part) else part

    def meant(self, text: str) -> bool:
        """Return whether the name has the suffix of a table, or an owner, as on the Hub."""
        tables = set(SUFFIXES) - {".jsonl"}
        return Path(text).suffix.lower() in tables or re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None

    def open(self, name: str, part: str, options: Options) -> Probe:
        """Read all facts of a split; invalid rows are counted in `dropped`."""
        splits = load_tables(part)
        split = _choose_split(list(splits), options.split, part)
        table = splits[split]
        columns = Columns(table.column_names, options.columns, name)
        rows = (_make_hub_fact(name, *row, columns) for row in enumerate(_read_rows(table, columns)))
        facts, dropped = collect_facts(rows, lambda fact: (fact.prompt, fact.obj_label), "same sentence and object")
        return Probe(
            name=name,
            protocol=HUB_PROTOCOL,
            facts=facts,
            dropped=dropped,
            vocabulary="closed" if all(fact.candidates for fact in facts) else "open",
            source={
                "dataset": self.named(part),
                "split": split,
                "columns": dict(columns.of),
                "known as": columns.known_as,
            },
        )


def _choose_split(splits: list[str], named: str | None, dataset: str) -> str:
    if named is not None and named not in splits:
        raise UsageError(f"hf:{dataset} has no split {named!r}.", hint=f"Choose from {', '.join(splits)}.")
    split = named or (splits[0] if len(splits) == 1 else next((name for name in _SPLITS if name in splits), None))
    if split is None:
        raise UsageError(f"hf:{dataset} has several splits.", hint=f"Pass --split with one of {', '.join(splits)}.")
    return split


def _read_rows(table: Any, columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield the rows with the keys of `columns` in place of the table's names."""
    pairs = [(key, name) for key, name in columns.of.items() if name in columns.names]
    for batch in table.select_columns(columns.names).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield {key: row[name] for key, name in pairs}


def _make_hub_fact(probe: str, number: int, row: dict[str, Any], columns: Columns) -> Fact | str:
    """Return the row's fact, or the reason to drop it."""
    obj_label, subject = _to_text(row.get("object")), _to_text(row.get("subject")) or ""
    relation = _to_text(row.get("relation")) or probe.removeprefix("hf:")
    if obj_label is None:
        return "no object"
    prompt = add_blank(_to_text(row.get("prompt")) or "")
    # As in a facts file, a row may have a template instead.
    if not prompt and ("template" in columns.of or "prompt" not in columns.of):
        template = columns.fixed_template or _to_text(row.get("template")) or columns.templates.get(relation)
        if not template or not subject:
            return "no subject, or no template for its relation"
        prompt = fill(template, subject)
    if reason := check_blanks(prompt):
        return reason
    candidates, popularity = _to_texts(row.get("candidates")), parse_cell("popularity", row.get("popularity"))
    if candidates is not None and (obj_label not in candidates or len(candidates) < 2):
        return "object not among two candidates or more"
    return Fact(
        id=f"{relation}/{_to_text(row.get('id')) or number}",
        probe=probe,
        relation=relation,
        subject=_to_text(row.get("school-subject")) or find_domain(relation, DOMAINS),
        sub_label=subject,
        obj_label=obj_label,
        prompt=prompt,
        candidates=candidates,
        popularity=popularity if _is_popularity(popularity) else None,
    )


def _is_popularity(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST_POPULAR


def _to_text(value: object) -> str | None:
    """Return a text or number, or the first one of a list, as text; None for anything else, or if it is empty."""
    if isinstance(value, list):
        return _to_text(value[0]) if value else None
    if isinstance(value, float) and value.is_integer():
        # Columns of integers are read as floats if a cell is empty.
        value = int(value)
    return (str(value).strip() or None) if isinstance(value, str | int | float) and value == value else None


def _to_texts(value: object) -> tuple[str, ...] | None:
    """Return the distinct texts of a list, of its JSON, or of a text separated by ``|``; None if there are none."""
    if isinstance(value, str):
        text = value
        try:
            value = parse_json(text.encode())
        except ValueError:
            value = text
        # A number is a single candidate.
        value = value if value is None or isinstance(value, list) else text.split("|")
    return tuple(dict.fromkeys(filter(None, map(_to_text, value)))) or None if isinstance(value, list) else None


# Shorter chunks have hardly any scored tokens.
LEAST_CONTEXT = 8


class Text(ProbeSource):
    help = "perplexity of a text, and KL per token, as in llama.cpp (causal models)"
    form = "FILE.txt"
    takes = frozenset({"context"})
    held_out = False

    named = OwnFacts.named

    def meant(self, text: str) -> bool:
        return Path(text).suffix.lower() in (".txt", ".raw")

    def open(self, name: str, part: str, options: Options) -> RunningText:
        """Open the text of a file. Raise UsageError if it does not exist, is empty, or is not UTF-8."""
        path = expand_home(part)
        hint = "text: is followed by the path of a UTF-8 text file."
        try:
            check_regular(path)
        except FileNotFoundError:
            raise UsageError(f"There is no file {path}.", hint=hint) from None
        except (OSError, NotReadable) as error:
            raise UsageError(f"{path} cannot be read: {error}.", hint=hint) from None
        if options.context is not None and options.context < LEAST_CONTEXT:
            raise UsageError(f"--context must be at least {LEAST_CONTEXT}: {options.context}.")
        text = RunningText(name, path, compute_sha256(path), path.stat().st_size, options.context, options.limit)
        if not text.read(options.context or CONTEXT).strip():
            raise UsageError(f"{path} is empty.", hint="Give a text of a few thousand words.")
        return text
