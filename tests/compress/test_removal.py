"""A model without its dropped blocks computes the logits of the model whose list of blocks is cut by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.cli import main
from compressknow.compress.convert import VariantMaker
from compressknow.compress.recipe import Recipe, build_recipe, read_recipe
from compressknow.compress.steps import DropBlocks, DropNeurons, Prune, Where
from compressknow.compress.verify import compare_to_manifest
from compressknow.engine.identity import describe, locate
from compressknow.evaluate.records import ModelRecord
from compressknow.pages.card.make import read_model_facts
from compressknow.pages.card.sections import Context
from compressknow.pages.card.sections.figures import Layers
from compressknow.pages.card.warnings import warn_of_recipe
from compressknow.pages.parts import Note
from tests.compress.deep import BUILDERS, DEPTH, STACKS, build_deep, remove_blocks, save_deep
from tests.long import one_in
from tests.models import _LLAMA, edit_config, load, logits, save_tiny
from tests.zoo import tiny_config, tiny_model

CHOICES = ([0], [1, 2], [DEPTH - 1])
# ModernBERT's first block has no norm before its attention, so no other can replace it.
FIXED = {("modernbert", 0)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deep")
    return {name: save_deep(name, root / name) for name in BUILDERS}


def get_stacks(name: str) -> tuple[str, ...]:
    return STACKS.get(name, ("model.layers",))


def get_depth(name: str, stack: str) -> int:
    return len(build_deep(name).get_submodule(stack))


def list_cases() -> list[Any]:
    return [
        pytest.param(name, dropped, id=f"{name}-{'-'.join(map(str, dropped))}")
        for name in BUILDERS
        for dropped in CHOICES
        if (name, dropped[0]) not in FIXED and all(max(dropped) < get_depth(name, stack) for stack in get_stacks(name))
    ]


@pytest.mark.parametrize(("name", "dropped"), one_in(6, list_cases()))
def test_logits_equal_those_of_the_model_cut_by_hand(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, dropped: Sequence[int]
) -> None:
    # In any order, and one of them twice.
    blocks = ",".join(map(str, [*reversed(dropped), f"{dropped[0]}-{dropped[0]}"]))
    manifest = compressknow.convert(checkpoints[name], tmp_path / "out", drop_blocks=blocks)
    expected = logits(remove_blocks(name, dict.fromkeys(get_stacks(name), dropped)))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(build_deep(name)), atol=1e-3)
    assert manifest.setup == f"Drop{len(dropped)}"
    assert not compare_to_manifest(tmp_path / "out").differences


@pytest.mark.parametrize(("name", "side"), [(n, s) for n in ("t5", "mt5", "bart") for s in ("encoder", "decoder")])
def test_a_scope_limits_dropping_to_a_stack(checkpoints: dict[str, Path], tmp_path: Path, name: str, side: str) -> None:
    compressknow.convert(checkpoints[name], tmp_path / "out", drop_blocks="0-1", scope=side)
    stack = next(stack for stack in get_stacks(name) if side in stack)
    expected = logits(remove_blocks(name, {stack: [0, 1]}))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_every_copy_of_a_count_in_the_config_is_updated(tmp_path: Path) -> None:
    """Published configs of BART give the number of the encoder's blocks twice."""
    edit_config(save_deep("bart", tmp_path / "in"), num_hidden_layers=3)
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="1", scope="encoder")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after["encoder_layers"], after["num_hidden_layers"], after["decoder_layers"]) == (2, 2, DEPTH)


def test_a_count_under_an_alias_is_updated(tmp_path: Path) -> None:
    edit_config(save_tiny("gpt2", tmp_path / "in"), "n_layer", num_hidden_layers=2)
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="0")
    assert len(load(tmp_path / "out").transformer.h) == 1


def test_layer_types_stay_with_their_blocks(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    compressknow.convert(checkpoints["gemma3"], tmp_path / "out", drop_blocks="1")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


def build_zamba2() -> transformers.PreTrainedModel:
    config = tiny_config("zamba2", "Zamba2ForCausalLM").to_dict()
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
    settings = {"num_hidden_layers": 5, "layers_block_type": kinds, "hybrid_layer_ids": [1, 3]}
    return transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**config | settings))


def build_llama4() -> transformers.PreTrainedModel:
    settings = {"num_hidden_layers": DEPTH, "moe_layers": [0, 1, 2, 3], "no_rope_layers": [1, 0, 1, 1]}
    config = transformers.Llama4TextConfig(**_LLAMA | settings, intermediate_size_mlp=48, num_local_experts=2)
    return transformers.Llama4ForCausalLM(config)


