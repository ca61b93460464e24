"""The recipes, grid and scripts in examples/."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compressknow
from compressknow.compress.recipe import read_recipe
from compressknow.study.grid import read_grid
from tests.long import long

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


def test_all_recipes_are_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(SETUPS)


@pytest.mark.parametrize(("name", "setup"), SETUPS.items())
def test_recipe_has_the_expected_setup_and_module_map(name: str, setup: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.toml")
    assert recipe.setup == setup
    assert recipe.module_map == ("paper" if name.startswith("paper") else "structural")


@long
@pytest.mark.network
def test_frontier_compresses_smollm2_with_valid_options(smollm2: Path, tmp_path: Path) -> None:
    frontier = runpy.run_path(str(EXAMPLES / "frontier.py"))
    for recipe in frontier["CONVERTED"].values():
        compressknow.convert(smollm2, tmp_path / "out", dry_run=True, **recipe)
    for source, chosen in frontier["EXPORTED"].values():
        assert source is None or source in frontier["CONVERTED"]
        inspect.signature(compressknow.export).bind(smollm2, tmp_path / "out.gguf", **chosen)
    assert list(tmp_path.iterdir()) == []


def test_model_taken_off_the_grid_computes_the_same_logits() -> None:
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        # Larger than untrained weights, so that the logits are not near zero.
        parameter.data = torch.randn_like(parameter) * 0.3 + ("norm" in name)
    ids = torch.randint(0, 90, (2, 12))
    with torch.no_grad():
        before, weights = model(ids).logits, {name: p.clone() for name, p in model.named_parameters()}
        runpy.run_path(str(EXAMPLES / "smollm2.py"))["take_off_grid"](model)
        assert (model(ids).logits - before).abs().max() < 1e-3 * before.abs().max()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert set(weights) - changed == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_grid_has_the_cells_that_the_manual_shows() -> None:
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
