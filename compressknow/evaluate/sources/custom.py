"""Sources that users bring: facts in a file or in a table, and running text.

``hf:NAME`` or ``hf:NAME:CONFIG`` names a set on the hub; ``hf:PATH`` a folder (of data files, or written by
`save_to_disk`) or one .parquet, .json, .jsonl or .csv file. Which column holds what is said by the user or known:
PopQA (``akariasai/PopQA``), LAMA's copies in Parquet, and tables with the columns of a facts file (`facts:`).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressknow.base.errors import UsageError
from compressknow.base.files import escape_name, expand_home
from compressknow.base.reading import SUFFIXES, NotReadable, check_regular, compute_sha256, load_tables, parse_json
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
    choose_columns,
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
# Answers are stored with floats, which are not exact for larger whole numbers.
_MOST_POPULAR = 1 << 53
# Problems of a file that a message shows.
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
        """Return the file's own name: a fact is the same wherever the file lies."""
        return escape_name(Path(part).name)

    def meant(self, text: str) -> bool:
        return Path(text).suffix.lower() in (".jsonl", ".csv")

    def open(self, name: str, part: str, options: Options) -> Probe:  # noqa: ARG002
        """Read the facts of a file: JSON lines, or CSV with the same keys as columns; `_KEYS` are those of a line.

        Without `relation` it is the name of the file, without `id` the relation and the number of the line. Raises
        UsageError that names file, line and key (or column, where a line is not JSON) of the first errors.
        """
        path = expand_home(part)
        if not path.exists():
            raise UsageError(
                f"There is no file {path}.", hint="facts: is followed by the path of a file of JSON lines, or of CSV."
            )
        facts: dict[str, Fact] = {}
        lines: dict[str, int] = {}
        problems: list[str] = []
        # One tuple for all facts with the same candidates: files repeat a relation's list in each line.
        shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        for number, row in (read_csv_lines if path.suffix.lower() == ".csv" else read_json_lines)(path):
            row = row if isinstance(row, str) else {key: _strip(key, value) for key, value in row.items()}
            found = [row] if isinstance(row, str) else _find_problems(row)
            if not found and isinstance(row, dict):
                fact = _make_fact(row, number, name, escape_name(path.stem), shared)
                if fact.id in facts:
                    found = [f"id: {fact.id!r} is the id of line {lines[fact.id]} too"]
                facts[fact.id], lines[fact.id] = fact, number
            problems += [f"line {number}, {problem}" for problem in found]
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            listed = "\n".join(f"  {line}" for line in problems[:_SHOWN] + more)
            raise UsageError(f"{path} cannot be read as facts:", listed, _HINT)
        if not facts:
            raise UsageError(f"{path} holds no facts.", hint=_HINT)
        return Probe(
            name=name,
            protocol=FACTS_PROTOCOL,
            facts=tuple(facts.values()),
            vocabulary="closed" if all(fact.candidates for fact in facts.values()) else "open",
            source={"files": {escape_name(path.name): compute_sha256(path)}},
        )


def _strip(key: str, value: Any) -> Any:
    """Strip the spaces around a label: no model writes them. Those of a prompt may be meant."""
    if isinstance(value, list):
        return [_strip(key, each) for each in value]
    return value.strip() if isinstance(value, str) and key not in ("prompt", "template") else value


def _find_problems(row: dict[str, Any]) -> list[str]:
    """List what is wrong with one line, each as ``KEY: what``; types first, since the other rules need them right."""
    wrong = [f"{key}: must be a non-empty string" for key in _TEXTS if key in row and not _is_text(row[key])]
    if "id" in row and not _is_text(row["id"]) and type(row["id"]) is not int:
        wrong.append("id: must be a non-empty string")
    candidates, popularity = row.get("candidates"), row.get("popularity")
    if candidates is not None and not (isinstance(candidates, list) and all(map(_is_text, candidates))):
        wrong.append("candidates: must be a list of texts, none empty")
    if popularity is not None and not _is_popularity(popularity):
        wrong.append("popularity: must be a number above 0, and at most 2^53")
    if wrong:
        return wrong
    # Other keys are ignored: those that nearly are known ones would go unnoticed.
    near = {key: difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85) for key in row if key not in _KEYS}
    wrong += [f"{key}: unknown; did you mean {match[0]}?" for key, match in near.items() if match]
    if "obj_label" not in row:
        wrong.append("obj_label: missing")
    return [*wrong, *_check_prompt(row), *_check_candidates(row)]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_prompt(row: dict[str, Any]) -> list[str]:
    if "prompt" in row:
        count = add_blank(row["prompt"]).count(BLANK)
        return [] if count == 1 else [f"prompt: holds {BLANK} {count} times, not once"]
    if "template" not in row:
        return ["prompt: missing, and no template either"]
    wrong = [] if "sub_label" in row else ["sub_label: missing; the template needs it"]
    if SUBJECT not in row["template"] or row["template"].count(OBJECT) != 1 or BLANK in row["template"]:
        wrong.append(f"template: must hold {SUBJECT}, and {OBJECT} once")
    elif BLANK in row.get("sub_label", ""):
        wrong.append(f"sub_label: holds {BLANK}")
    return wrong


