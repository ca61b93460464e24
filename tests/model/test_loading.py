"""Checkpoints that lack weights which transformers would miss are refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.base.errors import CheckpointError
from compressknow.cli import main
from compressknow.compress.convert import VariantMaker
from compressknow.model.loading import open_complete
from tests.models import BUILDERS, edit_config, edit_tensors, load, logits, save_tiny


def drop_tensors(folder: Path, *names: str) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in names])


@pytest.mark.parametrize("name", BUILDERS)
def test_a_complete_checkpoint_opens(tmp_path: Path, name: str) -> None:
    folder = save_tiny(name, tmp_path / "in")
    assert set(open_complete(folder)[0].tensors) == set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    "lost", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_missing_weight_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str, options: list[str]
) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    drop_tensors(folder, lost)
    # Weights out of scope count too.
    command = ["convert", str(folder), str(tmp_path / "out"), "--prune", "0.2", "--scope", "attention", *options]
    capsys.readouterr()
    assert main(command) == 1
    assert f"lacks a weight of LlamaForCausalLM: {lost}." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_a_missing_part_of_a_fused_weight_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    folder = save_tiny("mixtral", tmp_path / "in")
    lost = f"model.layers.1.block_sparse_moe.experts.3.{part}.weight"
    drop_tensors(folder, lost)
    capsys.readouterr()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--prune", "0.2", "--scope", "attention"]) == 1
    assert f"lacks a weight of MixtralForCausalLM: {lost}." in capsys.readouterr().err


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_a_missing_part_under_a_former_name_is_refused(tmp_path: Path, part: str) -> None:
    folder = save_tiny("mixtral", tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    del renamed[f"model.layers.1.mlp.experts.3.{part}.weight"]
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_complete(folder)


def test_a_config_with_fewer_experts_than_stored_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "in")
    edit_config(folder, num_local_experts=2)
    with pytest.raises(CheckpointError, match=r"down_proj has shape \[4, 32, 48\], but config\.json says \[2, 32"):
        open_complete(folder)


def test_many_missing_weights_are_counted_and_a_few_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("down", "gate", "up")]
    drop_tensors(folder, *names)
    with pytest.raises(CheckpointError) as caught:
        open_complete(folder)
    assert f"lacks 6 weights of LlamaForCausalLM: {', '.join(names[:3])} and 3 more." in str(caught.value)


def test_variants_of_an_incomplete_checkpoint_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "in")
    drop_tensors(folder, "bert.encoder.layer.0.output.LayerNorm.bias")
    with pytest.raises(CheckpointError, match=r"LayerNorm\.bias"):
        VariantMaker(folder)


def test_inspect_lists_missing_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    assert "Missing" not in capsys.readouterr().out
    drop_tensors(folder, "model.norm.weight")
    assert main(["inspect", str(folder)]) == 0
    assert "Missing from the weight files\n  model.norm.weight\n" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == ["model.norm.weight"]


def test_scales_of_mx_formats_are_copied(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    scale = torch.full((8,), 2.0).to(torch.float8_e8m0fnu)
    edit_tensors(folder, lambda tensors: tensors.update(scale=scale))
    assert compressknow.inspect(folder)["missing"] == []
    compressknow.convert(folder, tmp_path / "out", prune=0.2, scope="attention")
    written = load_file(tmp_path / "out" / "model.safetensors")["scale"]
    assert written.dtype == scale.dtype
    assert torch.equal(written.view(torch.uint8), scale.view(torch.uint8))


def test_a_tied_weight_may_be_stored_under_either_name(tmp_path: Path) -> None:
    folder = save_tiny("llama-tied", tmp_path / "in")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    open_complete(folder)
    drop_tensors(folder, "lm_head.weight")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight, model\.embed_tokens\.weight"):
        open_complete(folder)


def test_all_that_is_tied_to_the_only_stored_weight_has_its_values(tmp_path: Path) -> None:
    """The embeddings of BART's encoder and decoder and its head are one tensor."""
    folder = save_tiny("bart", tmp_path / "in")
    source = load(folder)
    edit_tensors(
        folder,
        lambda tensors: tensors.update({"model.decoder.embed_tokens.weight": tensors.pop("model.shared.weight")}),
    )
    compressknow.convert(folder, tmp_path / "out", quantize="int8-weights", scope="final")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(source), rtol=0, atol=0.05)


def test_of_a_weight_stored_twice_the_one_that_transformers_loads_is_compressed(tmp_path: Path) -> None:
    folder, weight = save_tiny("bert", tmp_path / "in"), "encoder.layer.0.output.dense.weight"
    names = ("embeddings.word_embeddings.weight", weight)
    # The same weights under the names of the base model have other values.
    edit_tensors(folder, lambda tensors: tensors.update({n: tensors[f"bert.{n}"].half() * 3 for n in names}))
    source = load(folder)
    assert {w["dtype"] for w in compressknow.inspect(folder)["groups"]["final"]["weights"]} == {"F32"}
    compressknow.convert(folder, tmp_path / "int8", quantize="int8-weights", scope="final")
    torch.testing.assert_close(logits(load(tmp_path / "int8")), logits(source), rtol=0, atol=0.05)
    compressknow.convert(folder, tmp_path / "pruned", prune=0.3, scope="feed-forward")
    values = {
        name: p for name, p in load(tmp_path / "pruned").named_parameters() if source.get_parameter(name).ndim > 1
    }
    changed = [values[name] for name in values if not torch.equal(values[name], source.get_parameter(name))]
    assert len(changed) == 4
    assert sum(int((p == 0).sum()) for p in changed) == round(0.3 * sum(p.numel() for p in changed))
    stored = load_file(tmp_path / "pruned" / "model.safetensors")[weight]
    assert torch.equal(stored, load_file(folder / "model.safetensors")[weight])


def test_a_base_model_needs_neither_a_head_nor_a_pooler(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=99,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "in")
    open_complete(tmp_path / "in")
    drop_tensors(tmp_path / "in", "pooler.dense.bias")
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.bias"):
        open_complete(tmp_path / "in")
    drop_tensors(tmp_path / "in", "pooler.dense.weight")
    open_complete(tmp_path / "in")
