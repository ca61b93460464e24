"""Files that are downloaded for models of the Hub, from a local hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file

import compressknow
from compressknow.engine.identity import TOKENIZER_FILES
from compressknow.model.checkpoint import open_checkpoint
from tests.hub.hub_server import COMMIT, Hub
from tests.model.test_checkpoint import save_bin_shards
from tests.model.test_structure import REMOTE, REMOTE_CODE
from tests.models import save_tiny

NAME = "org/tiny"


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT


def test_model_in_sharded_bin_files_is_downloaded(
    hub: Hub, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The index is downloaded with the config, before the shards."""
    weights = save_bin_shards(tmp_path / "llama")
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()}
    checkpoint = open_checkpoint(NAME)
    assert checkpoint.folder == cache
    assert checkpoint.tensors.keys() == weights.keys()
    assert "No files matched" not in caplog.text


def test_only_files_of_the_index_are_downloaded_not_their_variants(hub: Hub, cache: Path, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "weights-1-of-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "weights-1-of-1.safetensors")
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories[NAME]["model.fp32-00001-of-00002.safetensors"] = b"twice the bytes"
    hub.repositories[NAME]["pytorch_model.bin"] = b"the same weights"
    assert open_checkpoint(NAME).tensors.keys() == index["weight_map"].keys()
    assert [path.name for path in cache.glob("*.safetensors")] == ["weights-1-of-1.safetensors"]
    assert not (cache / "pytorch_model.bin").exists()


def test_tokenizer_and_adapter_of_a_model_are_downloaded(hub: Hub, cache: Path, tmp_path: Path) -> None:
    save_bin_shards(tmp_path / "llama")
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()}
    adapter = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    tokenizer = ("tokenizer.model", "spiece.spm", "vocab.tiktoken", "merges.txt", "chat_template.jinja")
    others = dict.fromkeys((*adapter, *tokenizer, *TOKENIZER_FILES, "LICENSE.txt"), b"{}")
    hub.repositories[NAME] |= others
    folder = open_checkpoint(NAME).folder
    assert {name: (folder / name).read_bytes() for name in others} == others


def test_modules_of_sentence_transformers_are_downloaded_with_their_weights(
    hub: Hub, cache: Path, tmp_path: Path
) -> None:
    folder = save_tiny("bert", tmp_path / "bert")
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in folder.iterdir()}
    modules = [{"path": ""}, {"path": "2_Dense"}, {"path": "3_Dense"}]
    hub.repositories[NAME] |= {
        "modules.json": json.dumps(modules).encode(),
        **dict.fromkeys(("2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"), b"{}"),
        "onnx/model.safetensors": b"of no module",
    }
    open_checkpoint(NAME)
    names = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.parent != cache}
    assert names == {"2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"}


def test_inspect_downloads_custom_code_but_no_weights(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    files = {"config.json": json.dumps(REMOTE), "tiny.py": REMOTE_CODE, "model.safetensors": ""}
    hub.repositories[NAME] = {name: text.encode() for name, text in files.items()}
    assert compressknow.inspect(NAME, trust_remote_code=True).architecture == "TinyModel"
    assert {path.name for path in cache.iterdir()} == {"config.json", "tiny.py"}


def test_custom_code_is_downloaded_from_another_repository(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto_map = {name: f"org/code--{reference}" for name, reference in REMOTE["auto_map"].items()}
    hub.repositories[NAME] = {"config.json": json.dumps(REMOTE | {"auto_map": auto_map}).encode()}
    hub.repositories["org/code"] = {"tiny.py": REMOTE_CODE.encode()}
    assert compressknow.inspect(NAME, trust_remote_code=True).architecture == "TinyModel"