def build_molmo2() -> transformers.PreTrainedModel:
    if not hasattr(transformers, "Molmo2Config"):
        pytest.skip("this transformers has no Molmo2")
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    text = {"num_hidden_layers": DEPTH, "head_dim": 8, "rope_parameters": rope, "rope_scaling_layers": [0, 1, 3]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    adapter = vision | {"text_hidden_size": 32, "vision_feature_layer": [1]}
    config = transformers.Molmo2Config(text_config=_LLAMA | text, vision_config=vision, adapter_config=adapter)
    return transformers.Molmo2ForConditionalGeneration(config)


@pytest.mark.parametrize(("build", "key", "numbers"), [
    (build_zamba2, "hybrid_layer_ids", [0, 2]),
    (build_llama4, "moe_layers", [0, 1, 2]),
    (build_molmo2, "rope_scaling_layers", [0, 2]),
], ids=["zamba2", "llama4", "molmo2"])  # fmt: skip
def test_lists_of_block_numbers_still_name_the_same_blocks(
    tmp_path: Path, build: Callable[[], transformers.PreTrainedModel], key: str, numbers: list[int]
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="0")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("text_config", config)[key] == numbers
    # The reference is a model whose first block returns its input.
    block = next(module for name, module in model.named_modules() if name.endswith("layers.0") and "vision" not in name)
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        block.forward = lambda hidden_states, *_, **__: hidden_states
        expected = model(ids, use_cache=False).logits
        dropped = type(model).from_pretrained(tmp_path / "out").eval()(ids, use_cache=False).logits
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_dropping_goes_with_pruning_and_quantizing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    steps = {"drop_blocks": "1-2", "prune": 0.3, "quantize": "int8", "scope": "feed-forward", "layers": "1"}
    manifest = compressknow.convert(checkpoints["llama"], tmp_path / "out", **steps)
    rows = {row["name"]: row for row in manifest.tensors}
    moved = rows["model.layers.1.mlp.up_proj.weight"]
    assert moved["name_before"] == "model.layers.3.mlp.up_proj.weight"
    assert moved["scheme"] == "int8"
    assert "name_before" not in rows["model.layers.0.mlp.up_proj.weight"]
    assert rows["model.layers.0.mlp.up_proj.weight"]["scheme"] is None
    assert manifest.setup == "Drop2 + FF[layers 1]_GPQ 30%"
    # Totals before the conversion count all tensors of the source.
    source = load_file(checkpoints["llama"] / "model.safetensors")
    assert manifest.totals["bytes_before"] == sum(t.numel() * t.element_size() for t in source.values())
    removed = manifest["removed"]
    assert {row["name"] for row in removed["tensors"]} == {n for n in source if ".layers.1." in n or ".layers.2." in n}
    assert removed["parameters"] == sum(source[row["name"]].numel() for row in removed["tensors"])
    assert manifest.totals["parameters"] + removed["parameters"] == sum(t.numel() for t in source.values())
    assert not compare_to_manifest(tmp_path / "out").differences


def test_verify_reports_dropped_tensors_that_do_not_add_up(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    compressknow.convert(checkpoints["llama"], tmp_path / "out", drop_blocks="1")
    path = tmp_path / "out" / "compressknow.json"
    manifest = json.loads(path.read_text())
    manifest["removed"]["tensors"].pop()
    path.write_text(json.dumps(manifest))
    differences = {str(difference) for difference in compare_to_manifest(tmp_path / "out").differences}
    assert any("totals.bytes_before" in difference for difference in differences)


def test_a_recipe_gives_the_same_bytes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    compressknow.convert(checkpoints["t5"], tmp_path / "a", drop_blocks="0,2", prune=0.2, threads=1)
    compressknow.convert(checkpoints["t5"], tmp_path / "b", recipe=tmp_path / "a", threads=2)
    for name in ("model.safetensors", "config.json", "compressknow.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_variant_in_memory_equals_what_convert_writes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = build_recipe(Where(), drop_blocks="1", quantize="int8")
    compressknow.convert(checkpoints["llama"], tmp_path / "out", recipe=recipe)
    maker = VariantMaker(checkpoints["llama"])
    # Variants before and after must not get tensors of other blocks under the same names.
    before = [maker.make(maker.plan(build_recipe(Where(), prune=0.2))) for _ in range(2)]
    variant = maker.make(maker.plan(recipe))
    after = maker.make(maker.plan(build_recipe(Where(), prune=0.2)))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == variant.tensors.keys()
    assert all(torch.equal(tensor, variant.tensors[name]) for name, tensor in written.items())
    assert variant.config["num_hidden_layers"] == DEPTH - 1
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before[0].tensors.items())


@pytest.mark.parametrize("form", ["sharded", "prefixless", "buffers"])
def test_blocks_of_sharded_prefixless_and_old_checkpoints_can_be_dropped(tmp_path: Path, form: str) -> None:
    name = "llama" if form == "sharded" else "bert" if form == "prefixless" else "gpt2"
    source = save_deep(name, tmp_path / "in", **({"max_shard_size": "20KB"} if form == "sharded" else {}))
    if form == "prefixless":
        # BertModel saves the base model's tensors without a prefix.
        tensors = load_file(source / "model.safetensors")
        renamed = {n.removeprefix("bert."): t for n, t in tensors.items()}
        save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    if form == "buffers":
        # Old versions saved a mask with each block, which is no parameter.
        tensors = load_file(source / "model.safetensors")
        masks = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(float(i)) for i in range(DEPTH)}
        save_file(tensors | masks, source / "model.safetensors", metadata={"format": "pt"})
    compressknow.convert(source, tmp_path / "out", drop_blocks="1,2")
    model = getattr(transformers, type(build_deep(name)).__name__).from_pretrained(tmp_path / "out").eval()
    expected = logits(remove_blocks(name, {get_stacks(name)[0]: [1, 2]}))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not compare_to_manifest(tmp_path / "out").differences
    if form == "buffers":
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert [float(written[f"transformer.h.{i}.attn.masked_bias"]) for i in range(2)] == [0, 3]
        assert "transformer.h.2.attn.masked_bias" not in written


def test_an_emptied_shard_is_not_written(tmp_path: Path) -> None:
    source = save_deep("llama", tmp_path / "in", max_shard_size="20KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shards = set(index.values())
    dropped = {name for name in index if ".layers.1." in name or ".layers.2." in name}
    emptied = shards - {index[name] for name in index.keys() - dropped}
    assert emptied
    manifest = compressknow.convert(source, tmp_path / "out", drop_blocks="1-2")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(shards) - len(emptied)
    assert shards <= manifest.source["files"].keys()


REFUSED = {
    "all": ("llama", "0-3", "would leave none"),
    "beyond": ("llama", "2-4", "no block 4"),
    "backwards": ("llama", "3-2", "not a range"),
    "not a number": ("llama", "many", "not a range"),
    "zero": ("llama", 0, "not a number of blocks"),
    "shorter side": ("bart", "3", "no block 3"),
}


@pytest.mark.parametrize(("name", "blocks", "message"), REFUSED.values(), ids=REFUSED)
def test_an_invalid_choice_of_blocks_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, blocks: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compressknow.convert(checkpoints[name], tmp_path / "out", drop_blocks=blocks)
    assert not any(tmp_path.iterdir())


def test_settings_per_block_of_an_encoder_follow_its_blocks(tmp_path: Path) -> None:
    """LED's config has an attention window per block of its encoder; here encoder and decoder have as many blocks."""
    model = tiny_model("led", "LEDForConditionalGeneration")
    model.save_pretrained(tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="1-1")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"], len(config["attention_window"])) == (1, 1, 1)
    for stack in (model.led.encoder, model.led.decoder):
        stack.layers = stack.layers[:1]
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model_type", "name", "lists"), [
    ("mamba2", "Mamba2ForCausalLM", {"time_step_limit"}),
    ("falcon_h1", "FalconH1ForCausalLM", {"time_step_limit", "mlp_multipliers"}),
])  # fmt: skip
def test_a_pair_of_numbers_is_not_taken_for_a_list_of_two_blocks(
    tmp_path: Path, model_type: str, name: str, lists: set[str]
) -> None:
    model = tiny_model(model_type, name)
    model.save_pretrained(tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="1-1")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out"))
    assert all(len(before[key]) == 2 and after[key] == before[key] for key in lists)
    base = model.base_model
    base.layers = base.layers[:1]
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


