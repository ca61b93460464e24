"""load() returns the model of a checkpoint, or raises an error that says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressknow.base.errors import CheckpointError
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Quantize, Where
from compressknow.engine import layers
from compressknow.engine.load import load, load_tokenizer
from tests.knowing import save_trained
from tests.models import convert, edit_config, edit_tensors, logits, save_tiny, tiny

IDS = torch.tensor([[5, 7, 11, 2]])
MODELS = ("bert", "llama-tied", "t5-gated")


@pytest.mark.parametrize("name", MODELS)
def test_a_float_checkpoint_loads_unchanged(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(tiny(name))
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(tiny(name)))


@pytest.mark.parametrize("scheme", ["int8", "int8-paper", "int8-weights", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_checkpoint_in_floats_computes_as_in_transformers(
    name: str, scheme: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.Int8Kind, "runs_on", lambda *_: False)
    save_tiny(name, tmp_path / "original")
    # fp8 is refused for T5's final layer: see tests/compress/test_loading.py.
    scope = "blocks" if (name, scheme) == ("t5-gated", "fp8") else "overall"
    convert(tmp_path / "original", tmp_path / "int8", Recipe((Quantize(scheme, Where((scope,))),)))
    capfd.readouterr()
    loaded = load(tmp_path / "int8")
    assert capfd.readouterr() == ("", "")
    plain = type(tiny(name)).from_pretrained(tmp_path / "int8").eval()
    assert torch.equal(logits(loaded), logits(plain))
    error = (logits(loaded) - logits(tiny(name))).norm() / logits(tiny(name)).norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("scheme", ["int8", "int8-paper"])
def test_an_int8_encoder_decoder_model_generates(scheme: Any, tmp_path: Path) -> None:
    save_tiny("t5-gated", tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "int8", Recipe((Quantize(scheme),)))
    loaded = load(tmp_path / "int8")
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape[0] == 1
    assert loaded.encoder(IDS).last_hidden_state.isfinite().all()


def test_an_unknown_architecture_falls_back_to_the_model_type(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
    edit_config(tmp_path, architectures=["SomeonesBertWithAnotherName"])
    assert torch.equal(logits(load(tmp_path)), logits(tiny("bert")))
    # transformers has a causal class for BERT's config too, which is not the right one for a model such as AntiBERTy.
    assert type(load(tmp_path, language_model=True)).__name__ == "BertForMaskedLM"


def test_custom_code_is_not_run_if_transformers_has_the_class(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
    edit_config(tmp_path, auto_map={"AutoConfig": "own.BertConfig", "AutoModelForMaskedLM": "own.BertForMaskedLM"})
    (tmp_path / "own.py").write_text("1 / 0")
    assert torch.equal(logits(load(tmp_path, trust_remote_code=True)), logits(tiny("bert")))


def test_the_dtype_of_float_weights_can_be_chosen(tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path)
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_device_that_torch_cannot_use_is_a_checkpoint_error(tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(tmp_path, device="xpu" if torch.cuda.is_available() else "cuda")


def test_a_missing_weight_is_never_initialized(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
    edit_tensors(tmp_path, lambda weights: weights.pop("cls.predictions.transform.dense.weight"))
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.transform\.dense\.weight"):
        load(tmp_path)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
    edit_config(tmp_path, intermediate_size=40)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert "bert.encoder.layer.0.intermediate.dense.bias is [48], but should be [40]" in error.value.what
    assert "ignore_mismatched" not in str(error.value)


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
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
    save_tiny("bert", tmp_path)
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
    save_tiny("bert", tmp_path)
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
