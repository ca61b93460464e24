"""Heat maps: figures by layer and module, from faint to full colour in equal ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import escape

from compressknow.format import number


@dataclass(frozen=True, slots=True)
class Grid:
    """Figures by block (rows) and by module inside a block (columns); None where a block has no such module, or no
    figure of it. A row of one figure is as wide as all columns."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]

    @property
    def figures(self) -> list[float]:
        """Those that are not 0."""
        return [cell for row in self.cells for cell in row if cell]


def four_digits(figure: float) -> str:
    """A figure to four decimals."""
    return number(figure, 4)


@dataclass(frozen=True, slots=True)
class Form:
    """How a map is drawn, in units of the drawing.

    Attributes
    ----------
    widest : a column, at most.
    label : room for the names of rows.
    upright : whether names of columns run upwards.
    most_figures : columns that leave room for a figure in each cell; a pointer is told it where there is none.
    """

    width: int
    widest: int
    label: int
    row: int
    upright: bool
    most_figures: int


WIDE = Form(720, 110, 76, 19, upright=False, most_figures=10)
NARROW = Form(328, 60, 66, 14, upright=True, most_figures=0)
# Shades of one colour, faint to full. Up to the fifth, ink reads on them in light and in dark; then paper does.
_SHADES = (0.08, 0.17, 0.27, 0.38, 0.5, 0.85, 1.0)
_INK_UP_TO = 4
_ORDERS = 4  # of magnitude that the shades span at most
_TOP, _LETTER, _LONGEST = 26, 5.6, 16


def heat_map(
    grid: Grid,
    id: str,
    title: str,
    *,
    bounds: Sequence[float] = (),
    write: Callable[[float], str] = four_digits,
    form: Form = WIDE,
) -> str | None:
    """The map as an element for HTML; None where all figures are 0.

    Parameters
    ----------
    id : of the element; nothing else on the page may have it or begin with it.
    bounds : the scale, as `bounds_of` gives it; by default the grid's own.
    write : writes a figure.
    """
    if not grid.figures:
        return None
    bounds = bounds or bounds_of(grid.figures)
    width = min(form.widest, (form.width - form.label) / len(grid.columns))
    top = _top(grid, form)
    height = top + form.row * len(grid.rows) + 34
    return "".join(
        [
            f'<svg class="chart heat" id="{id}" viewBox="0 0 {form.width} {height}" role="img" ',
            f'aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{escape(title)}</title>',
            f'<desc id="{id}-desc">{escape(_told(grid, write))}</desc>',
            *_heads(grid, width, top, form),
            *(mark for i in range(len(grid.rows)) for mark in _map_row(grid, i, width, top, bounds, write, form)),
            *_legend(bounds, top + form.row * len(grid.rows) + 12, write, form),
            "</svg>",
        ]
    )


def bounds_of(figures: Sequence[float]) -> tuple[float, ...]:
    """Figures that part the shades, in equal ratios between the least and the largest."""
    high = max(figures)
    low = max(min(figures), high / 10**_ORDERS)
    steps = len(_SHADES)
    return tuple(low * math.exp(math.log(high / low) * i / steps) for i in range(1, steps))


def _shade(figure: float, bounds: Sequence[float]) -> int:
    """Which shade a figure has, 0 the faintest; `bounds` are the lowest figures of the shades above it."""
    return sum(figure >= bound for bound in bounds)


def _told(grid: Grid, write: Callable[[float], str]) -> str:
    found = [(figure, ", ".join(filter(None, (column, row))))
             for row, column, figure in _placed(grid) if figure]  # fmt: skip
    largest, least = max(found), min(found)
    return (
        f"From {write(least[0])} ({least[1]}) to {write(largest[0])} ({largest[1]}). "
        "The table after the map has every figure."
    )


def _placed(grid: Grid) -> Iterator[tuple[str, str, float | None]]:
    for row, cells in zip(grid.rows, grid.cells, strict=True):
        columns = grid.columns if len(cells) == len(grid.columns) else ("",)
        yield from ((row, column, cell) for column, cell in zip(columns, cells, strict=True))


def _top(grid: Grid, form: Form) -> int:
    if not form.upright:
        return _TOP
    return 10 + round(min(_LONGEST, max(map(len, grid.columns))) * _LETTER)


def _heads(grid: Grid, width: float, top: int, form: Form) -> Iterator[str]:
    room = _LONGEST if form.upright else max(4, int(width / _LETTER))
    for i, name in enumerate(grid.columns):
        shown = name if len(name) <= room else f"…{name[1 - room :]}"
        x = form.label + width * (i + 0.5) + 3.5 * form.upright
        yield _text(x, top - 8, shown, "f-muted", "start" if form.upright else "middle", upright=form.upright)


def _map_row(
    grid: Grid, i: int, width: float, top: int, bounds: Sequence[float], write: Callable[[float], str], form: Form
) -> Iterator[str]:
    y, cells = top + form.row * i, grid.cells[i]
    yield _text(form.label - 8, y + form.row - 6 + (form.row < 16) * 3, grid.rows[i], "f-muted", "end")
    wide = width if len(cells) == len(grid.columns) else width * len(grid.columns)
    for j, figure in enumerate(cells):
        if figure is None:
            continue
        step, x = _shade(figure, bounds), form.label + wide * j
        colour = f'class="f-c1" opacity="{_SHADES[step]}"' if figure else 'class="f-rule" opacity="0.35"'
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(wide - 1)}" height="{form.row - 1}"'
        if len(grid.columns) <= form.most_figures:
            yield f"<rect {colour} {place}/>"
            ink = "f-ink" if not figure or step <= _INK_UP_TO else "f-paper"
            yield _text(x + wide / 2, y + form.row - 6, write(figure), ink, "middle")
        else:
            yield f"<rect {colour} {place}><title>{escape(write(figure))}</title></rect>"


def _legend(bounds: Sequence[float], y: float, write: Callable[[float], str], form: Form) -> Iterator[str]:
    box = min(54, (form.width - form.label) / len(_SHADES))
    for i, opacity in enumerate(_SHADES):
        x = form.label + box * i
        yield f'<rect class="f-c1" opacity="{opacity}" x="{_n(x)}" y="{_n(y)}" width="{_n(box - 1)}" height="7"/>'
        if i:
            yield _text(x, y + 18, write(bounds[i - 1]), "f-muted", "middle")


def _text(x: float, y: float, text: str, colour: str, anchor: str, *, upright: bool = False) -> str:
    turned = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if upright else ""
    return (
        f'<text class="{colour}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" font-size="10"{turned}>'
        f"{escape(text)}</text>"
    )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
