"""Read the figures of a chart back from the coordinates of its SVG."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from xml.etree.ElementTree import Element

_TICK = re.compile("(\N{MINUS SIGN}?[0-9]+)(?: %)?")


def read_axes(root: Element) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Return functions that turn coordinates into the figures on the axes; the vertical one has grid lines."""
    ticks: dict[str, list[tuple[float, float]]] = {"middle": [], "end": []}
    for before, label in pairwise(root):
        if label.tag == "text" and (match := _TICK.fullmatch(label.text or "")):
            value, anchor = float(match[1].replace("\N{MINUS SIGN}", "-")), label.get("text-anchor", "")
            place = float(label.get("x", "")) if anchor == "middle" else read_points(before)[0][1]
            ticks.get(anchor, []).append((place, value))
    across, up = (interpolate(ticks[anchor]) for anchor in ("middle", "end"))
    return across, up


def interpolate(ticks: list[tuple[float, float]]) -> Callable[[float], float]:
    if not ticks:
        return lambda place: place
    (x0, y0), (x1, y1) = ticks[0], ticks[-1]
    return lambda place: y0 + (place - x0) * (y1 - y0) / (x1 - x0)


def read_points(path: Element) -> list[tuple[float, float]]:
    numbers = [float(each) for each in re.findall(r"-?[\d.]+", path.get("d", ""))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def find_paths(root: Element, look: str, **attributes: str) -> list[Element]:
    """Return the paths of a class that have these attributes, in the order in which they are drawn."""
    wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
    return [path for path in root.iter("path") if path.get("class") == look and wanted.items() <= path.attrib.items()]


def find_text(root: Element, text: str) -> Element:
    return next(each for each in root.iter("text") if each.text == text)
