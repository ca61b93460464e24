"""`hf:DATASET`: facts from any table that the `datasets` library reads, from the Hugging Face hub or from disk.

``hf:NAME`` or ``hf:NAME:CONFIG`` names a set on the hub; ``hf:PATH`` a folder (of data files, or written by
`save_to_disk`) or one .parquet, .json, .jsonl or .csv file. Which column holds what is said by the user or known:
PopQA (``akariasai/PopQA``), LAMA's copies in Parquet, and tables with the columns of a facts file (`facts:`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressknow.errors import UsageError
from compressknow.evaluate.facts import Fact, Probe, domain_of
from compressknow.evaluate.scoring.prompts import UniqueIds, fill, wrong_blanks
from compressknow.evaluate.sources.columns import POPQA, Columns, choose_columns
from compressknow.evaluate.sources.lama import CONCEPTNET
from compressknow.evaluate.sources.lama import DOMAINS as LAMA
from compressknow.evaluate.sources.source import Options, ProbeSource
from compressknow.reading import parse_json
from compressknow.tables import SUFFIXES, load_tables

PROTOCOL = "hf/1"
# Where the user names no split: sets for evaluation have their facts in the first of these that there is.
_SPLITS = ("test", "validation", "train")
_ROWS_AT_ONCE = 10_000
# Of the sets whose tables are known.
DOMAINS = LAMA | CONCEPTNET | POPQA


class Hub(ProbeSource):
    """``hf:DATASET``."""

    help = "a Hub data set, or a local Parquet, JSON or CSV file"
    form = "DATASET"
    takes = frozenset({"columns", "split"})

    def meant(self, text: str) -> bool:
        """By a file's suffix, or as a name on the hub has an owner."""
        tables = set(SUFFIXES) - {".jsonl"}
        return Path(text).suffix.lower() in tables or re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None

    def open(self, name: str, part: str, options: Options) -> Probe:  # noqa: ARG002
        """See `hub_facts`."""
        return hub_facts(part, options.columns, options.split)


def hub_facts(dataset: str, columns: Mapping[str, str] | None = None, split: str | None = None) -> Probe:
    """All facts of one split of a data set; rows that make no fact are counted in `dropped`.

    `columns` is {one of `compressknow.evaluate.sources.columns.KEYS`: name of a column}; "template" may also be a
    template itself.
    Raises UsageError where the set, the split or a column is not there, CompressknowError where the hub is not reached
    or the data cannot be read.
    """
    splits = load_tables(dataset)
    chosen = _choose_split(list(splits), split, dataset)
    table = splits[chosen]
    named = choose_columns(table.column_names, columns or {}, f"hf:{dataset}")
    facts, dropped = _select(f"hf:{dataset}", _rows(table, named), named)
    return Probe(
        name=f"hf:{dataset}",
        protocol=PROTOCOL,
        facts=facts,
        dropped=dropped,
        vocabulary="closed" if all(fact.candidates for fact in facts) else "open",
        source={"dataset": dataset, "split": chosen, "columns": dict(named.of), "known as": named.known_as},
    )


def _choose_split(there: list[str], wanted: str | None, dataset: str) -> str:
    if wanted is not None and wanted not in there:
        raise UsageError(f"hf:{dataset} has no split {wanted!r}.", hint=f"There is {', '.join(there)}.")
    chosen = wanted or (there[0] if len(there) == 1 else next((name for name in _SPLITS if name in there), None))
    if chosen is None:
        raise UsageError(f"hf:{dataset} has several splits.", hint=f"Say --split with one of {', '.join(there)}.")
    return chosen


def _rows(table: Any, columns: Columns) -> Iterator[dict[str, Any]]:
    """The rows with the keys of `columns` in place of the table's names."""
    pairs = [(key, name) for key, name in columns.of.items() if name in columns.names]
    for batch in table.select_columns(columns.names).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield {key: row[name] for key, name in pairs}


def _select(probe: str, rows: Iterator[dict[str, Any]], columns: Columns) -> tuple[tuple[Fact, ...], dict[str, int]]:
    facts, dropped, unique = [], Counter[str](), UniqueIds()
    asked: set[tuple[str, str]] = set()
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    for number, row in enumerate(rows):
        fact = _fact(probe, number, row, columns)
        if isinstance(fact, Fact) and (fact.prompt, fact.obj_label) in asked:
            fact = "same sentence and object"
        if isinstance(fact, str):
            dropped[fact] += 1
            continue
        asked.add((fact.prompt, fact.obj_label))
        candidates = shared.setdefault(fact.candidates, fact.candidates) if fact.candidates else None
        facts.append(replace(fact, id=unique(fact.id), candidates=candidates))
    return tuple(facts), dict(dropped)


def _fact(probe: str, number: int, row: dict[str, Any], columns: Columns) -> Fact | str:
    """The row's fact, or the reason to drop it."""
    obj_label, subject = _text(row.get("object")), _text(row.get("subject")) or ""
    relation = _text(row.get("relation")) or probe.removeprefix("hf:")
    if obj_label is None:
        return "no object"
    prompt = _prompt(row, subject, relation, columns)
    if prompt is None:
        return "no subject, or no template for its relation"
    if reason := wrong_blanks(prompt):
        return reason
    candidates = _texts(row.get("candidates"))
    if candidates is not None and (obj_label not in candidates or len(candidates) < 2):
        return "object not among two candidates or more"
    return Fact(
        id=f"{relation}/{_text(row.get('id')) or number}",
        probe=probe,
        relation=relation,
        subject=_text(row.get("school-subject")) or domain_of(relation, DOMAINS),
        sub_label=subject,
        obj_label=obj_label,
        prompt=prompt,
        candidates=candidates,
        popularity=_popularity(row.get("popularity")),
    )


def _prompt(row: dict[str, Any], subject: str, relation: str, columns: Columns) -> str | None:
    if "prompt" in columns.of:
        return _text(row["prompt"]) or ""
    template = columns.fixed_template or _text(row.get("template")) or columns.templates.get(relation)
    return fill(template, subject) if template and subject else None


def _text(value: object) -> str | None:
    """A text, a number as one, the first of a list; None for what is empty or nothing of these."""
    if isinstance(value, list):
        return _text(value[0]) if value else None
    return (str(value).strip() or None) if isinstance(value, str | int | float) and value == value else None


def _texts(value: object) -> tuple[str, ...] | None:
    """A list of texts, also as a text of JSON, each once; None for an empty one. Another text is a list of itself."""
    if isinstance(value, str):
        try:
            value = parse_json(value.encode())
        except ValueError:
            value = [value]
    return tuple(dict.fromkeys(filter(None, map(_text, value)))) or None if isinstance(value, list) else None


def _popularity(value: object) -> float | None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return number if 0 < number < math.inf else None
