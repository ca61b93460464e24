"""A study on disk: its page, the same in Markdown and JSON, the tidy table, the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressknow.files import write_whole
from compressknow.format import json_text
from compressknow.report.pages import html_page, markdown_page, source
from compressknow.report.study.charts import NAMES, Chart, study_charts
from compressknow.report.study.export import study_to_json, tidy_rows, to_csv, to_parquet
from compressknow.report.study.records import Study
from compressknow.report.study.view import study_page
from compressknow.report.svg import standalone


def render_study_html(study: Study, charts: Sequence[Chart] | None = None) -> str:
    """The page: the same study gives the same bytes.

    Parameters
    ----------
    charts : those of `study_charts(study)`, where they are drawn already.
    """
    drawn = study_charts(study) if charts is None else charts
    return html_page("sections.html.j2", page=study_page(study, drawn))


def render_study_markdown(study: Study) -> str:
    """The study as GitHub-flavoured Markdown; the same study gives the same text."""
    return markdown_page("sections.md.j2", page=study_page(study))


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
    style = source("style.css")
    for chart in charts:
        panels = [(panel.probe, panel.svg) for panel in chart.panels]
        write_whole(folder / f"{chart.name}.svg", standalone(panels, chart.title, style).encode("utf-8"))
    for name in set(NAMES) - {chart.name for chart in charts}:
        (folder / f"{name}.svg").unlink(missing_ok=True)
