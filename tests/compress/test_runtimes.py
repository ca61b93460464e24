"""The manifest says where a checkpoint runs, and warns if it grows; the default scope leaves final layers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.utils.match import is_match

import compressknow
from compressknow.cli.convert import build_manifest_page
from compressknow.compress.schemes import VLLM_ARCHITECTURES, find_vllm_limit, find_vllm_obstacle
from compressknow.pages.model_card import describe_runtimes, list_warnings
from tests.long import one_in
from tests.models import QUANTIZABLE, save_tiny, tiny_of_groups

PARTS = ("attention", "feed-forward")
JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def dry_run(name: str, tmp_path: Path, **options: Any) -> dict[str, Any]:
    source = tmp_path / "in"
    if not source.exists():
        save_tiny(name, source)
    return compressknow.convert(source, tmp_path / "out", dry_run=True, **options)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "opt", "gpt-neox"])
def test_int8_blocks_of_a_decoder_run_in_vllm_but_not_on_blackwell(name: str, tmp_path: Path) -> None:
    manifest = dry_run(name, tmp_path, quantize="int8")
    assert manifest["runtimes"] == ["transformers", "compressknow", "vLLM"]
    assert "not on Blackwell GPUs" in describe_runtimes(manifest)
    assert find_vllm_limit(dry_run(name, tmp_path, prune=0.2)) is None


@pytest.mark.parametrize(
    ("schemes", "limit"),
    [
        (("int8", "int4"), "not on Blackwell GPUs: no int8; on CPUs with --dtype float16"),
        (("int8-weights", "int4"), "on GPUs"),
        (("int8-weights", "int8"), "not on Blackwell GPUs: no int8; on GPUs"),
        (("fp8", "int8-weights"), "on GPUs; before Ada and Hopper, activations stay floats"),
    ],
)
def test_limits_of_two_schemes_hold_together(schemes: tuple[str, str], limit: str, tmp_path: Path) -> None:
    tiny_of_groups("llama").save_pretrained(tmp_path / "in")
    steps = [{"scope": scope, "quantize": each} for scope, each in zip(PARTS, schemes, strict=True)]
    manifest = dry_run("llama", tmp_path, recipe={"steps": steps})
    assert find_vllm_limit(manifest) == limit


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert", "t5-tied", "bart"])
@pytest.mark.parametrize("options", [{"prune": 0.2}, {"quantize": "int8"}], ids=str)
def test_encoders_and_encoder_decoders_do_not_run_in_vllm(name: str, options: Any, tmp_path: Path) -> None:
    manifest = dry_run(name, tmp_path, **options)
    assert manifest["runtimes"] == ["transformers", "compressknow"]
    assert "vLLM" not in describe_runtimes(manifest)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scope": "attention", "include": ["q_proj"]}, "fuses q_proj, k_proj and v_proj of model.layers.0.self_attn"),
        ({"scope": "attention", "exclude": [r"1\.self_attn\.v_proj"]}, "of model.layers.1.self_attn, so all or none"),
        ({"exclude": ["gate_proj"]}, "fuses gate_proj and up_proj of model.layers.0.mlp"),
        ({"scope": "overall"}, "the final layer (lm_head) is int8"),
        ({"quantize": "int8-paper"}, "no kernel for int8-paper"),
    ],
)
def test_the_reason_a_decoder_does_not_run_in_vllm_is_named(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    manifest = dry_run("llama", tmp_path, **{"quantize": "int8", **options})
    assert manifest["runtimes"] == ["transformers", "compressknow"]
    assert why in str(find_vllm_obstacle(manifest))
    assert "It does not run in vLLM: " in describe_runtimes(manifest)


def test_layers_outside_attention_and_feed_forward_keep_a_decoder_from_vllm(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 1}
    hf.OPTForCausalLM(hf.OPTConfig(**sizes, num_attention_heads=4, vocab_size=96)).save_pretrained(tmp_path / "in")
    manifest = dry_run("opt", tmp_path, quantize="int8", scope="overall", exclude="lm_head")
    assert "a layer outside attention and feed-forward (model.decoder.proj" in str(find_vllm_obstacle(manifest))


@pytest.mark.parametrize("options", [{"include": ["o_proj", "down_proj"]}, {"layers": "1"}, {"scope": "attention"}])
def test_all_parts_of_a_joined_layer_may_stay_floats(options: dict[str, Any], tmp_path: Path) -> None:
    """compressed-tensors needs the parts of a layer that vLLM joins to be all targets or all ignored."""
    assert find_vllm_obstacle(dry_run("llama", tmp_path, quantize="int8", **options)) is None
    compressknow.convert(tmp_path / "in", tmp_path / "done", quantize="int8", **options)
    settings = json.loads((tmp_path / "done" / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    linear = torch.nn.Linear(1, 1)
    for joined, parts in JOINED.items():
        for i in (0, 1):
            parent = f"model.layers.{i}.{'self_attn' if joined == 'qkv_proj' else 'mlp'}"
            quantized = {is_match(f"{parent}.{part}", linear, group["targets"]) for part in parts}
            ignored = {is_match(f"{parent}.{part}", linear, settings["ignore"]) for part in parts}
            assert (quantized, ignored) in (({True}, {False}), ({False}, {True}))


def test_unused_tensors_are_named_and_keep_a_model_from_vllm(tmp_path: Path) -> None:
    config = json.loads((save_tiny("llama", tmp_path / "in") / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    manifest = dry_run("llama", tmp_path, prune=0.2)
    assert len(manifest["unused"]) == 9
    assert "vLLM: LlamaForCausalLM has no place for model.layers.1." in describe_runtimes(manifest)
    page = " ".join(build_manifest_page(manifest, "in", tmp_path / "out", dry_run=True))
    assert "9 tensors have no place in LlamaForCausalLM" in page


def test_the_architectures_of_vllm_are_decoders_of_transformers() -> None:
    assert all(hasattr(hf, name) for name in VLLM_ARCHITECTURES)
    causal = set(hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert causal >= VLLM_ARCHITECTURES


@pytest.mark.parametrize("name", ["bert", "llama-tied"])
def test_an_output_larger_than_the_input_is_warned_of(name: str, tmp_path: Path) -> None:
    (warning,) = list_warnings(dry_run(name, tmp_path, scope="final", prune=0.2))
    assert "larger than the input" in warning
    assert "no longer shares its weight with the embedding" in warning
    assert not list(list_warnings(dry_run(name, tmp_path, quantize="int8")))


@pytest.mark.parametrize("name", one_in(3, QUANTIZABLE))
def test_the_default_scope_leaves_final_layers_tied_and_unchanged(name: str, tmp_path: Path) -> None:
    manifest = dry_run(name, tmp_path, prune=0.2, quantize="int8")
    assert not manifest["untied"]
    assert not any(row["in_scope"] for row in manifest["tensors"] if row["group"] == "final")
    assert manifest["recipe"]["steps"][0]["scope"] == ["blocks"]
    assert manifest["setup"] == "Blocks_GPQ 20%"
    assert manifest["totals"]["quantized"] > 0


def test_pruning_what_is_zero_already_is_a_warning(tmp_path: Path) -> None:
    compressknow.convert(save_tiny("bert", tmp_path / "in"), tmp_path / "once", prune=0.5)
    again = compressknow.convert(tmp_path / "once", tmp_path / "twice", prune=0.3)
    (warning,) = list_warnings(again)
    assert warning == f"All {again['totals']['pruned']:,} pruned weights were zero already: pruning changed nothing."
    assert not list(list_warnings(compressknow.convert(tmp_path / "once", tmp_path / "more", prune=0.6)))
