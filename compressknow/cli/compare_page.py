"""A comparison of two checkpoints as a page for the terminal, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from compressknow.report.contrast.knowledge_tables import figures_table, probes_of
from compressknow.report.contrast.tables import Part, groups, layers, part_row, settings_table, structure_table, worst
from compressknow.report.contrast.verdict import names_of
from compressknow.report.figures import size, smaller
from compressknow.report.text import plain

if TYPE_CHECKING:
    from compressknow.compress.difference_records import Difference
    from compressknow.report.contrast.records import Behaviour, Checkpoint, Contrast
    from compressknow.report.tables import Table

WIDTH = 80
WIDTHS = (13, 14, 9, 9, 8, 10, 9, 8)
HEADS = ("", "Weights", "Zeros A", "Zeros B", "Error", "Cosine", "SNR", "Largest")
WORST = 5
SHOWN = 8


def compare_page(contrast: Contrast) -> Iterator[str]:
    """Lines: the verdict, sizes, weights by group, the layers that differ most, structure, settings, knowledge."""
    yield from textwrap.wrap(contrast.verdict, WIDTH)
    yield ""
    yield from _sizes(contrast.a, contrast.b)
    if contrast.difference:
        yield from _weights(contrast.difference)
        yield from _listed(structure_table(contrast.difference))
        yield from _listed(settings_table(contrast.difference, contrast.files))
    if contrast.behaviour:
        yield from _knowledge(contrast.behaviour)
    for warning in contrast.warnings:
        yield ""
        yield from textwrap.wrap(f"! {warning}", WIDTH, subsequent_indent="  ")


def _sizes(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    names = names_of(a, b)
    for letter, side, name in zip("AB", (a, b), names, strict=True):
        what = f"{plain(side.dtype, 16)}, {size(side.bytes)}"
        setup = f", {plain(side.setup, 20)}" if side.setup else ""
        yield f"{letter}: {name if name != letter else plain(side.name, 30)} ({what}{setup})"[:WIDTH]
    yield f"B is {smaller(a.bytes, b.bytes).replace('the same size', 'of the same size')}"


def _weights(difference: Difference) -> Iterator[str]:
    if not difference.tensors:
        return
    yield ""
    yield _row(("Group", *HEADS[1:]))
    yield "-" * WIDTH
    for part in groups(difference):
        yield _row(part_row(part))
    yield "-" * WIDTH
    yield _row(part_row(Part("all", difference.tensors)))
    yield from _worst(worst(layers(difference), WORST))


def _worst(parts: Iterable[Part]) -> Iterator[str]:
    rows = [_row(part_row(part)) for part in parts]
    if rows:
        yield ""
        yield "Layers with the largest error"
        yield from rows


def _row(cells: tuple[str, ...]) -> str:
    """Cells in their columns: the first to the left, the others to the right; a unit that is in the head goes."""
    first, *others = (cell.removesuffix(" dB") for cell in cells)
    columns = zip(others, WIDTHS[1:], strict=True)
    return f"{first:<{WIDTHS[0]}}" + "".join(f"{cell:>{width}}" for cell, width in columns)


def _listed(table: Table | None) -> Iterator[str]:
    """A table's caption and rows, a paragraph a row."""
    if table is None:
        return
    yield ""
    yield table.caption
    for row in table.rows[:SHOWN]:
        yield from textwrap.wrap("  " + _told(row), WIDTH, subsequent_indent="    ")
    if len(table.rows) > SHOWN:
        yield f"  and {len(table.rows) - SHOWN} more: see -o compare.html or --json"


def _told(row: tuple[str, ...]) -> str:
    if len(row) == 3:
        return f"{row[0]}: {row[1]} -> {row[2]}".replace(" - ->", " none ->")
    what, number, a, b, which = row
    return f"{number} {what}: {a} -> {b} ({which})"


def _knowledge(behaviour: Behaviour) -> Iterator[str]:
    for both in probes_of(behaviour):
        table = figures_table((both,))
        yield ""
        yield table.columns[1]
        for name, figure in table.rows:
            yield f"  {name:<40}{figure:>36}"
