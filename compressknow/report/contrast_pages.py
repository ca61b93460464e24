"""A comparison of two checkpoints as a file: HTML that asks nothing of any server, Markdown, JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

from markupsafe import Markup

from compressknow.report.contrast_records import Contrast
from compressknow.report.contrast_view import Limits, contrast_page
from compressknow.report.heat_map import heat_map
from compressknow.report.html import policy
from compressknow.report.templates import render, source
from compressknow.report.write import write_whole

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
    style, script = source("style.css").strip() + "\n" + source("compare.css").strip(), source("report.js").strip()
    drawn = heat_map(page.weights.grid, "heat") if page.weights and page.weights.grid else None
    return render(
        "compare.html.j2",
        page=page,
        heat_map=Markup(drawn) if drawn else None,
        method=METHOD,
        # Both come from this package and hold no text of anyone else; the policy names their hashes.
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
    )


def render_contrast_markdown(contrast: Contrast) -> str:
    """The same as GitHub-flavoured Markdown, with fewer tensors and facts."""
    text = render("compare.md.j2", page=contrast_page(contrast, _MARKDOWN), method=METHOD)
    return re.sub(r"\n{3,}", "\n\n", text)


def write_contrast(contrast: Contrast, path: Path) -> None:
    """Write the comparison as the format that the name asks for; the file appears only when it is whole."""
    write_whole(path, rendered(contrast, path.suffix.lower()).encode("utf-8"))


def rendered(contrast: Contrast, suffix: str) -> str:
    """The comparison as text: ``.html``, ``.md`` or ``.json``."""
    if suffix == ".html":
        return render_contrast_html(contrast)
    if suffix == ".md":
        return render_contrast_markdown(contrast)
    from compressknow.report.contrast_json import contrast_json

    return json.dumps(contrast_json(contrast), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
