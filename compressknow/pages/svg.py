"""SVG that can be embedded in an HTML page: converted from matplotlib output, and heat maps.

Colours become classes, so that a chart follows the page from light to dark; inline styles become attributes, so that
the page's content security policy can forbid them; ids get a unique prefix for each chart; metadata is removed.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import escape

from compressknow.base.format import clean, clean_lines, number

# Placeholder colours for matplotlib, one for each class of the page's style sheet.
COLOURS = {name: f"#{i:06x}" for i, name in enumerate("ink muted rule paper c1 c2 c3 c4 c5 c6".split(), start=1)}
_CLASSES = {colour: name for name, colour in COLOURS.items()}
_ATTRIBUTES = {"stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "text-anchor", "opacity"}
_NUMBERS = {"d", "x", "y", "width", "height", "transform", "stroke-width", "stroke-dasharray"}
# For a standalone file: title characters per line and column, a margin for overflowing labels, and line height.
_TITLE_WIDTH, _MARGIN, _LINE = 52, 40, 16
_COLUMNS = 2
_SIZE = re.compile(r"([\d.]+)px")
# XML forbids the control characters; the others change the writing direction.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_DECIMALS = re.compile(r"-?\d+\.\d+")


def make_inline(raw: str, id: str, title: str, description: str, hover: Mapping[str, str] = {}) -> str:
    """Return `raw` as an element for HTML, with a title and a description for screen readers, which are escaped here.
    No other id on the page may begin with `id`. `hover` has the tooltip of each mark by its gid."""
    root = ElementTree.fromstring(_UNSEEN.sub(lambda match: clean(match.group()), raw))
    for element in root.iter():
        element.tag = _strip_namespace(element.tag)
    for parent in list(root.iter()):
        for child in [each for each in parent if each.tag in ("metadata", "style")]:
            parent.remove(child)
    marks = [(mark, hover.get(group.get("id", ""))) for group in root.iter("g") for mark in group.iter("use")]
    referenced = {name for element in root.iter() for name in _list_references(element)}
    for element in root.iter():
        _clean(element, referenced, id)
    for mark, tooltip in marks:
        if tooltip is not None:
            ElementTree.SubElement(mark, "title").text = tooltip
    _unwrap(root)
    root.attrib = {"class": "chart", "id": id, "viewBox": root.get("viewBox", ""), "role": "img"}
    root.set("aria-labelledby", f"{id}-title {id}-desc")
    for tag, text in (("desc", description), ("title", title)):
        named = ElementTree.Element(tag, {"id": f"{id}-{tag}"})
        named.text = clean_lines(text)
        root.insert(0, named)
    return ElementTree.tostring(root, encoding="unicode")


def make_standalone(panels: Sequence[tuple[str, str]], title: str, style: str) -> str:
    """Return elements of `make_inline`, each with a heading (may be empty), as one file: a title, then two panels per
    row, in the light and dark colours of the page's style sheet."""
    root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg"})
    ElementTree.SubElement(root, "title").text = title
    ElementTree.SubElement(root, "style").text = _write_colours(style)
    columns = min(_COLUMNS, len(panels))
    lines = textwrap.wrap(title, _TITLE_WIDTH * columns)
    for i, line in enumerate(lines, start=1):
        _write(root, line, 4, _LINE * i)
    width, bottom = 0.0, _LINE * len(lines) + 8.0
    for first in range(0, len(panels), columns):
        right, bottom = _put_row(root, panels[first : first + columns], bottom)
        width = max(width, right)
    root.set("viewBox", f"0 0 {width:g} {bottom:g}")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _put_row(root: ElementTree.Element, panels: Sequence[tuple[str, str]], top: float) -> tuple[float, float]:
    """Put the panels side by side; return the right and bottom ends of the row."""
    right, bottom = 0.0, top
    for name, chart in panels:
        element = ElementTree.fromstring(chart)
        width, height = map(float, element.get("viewBox", "0 0 0 0").split()[2:])
        y = top
        if name:
            _write(root, name, right + 4, top + 1.5 * _LINE)
            y += 2 * _LINE
        place = {"x": right, "y": y, "width": width, "height": height}
        element.attrib |= {key: f"{value:g}" for key, value in place.items()} | {"overflow": "visible"}
        root.append(element)
        right, bottom = right + width + _MARGIN, max(bottom, y + height)
    return right, bottom


def _write(root: ElementTree.Element, text: str, x: float, y: float) -> None:
    place = {"x": f"{x:g}", "y": f"{y:g}", "font-size": "12", "class": "f-ink"}
    ElementTree.SubElement(root, "text", place).text = text


def _write_colours(style: str) -> str:
    """Write rules for the classes of charts, light then dark, from the variables of the page's style sheet."""
    light, dark = (
        {name: re.findall(rf"--{name}:\s*(#[0-9a-f]+)", style)[place] for name in COLOURS} for place in (0, 1)
    )
    return (
        f"svg{{background:{light['paper']};font-family:sans-serif}}"
        f"text{{paint-order:stroke;stroke-width:3px;stroke-linejoin:round}}{_write_rules(light)}"
        f"@media (prefers-color-scheme:dark){{svg{{background:{dark['paper']}}}{_write_rules(dark)}}}"
    )


