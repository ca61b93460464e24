"""Page of a comparison of two checkpoints: HTML that requests nothing from any server, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressknow.base.format import NONE, clean, dump_json, number, share, write_size
from compressknow.comparison.diff import CheckpointDiff, Sums
from compressknow.model.manifest import describe_text
from compressknow.pages.card.sections.facts import make_grades_table
from compressknow.pages.diff import tables
from compressknow.pages.diff.make import Behaviour, CheckpointComparison, name_both, sum_by
from compressknow.pages.pages import render_html, render_markdown, write_files
from compressknow.pages.parts import (
    NO_FACTS,
    Drawn,
    Entries,
    Entry,
    Folded,
    Note,
    Page,
    Part,
    Sentences,
    Shown,
    Sizes,
    Table,
    draw_charts,
    make_hash_entry,
    make_name_entry,
    show_run,
)
from compressknow.pages.records import Checkpoint, dump_comparison
from compressknow.pages.svg import draw_heat_map
from compressknow.pages.texts import make_text_parts, write_measured, write_text_headline

_MAP_NOTE = (
    "Relative error of each Linear weight, from faint to full colour in equal ratios; grey did not change. The marks "
    "under the map are the errors at which the shades change."
)
METHOD = (
    "Weights are compared as numbers, tensor by tensor, in float64; int8 weights by the values they represent "
    "(stored integer times scale). The relative error is ‖B − A‖ / ‖A‖ by the Frobenius norm, signal to noise is 20 "
    "log10 ‖A‖ / ‖B − A‖ in decibels, the cosine is of the angle between A and B. Figures of a group or a layer are "
    "those of all its weights taken as one tensor, so that large weights count for more than small ones.",
    "Layers and modules are those of Linear weights; biases, norms and embeddings are under not-linear. A weight that "
    "one side shares with another (a final layer tied to the embedding) is compared with what it shares.",
)


def make_comparison_page(
    comparison: CheckpointComparison, *, tensors: int, facts: int, shown: int, charts: bool
) -> Page:
    """Return the comparison as text, with so many tensors and facts, `shown` of these at once."""
    a, b = name_both(comparison.a, comparison.b)
    headline, difference = _write_headline(comparison), comparison.difference
    there = comparison.behaviour.b_against_a if comparison.behaviour else None
    origin = (Entries(_describe_checkpoint(comparison.a), "A"), Entries(_describe_checkpoint(comparison.b), "B"))
    method = (*METHOD, *(clean(sentence, 2000) for sentence in (there.method if there else ())))
    how = Shown("how", "How it was made", show_run(comparison.command, comparison.versions))
    weights: tuple[Shown, ...] = ()
    if difference and difference.tensors:
        groups = tables.sum_groups(difference)
        table = tables.build_sums_table("What differs by group of layers", "Group", groups, difference.total)
        weights = (Shown("groups", "Weights", (table,)),)
    sections = (
        *(_show_behaviour(comparison, facts, shown, charts) if comparison.behaviour else ()),
        *(_show_difference(difference, comparison.files, tensors, charts) if difference else ()),
        Shown("compare-method", "Method", (Sentences(method),), look="text"),
    )
    return Page(
        kind="comparison",
        title=f"{headline}: {a} and {b}",
        models=f"{a} and {b}",
        headline=headline,
        verdict=clean(comparison.verdict, 1000),
        warnings=tuple(clean(warning, 1000) for warning in comparison.warnings),
        sections=tuple(section for section in sections if section.parts),
        counts=there.comparisons[0].counts if there else None,
        names=("both know", "only A", "only B", "neither"),
        front=(
            (*weights, how),
            (
                Shown("compare-size", "Size", (Sizes(comparison.a.bytes, comparison.b.bytes),)),
                Shown("from", "Which checkpoints", origin),
            ),
        ),
    )


def _write_headline(comparison: CheckpointComparison) -> str:
    if comparison.identical:
        return "Identical"
    if comparison.behaviour:
        there = comparison.behaviour.b_against_a.comparisons[0]
        if there.texts and not there.probes:
            return write_text_headline(there.texts[0])
        if there.kept.value is not None:
            return f"B knows {share(there.kept.value)} of what A knows"
    if comparison.difference is None or not comparison.difference.tensors:
        return "Weights that cannot be compared"
    total = comparison.difference.total
    if not total.energy_change and total.finite:
        return "The same weights" if comparison.difference.same_weights else "The same values"
    return f"Relative error {number(total.relative_error, 4)}"


def _describe_checkpoint(side: Checkpoint) -> tuple[Entry, ...]:
    source = (side.source or {}).get("name") or ""
    entries = (
        make_name_entry("Name", side.name, side.revision),
        make_hash_entry(side.sha256),
        make_name_entry("Made from", source, None) if clean(source) else None,
        Entry("Setup", clean(side.setup, 80)) if side.setup else None,
        Entry("Calibrated on", clean(describe_text(side.calibration), 200)) if side.calibration else None,
        Entry("Quantization", clean(side.quantization, 200)) if side.quantization else None,
        Entry("Type", clean(side.dtype, 60)),
        Entry("Size", write_size(side.bytes)),
    )
    return tuple(entry for entry in entries if entry)


def _show_behaviour(comparison: CheckpointComparison, facts: int, shown: int, charts: bool) -> Iterator[Shown]:
    behaviour = comparison.behaviour
    assert behaviour is not None
    probes = tables.pair_probes(behaviour)
    yield Shown("compare-knowledge", "Knowledge", tuple(_show_knowledge(probes)))
    texts = draw_charts(_show_texts(behaviour), "compare-text", charts)
    yield Shown("compare-text", "Running text", tuple(texts))
    if probes:
        answers = tables.answer_parts(behaviour.answers, facts, shown)
        yield Shown("compare-answers", "Answers side by side", tuple(answers) if comparison.show_facts else (NO_FACTS,))


def _show_difference(difference: CheckpointDiff, files: tuple[str, ...], tensors: int, charts: bool) -> Iterator[Shown]:
    is_changed = bool(difference.total.energy_change) or not difference.total.finite
    if is_changed:
        yield Shown("compare-map", "By layer and module", tuple(_show_map(difference, charts)))
    if is_changed and (layers := tables.sum_layers(difference)):
        table = tables.build_sums_table("Linear weights by layer", "Layer", layers)
        yield Shown("compare-layers", "By layer", (table,))
    yield Shown("compare-tensors", "By tensor", tuple(tables.tensor_parts(difference, tensors)))
    stored = tables.build_settings_table(difference, files), tables.build_structure_table(difference)
    yield Shown("compare-structure", "Settings and structure", tuple(table for table in stored if table))


def _show_texts(behaviour: Behaviour) -> Iterator[Part]:
    for figures in behaviour.b_against_a.comparisons[0].texts:
        yield from make_text_parts(figures, ("A", "B"))
    back = behaviour.a_against_b.comparisons[0].texts
    rows = []
    for figures in back:
        kl, percentiles = (figures.moved.kl, figures.moved.kl_percentiles) if figures.moved else (None, None)
        p99 = number(percentiles["p99"], 4) if percentiles else NONE
        rows.append((clean(figures.text, 60), write_measured(kl, 4), p99))
    if rows:
        yield Table("KL(B‖A) by token, nats", ("Text", "Mean", "99th percentile"), tuple(rows))


def _show_knowledge(probes: tuple[tables.Both, ...]) -> Iterator[Part]:
    if probes:
        yield tables.build_figures_table(probes)
    for there, _ in probes:
        if there.knowing:
            yield make_grades_table(
                there.knowing, f"{clean(there.probe, 60)}: grades of knowing of A (rows) and of B", "A"
            )
    if groups := tables.group_tables(probes):
        yield Folded("By domain and by relation", groups)


def _show_map(difference: CheckpointDiff, charts: bool) -> Iterator[Part]:
    grid = tables.make_grid(difference)
    if grid is None:
        return
    if charts and (drawn := draw_heat_map(grid, "heat", "Relative error by layer and module")):
        yield Drawn(drawn, look="map")
        yield Note("", drawn=_MAP_NOTE)
    rows = tuple((row, *(number(cell, 4) for cell in cells)) for row, cells in zip(grid.rows, grid.cells, strict=True))
    table = Table("Relative error by layer and module", ("Layer", *grid.columns), rows, sortable=len(rows) > 1)
    yield Folded("The map as a table", (table,))


SCHEMA = 1


def render_comparison_html(comparison: CheckpointComparison) -> str:
    """Return the page: the same comparison gives the same bytes."""
    return render_html(make_comparison_page(comparison, tensors=500, facts=500, shown=20, charts=True))


def render_comparison_markdown(comparison: CheckpointComparison) -> str:
    """Return the same as GitHub-flavoured Markdown, with fewer tensors and facts."""
    return render_markdown(make_comparison_page(comparison, tensors=30, facts=50, shown=50, charts=False))


def write_comparisons(comparison: CheckpointComparison, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Write the comparison in the formats that the names ask for."""
    texts = {
        ".html": lambda: render_comparison_html(comparison),
        ".md": lambda: render_comparison_markdown(comparison),
        ".json": lambda: dump_json(diff_json(comparison)),
    }
    write_files(texts, paths, overwrite=overwrite)


