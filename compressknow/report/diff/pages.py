"""A comparison of two checkpoints as a file: HTML that asks nothing of any server, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from compressknow.files import write_together
from compressknow.report.diff.as_json import contrast_json
from compressknow.report.diff.heat_map import heat_map
from compressknow.report.diff.records import Contrast
from compressknow.report.diff.view import Limits, contrast_page
from compressknow.report.format import json_text
from compressknow.report.pages import html_page, markdown_page

_HTML, _MARKDOWN = Limits(tensors=500, facts=500, open=20), Limits(tensors=30, facts=50, open=50)
METHOD = (
    "Weights are compared as numbers, tensor by tensor, in float64; int8 weights as what they stand for, the stored "
    "integer times its scale. The relative error is ‖B − A‖ / ‖A‖ by the Frobenius norm, signal to noise is "
    "20 log10 ‖A‖ / ‖B − A‖ in decibels, the cosine is of the angle between A and B. Figures of a group or a layer are "
    "those of all its weights taken as one tensor, so that large weights count for more than small ones.",
    "Layers and modules are those of Linear weights; biases, norms and embeddings are under not-linear. A weight that "
    "one side shares with another (a final layer tied to the embedding) is compared with what it shares.",
)


def render_contrast_html(contrast: Contrast) -> str:
    """The page: the same comparison gives the same bytes."""
    page = contrast_page(contrast, _HTML)
    drawn = heat_map(page.weights.grid, "heat") if page.weights and page.weights.grid else None
    return html_page(
        "compare.html.j2",
        styles=("style.css", "compare.css"),
        page=page,
        heat_map=Markup(drawn) if drawn else None,
        method=METHOD,
    )


def render_contrast_markdown(contrast: Contrast) -> str:
    """The same as GitHub-flavoured Markdown, with fewer tensors and facts."""
    return markdown_page("compare.md.j2", page=contrast_page(contrast, _MARKDOWN), method=METHOD)


def write_contrasts(contrast: Contrast, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Write the comparison in the formats that the names ask for: all files appear, each of them whole, or none."""
    contents = {path: rendered(contrast, path.suffix.lower()).encode("utf-8") for path in paths}
    write_together(contents, overwrite=overwrite)


def rendered(contrast: Contrast, suffix: str) -> str:
    """The comparison as text: ``.html``, ``.md`` or ``.json``."""
    if suffix == ".html":
        return render_contrast_html(contrast)
    if suffix == ".md":
        return render_contrast_markdown(contrast)
    return json_text(contrast_json(contrast))
