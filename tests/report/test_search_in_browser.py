"""A search's page in a real browser: quiet, asking for nothing, accessible, and never wider than the screen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from compressknow.report.records import Estimate, ModelFacts
from compressknow.report.search_records import Search, Tried
from compressknow.report.search_write import render_search_html
from tests.report.hostile import TEXTS
from tests.report.test_page_in_browser import AXE, overflow

if TYPE_CHECKING:
    from playwright.sync_api import Page


def tried(setup: str, kind: str, size: int, kept: float, held_out: float | None = None) -> Tried:
    def estimate(value: float) -> Estimate:
        return Estimate(value, max(0.0, value - 0.04), min(1.0, value + 0.04))

    recipe = {"module_map": "structural", "steps": [{"prune": size / 1e8, "scope": ["attention"]}]}
    sizes = {"sparse-bytes": size, "bytes": 2 * size, "nonzero": size // 2}
    known = None if held_out is None else estimate(held_out)
    return Tried(setup, kind, recipe, estimate(kept), sizes, known, 0.25)


def found(text: str = "a-model") -> Search:
    all_tried = (
        tried("Overall_GP 20%", "paper", 80_000_000, 0.97),
        tried(f"Att[layers 0-6]_GP 50% {text}", "layers", 90_000_000, 0.99),
        tried("Att_GP 30% + FF_GP 25% + Att+FF_GQ", "search", 60_000_000, 0.96, 0.95),
        tried("Att_GP 80% + FF_GP 80%", "search", 30_000_000, 0.1),
    )
    sizes = {"sparse-bytes": 100_000_000, "bytes": 100_000_000, "nonzero": 50_000_000}
    model = ModelFacts(text, None, "0" * 64, "LlamaForCausalLM", "causal", 50_000_000, 100_000_000, "BF16")
    return Search(
        original=model,
        keep=0.9,
        minimize="sparse-bytes",
        probes=("atlas", text),
        searched=150,
        held_out=150,
        known_searched=93,
        known_held_out=92,
        level=0.99,
        sizes=sizes,
        tried=all_tried,
        confirmed=(all_tried[2],),
        winner=all_tried[2],
        closest=None,
        naive=all_tried[0],
        seed=0,
        versions={"compressknow": "0.1.0"},
        command=f"compressknow search {text}",
    )


PAGES = {
    "found": found(),
    "none": replace(found(), winner=None, naive=None, closest=found().tried[2]),
    "hostile 6": found(TEXTS[6]),
    "hostile 7": found(TEXTS[7]),
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
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert overflow(page) <= 0, width


@pytest.mark.parametrize(("name", "scheme"), [("found", "light"), ("found", "dark"), ("none", "light")])
def test_axe_finds_nothing_to_mend(page: Page, files: dict[str, Path], name: str, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 900})
    page.goto(files[name].as_uri())
    page.evaluate(AXE)
    violations = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations)")
    assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []


def test_the_page_says_what_was_found(page: Page, files: dict[str, Path]) -> None:
    page.goto(files["found"].as_uri())
    assert page.locator("h1").inner_text() == "40.0 % smaller, and at least 90 % kept"
    verdict = page.locator("header .verdict").inner_text()
    assert "60.0 MB: 40.0 % less than the original (100.0 MB)" in verdict
    assert "25.0 % less than the naive choice, one amount over everything (Overall_GP 20%, 80.0 MB)" in verdict
    page.goto(files["none"].as_uri())
    assert page.locator("h1").inner_text() == "Nothing that was tried surely keeps 90 %"
