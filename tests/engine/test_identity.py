"""A model is identified by a hash of the files that decide its answers, and described by its config and manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import compressknow
from compressknow.base.errors import CheckpointError, UnusedOptions
from compressknow.engine.identity import describe, locate, read_contents
from compressknow.model.manifest import MANIFEST_NAME
from tests.knowing import save_trained
from tests.models import edit_tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original, `bert`, and a conversion of it, `converted`."""
    root = tmp_path_factory.mktemp("place")
    save_trained("bert", root / "bert")
    compressknow.convert(root / "bert", root / "converted", scope="attention", prune=0.3, quantize="int8")
    return root


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "bert", tmp_path / "model")


@pytest.fixture
def converted_model(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "converted", tmp_path / "converted")


def hash_model(folder: Path) -> str:
    return read_contents(locate(folder)).sha256


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_changing_weights_config_or_tokenizer_changes_the_hash(root: Path, model: Path, name: str) -> None:
    content = bytearray((model / name).read_bytes())
    content[-3] ^= 1
    (model / name).write_bytes(content)
    located = locate(root / "bert")
    assert read_contents(located).sha256 != read_contents(type(located)("model", model)).sha256


@pytest.mark.parametrize(
    "name",
    ["modeling_mine.py", "vocab.txt", "added_tokens.json", "source.spm", "spm.model", "adapter_config.json"],
)
def test_a_further_file_that_matters_changes_the_hash(root: Path, model: Path, name: str) -> None:
    (model / name).write_text("[]")
    assert hash_model(model) != hash_model(root / "bert")


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "training_args.bin", "compressknow.json.bak"])
def test_a_card_or_another_name_does_not_change_the_hash(root: Path, model: Path, name: str) -> None:
    (model / name).write_text("{}")
    assert hash_model(model.rename(model.with_name("another name"))) == hash_model(root / "bert")


def test_a_checkpoint_is_described_by_its_files(root: Path) -> None:
    assert describe(locate(root / "bert")) == {
        "name": "bert",
        "revision": None,
        "bytes": (root / "bert" / "model.safetensors").stat().st_size,
        "dtype": "F32",
        "quantization": None,
    }


def test_a_checkpoint_whose_weights_lie_on_a_grid_is_described_so(model: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    edit_tensors(model, lambda tensors: tensors[name].copy_((8 * tensors[name]).round() / 8))
    grid = describe(locate(model))["grid"]
    assert grid["weights"] == 1 < grid["of"]
    assert 2 < grid["values"] < 17


def test_the_source_hash_of_a_conversion_includes_the_adapter_and_code(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    (model / "modeling_mine.py").write_text("mine = True\n")
    (model / "examples").mkdir()
    (model / "examples" / "run.py").touch()
    save_file({"lora_A.weight": torch.ones(1)}, model / "adapter_model.safetensors")
    compressknow.convert(model, tmp_path / "out", prune=0.1)
    assert describe(locate(tmp_path / "out"))["source"]["sha256"] == hash_model(model)


def test_a_conversion_is_described_by_its_manifest_too(root: Path) -> None:
    manifest = json.loads((root / "converted" / MANIFEST_NAME).read_text())
    info = describe(locate(root / "converted"))
    assert info["setup"] == manifest["setup"] == "Att_GPQ 30%"
    assert info["recipe"] == manifest["recipe"]
    assert info["source"] == {"name": "bert", "revision": None, "sha256": hash_model(root / "bert")}
    assert info["zeros"] == manifest["totals"]["zeros_after"]
    assert info["quantization"] == "compressed-tensors, 8-bit weights (channel), 8-bit activations"
    assert set(info["groups"]) == set(manifest["groups"])
    assert info["groups"]["attention"]["relative_error"] > info["groups"]["feed-forward"]["relative_error"] == 0
    assert set(info["dtype"].split(" + ")) == {"F32", "I8"}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"tensors": [1]}', '{"tensors": [], "setup": "x", "recipe": {}, "source": null}', "[" * 100_000],
)
def test_a_damaged_manifest_is_an_error_that_names_it(converted_model: Path, content: str) -> None:
    (converted_model / MANIFEST_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        describe(locate(converted_model))


def test_a_conversion_without_manifest_is_described_by_its_files(converted_model: Path) -> None:
    (converted_model / MANIFEST_NAME).unlink()
    info = describe(locate(converted_model))
    assert "setup" not in info
    assert info["quantization"] == "compressed-tensors, 8-bit weights (channel), 8-bit activations"


def test_a_file_or_a_server_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for model in (tmp_path / "x.gguf", "http://localhost:9"):
        with pytest.raises(UnusedOptions, match="which has no revision v1"):
            locate(model, "v1")


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        locate(model)
    with pytest.raises(CheckpointError, match="no such file"):
        locate(model / "model.gguf")
