"""A conversion in memory equals what `convert` writes bit for bit, and computes the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from compressknow import convert
from compressknow.base.errors import CompressknowError
from compressknow.base.packages import is_installed
from compressknow.compress.convert import VariantMaker
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Calibration, DropBlocks, Prune, Quantize, Where
from compressknow.engine.identity import describe_variant
from compressknow.engine.load import load, load_variant
from tests.knowing import save_trained, save_trained_custom_code
from tests.models import logits, save_tiny, tiny_of_groups

RECIPES = {
    "attention pruned": Recipe((Prune(0.3, where=Where(("attention",))),)),
    "attention pruned and int8": Recipe(
        (Prune(0.2, where=Where(("attention",))), Quantize("int8", Where(("attention",))))
    ),
    "all by the paper's scheme": Recipe((Quantize("int8-paper"),)),
    "feed-forward int8 weights": Recipe((Quantize("int8-weights", Where(("feed-forward",))),)),
    "final rows": Recipe((Prune(0.4, "ln-structured", Where(("final",))),)),
}


@pytest.mark.parametrize("architecture", ["bert", "albert", "t5-gated", "bart", "llama", "qwen3"])
def test_a_variant_equals_what_convert_writes_and_computes_the_same(architecture: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "model")
    (source / "generation_config.json").write_text('{"suppress_tokens": [7]}')
    maker = VariantMaker(source)
    # One maker makes all variants, and no change of one may remain in the next.
    for number, recipe in enumerate(RECIPES.values()):
        folder = tmp_path / str(number)
        manifest = convert(source, folder, recipe=recipe)
        variant = maker.make(maker.plan(recipe))
        assert variant.manifest["tensors"] == manifest["tensors"]
        assert variant.manifest["totals"] == manifest["totals"]
        assert variant.config == json.loads((folder / "config.json").read_text())
        assert variant.bytes == (folder / "model.safetensors").stat().st_size
        stored, read = load_file(folder / "model.safetensors"), maker.read(folder)
        assert (read.bytes, read.config, read.manifest) == (variant.bytes, variant.config, manifest)
        assert variant.tensors.keys() == read.tensors.keys() == stored.keys()
        for name, tensor in stored.items():
            assert tensor.dtype == variant.tensors[name].dtype
            assert torch.equal(tensor.view(torch.uint8), variant.tensors[name].view(torch.uint8)), name
        written, made = load(folder, dtype="float32", language_model=True), load_variant(variant, dtype="float32")
        assert torch.equal(logits(made), logits(written))
        if made.can_generate():
            assert made.generation_config.suppress_tokens == written.generation_config.suppress_tokens == [7]


def test_a_variant_of_a_model_whose_config_has_an_infinity_loads(tmp_path: Path) -> None:
    """JSON has no infinity, so transformers writes the default `time_step_limit` of Mamba2 as an object."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2, "vocab_size": 99}
    torch.manual_seed(0)
    hf.Mamba2ForCausalLM(hf.Mamba2Config(**sizes, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    assert "Infinity" in (tmp_path / "model" / "config.json").read_text()
    recipe = Recipe((Prune(0.4, where=Where(("final",))),))
    manifest = convert(tmp_path / "model", tmp_path / "out", recipe=recipe)
    assert [untied["name"] for untied in manifest["untied"]] == ["lm_head.weight"]
    maker = VariantMaker(tmp_path / "model")
    expected = logits(load(tmp_path / "out", dtype="float32", language_model=True))
    assert torch.equal(logits(load_variant(maker.make(maker.plan(recipe)), dtype="float32")), expected)


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_smoothed_norms_do_not_reach_other_variants(architecture: str, tmp_path: Path) -> None:
    source = save_trained(architecture, tmp_path / "model")
    blocks = Where(("attention", "feed-forward"))
    plain = Recipe((Quantize("int8", blocks),))
    smooth = Recipe((Quantize("int8", blocks, smooth=0.5),), calibration=Calibration(tokens=256))
    maker = VariantMaker(source)
    # The plain variant is made before and after the smoothed one.
    for number, recipe in enumerate((plain, smooth, plain)):
        convert(source, tmp_path / str(number), recipe=recipe)
        stored = load_file(tmp_path / str(number) / "model.safetensors")
        variant = maker.make(maker.plan(recipe))
        assert variant.tensors.keys() == stored.keys()
        for name, tensor in stored.items():
            assert torch.equal(tensor.view(torch.uint8), variant.tensors[name].view(torch.uint8)), name


def test_the_original_writes_one_text_per_calibration_for_all_recipes(tmp_path: Path) -> None:
    source, calibration = save_trained("llama", tmp_path / "model"), Calibration(tokens=64)
    quantize = Quantize("int8", rounding="gptq")
    (tmp_path / "texts").mkdir()
    maker = VariantMaker(source, texts=tmp_path / "texts")
    hashes = []
    for recipe in (
        Recipe((quantize,), calibration=calibration),
        Recipe((quantize,), calibration=replace(calibration, seed=1)),
    ):
        text = maker.get_text(maker.plan(recipe))
        assert text is not None
        hashes.append(text.sha256)
    assert len(set(hashes)) == 2
    maker = VariantMaker(source)
    text = maker.get_text(maker.plan(Recipe((DropBlocks(1), quantize), calibration=calibration)))
    assert text is not None
    assert text.sha256 == hashes[0]


def test_a_trusted_model_with_custom_code_writes_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    maker = VariantMaker(save_trained_custom_code(tmp_path / "own"), trust_remote_code=True)
    recipe = Recipe((Quantize("int8", rounding="gptq"),), calibration=Calibration(tokens=64))
    assert maker.get_text(maker.plan(recipe))


@pytest.mark.parametrize("dropped", [(), (DropBlocks("0"),)], ids=["all blocks", "one dropped"])
def test_recipes_of_both_module_maps_select_their_own_layers(tmp_path: Path, dropped: tuple[DropBlocks, ...]) -> None:
    maker, prune = VariantMaker(save_tiny("bert", tmp_path / "model")), Prune(0.3, where=Where(("attention",)))
    plans = [maker.plan(Recipe((*dropped, prune), module_map=name)) for name in ("structural", "paper")]
    structural, paper = ({each.module for each in plan.tensors if each.in_scope} for plan in plans)
    different = [f"bert.encoder.layer.{number}.attention.output.dense" for number in range(2 - len(dropped))]
    assert sorted(filter(None, structural ^ paper)) == different


def test_unchanged_tensors_are_shared_between_variants_and_never_modified(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    maker = VariantMaker(source)
    first = maker.make(maker.plan(RECIPES["attention pruned"]))
    second = maker.make(maker.plan(RECIPES["feed-forward int8 weights"]))
    name = "model.embed_tokens.weight"
    assert first.tensors[name].data_ptr() == second.tensors[name].data_ptr()
    load_variant(first, dtype="float32")
    assert torch.equal(second.tensors[name], load_file(source / "model.safetensors")[name])


@pytest.mark.parametrize(("scheme", "bits"), [(None, 32), ("int8", 8), ("int8-weights", 8), ("int4", 4)])
def test_a_sparse_format_has_the_values_that_are_not_zero_and_a_bit_per_weight(
    scheme: str | None, bits: int, tmp_path: Path
) -> None:
    tiny_of_groups("llama").save_pretrained(tmp_path / "model")
    maker = VariantMaker(tmp_path / "model")
    steps = Prune(0.6, per_layer=True), *([Quantize(scheme)] if scheme else [])
    variant = maker.make(maker.plan(Recipe(steps)))
    totals, changed = (
        describe_variant("cell", variant)["totals"],
        [r for r in variant.manifest["tensors"] if r["in_scope"]],
    )
    zeros, weights = (sum(row[key] for row in changed) for key in ("zeros", "numel"))
    assert totals["sparse_bytes"] == pytest.approx(
        totals["bytes_after"] - (zeros * bits - weights) / 8, abs=len(changed)
    )
    assert totals["nonzero"] == totals["parameters"] - zeros


@pytest.mark.skipif(is_installed("peft"), reason="peft is installed")
def test_a_model_is_not_run_without_the_adapter_in_its_folder(tmp_path: Path) -> None:
    """transformers would leave it out."""
    source = save_tiny("llama", tmp_path / "model")
    (source / "adapter_config.json").write_text("{}")
    maker = VariantMaker(source)
    variant = maker.make(maker.plan(Recipe((Prune(0.3),))))
    for run in (lambda: load(source), lambda: load_variant(variant)):
        with pytest.raises(CompressknowError, match="peft is not installed"):
            run()
