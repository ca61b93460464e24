"""Study on disk: its page, the same in Markdown and JSON, a row per cell and probe (CSV, Parquet), the figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressknow.base.files import write_whole
from compressknow.base.format import dump_json
from compressknow.comparison.intervals import run_mcnemar
from compressknow.pages.as_json import dump_interval, dump_kept
from compressknow.pages.pages import read_source, render_html, render_markdown, write_files
from compressknow.pages.study.charts import Chart, draw_charts, is_chart
from compressknow.pages.study.claims import CellComparison
from compressknow.pages.study.findings import Finding, evaluate_findings
from compressknow.pages.study.records import COLUMNS, Study, infer_type, tidy_rows
from compressknow.pages.study.summary import (
    describe_changes,
    draw_conclusions,
    find_cliffs,
    rank_cells,
    write_verdict,
)
from compressknow.pages.study.view import make_study_page
from compressknow.pages.svg import make_standalone

SCHEMA = 1


def render_study_html(study: Study, charts: Sequence[Chart] | None = None) -> str:
    """Return the page, with charts that are drawn already or are drawn here; the same study gives the same bytes."""
    return render_html(make_study_page(study, draw_charts(study) if charts is None else charts))


def render_study_markdown(study: Study) -> str:
    """Return the study as GitHub-flavoured Markdown; the same study gives the same text."""
    return render_markdown(make_study_page(study))


def write_study(study: Study, folder: Path) -> None:
    """Write the study into `folder`, which is there; each file appears only when it is whole, the page last.

    ``study.html``, ``study.md``, ``study.json``, ``cells.parquet``, ``cells.csv`` and ``figures/*.svg``. What is there
    of an earlier state of the study is replaced; a figure that it no longer has is removed.
    """
    charts, rows = draw_charts(study), tidy_rows(study)
    write_whole(folder / "cells.csv", to_csv(rows))
    write_whole(folder / "cells.parquet", to_parquet(rows))
    _write_figures(charts, folder / "figures")
    texts = {
        ".json": lambda: dump_json(dump_study(study)),
        ".md": lambda: render_study_markdown(study),
        ".html": lambda: render_study_html(study, charts),
    }
    write_files(texts, [folder / f"study{suffix}" for suffix in texts], overwrite=True)


def _write_figures(charts: tuple[Chart, ...], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    style = read_source("style.css")
    for chart in charts:
        write_whole(folder / f"{chart.name}.svg", make_standalone(chart.panels, chart.title, style).encode("utf-8"))
    drawn = {chart.name for chart in charts}
    for path in folder.glob("*.svg"):
        if is_chart(path.stem) and path.stem not in drawn:
            path.unlink()


def dump_study(study: Study) -> dict[str, Any]:
    """Return plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order.

    Shares and accuracies lie between 0 and 1, sizes are bytes; what cannot be told is None; intervals are [low, high],
    95 %. ``cells`` are the rows of the tidy table, one per cell and probe. No fact's text is in it.
    """
    findings, by_method = evaluate_findings(study)
    methods: dict[str, dict[str, Any]] = {}
    for (kind, name), of_method in by_method.items():
        methods.setdefault(kind, {})[name] = {id: _dump_finding(each) for id, each in of_method.items()}
    of_probe = ("n", "average", "accuracy", "majority", "chance", "templates")
    return {
        "schema": SCHEMA,
        "verdict": write_verdict(study),
        "known": study.known,
        "found": [asdict(each) for each in draw_conclusions(study, findings)],
        "original": asdict(study.original),
        "probes": {probe.name: {key: getattr(probe, key) for key in of_probe} for probe in study.probes},
        "findings": {finding.id: _dump_finding(finding) for finding in findings},
        "findings_by_method": methods,
        "changes": describe_changes(by_method),
        "hurts_least": [asdict(least) for least in rank_cells(study)["modules"]],
        "cliffs": [asdict(cliff) for cliff in find_cliffs(study)],
        "kept": {
            cell.key: dump_kept(cell.comparison.counts)
            | {
                "kept_cluster_interval": dump_interval(cell.comparison.certainty.kept),
                "p": cell.comparison.certainty.test.p,
            }
            for cell in study.cells
        },
        "cells": tidy_rows(study),
        "method": list(study.method),
        "versions": dict(study.versions),
        "command": study.command,
    }


def _dump_finding(finding: Finding) -> dict[str, Any]:
    keys = ("claim", "families", "answer", "statistic", "why", "per_million")
    return {
        **{key: getattr(finding, key) for key in keys},
        "comparisons": [_dump_comparison(pair) for pair in finding.comparisons],
        "limits": [
            {"of": bound.of, "value": bound.value.value, "interval": dump_interval(bound.value)}
            | {"limit": bound.limit, "p": bound.p}
            for bound in finding.bounds
        ],
    }


def _dump_comparison(pair: CellComparison) -> dict[str, Any]:
    return {
        "less": pair.less,
        "more": pair.more,
        "part": pair.part,
        "n": pair.counts.n,
        "both": pair.counts.both,
        "only_less": pair.counts.lost,
        "only_more": pair.counts.gained,
        "neither": pair.counts.neither,
        "mcnemar_p": run_mcnemar(pair.counts),
        "p": pair.p,
        "p_holm": pair.p_holm,
        "at_floor": pair.at_floor,
        "per_million": pair.rate.value,
        "per_million_interval": dump_interval(pair.rate),
        "per_million_p": pair.rate_p,
        "per_million_p_holm": pair.rate_p_holm,
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as CSV in UTF-8, a header first; None is an empty field, numbers have all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if rows else COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as a Parquet file; the same rows give the same bytes (by one version of pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else COLUMNS)}
    types = {name: COLUMNS.get(name) or infer_type(values) for name, values in columns.items()}
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])
    written = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), written, compression="zstd")
    return written.getvalue()
