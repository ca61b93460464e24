"""Make SVG as matplotlib writes it fit to stand inside an HTML page.

Colours become classes, so that a chart follows the page from light to dark; inline styles become attributes, so that
the page's content security policy can forbid them; ids are prefixed, so that charts do not share them; metadata goes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from xml.etree import ElementTree

from compressknow.base.format import plain, plain_lines

# What charts are drawn in: colours that matplotlib takes, each the name of a class of the page's style sheet.
COLOURS = {name: f"#{i:06x}" for i, name in enumerate("ink muted rule paper c1 c2 c3 c4 c5 c6".split(), start=1)}
_CLASSES = {colour: name for name, colour in COLOURS.items()}
_ATTRIBUTES = {"stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "text-anchor", "opacity"}
_NUMBERS = {"d", "x", "y", "width", "height", "transform", "stroke-width", "stroke-dasharray"}
# Of a file: characters of a line of its title in each column, and room for labels that reach over the edge.
_TITLE_WIDTH, _MARGIN, _LINE = 52, 40, 16
_COLUMNS = 2
_SIZE = re.compile(r"([\d.]+)px")
# No XML may hold the first of these; the others turn the direction of writing.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_DECIMALS = re.compile(r"-?\d+\.\d+")


def make_inline(raw: str, id: str, title: str, description: str, hover: Mapping[str, str] | None = None) -> str:
    """Return `raw` as an element for HTML, named and described for those who cannot see it.

    Nothing else on the page may have its `id` or begin with it. Title and description are plain text, escaped here;
    `hover` is what a pointer over a mark is told, by the gid that it was drawn with.
    """
    root = ElementTree.fromstring(_UNSEEN.sub(lambda held_out: plain(held_out.group()), raw))
    for element in root.iter():
        element.tag = _strip_namespace(element.tag)
    _drop(root, {"metadata", "style"})
    marks = [
        (mark, hover[group.get("id", "")])
        for group in root.iter("g")
        if hover and group.get("id") in hover
        for mark in group.iter("use")
    ]
    referenced = {name for element in root.iter() for name in _list_references(element)}
    for element in root.iter():
        _clean(element, referenced, id)
    for mark, told in marks:
        ElementTree.SubElement(mark, "title").text = told
    _unwrap(root)
    root.attrib = {
        "class": "chart",
        "id": id,
        "viewBox": root.get("viewBox", ""),
        "role": "img",
        "aria-labelledby": f"{id}-title {id}-desc",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        named = ElementTree.Element(tag, {"id": f"{id}-{tag}"})
        named.text = plain_lines(text)
        root.insert(place, named)
    return ElementTree.tostring(root, encoding="unicode")


def make_standalone(panels: Sequence[tuple[str, str]], title: str, style: str) -> str:
    """Return elements of `make_inline` as one file: its title above, two in a row, in the page's colours, light and
    dark, which its style sheet names. A panel is the name that stands above it, empty for none, and the element.
    """
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
    """Put the panels side by side; return where the row ends, to the right and below."""
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
    """Write rules for the classes of charts, from the variables that the page's style sheet sets: light, then dark."""
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


def _drop(parent: ElementTree.Element, tags: set[str]) -> None:
    for child in list(parent):
        if child.tag in tags:
            parent.remove(child)
        else:
            _drop(child, tags)


def _list_references(element: ElementTree.Element) -> Iterator[str]:
    for name, value in element.attrib.items():
        if _strip_namespace(name) == "href":
            yield value.removeprefix("#")
        elif match := re.fullmatch(r"url\(#(.*)\)", value):
            yield match.group(1)


def _clean(element: ElementTree.Element, referenced: set[str], id: str) -> None:
    old, element.attrib = element.attrib, {}
    # Indentation is most of what matplotlib writes; only the text of a text is wanted.
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
    """Return the declarations of a style attribute as attributes; colours as classes."""
    declarations = [part.partition(":") for part in style.split(";") if part.strip()]
    found = {name.strip(): value.strip() for name, _, value in declarations}
    attributes = {name: value for name, value in found.items() if name in _ATTRIBUTES}
    classes = []
    for name in ("fill", "stroke"):
        if (colour := found.get(name)) in _CLASSES:
            classes.append(f"{name[0]}-{_CLASSES[colour]}")
        elif colour:
            attributes[name] = colour
    if size := _SIZE.search(found.get("font-size", found.get("font", ""))):
        attributes["font-size"] = size.group(1)
    return attributes | ({"class": " ".join(classes)} if classes else {})


def _shorten(value: str) -> str:
    rounded = _DECIMALS.sub(lambda match: f"{float(match.group()):.1f}".removesuffix(".0"), value)
    return " ".join(rounded.split()).replace("-0 ", "0 ")


def _unwrap(parent: ElementTree.Element) -> None:
    """Take the children out of groups that say nothing."""
    for child in list(parent):
        _unwrap(child)
        if child.tag in ("g", "defs") and not child.attrib and (child.tag == "g" or not len(child)):
            place = list(parent).index(child)
            parent.remove(child)
            for offset, grandchild in enumerate(child):
                parent.insert(place + offset, grandchild)
