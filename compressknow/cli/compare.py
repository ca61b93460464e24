"""`compressknow compare`: the content of two checkpoints, and their knowledge, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.base.format import NONE, clean, compare_sizes, write_size
from compressknow.cli import NOTHING_WRITTEN, RESUMES, explain_interrupt, show_before_error
from compressknow.cli import options as opt
from compressknow.cli.report import get_command, list_texts
from compressknow.cli.terminal import WIDTH, ProgressLines, show, show_json, show_written, wrap
from compressknow.pages.diff import pages
from compressknow.pages.diff.make import Behaviour, CheckpointComparison, name_both

if TYPE_CHECKING:
    from compressknow.comparison.diff import CheckpointDiff
    from compressknow.evaluate.records import ModelRecord
    from compressknow.pages.parts import Table


@opt.command()
@click.argument("a")
@click.argument("b")
@opt.add_output_files("File, repeatable: .html, .md or .json.")
@opt.probe_options
@opt.known_option
@opt.option(
    "--fail-under",
    multiple=True,
    metavar="[NAME=]SHARE",
    help="Exit with 3 if B keeps less of A's knowledge: 0.95. Needs -p.",
)
@opt.strict_option
@opt.no_facts_option
@opt.answers_option
@opt.option("--overwrite", is_flag=True, help="Replace files that compressknow wrote.")
@opt.threads_option
@opt.option("--revision", group=opt.RUNS, help="Branch, tag or commit of A on the Hub.")
@opt.option("--revision-b", group=opt.RUNS, help="Branch, tag or commit of B on the Hub.")
@opt.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(a: str, b: str, output: tuple[Path, ...], probe: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Show how checkpoint B differs from A: in settings, structure, and weight by weight.

    Both are local folders or Hub ids of one architecture: an original and its conversion, two conversions, or two
    fine-tunes. int8 weights are compared by the values that they represent. With -p, both are also evaluated on facts,
    and the page shows what each keeps of the other's knowledge.

    \b
    compressknow compare MODEL CONVERTED
    compressknow compare CONVERTED OTHER -o compare.html -o compare.json
    compressknow compare MODEL CONVERTED -p atlas --limit 300 -o compare.html
    compressknow compare MODEL CONVERTED -p atlas --fail-under 0.95
    """
    from compressknow.api.compare import compare as run

    with (
        explain_interrupt(RESUMES if probe else NOTHING_WRITTEN),
        show_before_error(lambda result: _show(result, output, as_json)),
    ):
        comparison = run(a, b, probe, output=output, command=get_command(), on_progress=ProgressLines(), **options)
    _show(comparison, output, as_json)


def _show(comparison: CheckpointComparison, output: tuple[Path, ...], as_json: bool) -> None:
    if as_json:
        from compressknow.pages.diff.pages import diff_json

        show_json(diff_json(comparison))
        return
    show(*compare_page(comparison))
    show_written(output)


WIDTHS = (13, 14, 9, 9, 8, 10, 9, 8)
HEADS = ("", "Weights", "Zeros A", "Zeros B", "Error", "Cosine", "SNR", "Largest")
WORST = 5
SHOWN = 8


def compare_page(comparison: CheckpointComparison) -> Iterator[str]:
    """Yield the lines: verdict, sizes, weights, the layers that differ most, structure, settings, knowledge."""
    yield from wrap(comparison.verdict, indent="")
    yield ""
    yield from _list_sizes(comparison.a, comparison.b)
    if comparison.difference:
        yield from _list_weights(comparison.difference)
        yield from _list_rows(pages.build_structure_table(comparison.difference))
        yield from _list_rows(pages.build_settings_table(comparison.difference, comparison.files))
    if comparison.behaviour:
        yield from _list_knowledge(comparison.behaviour)
    for warning in comparison.warnings:
        yield ""
        yield from wrap(f"! {warning}")


def _list_sizes(a: ModelRecord, b: ModelRecord) -> Iterator[str]:
    names = name_both(a, b)
    for letter, side, name in zip("AB", (a, b), names, strict=True):
        storage = f"{clean(side.dtype, 16)}, {write_size(side.bytes)}"
        setup = f", {clean(side.setup, 20)}" if side.setup else ""
        yield f"{letter}: {name if name != letter else clean(side.name, 30)} ({storage}{setup})"[:WIDTH]
    yield f"B is {compare_sizes(a.bytes, b.bytes).replace('the same size', 'of the same size')}"


def _list_weights(difference: CheckpointDiff) -> Iterator[str]:
    if not difference.tensors:
        return
    yield ""
    yield _format_row(("Group", *HEADS[1:]))
    yield "-" * WIDTH
    for name, sums in pages.sum_groups(difference).items():
        yield _format_row(pages.build_sums_row(name, sums))
    yield "-" * WIDTH
    yield _format_row(pages.build_sums_row("all", difference.total))
    changed = [(name, sums) for name, sums in pages.sum_layers(difference).items() if sums.energy_change]
    if changed:
        yield ""
        yield "Layers with the largest error"
        for name, sums in sorted(changed, key=lambda layer: -(layer[1].relative_error or 0.0))[:WORST]:
            yield _format_row(pages.build_sums_row(name, sums))


def _format_row(cells: tuple[str, ...]) -> str:
    """Align the first cell left and the others right, without the unit that is in the header."""
    first, *others = (cell.removesuffix(" dB") for cell in cells)
    columns = zip(others, WIDTHS[1:], strict=True)
    return f"{first:<{WIDTHS[0]}}" + "".join(f"{cell:>{width}}" for cell, width in columns)


def _list_rows(table: Table | None) -> Iterator[str]:
    """Yield a table's caption and rows, a paragraph per row."""
    if table is None:
        return
    yield ""
    yield table.caption
    for row in table.rows[:SHOWN]:
        yield from wrap("  " + _describe(row), indent="    ")
    if len(table.rows) > SHOWN:
        yield f"  and {len(table.rows) - SHOWN} more: see -o compare.html or --json"


def _describe(row: tuple[str, ...]) -> str:
    if len(row) == 3:
        before, after = ("none" if cell == NONE else cell for cell in row[1:])
        return f"{row[0]}: {before} -> {after}"
    kind, number, a, b, names = row
    return f"{number} {kind}: {a} -> {b} ({names})"


def _list_knowledge(behaviour: Behaviour) -> Iterator[str]:
    for both in pages.pair_probes(behaviour):
        table = pages.build_figures_table((both,))
        yield ""
        yield table.columns[1]
        for name, figure in table.rows:
            yield f"  {name:<40}{figure:>36}"
    yield from list_texts(behaviour.b_against_a.comparisons[0].texts, ("of A", "of B"))
