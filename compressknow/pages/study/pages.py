"""A study on disk: its page, the same in Markdown and JSON, a row per cell and probe (CSV, Parquet), the figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressknow.base.files import write_whole
from compressknow.base.format import json_text, plain
from compressknow.comparison.intervals import mcnemar
from compressknow.comparison.records import ProbeFigures, TextFigures
from compressknow.pages.as_json import finite, interval_to_json, kept_to_json
from compressknow.pages.pages import read_source, render_html_page, render_markdown_page
from compressknow.pages.parts import get_headline_accuracy
from compressknow.pages.records import Comparison
from compressknow.pages.study import summary
from compressknow.pages.study.charts import Chart, is_chart, study_charts
from compressknow.pages.study.findings import Finding, MethodFindings, by_method, findings
from compressknow.pages.study.records import TOLD, FailedCell, Setting, Study, StudyCell, StudyProbe
from compressknow.pages.study.summary import changes, cliffs, module_that_hurts_least, what_was_found
from compressknow.pages.study.tests import Bound, CheckpointComparison
from compressknow.pages.study.view import study_page
from compressknow.pages.svg import make_standalone

SCHEMA = 1


def render_study_html(study: Study, charts: Sequence[Chart] | None = None) -> str:
    """The page: the same study gives the same bytes.

    Parameters
    ----------
    charts : those of `study_charts(study)`, where they are drawn already.
    """
    drawn = study_charts(study) if charts is None else charts
    return render_html_page("sections.html.j2", page=study_page(study, drawn))


def render_study_markdown(study: Study) -> str:
    """The study as GitHub-flavoured Markdown; the same study gives the same text."""
    return render_markdown_page("sections.md.j2", page=study_page(study))


FIGURES = "figures"


def write_study(study: Study, folder: Path) -> None:
    """Write the study into `folder`, which is there; each file appears only when it is whole, the page last.

    ``study.html``, ``study.md``, ``study.json``, ``cells.parquet``, ``cells.csv`` and ``figures/*.svg``. What is there
    of an earlier state of the study is replaced; a figure that it no longer has is removed.
    """
    charts, rows = study_charts(study), tidy_rows(study)
    write_whole(folder / "cells.csv", to_csv(rows))
    write_whole(folder / "cells.parquet", to_parquet(rows))
    _write_figures(charts, folder / FIGURES)
    write_whole(folder / "study.json", json_text(study_to_json(study)).encode())
    write_whole(folder / "study.md", render_study_markdown(study).encode("utf-8"))
    write_whole(folder / "study.html", render_study_html(study, charts).encode("utf-8"))


def _write_figures(charts: tuple[Chart, ...], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    style = read_source("style.css")
    for chart in charts:
        panels = [(panel.probe, panel.svg) for panel in chart.panels]
        write_whole(folder / f"{chart.name}.svg", make_standalone(panels, chart.title, style).encode("utf-8"))
    drawn = {chart.name for chart in charts}
    for path in folder.glob("*.svg"):
        if is_chart(path.stem) and path.stem not in drawn:
            path.unlink()


def study_to_json(study: Study) -> dict[str, Any]:
    """Plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order.

    Shares and accuracies lie between 0 and 1, sizes are bytes; what cannot be told is None; intervals are [low, high],
    95 %. ``cells`` are the rows of the tidy table, one a cell and probe. No fact's text is in it.
    """
    found, methods = findings(study), by_method(study)
    return {
        "schema": SCHEMA,
        "verdict": summary.verdict(study),
        "known": study.known,
        "found": [asdict(each) for each in what_was_found(study, found)],
        "original": asdict(study.original),
        "probes": {probe.name: _probe(probe) for probe in study.probes},
        "findings": {finding.id: _finding(finding) for finding in found},
        "findings_by_method": _by_method(methods),
        "changes": list(changes(methods)),
        "hurts_least": [asdict(least) for least in module_that_hurts_least(study)],
        "cliffs": [asdict(cliff) for cliff in cliffs(study)],
        "kept": {cell.key: _kept(cell.comparison) for cell in study.cells},
        "cells": tidy_rows(study),
        "method": list(study.method),
        "versions": dict(study.versions),
        "command": study.command,
    }


def _probe(probe: StudyProbe) -> dict[str, Any]:
    keys = ("n", "average", "accuracy", "majority", "chance", "templates")
    return {key: getattr(probe, key) for key in keys}


def _kept(comparison: Comparison) -> dict[str, Any]:
    """Of one cell, over all probes' facts."""
    sure = comparison.certainty
    return {**kept_to_json(comparison.counts), "kept_cluster_interval": interval_to_json(sure.kept), "p": sure.test.p}


def _finding(finding: Finding) -> dict[str, Any]:
    keys = ("claim", "families", "answer", "statistic", "why", "per_million")
    return {
        **{key: getattr(finding, key) for key in keys},
        "comparisons": [_paired_test(pair) for pair in finding.paired_tests],
        "limits": [_bound(bound) for bound in finding.bounds],
    }


def _by_method(found: Sequence[MethodFindings]) -> dict[str, dict[str, Any]]:
    """By kind (``pruning``, ``quantization``), by method, by finding."""
    told: dict[str, dict[str, Any]] = {}
    for each in found:
        told.setdefault(each.kind, {})[each.name] = {finding.id: _finding(finding) for finding in each.findings}
    return told


def _paired_test(pair: CheckpointComparison) -> dict[str, Any]:
    return {
        "less": pair.less,
        "more": pair.more,
        "part": pair.part,
        "n": pair.counts.n,
        "both": pair.counts.both,
        "only_less": pair.counts.lost,
        "only_more": pair.counts.gained,
        "neither": pair.counts.neither,
        "mcnemar_p": mcnemar(pair.counts),
        "p": pair.p,
        "p_holm": pair.p_holm,
        "at_floor": pair.at_floor,
        "per_million": pair.rate.value,
        "per_million_interval": interval_to_json(pair.rate),
        "per_million_p": pair.rate_p,
        "per_million_p_holm": pair.rate_p_holm,
    }


def _bound(bound: Bound) -> dict[str, Any]:
    return {
        "of": bound.of,
        "value": bound.value.value,
        "interval": interval_to_json(bound.value),
        "limit": bound.limit,
        "p": bound.p,
    }


_TEXT, _SHARE, _COUNT, _FLAG = "string", "double", "int64", "bool"
# Columns and their types, in order. Shares and accuracies lie between 0 and 1; sizes are bytes, divergences nats.
COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(("key", "setup", "scope", "method"), _TEXT),
    "amount": _SHARE,
    **dict.fromkeys(("scheme", "pruning", "quantization", "probe", "known"), _TEXT),
    **dict.fromkeys(("n", "both", "lost", "gained", "neither"), _COUNT),
    **dict.fromkeys(("accuracy_original", "accuracy_compressed", "drop_absolute", "drop_relative"), _SHARE),
    **dict.fromkeys(("kept", "kept_low", "kept_high", "mcnemar_p", "p", "answer_changed", "kl_mean"), _SHARE),
    "kl_is_lower_bound": _FLAG,
    **dict.fromkeys(("perplexity_original", "perplexity_compressed"), _SHARE),
    **dict.fromkeys(("in_scope", "pruned", "quantized", "nonzero", "bytes", "sparse_bytes"), _COUNT),
    **dict.fromkeys(("status", "error"), _TEXT),
}
_BESIDE = "quantization"  # the column that those of a study's settings stand behind
_LONGEST = 2000  # characters of a text


def tidy_rows(study: Study) -> list[dict[str, Any]]:
    """One row a cell and probe, in the order of the grid; cells that failed last, with None where nothing is known.
    A running text has a row a cell too, which counts no facts. Beside `COLUMNS` a column for each setting that any cell
    has (``layers``, ``rounding``, ``group_size``, ...).

    Accuracies are averaged as the probe's protocol does (over facts, or over relations); `status` is ``ok``,
    ``failed`` or ``refused``; the text of an error is on one line.
    """
    rows = []
    for cell in study.cells:
        rows += [_row(cell, probe, study.known) for probe in cell.comparison.probes]
        rows += [_row_of_text(cell, figures) for figures in cell.comparison.texts]
    probes: list[str | None] = [probe.name for probe in study.probes]
    lacking = [("failed", cell) for cell in study.failed] + [("refused", cell) for cell in study.refused]
    rows += [_failed(cell, probe, status) for status, cell in lacking for probe in probes or [None]]
    types = _settings(study)
    columns = [name for column in COLUMNS for name in (column, *(types if column == _BESIDE else ()))]
    # Numbers beside texts are texts: a column has one type.
    texts = [name for name, kind in types.items() if kind == _TEXT]
    told = (row | {name: plain(row[name]) for name in texts if row.get(name) is not None} for row in rows)
    return [{name: row.get(name) for name in columns} for row in told]


def _settings(study: Study) -> dict[str, str]:
    """The type of each setting that any cell has, and no other column tells."""
    names = dict.fromkeys(name for cell in study.cells for name in cell.settings if name not in (*TOLD, *COLUMNS))
    return {name: _type_of([cell.settings.get(name) for cell in study.cells]) for name in names}


def _type_of(values: Sequence[Setting]) -> str:
    kinds = {type(value) for value in values if value is not None}
    of_kinds = ((_FLAG, {bool}), (_COUNT, {int}), (_SHARE, {int, float}))
    return next((name for name, fits in of_kinds if kinds and kinds <= fits), _TEXT)


def _row(cell: StudyCell, probe: ProbeFigures, known: str) -> dict[str, Any]:
    before, after = get_headline_accuracy(probe)
    counts = probe.counts
    values = {
        **_cell(cell),
        "probe": plain(probe.probe),
        "known": known,
        "n": counts.n,
        "both": counts.both,
        "lost": counts.lost,
        "gained": counts.gained,
        "neither": counts.neither,
        "accuracy_original": before.value,
        "accuracy_compressed": after.value,
        "drop_absolute": probe.drop_absolute,
        "drop_relative": probe.drop_relative,
        "kept": probe.kept.value,
        "kept_low": probe.kept.low,
        "kept_high": probe.kept.high,
        "mcnemar_p": mcnemar(probe.counts),
        "p": probe.certainty.test.p,
        "answer_changed": probe.answer_changed,
        "kl_mean": probe.movement.kl_mean if probe.movement else None,
        "kl_is_lower_bound": probe.movement.is_lower_bound if probe.movement else None,
    }
    return values | {"status": "ok"}


def _row_of_text(cell: StudyCell, figures: TextFigures) -> dict[str, Any]:
    kl = figures.moved.kl if figures.moved else None
    told = {
        "perplexity_original": figures.original.value.value,
        "perplexity_compressed": figures.compressed.value.value,
        "kl_mean": kl.value if kl else None,
        "kl_is_lower_bound": False if kl else None,
    }
    return _cell(cell) | {"probe": plain(figures.text)} | finite(told) | {"status": "ok"}


def _cell(cell: StudyCell) -> dict[str, Any]:
    return {
        **cell.settings,
        "key": plain(cell.key),
        "setup": plain(cell.setup),
        "scope": plain(cell.scope),
        "method": plain(cell.method) if cell.method else None,
        "amount": cell.amount,
        "scheme": plain(cell.scheme) if cell.scheme else None,
        "pruning": plain(cell.pruning) if cell.pruning else None,
        "quantization": plain(cell.quantization) if cell.quantization else None,
        "in_scope": cell.in_scope,
        "pruned": cell.pruned,
        "quantized": cell.quantized,
        "nonzero": cell.nonzero,
        "bytes": cell.bytes,
        "sparse_bytes": cell.sparse_bytes,
    }


def _failed(cell: FailedCell, probe: str | None, status: str) -> dict[str, Any]:
    known = {"key": plain(cell.key), "setup": plain(cell.setup), "probe": plain(probe) if probe else None}
    return {**known, "status": status, "error": plain(cell.why, _LONGEST)}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as CSV in UTF-8, a header first; None is an empty field, numbers have all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if rows else COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as a Parquet file; the same rows give the same bytes (by one version of pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else COLUMNS)}
    types = {name: COLUMNS.get(name) or _type_of(values) for name, values in columns.items()}
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])
    written = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), written, compression="zstd")
    return written.getvalue()
