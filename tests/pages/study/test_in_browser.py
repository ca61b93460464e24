"""The page of a study in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from compressknow.pages.drawing import WIDTH
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.in_browser import check_accessible, check_fits, measure_chart_widths, unfold
from tests.pages.study.studies import STUDIES, make_whole_grid, render_study_html, replace_texts

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("studies")
    pages = {name: make() for name, make in STUDIES.items()}
    pages |= {f"hostile {i}": replace_texts(make_whole_grid(), HOSTILE_TEXTS[i]) for i in (6, 7)}
    for name, study in pages.items():
        (folder / f"{name}.html").write_text(render_study_html(study), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.mark.parametrize("name", [*STUDIES, "hostile 6", "hostile 7"])
def test_page_is_never_wider_than_the_screen(page: Page, files: dict[str, Path], name: str) -> None:
    page.goto(files[name].as_uri())
    unfold(page, 100)
    check_fits(page, whole=not name.startswith("hostile"))


@pytest.mark.parametrize("name", ["masked", "seq2seq"])
@pytest.mark.parametrize("width", [360, 1280])
def test_all_charts_have_the_same_width(page: Page, files: dict[str, Path], name: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(files[name].as_uri())
    unfold(page, 100)
    (width_of_all,) = measure_chart_widths(page)
    assert 0.95 <= width_of_all / WIDTH <= 1.1  # letters are as large as drawn


@pytest.mark.parametrize(("name", "scheme"), [("masked", "light"), ("seq2seq", "dark"), ("empty", "light")])
def test_page_is_accessible(page: Page, files: dict[str, Path], name: str, scheme: Any) -> None:
    check_accessible(page, files[name], scheme)


def test_printed_charts_are_whole_and_light(page: Page, files: dict[str, Path]) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(files["seq2seq"].as_uri())
    style = "[...document.querySelectorAll('{}')].map((each) => getComputedStyle(each).{})"
    assert set(page.evaluate(style.format("figure:not(.panels), .found, .findings tbody", "breakInside"))) == {"avoid"}
    assert page.evaluate(style.format("html, body", "backgroundColor")) == ["rgba(0, 0, 0, 0)"] * 2
    assert page.evaluate(style.format("h1, .chart .f-paper", "color"))[0] == "rgb(28, 27, 25)"


def test_cells_are_sorted_by_a_key_press(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["masked"].as_uri())
    table = page.locator("section[aria-labelledby=cells] table.sortable")
    header = table.get_by_role("columnheader", name="Kept")
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    kept = table.locator("tbody").last.locator("tr > td:nth-child(2)").all_inner_texts()
    numbers = [float(text.split()[0]) for text in kept]
    assert numbers == sorted(numbers, reverse=True)
    assert table.locator("tbody th").first.inner_text() == "original"


def test_page_is_complete_without_javascript(browser: Browser, files: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(files["masked"].as_uri())
    assert page.locator("table.findings").is_visible()
    assert page.locator("svg.chart").count() == 5
    assert page.locator("section[aria-labelledby=cells] tbody tr").count() == 41
    context.close()