def _check_candidates(row: dict[str, Any]) -> list[str]:
    candidates = row.get("candidates")
    if candidates is None:
        return []
    if len(candidates) < 2:
        return ["candidates: must be at least 2"]
    if len({unicodedata.normalize("NFC", each) for each in candidates}) < len(candidates):
        return ["candidates: hold one answer twice"]
    if "obj_label" in row and row["obj_label"] not in candidates:
        return [f"candidates: the object {row['obj_label']!r} is not among them"]
    return []


def _make_fact(
    row: dict[str, Any], number: int, probe: str, stem: str, shared: dict[tuple[str, ...], tuple[str, ...]]
) -> Fact:
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
        candidates=shared.setdefault(candidates, candidates) if candidates else None,
        popularity=row.get("popularity"),
    )


HUB_PROTOCOL = "hf/1"
# Default split: evaluation sets have their facts in the first of these that exists.
_SPLITS = ("test", "validation", "train")
_ROWS_AT_ONCE = 10_000
# Domains of relations in the data sets whose tables are known.
DOMAINS = LAMA | CONCEPTNET | POPQA


class Hub(ProbeSource):
    help = "a Hub data set, or a local Parquet, JSON or CSV file"
    form = "DATASET"
    takes = frozenset({"columns", "split"})

    def meant(self, text: str) -> bool:
        """Go by a file's suffix, or by an owner, as names on the hub have one."""
        tables = set(SUFFIXES) - {".jsonl"}
        return Path(text).suffix.lower() in tables or re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None

    def open(self, name: str, part: str, options: Options) -> Probe:
        """Read all facts of one split; rows that make no fact are counted in `dropped`."""
        splits = load_tables(part)
        chosen = _choose_split(list(splits), options.split, part)
        table = splits[chosen]
        named = choose_columns(table.column_names, options.columns, name)
        made = (_make_hub_fact(name, *row, named) for row in enumerate(_read_rows(table, named)))
        facts, dropped = collect_facts(made, lambda fact: (fact.prompt, fact.obj_label), "same sentence and object")
        return Probe(
            name=name,
            protocol=HUB_PROTOCOL,
            facts=facts,
            dropped=dropped,
            vocabulary="closed" if all(fact.candidates for fact in facts) else "open",
            source={"dataset": part, "split": chosen, "columns": dict(named.of), "known as": named.known_as},
        )


def _choose_split(there: list[str], wanted: str | None, dataset: str) -> str:
    if wanted is not None and wanted not in there:
        raise UsageError(f"hf:{dataset} has no split {wanted!r}.", hint=f"Choose from {', '.join(there)}.")
    chosen = wanted or (there[0] if len(there) == 1 else next((name for name in _SPLITS if name in there), None))
    if chosen is None:
        raise UsageError(f"hf:{dataset} has several splits.", hint=f"Pass --split with one of {', '.join(there)}.")
    return chosen


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
    if "prompt" in columns.of:
        prompt = add_blank(_to_text(row["prompt"]) or "")
    else:
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
    """Return a text, a number as one, the first of a list; None for what is empty or nothing of these."""
    if isinstance(value, list):
        return _to_text(value[0]) if value else None
    if isinstance(value, float) and value.is_integer():
        # Columns of whole numbers are read as floats where a cell is empty.
        value = int(value)
    return (str(value).strip() or None) if isinstance(value, str | int | float) and value == value else None


def _to_texts(value: object) -> tuple[str, ...] | None:
    """Return a list of texts, also as a text of JSON or parted by ``|``, each once; None for an empty one."""
    if isinstance(value, str):
        text = value
        try:
            value = parse_json(text.encode())
        except ValueError:
            value = text.split("|")
    return tuple(dict.fromkeys(filter(None, map(_to_text, value)))) or None if isinstance(value, list) else None


# A shorter chunk has hardly a second half.
LEAST_CONTEXT = 8


class Text(ProbeSource):
    help = "perplexity of a text, and KL by token, as llama.cpp has them (causal models)"
    form = "FILE.txt"
    takes = frozenset({"context"})
    held_out = False

    def named(self, part: str) -> str:
        """Return the file's own name: a text is the same wherever the file lies."""
        return escape_name(Path(part).name)

    def meant(self, text: str) -> bool:
        return Path(text).suffix.lower() in (".txt", ".raw")

    def open(self, name: str, part: str, options: Options) -> RunningText:
        """Open the text of a file. Raise UsageError if there is none, where it is empty, or no text in UTF-8."""
        path = expand_home(part)
        hint = "text: is followed by the path of a text in UTF-8."
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
