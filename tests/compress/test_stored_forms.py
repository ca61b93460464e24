"""Weights that are not stored as the model holds them: shared between modules, fused, or read past their layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    Zamba2ForCausalLM,
)

import compressknow
from compressknow.base.errors import UnsupportedError
from compressknow.base.progress import ignore_progress
from compressknow.compress import output_config
from compressknow.compress.convert import VariantMaker
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Quantize, Where
from compressknow.model.checkpoint import open_checkpoint
from compressknow.model.loading import LoadReport, list_headers, load_report
from compressknow.model.meta import build_meta_model, find_direct_reads, parse_config
from tests.compress.test_removal import build_zamba2
from tests.compress.test_zoo_converts import compute_logits, load_strictly
from tests.model.test_zoo import ZOO
from tests.models import edit_tensors, save_tiny
from tests.zoo import tiny_model


def save_zoo_model(model_type: str, name: str, folder: Path) -> transformers.PreTrainedModel:
    model = tiny_model(model_type, name)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("model_type", "name"), [("zamba", "ZambaForCausalLM"), ("zamba2", "Zamba2ForCausalLM")])
def test_every_module_that_shares_a_weight_is_int8(tmp_path: Path, model_type: str, name: str) -> None:
    save_zoo_model(model_type, name, tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", quantize="int8")
    model = load_strictly(name, tmp_path / "out")
    queries = [module.weight for path, module in model.named_modules() if path.endswith("self_attn.q_proj")]
    assert len(queries) == 2
    assert all(weight.dtype == torch.int8 for weight in queries)
    assert queries[0].data_ptr() == queries[1].data_ptr()
    assert not compressknow.verify(tmp_path / "out").differences
    engine = compute_logits(compressknow.load(tmp_path / "out"))
    torch.testing.assert_close(engine, compute_logits(model), rtol=1e-2, atol=1e-2)


def test_shared_blocks_stay_shared_where_the_final_layer_is_untied(tmp_path: Path) -> None:
    save_zoo_model("zamba2", "Zamba2ForCausalLM", tmp_path / "in")
    for options in ({"scope": "overall", "quantize": "int8"}, {"scope": ["blocks", "final"], "prune": 0.3}):
        with pytest.raises(UnsupportedError, match=r"shared_transformer\S+ and \d+ more are compressed too"):
            compressknow.convert(tmp_path / "in", tmp_path / "out", **options)  # type: ignore[arg-type]
    original = Zamba2ForCausalLM.from_pretrained(tmp_path / "in").state_dict()
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", prune=0.3)
    pruned = load_strictly("Zamba2ForCausalLM", tmp_path / "out").state_dict()
    assert {name for name, tensor in original.items() if not torch.equal(tensor, pruned[name])} == {"lm_head.weight"}


def test_a_text_model_inside_a_multimodal_one_is_untied_too(tmp_path: Path) -> None:
    """Runtimes that build it from its own config would tie it."""
    save_zoo_model("gemma3", "Gemma3ForConditionalGeneration", tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", prune=0.3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [part["tie_word_embeddings"] for part in (config, config["text_config"])] == [False, False]


def test_a_text_model_with_the_config_of_a_multimodal_one_is_quantized_and_loads(tmp_path: Path) -> None:
    model = save_zoo_model("emu3_text_model", "Emu3ForCausalLM", tmp_path / "in")
    text = json.loads((tmp_path / "in" / "config.json").read_text())
    whole = {"architectures": ["Emu3ForCausalLM"], "model_type": "emu3", "text_config": text}
    (tmp_path / "in" / "config.json").write_text(json.dumps(whole))
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", quantize="int8")
    assert (compute_logits(compressknow.load(tmp_path / "out")) - compute_logits(model)).abs().max() < 0.02


def test_experts_that_are_transposed_on_loading_are_pruned_along_their_inputs(tmp_path: Path) -> None:
    name = "Qwen3VLMoeForConditionalGeneration"
    for folder in ("plain", "published"):
        save_zoo_model("qwen3_vl_moe", name, tmp_path / folder)
    edit_tensors(
        tmp_path / "published",
        lambda tensors: tensors.update({key: tensors[key].mT.contiguous() for key in tensors if ".experts." in key}),
    )
    pruned = []
    for folder in ("plain", "published"):
        options: Any = {"scope": "feed-forward", "prune": 0.5, "parameters": {"pattern": "2:4"}}
        compressknow.convert(tmp_path / folder, tmp_path / f"{folder}-out", **options)
        pruned.append(load_strictly(name, tmp_path / f"{folder}-out").state_dict())
    torch.testing.assert_close(pruned[1], pruned[0], rtol=0, atol=0)


def test_weights_stored_in_one_tensor_can_be_changed_one_by_one(tmp_path: Path) -> None:
    name = "NomicBertForMaskedLM"
    model = save_zoo_model("nomic_bert", name, tmp_path / "in")
    assert not any("q_proj" in key for key in load_file(tmp_path / "in" / "model.safetensors"))
    compressknow.convert(tmp_path / "in", tmp_path / "pruned", include=["q_proj"], prune=0.3)
    before, after = model.state_dict(), load_strictly(name, tmp_path / "pruned").state_dict()
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed == {key for key in before if "q_proj.weight" in key}
    # An old pickle is read into memory.
    file = tmp_path / "in" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=False)
    file.unlink()
    compressknow.convert(tmp_path / "in", tmp_path / "int8", scope="attention", quantize="int8")
    found, expected = compute_logits(load_strictly(name, tmp_path / "int8")), compute_logits(model)
    assert 0 < (found - expected).norm() / expected.norm() < 0.01


def test_a_tied_bias_stored_under_its_other_name_is_copied(tmp_path: Path) -> None:
    file = save_tiny("bert", tmp_path / "in") / "model.safetensors"
    stored = load_file(file)
    bias = torch.randn(stored.pop("cls.predictions.bias").shape)
    save_file({**stored, "cls.predictions.decoder.bias": bias}, file, metadata={"format": "pt"})
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", prune=0.3)
    head = load_strictly("BertForMaskedLM", tmp_path / "out").cls.predictions
    assert torch.equal(head.bias, bias)
    assert torch.equal(head.decoder.bias, bias)


def test_a_block_that_stores_the_weights_of_others_is_not_dropped(tmp_path: Path) -> None:
    build_zamba2().save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedError, match=r"no place for model\.layers\.3\.shared_transformer"):
        compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="1")
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="4")
    load_strictly("Zamba2ForCausalLM", tmp_path / "out")


def test_floats_in_place_of_integers_are_reported(tmp_path: Path) -> None:
    # transformers casts them to integers, which turns small weights to zero.
    compressknow.convert(save_tiny("bert", tmp_path / "in"), tmp_path / "out", quantize="int8")
    written = open_checkpoint(tmp_path / "out")
    tree = build_meta_model(tmp_path / "in")
    config = parse_config(tree, written.config)
    headers, name = list_headers(written), "bert.encoder.layer.1.attention.self.query.weight"
    assert load_report(type(tree), config, headers) == LoadReport()
    assert load_report(type(tree), config, {**headers, name: ("F32", headers[name][1])}).retyped == (name,)


def test_a_lack_of_memory_is_not_reported_as_a_failed_load(tmp_path: Path) -> None:
    class Starved(transformers.BertForMaskedLM):
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> Starved:
            raise RuntimeError("can't start new thread")

    tree = build_meta_model(save_tiny("bert", tmp_path / "in"))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        load_report(Starved, tree.config, {})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("nomic_bert", "NomicBertForMaskedLM"),
        ("gte", "GteForMaskedLM"),
        ("jina_embeddings_v3", "JinaEmbeddingsV3ForMaskedLM"),
    ],
)
def test_only_the_part_of_a_fused_tensor_in_scope_changes(tmp_path: Path, model_type: str, name: str) -> None:
    original = save_zoo_model(model_type, name, tmp_path / "in").state_dict()
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", include=["q_proj$"], prune=0.5)
    pruned = load_strictly(name, tmp_path / "out").state_dict()
    changed = {key for key, tensor in original.items() if not torch.equal(tensor, pruned[key])}
    assert changed == {key for key in original if key.endswith("q_proj.weight")}


def test_a_fused_tensor_that_is_entirely_pruned_stays_fused(tmp_path: Path) -> None:
    save_zoo_model("nomic_bert", "NomicBertForMaskedLM", tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", prune=0.5)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(load_file(tmp_path / "in/model.safetensors"))


def test_parts_of_a_fused_tensor_can_be_quantized(tmp_path: Path) -> None:
    model = save_zoo_model("nomic_bert", "NomicBertForMaskedLM", tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", quantize="int8")
    plain = compute_logits(load_strictly("NomicBertForMaskedLM", tmp_path / "out"))
    assert (plain - compute_logits(model)).abs().max() < 0.01


def test_a_weight_that_the_model_reads_directly_is_refused_by_name(tmp_path: Path) -> None:
    save_zoo_model("mamba", "MambaForCausalLM", tmp_path / "in")
    with pytest.raises(UnsupportedError) as caught:
        compressknow.convert(tmp_path / "in", tmp_path / "out", quantize="int8")
    assert "reads the weight directly, bypassing the layer" in str(caught.value)
    assert r"`exclude` 'backbone\.layers\.\d+\.mixer\.dt_proj$'" in str(caught.value)
    compressknow.convert(tmp_path / "in", tmp_path / "out", exclude=[r"mixer\.dt_proj$"], quantize="int8")
    plain = compute_logits(load_strictly("MambaForCausalLM", tmp_path / "out"))
    torch.testing.assert_close(compute_logits(compressknow.load(tmp_path / "out")), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not hasattr(transformers, "Inkling2ForCausalLM"), reason="older releases lack the model")
@pytest.mark.parametrize("where", [{"scope": "final"}, {"include": ["weight_proj"], "scope": "overall"}])
def test_a_weight_whose_scale_would_not_be_loaded_next_to_it_is_refused_by_name(
    tmp_path: Path, where: dict[str, Any]
) -> None:
    """On loading, rows are cut from the head, and the other is renamed, but not its scale."""
    model_type = {name: kind for kind, name in ZOO}["Inkling2ForCausalLM"]
    save_zoo_model(model_type, "Inkling2ForCausalLM", tmp_path / "in")
    with pytest.raises(UnsupportedError, match="transformers fuses, splits or transposes it on loading"):
        compressknow.convert(tmp_path / "in", tmp_path / "out", quantize="int8", **where)


def test_code_that_a_forward_pass_does_not_run_is_no_direct_read() -> None:
    # BLOOM reads two weights only in its exact mode, DeBERTa one only if it is given query states.
    for model_type, name in (("bloom", "BloomForCausalLM"), ("deberta", "DebertaForMaskedLM")):
        assert find_direct_reads(tiny_model(model_type, name)) == {}


def test_a_weight_that_only_the_first_forward_pass_reads_is_found_every_time() -> None:
    rwkv = tiny_model("rwkv", "RwkvForCausalLM").to("meta")
    for _ in range(2):
        read = find_direct_reads(rwkv)
        assert {path for path in read if ".0." in path} == {
            "rwkv.blocks.0.attention.output",
            "rwkv.blocks.0.feed_forward.value",
        }


def test_code_after_a_pass_that_fails_midway_is_read_from_the_source() -> None:
    """Both fail before the head; their source names its weight only where it is tied."""
    for model_type, name in (("xlnet", "XLNetLMHeadModel"), ("jetmoe", "JetMoeForCausalLM")):
        assert find_direct_reads(tiny_model(model_type, name)) == {}


class StopsMidway(PreTrainedModel):
    """Model with two blocks, whose pass fails before the second; other code names weights that it has not read."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "gate": nn.Linear(4, 4)}) for _ in range(2))
        self.last = nn.Sequential(nn.Linear(4, 4))
        self.head, self.plain = nn.Linear(4, 4), nn.Linear(4, 4)
        self.cast, self.joined, self.named = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks[0]["up"](self.embeddings(input_ids)[..., : self.blocks[0]["gate"].weight.size(0)])
        weight = self.plain.weight
        hidden = (self.plain(hidden).to(weight.dtype) @ self.plain.weight).to(weight.dtype)
        hidden = self.named(self.joined(self.cast(hidden))).to(dtype=self.cast.weight.dtype)
        hidden = nn.functional.linear(hidden @ torch.cat([self.joined.weight]), weight=self.named.weight)
        raise RuntimeError(f"{hidden.shape} {attention_mask}")

    def _init_weights(self, module: nn.Module) -> None:
        nn.init.zeros_(module.gate.weight)

    def fuse(self) -> list[torch.Tensor]:
        return [*(block.up.weight for block in self.blocks), self.last[0].weight, self.head.weight]