def test_shared_blocks_cannot_be_dropped(tmp_path: Path) -> None:
    source = save_tiny("albert", tmp_path / "in")
    with pytest.raises(UnsupportedError, match="share weights"):
        compressknow.convert(source, tmp_path / "out", drop_blocks="0")


def test_a_block_that_no_other_can_replace_is_not_dropped(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be dropped"):
        compressknow.convert(checkpoints["modernbert"], tmp_path / "out", drop_blocks="0")


def test_the_only_block_of_attention_cannot_be_dropped(tmp_path: Path) -> None:
    """The cache of a model without one fails."""
    kinds = ["conv", "full_attention", "conv"]
    config = transformers.Lfm2Config(**_LLAMA | {"num_hidden_layers": 3, "layer_types": kinds}, block_multiple_of=16)
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedError, match="transformers cannot run the rest: `get_seq_length`"):
        compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="1")
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="2")


def test_dense_blocks_before_a_mixture_are_not_dropped(tmp_path: Path) -> None:
    """DeepSeek's config gives the number of dense blocks, so none is dropped unless all that follow it are alike."""
    config = transformers.DeepseekV3Config(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, vocab_size=99,
        first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedError, match="cannot be dropped"):
        compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="0")
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="3")


def test_blocks_scaled_by_their_number_are_not_dropped(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=DEPTH, n_head=4, vocab_size=99, n_positions=40, scale_attn_by_inverse_layer_idx=True
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedError, match="cannot be dropped"):
        compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="1")


