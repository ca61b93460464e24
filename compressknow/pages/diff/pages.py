"""A comparison of two checkpoints as a file: HTML that requests nothing from any server, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressknow.diff.records import Difference, Sums, TensorDifference, summed
from compressknow.format import json_text
from compressknow.pages.card.pages import comparison_json
from compressknow.pages.diff.records import Behaviour, CheckpointComparison
from compressknow.pages.diff.tables import groups
from compressknow.pages.diff.view import Limits, comparison_page
from compressknow.pages.pages import html_page, markdown_page, write_formats

_HTML, _MARKDOWN = Limits(tensors=500, facts=500, open=20, charts=True), Limits(tensors=30, facts=50, open=50)
SCHEMA = 1


def render_comparison_html(comparison: CheckpointComparison) -> str:
    """The page: the same comparison gives the same bytes."""
    styles = ("style.css", "compare.css")
    return html_page("compare.html.j2", styles=styles, page=comparison_page(comparison, _HTML))


def render_comparison_markdown(comparison: CheckpointComparison) -> str:
    """The same as GitHub-flavoured Markdown, with fewer tensors and facts."""
    return markdown_page("compare.md.j2", page=comparison_page(comparison, _MARKDOWN))


def write_comparisons(comparison: CheckpointComparison, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Write the comparison in the formats that the names ask for: all files appear, each of them whole, or none."""
    write_formats(lambda path: rendered(comparison, path.suffix.lower()), paths, overwrite=overwrite)


def rendered(comparison: CheckpointComparison, suffix: str) -> str:
    """The comparison as text: ``.html``, ``.md`` or ``.json``."""
    if suffix == ".html":
        return render_comparison_html(comparison)
    if suffix == ".md":
        return render_comparison_markdown(comparison)
    return json_text(diff_json(comparison))


def diff_json(comparison: CheckpointComparison) -> dict[str, Any]:
    """Plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order; what cannot be told is None."""
    return {
        "schema": SCHEMA,
        "verdict": comparison.verdict,
        "identical": comparison.identical,
        "a": asdict(comparison.a),
        "b": asdict(comparison.b),
        "files": list(comparison.files),
        **_difference(comparison.difference),
        "behaviour": _behaviour(comparison.behaviour, comparison.show_facts) if comparison.behaviour else None,
        "warnings": list(comparison.warnings),
        "versions": dict(comparison.versions),
        "command": comparison.command,
    }


def _difference(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"architecture": None, "config": [], "structure": [], "weights": None}
    blocks = summed(difference.tensors, lambda t: (t.stack, t.layer) if t.layer is not None else None)
    cells = summed(difference.tensors, lambda t: (t.stack, t.layer, t.module) if t.module else None)
    return {
        "architecture": difference.architecture,
        "config": [asdict(change) for change in difference.config],
        "structure": [asdict(change) for change in difference.structure],
        "weights": {
            "total": _figures(difference.total),
            "groups": {part.name: _figures(part.sums) for part in groups(difference)},
            "layers": [{"stack": stack, "layer": layer, **_of(those)} for (stack, layer), those in blocks.items()],
            "modules": [
                {"stack": stack, "layer": layer, "module": module, **_of(those)}
                for (stack, layer, module), those in cells.items()
            ],
            "tensors": [_tensor(tensor) for tensor in difference.tensors],
        },
    }


def _tensor(tensor: TensorDifference) -> dict[str, Any]:
    described = asdict(tensor)
    del described["sums"]
    return described | {"shape": list(tensor.shape), **_figures(tensor.sums)}


def _of(tensors: Iterable[TensorDifference]) -> dict[str, Any]:
    return _figures(sum((tensor.sums for tensor in tensors), Sums()))


def _figures(sums: Sums) -> dict[str, Any]:
    return {
        "numel": sums.numel,
        "zeros_a": sums.zeros_a,
        "zeros_b": sums.zeros_b,
        "relative_error": sums.relative_error,
        "cosine": sums.cosine,
        "snr_db": sums.snr_db,
        "largest_change": sums.largest_change,
    }


def _behaviour(behaviour: Behaviour, show_facts: bool) -> dict[str, Any]:
    there, back = behaviour.b_against_a, behaviour.a_against_b
    told: dict[str, Any] = {
        "known": behaviour.known,
        "b_against_a": comparison_json(there.comparisons[0], show_facts),
        "a_against_b": comparison_json(back.comparisons[0], show_facts),
        "method": list(there.method),
    }
    return told | ({"answers": [asdict(answer) for answer in behaviour.answers]} if show_facts else {})