def test_layers_that_a_pass_does_not_reach_are_read_if_code_names_their_weight() -> None:
    """All blocks run alike; neither the size or dtype of a weight nor code that sets it reads its values."""
    with torch.device("meta"):
        model = StopsMidway(BertConfig(vocab_size=9))
    values = dict.fromkeys(("last.0", "head", "plain", "joined", "named"), "values")
    assert find_direct_reads(model) == values | {"cast": "dtype"}


def test_direct_reads_of_a_vision_tower_are_found_in_its_source() -> None:
    # SigLIP's head passes the weights of its output layer to a function of torch.
    with torch.device("meta"):
        vision, text = SiglipVisionConfig(num_hidden_layers=1), LlamaConfig(num_hidden_layers=1)
        llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    assert find_direct_reads(llava) == {"model.vision_tower.head.attention.out_proj": "values"}


def test_an_output_that_transformers_could_not_load_is_refused_early(tmp_path: Path) -> None:
    # In an int8 checkpoint, transformers expects experts one by one, not as a stack.
    save_zoo_model("llama4_text", "Llama4ForCausalLM", tmp_path / "in")
    with pytest.raises(
        UnsupportedError, match=r"could not load the output\.\nIt finds no values for model\.layers\.0\."
    ):
        compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", quantize="int8")
    recipe = Recipe((Quantize("int8", Where(("attention",))),))
    with pytest.raises(UnsupportedError, match="transformers could not load the output"):
        VariantMaker(tmp_path / "in").plan(recipe)
    with pytest.raises(UnsupportedError, match="transformers could not load the output"):
        VariantMaker(tmp_path / "in").write(recipe, tmp_path / "out", lambda *_: "", ignore_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"prune": 0.2}, "Narrow `scope` (or `exclude`)."),
        ({"quantize": "int8"}, "Prune only, or narrow `scope` (or `exclude`) to other layers."),
    ],
    ids=["pruned", "quantized"],
)
def test_an_output_that_does_not_load_is_not_told_to_prune_if_it_is_only_pruned(
    options: dict[str, Any], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_config, "_find_fault", lambda *_: "It finds no values for x.")
    with pytest.raises(UnsupportedError) as caught:
        compressknow.convert(save_tiny("llama", tmp_path / "in"), tmp_path / "out", **options)
    assert caught.value.hint == hint
