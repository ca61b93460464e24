"""The page of a search in a real browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from compressknow.pages.search import render_search_html
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.in_browser import check_accessible, check_fits
from tests.pages.search.searches import make_search, make_size_search

if TYPE_CHECKING:
    from playwright.sync_api import Page


PAGES = {
    "found": make_search(),
    "none": replace(make_search(), winner=None, recipe=None, closest=make_search().tried[2]),
    "sized": make_size_search(),
    "hostile 6": make_search(HOSTILE_TEXTS[6]),
    "hostile 7": make_search(HOSTILE_TEXTS[7]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("searches")
    for name, search in PAGES.items():
        (folder / f"{name}.html").write_text(render_search_html(search), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_never_wider_than_the_screen(page: Page, files: dict[str, Path], name: str) -> None:
    page.goto(files[name].as_uri())
    check_fits(page, whole=not name.startswith("hostile"))


@pytest.mark.parametrize(("name", "scheme"), [("found", "light"), ("found", "dark"), ("none", "light")])
def test_page_is_accessible(page: Page, files: dict[str, Path], name: str, scheme: Any) -> None:
    check_accessible(page, files[name], scheme)


def read_text(page: Page, selector: str) -> str:
    """Return the visible text, with no-break spaces as spaces."""
    return page.locator(selector).inner_text().replace("\N{NO-BREAK SPACE}", " ")


def test_page_shows_the_result(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["found"].as_uri())
    assert read_text(page, "h1") == "40.0 % smaller, and 94.0 % kept"
    verdict = read_text(page, "header .verdict")
    assert "The GGUF file of 60.0 MB keeps 94.0 %" in verdict
    assert "The original has 100.0 MB" in verdict
    page.goto(files["none"].as_uri())
    assert read_text(page, "h1") == "No file tried is certain to keep 90 %"
