"""The examples are what they say they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressknow.compress.recipe import read_recipe

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
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
