"""The examples are what they say they are."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import pytest

import compressknow
from compressknow.compress.recipe import read_recipe
from compressknow.study.grid import read_grid

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = EXAMPLES / "recipes"
SETUPS = {
    "att-prune20-int8": "Att_GPQ 20%",
    "first-layers-feed-forward": "FF[layers 0-5] L1-unstructured per layer 50%",
    "mixed": "Att_GP 10% + FF_GP 30% + Att+FF_GQ",
    "overall-int8": "Overall_GQ",
    "paper-att-gpq20": "Att_GPQ 20%",
    "paper-final-l1-structured40": "FLP L1-structured 40%",
}


def test_every_recipe_is_named_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(SETUPS)


@pytest.mark.parametrize(("name", "setup"), SETUPS.items())
def test_recipe_is_the_setup_that_its_name_says(name: str, setup: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.toml")
    assert recipe.setup == setup
    assert recipe.module_map == ("paper" if name.startswith("paper") else "structural")


@pytest.mark.network
def test_every_form_of_the_frontier_is_one_that_smollm2_can_have(smollm2: Path, tmp_path: Path) -> None:
    frontier = runpy.run_path(str(EXAMPLES / "frontier.py"))
    for recipe in frontier["CONVERTED"].values():
        compressknow.convert(smollm2, tmp_path / "out", dry_run=True, **recipe)
    for source, chosen in frontier["EXPORTED"].values():
        assert source is None or source in frontier["CONVERTED"]
        inspect.signature(compressknow.export).bind(smollm2, tmp_path / "out.gguf", **chosen)
    assert list(tmp_path.iterdir()) == []


def test_grid_is_the_cells_that_the_manual_shows() -> None:
    cells = {cell.key: cell.recipe.setup for cell in read_grid(EXAMPLES / "grid.toml")}
    assert cells == {
        "att-gq-int8": "Att_GQ",
        "att-gpq-20-int8": "Att_GPQ 20%",
        "ff-gq-int8": "FF_GQ",
        "ff-gpq-20-int8": "FF_GPQ 20%",
        "first-layers": "FF[layers 0-5]_GP 50%",
        "mixed": "Att_GP 10% + FF_GP 30% + Att+FF_GQ",
    }
    page = (EXAMPLES.parent / "docs" / "commands" / "sweep.md").read_text(encoding="utf-8")
    assert all(setup.removesuffix("FF_GQ") in page for setup in cells.values())