def _write_rules(colours: dict[str, str]) -> str:
    rules = (f".f-{name}{{fill:{colour}}}.s-{name}{{stroke:{colour}}}" for name, colour in colours.items())
    return "".join(rules) + f"text{{stroke:{colours['paper']}}}"


def _strip_namespace(name: str) -> str:
    return name.rpartition("}")[2]


def _list_references(element: ElementTree.Element) -> Iterator[str]:
    for name, value in element.attrib.items():
        if _strip_namespace(name) == "href":
            yield value.removeprefix("#")
        elif match := re.fullmatch(r"url\(#(.*)\)", value):
            yield match.group(1)


def _clean(element: ElementTree.Element, referenced: set[str], id: str) -> None:
    old, element.attrib = element.attrib, {}
    # Most text in matplotlib's output is indentation; keep only that of text elements.
    element.tail = None
    if element.tag != "text":
        element.text = None
    for name, value in (old | _read_style(old.get("style", ""))).items():
        match _strip_namespace(name):
            case "style":
                continue
            case "id":
                if value in referenced:
                    element.set("id", f"{id}-{value}")
            case "href":
                element.set("href", f"#{id}-{value.removeprefix('#')}")
            case "clip-path":
                element.set("clip-path", value.replace("url(#", f"url(#{id}-"))
            case "transform" if re.match(r"rotate\(-?0(\.0)? ", value):
                continue
            case local:
                element.set(local, _shorten(value) if local in _NUMBERS else value)


def _read_style(style: str) -> dict[str, str]:
    """Return the declarations of a style attribute as attributes, with colours as classes."""
    declarations = [part.partition(":") for part in style.split(";") if part.strip()]
    values = {name.strip(): value.strip() for name, _, value in declarations}
    attributes = {name: value for name, value in values.items() if name in _ATTRIBUTES}
    classes = []
    for name in ("fill", "stroke"):
        if (colour := values.get(name)) in _CLASSES:
            classes.append(f"{name[0]}-{_CLASSES[colour]}")
        elif colour:
            attributes[name] = colour
    if size := _SIZE.search(values.get("font-size", values.get("font", ""))):
        attributes["font-size"] = size.group(1)
    return attributes | ({"class": " ".join(classes)} if classes else {})


def _shorten(value: str) -> str:
    rounded = _DECIMALS.sub(lambda match: _write_number(float(match.group())), value)
    return " ".join(rounded.split()).replace("-0 ", "0 ")


def _unwrap(parent: ElementTree.Element) -> None:
    """Replace groups without attributes by their children."""
    for child in list(parent):
        _unwrap(child)
        if child.tag in ("g", "defs") and not child.attrib and (child.tag == "g" or not len(child)):
            place = list(parent).index(child)
            parent.remove(child)
            for offset, grandchild in enumerate(child):
                parent.insert(place + offset, grandchild)


@dataclass(frozen=True, slots=True)
class Grid:
    """Figures, or None, by block and by module in it; a row of one figure is as wide as all columns."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]

    @property
    def figures(self) -> list[float]:
        """Return the figures that are not 0."""
        return [cell for row in self.cells for cell in row if cell]


def shorten_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the shortest endings of dotted names that tell them apart.

    >>> shorten_names(("attention.self.query", "attention.output.dense", "output.dense"))
    ('query', 'attention.output.dense', 'output.dense')
    """
    parts = [name.split(".") for name in names]

    def shorten(name: list[str]) -> str:
        others = [other for other in parts if other != name]
        sizes = range(1, len(name) + 1)
        enough = (size for size in sizes if all(other[-size:] != name[-size:] for other in others))
        return ".".join(name[-next(enough, len(name)) :])

    return tuple(map(shorten, parts))


# Shades of one colour, faint to full. Ink is legible on the first five, paper on the others, in light and dark mode.
_SHADES = (0.08, 0.17, 0.27, 0.38, 0.5, 0.85, 1.0)
_INK_UP_TO = 4
_ORDERS = 4  # of magnitude that the shades span at most
# Maximum number of columns with figures in the cells of a broad map; with more, tooltips show them.
_MOST_FIGURES = 10
_LETTER, _LONGEST = 5.6, 16