def diff_json(comparison: CheckpointComparison) -> dict[str, Any]:
    """Return plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order; what cannot be told is None."""
    behaviour = comparison.behaviour
    return {
        "schema": SCHEMA,
        "verdict": comparison.verdict,
        "identical": comparison.identical,
        "a": asdict(comparison.a),
        "b": asdict(comparison.b),
        "files": list(comparison.files),
        **_dump_difference(comparison.difference),
        "behaviour": _dump_behaviour(behaviour, comparison.show_facts) if behaviour else None,
        "warnings": list(comparison.warnings),
        "versions": dict(comparison.versions),
        "command": comparison.command,
    }


def _dump_difference(difference: CheckpointDiff | None) -> dict[str, Any]:
    if difference is None:
        return {"architecture": None, "config": [], "structure": [], "weights": None}
    blocks = sum_by(difference, lambda t: (t.stack, t.layer) if t.layer is not None else None)
    modules = sum_by(difference, lambda t: (t.stack, t.layer, t.module) if t.module else None)
    return {
        "architecture": difference.architecture,
        "config": [asdict(change) for change in difference.config],
        "structure": [asdict(change) for change in difference.structure],
        "weights": {
            "total": _dump_sums(difference.total),
            "groups": {name: _dump_sums(sums) for name, sums in tables.sum_groups(difference).items()},
            "layers": [{"stack": stack, "layer": layer, **_dump_sums(sums)} for (stack, layer), sums in blocks.items()],
            "modules": [
                {"stack": stack, "layer": layer, "module": module, **_dump_sums(sums)}
                for (stack, layer, module), sums in modules.items()
            ],
            "tensors": [
                {key: value for key, value in asdict(tensor).items() if key != "sums"}
                | {"shape": list(tensor.shape), **_dump_sums(tensor.sums)}
                for tensor in difference.tensors
            ],
        },
    }


def _dump_sums(sums: Sums) -> dict[str, Any]:
    names = ("numel", "zeros_a", "zeros_b", "relative_error", "cosine", "snr_db", "largest_change")
    return {name: getattr(sums, name) for name in names}


def _dump_behaviour(behaviour: Behaviour, show_facts: bool) -> dict[str, Any]:
    there, back = behaviour.b_against_a, behaviour.a_against_b
    values: dict[str, Any] = {
        "known": behaviour.known,
        "b_against_a": dump_comparison(there.comparisons[0], show_facts=show_facts),
        "a_against_b": dump_comparison(back.comparisons[0], show_facts=show_facts),
        "method": list(there.method),
    }
    return values | ({"answers": [asdict(answer) for answer in behaviour.answers]} if show_facts else {})
