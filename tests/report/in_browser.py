"""What the tests of all pages ask a browser: what axe finds to mend, and how much wider than the screen a page is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import axe_playwright_python

if TYPE_CHECKING:
    from playwright.sync_api import Page

_AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Page) -> list[tuple[str, str]]:
    """Rules of accessibility that the page breaks, each with the first element that does."""
    page.evaluate(_AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations)")
    return [(each["id"], each["nodes"][0]["html"]) for each in found]


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def unfold(page: Page, first: int) -> None:
    """Open the first so many of what is folded."""
    page.evaluate(f"document.querySelectorAll('details').forEach((each, i) => {{ each.open = i < {first}; }})")