def test_a_recipe_drops_blocks_then_neurons_then_prunes(tmp_path: Path) -> None:
    steps = (DropBlocks("2-3", Where(("decoder",))), DropNeurons(0.2, multiple=8), Prune(0.1))
    recipe = Recipe(steps)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.setup == "Drop2[decoder] + DropNeurons 20% + Blocks_GP 10%"
    (tmp_path / "r.toml").write_text(
        "[[steps]]\ndrop_blocks = '2-3'\nscope = ['decoder']\n[[steps]]\ndrop_neurons = 0.2\nmultiple = 8\n"
        "[[steps]]\nprune = 0.1\n"
    )
    assert read_recipe(tmp_path / "r.toml") == recipe
    with pytest.raises(UsageError, match="drops blocks first, then neurons"):
        Recipe(steps[::-1])


BAD_STEPS = {
    "drop and prune": ({"drop_blocks": 2, "prune": 0.1}, "a step has either(.|\n)*has drop_blocks, prune"),
    "unknown key": ({"drop_blocks": 2, "amount": 0.1}, "unknown key 'amount'"),
    "multiple of blocks": ({"drop_blocks": 2, "multiple": 8}, "unknown key 'multiple'"),
    "boolean": ({"drop_blocks": True}, "not a number of blocks"),
    "fraction": ({"drop_blocks": 1.5}, "not a number of blocks"),
    "scope": ({"drop_blocks": 2, "scope": ["attention"]}, "accepts only the scopes encoder and decoder"),
    "layers": ({"drop_neurons": 0.2, "layers": "0-1"}, "accepts only the scopes encoder and decoder"),
    "percent": ({"drop_neurons": 20}, "Did you mean 0.2, which is 20 %"),
    "zero": ({"drop_neurons": 0}, "greater than 0"),
    "multiple of zero": ({"drop_neurons": 0.2, "multiple": 0}, "whole number of at least 1"),
}


@pytest.mark.parametrize(("step", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_invalid_steps_are_refused(step: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.from_dict({"steps": [step]})


def test_scope_options_restrict_dropping_only_to_encoder_or_decoder() -> None:
    assert build_recipe(Where(("attention",)), drop_blocks=2, prune=0.1).steps[0] == DropBlocks(2)
    assert build_recipe(Where(("encoder",)), drop_blocks=2).steps == (DropBlocks(2, Where(("encoder",))),)


def test_pages_name_the_dropped_blocks(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = str(checkpoints["llama"]), tmp_path / "out"
    assert main(["convert", source, str(output), "--drop-blocks", "1-2"]) == 0
    sentence = "2 of the 4 blocks of model.layers were dropped: 1-2."
    assert sentence in " ".join(capsys.readouterr().out.split())
    card = (output / "README.md").read_text()
    assert sentence in " ".join(card.split())
    assert "nothing changed" not in card
    described = describe(locate(output))
    assert described["removed"]["blocks"][0]["dropped"] == [1, 2]
    assert "tensors" not in described["removed"]
    original = {"sha256": "0", "architecture": "LlamaForCausalLM", "family": "causal", "parameters": 1}
    model = read_model_facts(ModelRecord.from_dict({**original, **described}))
    section = Context(model, SimpleNamespace(model=model, source_matches=None), {}, True)  # type: ignore[arg-type]
    assert any(sentence in part.sentence for part in Layers().parts(section) if isinstance(part, Note))
    assert not list(warn_of_recipe(model))
