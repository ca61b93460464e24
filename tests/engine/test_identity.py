"""A model is known by the files that decide what it answers, and told by what its files say."""

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
from tests.knowing import knowing


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original, `bert`, and a conversion of it, `converted`."""
    folder = tmp_path_factory.mktemp("place")
    knowing("bert", folder / "bert")
    compressknow.convert(folder / "bert", folder / "converted", scope="attention", prune=0.3, quantize="int8")
    return folder


@pytest.fixture
def model(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "bert", tmp_path / "model")


@pytest.fixture
def converted(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "converted", tmp_path / "converted")


def hash_of(folder: Path) -> str:
    return read_contents(locate(folder)).sha256


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_any_change_of_weights_config_or_tokenizer_makes_another_model(place: Path, model: Path, name: str) -> None:
    content = bytearray((model / name).read_bytes())
    content[-3] ^= 1
    (model / name).write_bytes(content)
    located = locate(place / "bert")
    assert read_contents(located).sha256 != read_contents(type(located)("model", model)).sha256


@pytest.mark.parametrize(
    "name",
    ["modeling_mine.py", "vocab.txt", "added_tokens.json", "source.spm", "spm.model", "adapter_config.json"],
)
def test_another_file_that_decides_makes_another_model(place: Path, model: Path, name: str) -> None:
    (model / name).write_text("[]")
    assert hash_of(model) != hash_of(place / "bert")


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "training_args.bin", "compressknow.json.bak"])
def test_a_card_or_a_name_makes_no_other_model(place: Path, model: Path, name: str) -> None:
    (model / name).write_text("{}")
    assert hash_of(model.rename(model.with_name("another name"))) == hash_of(place / "bert")


def test_an_original_is_told_by_its_files(place: Path) -> None:
    assert describe(locate(place / "bert")) == {
        "name": "bert",
        "revision": None,
        "bytes": (place / "bert" / "model.safetensors").stat().st_size,
        "dtype": "F32",
        "quantization": None,
    }


def test_the_original_of_a_conversion_has_its_adapter_too(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(1)}, model / "adapter_model.safetensors")
    compressknow.convert(model, tmp_path / "out", prune=0.1)
    assert describe(locate(tmp_path / "out"))["source"]["sha256"] == hash_of(model)


def test_a_conversion_is_told_by_its_manifest_too(place: Path) -> None:
    manifest = json.loads((place / "converted" / MANIFEST_NAME).read_text())
    told = describe(locate(place / "converted"))
    assert told["setup"] == manifest["setup"] == "Att_GPQ 30%"
    assert told["recipe"] == manifest["recipe"]
    assert told["source"] == {"name": "bert", "revision": None, "sha256": hash_of(place / "bert")}
    assert told["zeros"] == manifest["totals"]["zeros_after"]
    assert told["quantization"] == "compressed-tensors, 8-bit weights (channel), 8-bit activations"
    assert set(told["groups"]) == set(manifest["groups"])
    assert told["groups"]["attention"]["relative_error"] > told["groups"]["feed-forward"]["relative_error"] == 0
    assert set(told["dtype"].split(" + ")) == {"F32", "I8"}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"tensors": [1]}', '{"tensors": [], "setup": "x", "recipe": {}, "source": null}', "[" * 100_000],
)
def test_a_damaged_manifest_is_an_error_that_names_it(converted: Path, content: str) -> None:
    (converted / MANIFEST_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        describe(locate(converted))


def test_a_conversion_without_its_manifest_is_told_as_any_other(converted: Path) -> None:
    (converted / MANIFEST_NAME).unlink()
    told = describe(locate(converted))
    assert "setup" not in told
    assert told["quantization"] == "compressed-tensors, 8-bit weights (channel), 8-bit activations"


def test_a_file_or_a_server_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for model in (tmp_path / "x.gguf", "http://localhost:9"):
        with pytest.raises(UnusedOptions, match="which has no revision v1"):
            locate(model, "v1")


def test_what_has_no_weights_is_no_model(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        locate(model)
    with pytest.raises(CheckpointError, match="no such file"):
        locate(model / "model.gguf")
