"""Weights that are not stored as the model holds them: shared by modules, in one tensor with others, read raw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig, Zamba2ForCausalLM

import compressknow
from compressknow.base.errors import UnsupportedError
from compressknow.model.checkpoint import open_checkpoint
from compressknow.model.loading import LoadReport, list_headers, load_report
from compressknow.model.meta import build_meta_model, find_direct_reads, parse_config
from tests.compress.test_zoo_converts import compute_logits, load_strictly
from tests.models import save_tiny
from tests.zoo import tiny_config, tiny_model


def save(model_type: str, name: str, folder: Path) -> transformers.PreTrainedModel:
    model = tiny_model(model_type, name)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("model_type", "name"), [("zamba", "ZambaForCausalLM"), ("zamba2", "Zamba2ForCausalLM")])
def test_all_modules_that_share_a_weight_are_int8(tmp_path: Path, model_type: str, name: str) -> None:
    save(model_type, name, tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", quantize="int8")
    model = load_strictly(name, tmp_path / "out")
    queries = [module.weight for path, module in model.named_modules() if path.endswith("self_attn.q_proj")]
    assert len(queries) == 2
    assert all(weight.dtype == torch.int8 for weight in queries)
    assert queries[0].data_ptr() == queries[1].data_ptr()
    assert not compressknow.verify(tmp_path / "out").differences
    engine = compute_logits(compressknow.load(tmp_path / "out"))
    torch.testing.assert_close(engine, compute_logits(model), rtol=1e-2, atol=1e-2)


def test_shared_blocks_do_not_come_apart_where_the_final_layer_is_untied(tmp_path: Path) -> None:
    save("zamba2", "Zamba2ForCausalLM", tmp_path / "in")
    for how in ({"scope": "overall", "quantize": "int8"}, {"scope": ["blocks", "final"], "prune": 0.3}):
        with pytest.raises(UnsupportedError, match=r"shared_transformer\S+ and \d+ more are compressed too"):
            compressknow.convert(tmp_path / "in", tmp_path / "out", **how)  # type: ignore[arg-type]
    original = Zamba2ForCausalLM.from_pretrained(tmp_path / "in").state_dict()
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", prune=0.3)
    pruned = load_strictly("Zamba2ForCausalLM", tmp_path / "out").state_dict()
    assert {name for name, tensor in original.items() if not torch.equal(tensor, pruned[name])} == {"lm_head.weight"}


def test_a_tied_bias_that_is_stored_under_its_other_name_comes_along(tmp_path: Path) -> None:
    file = save_tiny("bert", tmp_path / "in") / "model.safetensors"
    stored = load_file(file)
    bias = torch.randn(stored.pop("cls.predictions.bias").shape)
    save_file({**stored, "cls.predictions.decoder.bias": bias}, file, metadata={"format": "pt"})
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", prune=0.3)
    head = load_strictly("BertForMaskedLM", tmp_path / "out").cls.predictions
    assert torch.equal(head.bias, bias)
    assert torch.equal(head.decoder.bias, bias)


def test_a_block_that_holds_the_weights_of_others_is_not_dropped(tmp_path: Path) -> None:
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
    settings = {"num_hidden_layers": 5, "layers_block_type": kinds, "hybrid_layer_ids": [1, 3]}
    config = tiny_config("zamba2", "Zamba2ForCausalLM").to_dict() | settings
    Zamba2ForCausalLM(transformers.Zamba2Config(**config)).save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedError, match=r"no place for model\.layers\.3\.shared_transformer"):
        compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="1")
    compressknow.convert(tmp_path / "in", tmp_path / "out", drop_blocks="4")
    load_strictly("Zamba2ForCausalLM", tmp_path / "out")


def test_floats_in_the_place_of_integers_do_not_pass_for_loaded(tmp_path: Path) -> None:
    # transformers casts them: of small weights nothing but zeros is left.
    compressknow.convert(save_tiny("bert", tmp_path / "in"), tmp_path / "out", quantize="int8")
    written = open_checkpoint(tmp_path / "out")
    tree = build_meta_model(tmp_path / "in")
    config = parse_config(tree, written.config)
    headers, name = list_headers(written), "bert.encoder.layer.1.attention.self.query.weight"
    assert load_report(type(tree), config, headers) == LoadReport()
    assert load_report(type(tree), config, {**headers, name: ("F32", headers[name][1])}).retyped == (name,)


def test_a_lack_of_memory_does_not_pass_for_a_checkpoint_that_does_not_load(tmp_path: Path) -> None:
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
def test_of_a_fused_tensor_only_the_part_in_scope_changes(tmp_path: Path, model_type: str, name: str) -> None:
    original = save(model_type, name, tmp_path / "in").state_dict()
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", include=["q_proj$"], prune=0.5)
    pruned = load_strictly(name, tmp_path / "out").state_dict()
    changed = {key for key, tensor in original.items() if not torch.equal(tensor, pruned[key])}
    assert changed == {key for key in original if key.endswith("q_proj.weight")}


def test_a_fused_tensor_that_is_pruned_whole_stays_fused(tmp_path: Path) -> None:
    save("nomic_bert", "NomicBertForMaskedLM", tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", prune=0.5)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(load_file(tmp_path / "in/model.safetensors"))


def test_parts_of_a_fused_tensor_have_an_int8_form(tmp_path: Path) -> None:
    model = save("nomic_bert", "NomicBertForMaskedLM", tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", quantize="int8")
    plain = compute_logits(load_strictly("NomicBertForMaskedLM", tmp_path / "out"))
    assert (plain - compute_logits(model)).abs().max() < 0.01


def test_a_weight_that_is_read_past_its_layer_is_refused_by_name(tmp_path: Path) -> None:
    save("mamba", "MambaForCausalLM", tmp_path / "in")
    with pytest.raises(UnsupportedError) as caught:
        compressknow.convert(tmp_path / "in", tmp_path / "out", quantize="int8")
    assert "reads the weight directly, bypassing the layer" in str(caught.value)
    assert r"`exclude` 'backbone\.layers\.\d+\.mixer\.dt_proj$'" in str(caught.value)
    compressknow.convert(tmp_path / "in", tmp_path / "out", exclude=[r"mixer\.dt_proj$"], quantize="int8")
    plain = compute_logits(load_strictly("MambaForCausalLM", tmp_path / "out"))
    torch.testing.assert_close(compute_logits(compressknow.load(tmp_path / "out")), plain, rtol=1e-2, atol=1e-2)


def test_what_a_forward_pass_does_not_read_is_no_direct_read() -> None:
    # BLOOM reads two weights in its exact mode, DeBERTa one where it is given states of its own.
    for model_type, name in (("bloom", "BloomForCausalLM"), ("deberta", "DebertaForMaskedLM")):
        assert find_direct_reads(tiny_model(model_type, name)) == {}
    read = find_direct_reads(tiny_model("rwkv", "RwkvForCausalLM"))
    assert {path.rpartition("blocks.")[2] for path in read if ".0." in path} == {
        "0.attention.output",
        "0.feed_forward.value",
    }


def test_what_a_pass_that_stops_midway_does_not_reach_is_told_by_code() -> None:
    """Both stop before the head, whose weight is named where it is tied, and by no code."""
    for model_type, name in (("xlnet", "XLNetLMHeadModel"), ("jetmoe", "JetMoeForCausalLM")):
        assert find_direct_reads(tiny_model(model_type, name)) == {}


def test_of_a_tower_that_no_text_reaches_the_source_is_believed() -> None:
    # SigLIP's head gives the weights of its output layer to a function of torch.
    with torch.device("meta"):
        vision, text = SiglipVisionConfig(num_hidden_layers=1), LlamaConfig(num_hidden_layers=1)
        llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    assert find_direct_reads(llava) == {"model.vision_tower.head.attention.out_proj": "values"}


def test_an_output_that_transformers_would_not_load_is_refused_before_any_work(tmp_path: Path) -> None:
    # It keeps experts one by one in place of a stack where a checkpoint is int8.
    save("llama4_text", "Llama4ForCausalLM", tmp_path / "in")
    with pytest.raises(UnsupportedError, match="transformers could not load the output"):
        compressknow.convert(tmp_path / "in", tmp_path / "out", scope="attention", quantize="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