def draw_heat_map(
    grid: Grid,
    title: str,
    id: str,
    broad: bool = True,
    *,
    bounds: Sequence[float] = (),
    write: Callable[[float], str] = lambda figure: number(figure, 4),
) -> str | None:
    """Return the map as an element for HTML, for the full width if `broad` or for a narrow screen, with figures as
    written by `write`; None if all are 0. No other id on the page may begin with `id`. The shades change at the figures
    `bounds`, by default those of `find_bounds` for the grid."""
    if not grid.figures:
        return None
    bounds = bounds or find_bounds(grid.figures)
    # In units of the drawing: total width, maximum width of a column, room for the names of rows, height of a row.
    whole, widest, label, row = (720, 110, 76, 19) if broad else (328, 60, 66, 14)
    width = min(widest, (whole - label) / len(grid.columns))
    # In a narrow map, the names of columns are vertical.
    top = 26 if broad else 10 + round(min(_LONGEST, max(map(len, grid.columns))) * _LETTER)
    height = top + row * len(grid.rows) + 34
    shows_figures = broad and len(grid.columns) <= _MOST_FIGURES
    lines = [
        f'<svg class="chart heat" id="{id}" viewBox="0 0 {whole} {height}" role="img" ',
        f'aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{escape(title)}</title>',
        f'<desc id="{id}-desc">{escape(_describe_grid(grid, write))}</desc>',
    ]
    room = max(4, int(width / _LETTER)) if broad else _LONGEST
    for i, name in enumerate(grid.columns):
        shown, x = _cut(name, room), label + width * (i + 0.5) + 3.5 * (not broad)
        lines.append(_draw_text(x, top - 8, shown, "f-muted", "middle" if broad else "start", upright=not broad))
    for i, (name, cells) in enumerate(zip(grid.rows, grid.cells, strict=True)):
        y, wide = top + row * i, width * len(grid.columns) / len(cells)
        shown = _cut(name, int((label - 8) / _LETTER))
        lines.append(_draw_text(label - 8, y + row - (6 if broad else 3), shown, "f-muted", "end"))
        for j, figure in enumerate(cells):
            if figure is not None:
                shade = sum(figure >= bound for bound in bounds) if figure else None
                box = label + wide * j, y, wide - 1, row - 1
                lines.append(_draw_cell(box, shade, write(figure), shows_figure=shows_figures))
    below, step = top + row * len(grid.rows) + 12, min(54, (whole - label) / len(_SHADES))
    for i, opacity in enumerate(_SHADES):
        x = label + step * i
        lines.append(_draw_box((x, below, step - 1, 7), f'class="f-c1" opacity="{opacity}"'))
        if i:
            lines.append(_draw_text(x, below + 18, write(bounds[i - 1]), "f-muted", "middle"))
    return "".join([*lines, "</svg>"])


def _cut(name: str, room: int) -> str:
    """Return the end of a dotted name, which tells it from others, if it is longer than `room`."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def find_bounds(figures: Sequence[float]) -> tuple[float, ...]:
    """Return the figures at which the shades change, in equal ratios from the smallest to the largest."""
    high = max(figures)
    low = max(min(figures), high / 10**_ORDERS)
    steps = len(_SHADES)
    return tuple(low * math.exp(math.log(high / low) * i / steps) for i in range(1, steps))


def _describe_grid(grid: Grid, write: Callable[[float], str]) -> str:
    figures = []
    for row, cells in zip(grid.rows, grid.cells, strict=True):
        columns = grid.columns if len(cells) == len(grid.columns) else ("",)
        places = (", ".join(filter(None, (column, row))) for column in columns)
        figures += [(figure, place) for figure, place in zip(cells, places, strict=True) if figure]
    largest, least = max(figures), min(figures)
    return (
        f"From {write(least[0])} ({least[1]}) to {write(largest[0])} ({largest[1]}). "
        "The table after the map has every figure."
    )


def _draw_cell(box: tuple[float, float, float, int], shade: int | None, text: str, *, shows_figure: bool) -> str:
    """Return a cell with its figure, as text or as a tooltip; a figure of 0 has no shade."""
    colour = 'class="f-rule" opacity="0.35"' if shade is None else f'class="f-c1" opacity="{_SHADES[shade]}"'
    if not shows_figure:
        return _draw_box(box, colour, text)
    x, y, width, height = box
    ink = "f-ink" if shade is None or shade <= _INK_UP_TO else "f-paper"
    return _draw_box(box, colour) + _draw_text(x + (width + 1) / 2, y + height - 5, text, ink, "middle")


def _draw_box(box: tuple[float, float, float, int], colour: str, tooltip: str = "") -> str:
    x, y, width, height = box
    place = f'x="{_write_number(x)}" y="{_write_number(y)}" width="{_write_number(width)}" height="{height}"'
    end = f"><title>{escape(tooltip)}</title></rect>" if tooltip else "/>"
    return f"<rect {colour} {place}{end}"


def _draw_text(x: float, y: float, text: str, colour: str, anchor: str, *, upright: bool = False) -> str:
    turned = f' transform="rotate(-90 {_write_number(x)} {_write_number(y)})"' if upright else ""
    place = f'x="{_write_number(x)}" y="{_write_number(y)}" text-anchor="{anchor}"'
    return f'<text class="{colour}" {place} font-size="10"{turned}>{escape(text)}</text>'


def _write_number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
