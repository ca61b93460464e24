"""A recipe printed as TOML is read back as the same recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from compressknow.compress.recipe import Recipe, read_recipe, to_toml
from compressknow.compress.steps import Prune, Quantize, Where

# Escaped text, because an invalid pattern would be refused before it could be written.
patterns = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10).map(re.escape), max_size=2).map(
    tuple
)
wheres = st.builds(
    Where,
    scope=st.sampled_from([("attention",), ("final", "feed-forward")]),
    include=patterns,
    exclude=patterns,
    layers=st.sampled_from([None, "0-5"]),
)
prunes = st.builds(
    Prune,
    amount=st.floats(0.001, 0.999),
    method=st.sampled_from(["l1-unstructured", "ln-structured"]),
    where=wheres,
    per_layer=st.booleans(),
    norm=st.sampled_from([1, 2.5, float("inf")]),
)


@given(prune=prunes, quantize=st.builds(Quantize, where=wheres))
def test_a_recipe_written_as_toml_is_read_back_the_same(tmp_path_factory, prune: Prune, quantize: Quantize) -> None:
    recipe = Recipe((prune, quantize), module_map="paper")
    path: Path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(to_toml(recipe.to_dict()), encoding="utf-8", newline="")
    assert read_recipe(path) == recipe


def test_numbers_of_numpy_become_numbers_of_json() -> None:
    plain, numpy = (
        Recipe(
            (
                Prune(real(0.25), "ln-structured", norm=whole(2), dim=whole(1)),
                Quantize("int4", parameters={"group_size": whole(64)}),
            )
        )
        for real, whole in ((float, int), (np.float32, np.int64))
    )
    assert json.loads(json.dumps(numpy.to_dict())) == plain.to_dict()


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[[steps]]\nprune = 0.2\n", encoding="utf-8-sig")
    assert read_recipe(tmp_path / "recipe.toml") == Recipe((Prune(0.2),))
