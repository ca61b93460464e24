"""The heat map of a comparison: relative error by layer and module, as an SVG grid in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Iterator

from markupsafe import escape

from compressknow.format import number
from compressknow.report.diff.tables import Grid

_WIDTH, _LABEL, _ROW, _TOP = 720, 76, 19, 26
_WIDEST = 110
# Shades of one colour, faint to full. Up to the fifth, ink reads on them in light and in dark; then paper does.
_SHADES = (0.08, 0.17, 0.27, 0.38, 0.5, 0.85, 1.0)
_INK_UP_TO = 4
_MOST_FIGURES = 10  # columns that leave room for a figure in each cell
_ORDERS = 4  # of magnitude that the shades span at most


def heat_map(grid: Grid, id: str) -> str | None:
    """The map as an element for HTML; None where nothing changed.

    Parameters
    ----------
    id : of the element; nothing else on the page may have it or begin with it.
    """
    errors = [cell for row in grid.cells for cell in row if cell]
    if not errors:
        return None
    bounds = _bounds(min(errors), max(errors))
    width = min(_WIDEST, (_WIDTH - _LABEL) / len(grid.columns))
    height = _TOP + _ROW * len(grid.rows) + 34
    title, told = "Relative error by layer and module", _told(grid)
    return "".join(
        [
            f'<svg class="chart heat" id="{id}" viewBox="0 0 {_WIDTH} {height}" role="img" ',
            f'aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{title}</title>',
            f'<desc id="{id}-desc">{escape(told)}</desc>',
            *_heads(grid, width),
            *(mark for i in range(len(grid.rows)) for mark in _row(grid, i, width, bounds)),
            *_legend(bounds, _TOP + _ROW * len(grid.rows) + 12),
            "</svg>",
        ]
    )


def shade(error: float, bounds: tuple[float, ...]) -> int:
    """Which shade an error has, 0 the faintest; `bounds` are the lowest errors of the shades above it."""
    return sum(error >= bound for bound in bounds)


def _bounds(low: float, high: float) -> tuple[float, ...]:
    """Errors that part the shades, in equal ratios between the least and the largest."""
    low = max(low, high / 10**_ORDERS)
    steps = len(_SHADES)
    return tuple(low * math.exp(math.log(high / low) * i / steps) for i in range(1, steps))


def _told(grid: Grid) -> str:
    found = [(e, row, col) for row, cells in zip(grid.rows, grid.cells, strict=True)
             for col, e in zip(grid.columns, cells, strict=True) if e]  # fmt: skip
    largest, least = max(found), min(found)
    return (
        f"From {number(least[0], 4)} ({least[2]}, {least[1]}) to {number(largest[0], 4)} ({largest[2]}, {largest[1]}). "
        "The table after the map has every figure."
    )


def _heads(grid: Grid, width: float) -> Iterator[str]:
    room = max(4, int(width / 5.6))
    for i, name in enumerate(grid.columns):
        shown = name if len(name) <= room else f"…{name[1 - room :]}"
        yield _text(_LABEL + width * (i + 0.5), _TOP - 8, shown, "f-muted", "middle")


def _row(grid: Grid, i: int, width: float, bounds: tuple[float, ...]) -> Iterator[str]:
    top = _TOP + _ROW * i
    yield _text(_LABEL - 8, top + 13, grid.rows[i], "f-muted", "end")
    for j, error in enumerate(grid.cells[i]):
        if error is not None:
            yield from _cell(_LABEL + width * j, top, width, error, bounds, len(grid.columns) <= _MOST_FIGURES)


def _cell(x: float, y: float, width: float, error: float, bounds: tuple[float, ...], figure: bool) -> Iterator[str]:
    step = shade(error, bounds)
    colour, opacity = ("f-c1", f' opacity="{_SHADES[step]}"') if error else ("f-rule", ' opacity="0.35"')
    yield f'<rect class="{colour}"{opacity} x="{_n(x)}" y="{_n(y)}" width="{_n(width - 1)}" height="{_ROW - 1}"/>'
    if figure:
        ink = "f-ink" if not error or step <= _INK_UP_TO else "f-paper"
        yield _text(x + width / 2, y + 13, number(error, 4), ink, "middle")


def _legend(bounds: tuple[float, ...], y: float) -> Iterator[str]:
    box = 54
    for i, opacity in enumerate(_SHADES):
        x = _LABEL + box * i
        yield f'<rect class="f-c1" opacity="{opacity}" x="{_n(x)}" y="{_n(y)}" width="{box - 1}" height="7"/>'
        if i:
            yield _text(x, y + 18, number(bounds[i - 1], 4), "f-muted", "middle")


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return f'<text class="{colour}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" font-size="10">{escape(text)}</text>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
