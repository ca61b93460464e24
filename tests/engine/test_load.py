"""load() returns the model of a checkpoint, or raises an error that says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from compressknow.base.errors import CheckpointError
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Quantize, Where
from compressknow.engine import layers
from compressknow.engine.load import load, load_tokenizer
from tests.knowing import save_trained
from tests.models import convert, edit_config, edit_tensors

IDS = torch.tensor([[5, 7, 11, 2]])


def build_bert() -> Any:
    return BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    )


def build_llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            tie_word_embeddings=True,
        )
    )


def build_t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


MODELS = {"bert": build_bert, "llama": build_llama, "t5": build_t5}


def save_model(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    return model


def compute_logits(model: Any) -> torch.Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder).logits


@pytest.mark.parametrize("kind", MODELS)
def test_a_float_checkpoint_loads_unchanged(kind: str, tmp_path: Path) -> None:
    model = save_model(kind, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(compute_logits(loaded), compute_logits(model))


@pytest.mark.parametrize("scheme", ["int8", "int8-paper", "int8-weights", "fp8"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_quantized_checkpoint_in_floats_computes_as_in_transformers(
    kind: str, scheme: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.Int8Kind, "runs_on", lambda *_: False)
    model = save_model(kind, tmp_path / "original")
    # fp8 is refused for T5's final layer: see tests/compress/test_loading.py.
    scope = "blocks" if (kind, scheme) == ("t5", "fp8") else "overall"
    convert(tmp_path / "original", tmp_path / "int8", Recipe((Quantize(scheme, Where((scope,))),)))
    capfd.readouterr()
    loaded = load(tmp_path / "int8")
    assert capfd.readouterr() == ("", "")
    plain = type(model).from_pretrained(tmp_path / "int8").eval()
    assert torch.equal(compute_logits(loaded), compute_logits(plain))
    error = (compute_logits(loaded) - compute_logits(model)).norm() / compute_logits(model).norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("scheme", ["int8", "int8-paper"])
def test_an_int8_encoder_decoder_model_generates(scheme: Any, tmp_path: Path) -> None:
    save_model("t5", tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "int8", Recipe((Quantize(scheme),)))
    loaded = load(tmp_path / "int8")
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape[0] == 1
    assert loaded.encoder(IDS).last_hidden_state.isfinite().all()


def test_an_unknown_architecture_falls_back_to_the_model_type(tmp_path: Path) -> None:
    model = save_model("bert", tmp_path)
    edit_config(tmp_path, architectures=["SomeonesBertWithAnotherName"])
    assert torch.equal(compute_logits(load(tmp_path)), compute_logits(model))
    # transformers has a causal class for BERT's config too, which is not the right one for a model such as AntiBERTy.
    assert type(load(tmp_path, language_model=True)).__name__ == "BertForMaskedLM"


def test_custom_code_is_not_run_if_transformers_has_the_class(tmp_path: Path) -> None:
    model = save_model("bert", tmp_path)
    edit_config(tmp_path, auto_map={"AutoConfig": "own.BertConfig", "AutoModelForMaskedLM": "own.BertForMaskedLM"})
    (tmp_path / "own.py").write_text("1 / 0")
    assert torch.equal(compute_logits(load(tmp_path, trust_remote_code=True)), compute_logits(model))


def test_the_dtype_of_float_weights_can_be_chosen(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_device_that_torch_cannot_use_is_a_checkpoint_error(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(tmp_path, device="xpu" if torch.cuda.is_available() else "cuda")


def test_a_missing_weight_is_never_initialized(tmp_path: Path) -> None:
    save_model("bert", tmp_path)
    edit_tensors(tmp_path, lambda weights: weights.pop("cls.predictions.transform.dense.weight"))
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.transform\.dense\.weight"):
        load(tmp_path)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_model("bert", tmp_path)
    edit_config(tmp_path, intermediate_size=40)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert "bert.encoder.layer.0.intermediate.dense.bias is [48], but should be [40]" in error.value.what
    assert "ignore_mismatched" not in str(error.value)


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    save_model("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": Path("not a tensor")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code") as error:
        load(tmp_path)
    assert "weights_only" not in str(error.value)


def test_a_missing_tokenizer_is_an_error_with_the_reason(tmp_path: Path) -> None:
    folder = save_trained("llama", tmp_path / "llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer that loads") as error:
        load_tokenizer(folder)
    assert str(error.value.why).startswith("It has no tokenizer.json, and no other file")


def test_a_tokenizer_that_panics_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model("bert", tmp_path)
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no tokenizer that loads") as error:
        load_tokenizer(tmp_path)
    assert "precompiled_charsmap" in str(error.value.why)
    # Rust would print the panic to standard error.
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("target", ["nowhere", "tokenizer_config.json"])
def test_a_broken_link_is_not_taken_for_a_missing_file(target: str, tmp_path: Path) -> None:
    folder = save_trained("bert", tmp_path / "bert")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(target)
    for read in (load, load_tokenizer, lambda source: convert(source, tmp_path / "out", Recipe((Quantize("int8"),)))):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is a link that leads nowhere"):
            read(folder)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    save_model("bert", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(tmp_path)


def test_a_path_that_is_no_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer("someone/not-a-folder")


@pytest.mark.parametrize("length", ["64", [64]])
def test_a_tokenizer_whose_maximum_length_is_no_number_is_an_error(length: object, tmp_path: Path) -> None:
    path = save_trained("bert", tmp_path / "bert") / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    with pytest.raises(CheckpointError, match=r"its model_max_length, .*64.*, is not a number"):
        load_tokenizer(path.parent)
