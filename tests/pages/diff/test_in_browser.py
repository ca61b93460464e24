"""The page of a comparison in a real browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from compressknow.comparison.diff import StructureChange
from compressknow.pages.diff.pages import render_comparison_html
from tests.pages.diff.contrasts import make_comparison
from tests.pages.in_browser import check_fits, find_scrolled, find_violations, measure_overflow, unfold

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    file: Path = tmp_path_factory.mktemp("pages") / "compare.html"
    file.write_text(render_comparison_html(make_comparison()), encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible(page: Page, address: str, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    unfold(page, 4)
    assert find_violations(page) == []


def test_page_is_never_wider_than_the_screen(page: Page, address: str) -> None:
    page.goto(address)
    unfold(page, 4)
    check_fits(page, whole=False)
    page.set_viewport_size({"width": 794, "height": 1123})  # A4
    page.emulate_media(media="print")
    assert measure_overflow(page) <= 0


def test_table_of_differently_stored_tensors_is_not_scrolled(page: Page, tmp_path: Path) -> None:
    names = [f"bert.encoder.layer.{number}.attention.self.query.weight" for number in range(3)]
    changes = tuple(StructureChange(name, "retyped", "BF16 [384, 384]", "I8 [384, 384]") for name in names)
    comparison = make_comparison()
    html = render_comparison_html(replace(comparison, difference=replace(comparison.difference, structure=changes)))
    file = tmp_path / "structure.html"
    file.write_text(html, encoding="utf-8")
    page.goto(file.as_uri())
    assert "Tensors that are stored differently" not in find_scrolled(page)


def test_map_is_legible_on_a_phone(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 360, "height": 900})
    page.goto(address)
    (scale,) = page.evaluate(
        "[...document.querySelectorAll('.heat')].filter((map) => map.checkVisibility())"
        ".map((map) => map.getBoundingClientRect().width / map.viewBox.baseVal.width)"
    )
    assert 10 * scale > 8  # the height of letters in pixels


def test_map_follows_the_color_scheme(page: Page, address: str) -> None:
    page.goto(address)
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colours.append(page.evaluate("getComputedStyle(document.querySelector('.heat rect.f-c1')).fill"))
    assert colours[0] != colours[1]


def test_layers_are_sorted_by_number(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "deep.html"
    file.write_text(render_comparison_html(make_comparison(facts=False, layers=12)), encoding="utf-8")
    page.goto(file.as_uri())
    table = page.locator("section[aria-labelledby=compare-layers] table")
    table.get_by_role("button", name="Layer").press("Enter")
    layers = [f"{stack} {number}" for stack in ("decoder", "encoder") for number in range(12)]
    assert table.locator("tbody th").all_inner_texts() == layers
