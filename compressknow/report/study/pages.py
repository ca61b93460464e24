"""A study on disk: its page, the same in Markdown and JSON, the tidy table, the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from compressknow.files import write_whole
from compressknow.report.format import json_text
from compressknow.report.pages import html_page, markdown_page, source
from compressknow.report.study.charts import NAMES, Chart, study_charts
from compressknow.report.study.export import study_to_json, tidy_rows, to_csv, to_parquet
from compressknow.report.study.findings import MINIMAL, NEAR
from compressknow.report.study.records import Study
from compressknow.report.study.summary import CLIFF
from compressknow.report.study.view import study_page
from compressknow.report.svg import standalone

SENTENCES = (
    "Two cells are compared fact by fact, over all probes together: exact two-sided McNemar tests, adjusted by Holm's "
    "method over the comparisons of a finding. A finding holds where all comparisons that separate their cells "
    "(p < 0.05) point as claimed, with one at least for each part of the claim; it does not hold where one points the "
    "other way round; else nothing can be told.",
    "A comparison does not count where neither cell is clearly above the baseline (95 % interval), over the probes of "
    "which the original knows more than that: what is right there by chance or habit separates nothing. The baseline "
    "is that of always the same answer where there are at most five to choose from, of guessing among more, and zero "
    "where any text may be answered.",
    f"F1 calls a decline minimal where accuracy falls by less than {100 * MINIMAL:g} % of what it was. F5 asks that "
    "what is left beyond the baseline, on average over the amounts above 50 %, is less than the share of weights left, "
    f"and at the largest amount less than {100 * NEAR:g} %, as F10 does. The whole 95 % interval must lie below the "
    "limit; for a finding to fail, that of one figure, adjusted for their number (Bonferroni), must lie above it.",
    "Per million parameters, each form's loss of accuracy is divided by the number of parameters that it changed: "
    "those quantized, or those pruned where none were. p is of the mean paired difference (normal approximation).",
    f"The cliff is the first amount asked at which less than {100 * CLIFF:g} % of the knowledge is kept. 30 % counts "
    "as low, 50 % as medium. Charts show means over probes, then each probe, averaged as its protocol does.",
    "The sparse size is what a store would take that keeps only weights that are not zero, with one bit a weight to "
    "say which; no current runtime reads one, and on disk pruned weights are dense.",
)


def render_study_html(study: Study, charts: Sequence[Chart] | None = None) -> str:
    """The page: the same study gives the same bytes.

    Parameters
    ----------
    charts : those of `study_charts(study)`, where they are drawn already.
    """
    drawn = study_charts(study) if charts is None else charts
    return html_page(
        "study.html.j2",
        page=study_page(study),
        means=[(chart.title, _marked(chart)[0][1]) for chart in drawn if not chart.by_probe],
        by_probe=[(chart.title, _marked(chart)) for chart in drawn if chart.by_probe],
        definitions=SENTENCES,
    )


def _marked(chart: Chart) -> list[tuple[str, Markup]]:
    return [(panel.probe, Markup(panel.svg)) for panel in chart.panels]


def render_study_markdown(study: Study) -> str:
    """The study as GitHub-flavoured Markdown; the same study gives the same text."""
    return markdown_page("study.md.j2", page=study_page(study), definitions=SENTENCES)


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
