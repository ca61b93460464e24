"""A comparison of two checkpoints as a file: HTML that requests nothing from any server, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from compressknow.format import json_text
from compressknow.report.diff.as_json import diff_json
from compressknow.report.diff.records import CheckpointComparison
from compressknow.report.diff.view import Limits, comparison_page
from compressknow.report.pages import html_page, markdown_page, write_formats

_HTML, _MARKDOWN = Limits(tensors=500, facts=500, open=20, charts=True), Limits(tensors=30, facts=50, open=50)


def render_comparison_html(comparison: CheckpointComparison) -> str:
    """The page: the same comparison gives the same bytes."""
    styles = ("style.css", "compare.css")
    return html_page("compare.html.j2", styles=styles, page=comparison_page(comparison, _HTML))


def render_comparison_markdown(comparison: CheckpointComparison) -> str:
    """The same as GitHub-flavoured Markdown, with fewer tensors and facts."""
    return markdown_page("compare.md.j2", page=comparison_page(comparison, _MARKDOWN))


def write_comparisons(comparison: CheckpointComparison, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Write the comparison in the formats that the names ask for: all files appear, each of them whole, or none."""
    write_formats(partial(rendered, comparison), paths, overwrite=overwrite)


def rendered(comparison: CheckpointComparison, suffix: str) -> str:
    """The comparison as text: ``.html``, ``.md`` or ``.json``."""
    if suffix == ".html":
        return render_comparison_html(comparison)
    if suffix == ".md":
        return render_comparison_markdown(comparison)
    return json_text(diff_json(comparison))
