"""A study as one HTML file that asks nothing of any server and is whole without JavaScript; and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from compressknow.report.pages import html_page, markdown_page
from compressknow.report.study.charts import Chart, study_charts
from compressknow.report.study.method import SENTENCES
from compressknow.report.study.records import Study
from compressknow.report.study.view import study_page


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
