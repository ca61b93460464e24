"""A sensitivity as files that people read: a table of every weight and type, and the same as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from compressknow._version import __version__
from compressknow.pages.pages import write_formats
from compressknow.study.sensitivity import Sensitivity

FORMATS = (".csv", ".json")
COLUMNS = ("name", "group", "layer", "rows", "columns", "type", "bytes", "kl_facts", "kl_text")


def write_map(sensitivity: Sensitivity, files: Sequence[Path], *, overwrite: bool) -> None:
    """Write it in the formats that the names of the files ask for."""
    written = {".csv": _csv, ".json": _json}
    write_formats(lambda suffix: written[suffix](sensitivity), files, overwrite=overwrite)


def _json(sensitivity: Sensitivity) -> str:
    values = {**sensitivity.as_json(), "versions": {"compressknow": __version__}}
    return json.dumps(values, indent=1) + "\n"


def _csv(sensitivity: Sensitivity) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(sensitivity))
    return text.getvalue()


def _rows(sensitivity: Sensitivity) -> Iterator[tuple[object, ...]]:
    for row in sensitivity.rows:
        rows, columns = row.shape
        for name, rounding in row.by_type.items():
            yield row.name, row.group, row.layer, rows, columns, name, rounding.bytes, rounding.facts, rounding.text
