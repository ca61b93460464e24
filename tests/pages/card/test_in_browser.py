"""The page of a report card in a real browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from compressknow.base.format import number
from compressknow.pages.card.pages import render_html
from tests.pages.card.cards import make_card_of_nothing, make_card_of_one, make_card_of_several
from tests.pages.hostile import HOSTILE_TEXTS, replace_texts
from tests.pages.in_browser import check_accessible, check_fits, find_overlaps, find_scrolled, measure_overflow, unfold

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGES = {
    "one": make_card_of_one,
    "several": lambda: make_card_of_several((20,)),
    "nothing": make_card_of_nothing,
    "hostile": lambda: replace_texts(make_card_of_one(lost=3, gained=1), HOSTILE_TEXTS[6]),
    "long": lambda: replace_texts(make_card_of_several((20,)), HOSTILE_TEXTS[7]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, make in PAGES.items():
        (folder / f"{name}.html").write_text(render_html(make()), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_never_wider_than_the_screen(page: Page, files: dict[str, Path], name: str) -> None:
    page.goto(files[name].as_uri())
    unfold(page, 4)
    # Hostile and long names may overlap in charts.
    is_ordinary = name not in ("hostile", "long")
    check_fits(page, labelled=is_ordinary, whole=is_ordinary)
    page.set_viewport_size({"width": 794, "height": 1123})  # A4
    page.emulate_media(media="print")
    assert measure_overflow(page) <= 0


_CUT_CAPTIONS = """
() => [...document.querySelectorAll('.scroll caption')].filter((each) => {
  const [box, region] = [each.getBoundingClientRect(), each.closest('.scroll').getBoundingClientRect()];
  return box.width && box.right > region.right + 1;
}).map((each) => each.textContent)
"""


def test_captions_of_scrolled_tables_are_whole_on_a_phone(page: Page, files: dict[str, Path]) -> None:
    page.set_viewport_size({"width": 360, "height": 900})
    page.goto(files["one"].as_uri())
    unfold(page, 100)
    assert find_scrolled(page)
    assert page.evaluate(_CUT_CAPTIONS) == []


def test_only_the_overview_is_scrolled_on_a_wide_screen(page: Page, files: dict[str, Path]) -> None:
    for name in ("one", "several"):
        page.goto(files[name].as_uri())
        unfold(page, 100)
        assert set(find_scrolled(page)) <= {"Every compressed model at a glance"}


@pytest.mark.parametrize(
    ("name", "scheme"), [("one", "light"), ("one", "dark"), ("several", "light"), ("nothing", "dark")]
)
def test_page_is_accessible(page: Page, files: dict[str, Path], name: str, scheme: Any) -> None:
    check_accessible(page, files[name], scheme)


def test_page_follows_the_color_scheme_and_prints_on_white(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["one"].as_uri())
    colours_of = {}
    for scheme in ("light", "dark"):
        for media in ("screen", "print"):
            page.emulate_media(color_scheme=scheme, media=media)  # type: ignore[arg-type]
            colours = "[getComputedStyle(document.documentElement).backgroundColor, "
            colours += "getComputedStyle(document.querySelector('.chart text')).fill]"
            colours_of[scheme, media] = page.evaluate(colours)
    assert colours_of["light", "screen"][0] != colours_of["dark", "screen"][0]
    assert colours_of["light", "screen"][1] != colours_of["dark", "screen"][1]
    assert colours_of["dark", "print"] == colours_of["light", "print"]
    assert colours_of["dark", "print"][0] == "rgba(0, 0, 0, 0)"


def test_folded_parts_are_printed(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["one"].as_uri())
    page.emulate_media(media="print")
    hidden = page.evaluate(
        "[...document.querySelectorAll('details > :not(summary)')].filter((each) => !each.checkVisibility()).length"
    )
    assert hidden == 0


def test_table_is_sorted_by_a_key_press_and_announces_it(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["several"].as_uri())
    table = page.locator("table.sortable").first
    header = table.get_by_role("columnheader", name="Kept")
    for direction, reverse in (("descending", True), ("ascending", False)):
        header.get_by_role("button").press("Enter")
        assert header.get_attribute("aria-sort") == direction
        kept = table.locator("tbody").last.locator("tr > td:nth-child(3)").all_inner_texts()
        numbers = [float(text.split()[0]) for text in kept]
        assert numbers == sorted(numbers, reverse=reverse)
        assert table.locator("tbody th").first.inner_text() == "original"


def test_sizes_are_sorted_by_bytes(page: Page, tmp_path: Path) -> None:
    card = make_card_of_several((20,))
    sizes = (2_000_000, 999_000, 1_500_000_000)
    comparisons = tuple(
        replace(each, model=replace(each.model, bytes=size))
        for each, size in zip(card.comparisons[:3], sizes, strict=True)
    )
    file = tmp_path / "sizes.html"
    file.write_text(render_html(replace(card, comparisons=comparisons, decision=None)), encoding="utf-8")
    page.goto(file.as_uri())
    table = page.locator("table.sortable").first
    table.get_by_role("button", name="Size").press("Enter")
    cells = table.locator("tbody").last.locator("tr > td:nth-child(2)").all_inner_texts()
    assert [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in cells] == ["1.50 GB", "2.0 MB", "999.0 kB"]


def test_powers_of_ten_are_sorted_by_value(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["several"].as_uri())
    texts = [number(value, 2) for value in (457.57, 3.6e102, -3e-9, 9e9)]
    keys = page.evaluate("(texts) => texts.map((text) => sortKey({ textContent: text }))", texts)
    assert keys == [457.57, 3.6e102, -3e-9, 9e9]


def test_grades_are_sorted_from_best_to_worst(page: Page, tmp_path: Path) -> None:
    card = make_card_of_several((20,))
    grades = ("B", "A", "-", "A+?", "A?", "A+")
    comparisons = []
    for comparison, mark in zip(card.comparisons, grades, strict=False):
        first, *others = comparison.grades
        first = replace(first, grade=mark.rstrip("?"), range="A to B" if "?" in mark else None)
        comparisons.append(replace(comparison, grades=(first, *others)))
    file = tmp_path / "grades.html"
    file.write_text(render_html(replace(card, comparisons=tuple(comparisons), decision=None)), encoding="utf-8")
    page.goto(file.as_uri())
    table = page.locator("table.sortable").first
    header = table.get_by_role("columnheader", name="geography")
    header.get_by_role("button").press("Enter")
    column = header.evaluate("(each) => each.cellIndex")
    cells = table.locator("tbody").last.locator(f"tr > :nth-child({column + 1})").all_inner_texts()
    assert cells == ["A+", "A+?", "A", "A?", "B", "-"]


def test_labels_of_bars_with_long_names_do_not_overlap(page: Page, tmp_path: Path) -> None:
    card = make_card_of_several((20,))
    named = tuple(
        replace(each, model=replace(each.model, setup=f"Blocks_GQ int4 group_size {size}"))
        for each, size in zip(card.comparisons[:3], (32, 64, 128), strict=True)
    )
    file = tmp_path / "named.html"
    file.write_text(render_html(replace(card, comparisons=named, decision=None)), encoding="utf-8")
    page.goto(file.as_uri())
    assert page.locator("svg[id$=bars]").count() == 1
    assert find_overlaps(page) == []


def test_link_opens_the_folded_section_it_leads_to(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["several"].as_uri())
    assert not page.locator("details.model").nth(2).evaluate("(each) => each.open")
    page.locator("a[href='#m3-top']").click()
    # wait_for_function would evaluate text in the page, which its policy forbids.
    expect(page.locator("details.model").nth(2)).to_have_attribute("open", "")


def test_table_of_domains_with_long_names_is_not_scrolled(page: Page, tmp_path: Path) -> None:
    card = make_card_of_one()
    names = ("high_school_european_history", "Wirtschaftswissenschaften", "x" * 80)
    named = tuple(replace(each, subject=name) for each, name in zip(card.comparisons[0].grades, names, strict=False))
    file = tmp_path / "named.html"
    named_card = replace(card, comparisons=(replace(card.comparisons[0], grades=named),))
    file.write_text(render_html(named_card), encoding="utf-8")
    page.goto(file.as_uri())
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert "Knowledge kept by domain" not in find_scrolled(page), width


def test_page_is_complete_without_javascript(browser: Browser, files: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(files["one"].as_uri())
    assert page.locator("table.grades tbody tr").count() == 6
    assert page.locator("table.grades").is_visible()
    last = page.get_by_text("99. The capital of Chad is ___.")
    assert not last.is_visible()
    page.locator("summary", has_text="80 more").click()
    assert last.is_visible()
    context.close()
