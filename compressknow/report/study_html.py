"""A study as one HTML file that asks nothing of any server and is whole without JavaScript; and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup

from compressknow.report import html
from compressknow.report.study_charts import Chart, study_charts
from compressknow.report.study_method import SENTENCES
from compressknow.report.study_records import Study
from compressknow.report.study_view import study_page
from compressknow.report.templates import render, source


def render_study_html(study: Study, charts: Sequence[Chart] | None = None) -> str:
    """The page: the same study gives the same bytes.

    Parameters
    ----------
    charts : those of `study_charts(study)`, where they are drawn already.
    """
    drawn = study_charts(study) if charts is None else charts
    style, script = source("style.css").strip(), source("report.js").strip()
    return render(
        "study.html.j2",
        page=study_page(study),
        charts=[(chart.title, Markup(chart.svg)) for chart in drawn],
        definitions=SENTENCES,
        # Both come from this package and hold no text of anyone else; the policy names their hashes.
        style=Markup(style),
        script=Markup(script),
        policy=html.policy(style, script),
    )


def render_study_markdown(study: Study) -> str:
    """The study as GitHub-flavoured Markdown; the same study gives the same text."""
    text = render("study.md.j2", page=study_page(study), definitions=SENTENCES)
    return re.sub(r"\n{3,}", "\n\n", text)
