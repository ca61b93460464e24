"""Measurements and checks of a page in a browser: accessibility, overflow, overlapping texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import axe_playwright_python

if TYPE_CHECKING:
    from playwright.sync_api import Page

_AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def find_violations(page: Page) -> list[tuple[str, str]]:
    """Return the accessibility rules that the page breaks, each with the first element that breaks it."""
    page.evaluate(_AXE)
    broken = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((results) => results.violations)")
    return [(each["id"], each["nodes"][0]["html"]) for each in broken]


def measure_overflow(page: Page) -> int:
    """Return by how many pixels the page is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def unfold(page: Page, first: int) -> None:
    """Open the first folded parts, and close the others."""
    page.evaluate(f"document.querySelectorAll('details').forEach((each, i) => {{ each.open = i < {first}; }})")


_OVERLAPPING = """
() => [...document.querySelectorAll('svg.chart')].flatMap((chart) => {
  const texts = [...chart.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
  const depth = (a, b) => Math.min(
    Math.min(a.right, b.right) - Math.max(a.left, b.left) + 3, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
  return texts.flatMap(([one, a], i) => texts.slice(i + 1)
    .filter(([, b]) => a.width && b.width && depth(a, b) > 1)
    .map(([other]) => `${chart.id}: ${one} / ${other}`));
})
"""


def find_overlaps(page: Page) -> list[str]:
    """Return visible texts of a chart that overlap by more than a pixel or have less than two pixels between them."""
    return page.evaluate(_OVERLAPPING)


_CUT = """
() => [...document.querySelectorAll('svg.chart')].flatMap((chart) => {
  const [whole, texts] = [chart.getBoundingClientRect(), [...chart.querySelectorAll('text')]];
  return texts.filter((text) => {
    const box = text.getBoundingClientRect();
    return box.width && (box.right > whole.right + 4 || box.left < whole.left - 4);
  }).map((text) => `${chart.id}: ${text.textContent}`);
})
"""


def find_cut_texts(page: Page) -> list[str]:
    """Return texts that cross the edge of their chart by more than a wider font explains."""
    return page.evaluate(_CUT)


def measure_chart_widths(page: Page) -> set[int]:
    """Return the widths of the visible charts, in pixels."""
    charts = "[...document.querySelectorAll('svg.chart')]"
    return set(page.evaluate(f"{charts}.map((each) => Math.round(each.getBoundingClientRect().width))")) - {0}


_OUTSIDE = """
() => [...document.querySelectorAll('.scroll, .facts td')].filter((each) => each.offsetParent).filter((each) => {
  const [box, column] = [each.getBoundingClientRect(), each.closest('section').getBoundingClientRect()];
  return box.right > column.right + 1 || box.left < column.left - 1;
}).map((each) => each.getAttribute('aria-label') || each.textContent)
"""


def find_outside(page: Page) -> list[str]:
    """Return visible tables and cells of tables of facts that cross the edge of their column."""
    return page.evaluate(_OUTSIDE)


_SCROLLED = """
() => [...document.querySelectorAll('.scroll')].filter((each) => each.offsetParent)
  .filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.getAttribute('aria-label'))
"""


def find_scrolled(page: Page) -> list[str]:
    """Return the visible tables that need scrolling."""
    return page.evaluate(_SCROLLED)


def check_fits(page: Page, *, labelled: bool = True, whole: bool = True) -> None:
    """Check that nothing is wider than a phone or a wide screen, that texts of charts do not overlap (if `labelled`),
    and that none is cut (if `whole`)."""
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert measure_overflow(page) <= 0, width
        assert find_outside(page) == [], width
        assert not labelled or find_overlaps(page) == [], width
        assert not whole or find_cut_texts(page) == [], width


def check_accessible(page: Page, file: Path, scheme: Any) -> None:
    """Check the accessibility of the page on a phone, with everything unfolded."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 900})
    page.goto(file.as_uri())
    unfold(page, 100)
    assert find_violations(page) == []
