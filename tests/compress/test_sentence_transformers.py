"""sentence-transformers can load and run what convert writes.

It loads a folder with its own config, calls `forward` past all hooks, and runs its own modules after the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import compressknow
from compressknow.base.errors import CheckpointError
from compressknow.base.progress import silence_libraries
from tests.models import save_tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BERT followed by a dense layer, as sentence-transformers saves it."""
    folder = save_tiny("bert", tmp_path / "in")
    paths = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"idx": i, "name": str(i), "path": p, "type": paths[p]} for i, p in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps([*modules, {"idx": 3, "path": None}, "4"]))
    settings = {"max_seq_length": 32, "config_args": {"layer_norm_eps": 1e-6}}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    for name in ("1_Pooling", "2_Dense", "onnx"):
        (folder / name).mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(3, 32)}, folder / "2_Dense" / "model.safetensors")
    save_file({"no.module": torch.ones(1)}, folder / "onnx" / "model.safetensors")
    return folder


def compute_states(folder: Path) -> torch.Tensor:
    """Load and call the model as sentence-transformers does; return its hidden states."""
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    with silence_libraries():
        config = transformers.AutoConfig.from_pretrained(folder, **settings["config_args"])
        model = transformers.AutoModel.from_pretrained(folder, config=config)
    assert config.layer_norm_eps == 1e-6
    with torch.no_grad():
        return model.forward(input_ids=torch.arange(5, 15)[None]).last_hidden_state


@pytest.mark.parametrize(
    "options",
    [{"quantize": "int8"}, {"quantize": "int4", "parameters": {"group_size": 32}, "scope": "attention"}],
    ids=["int8", "int4"],
)
def test_a_quantized_model_runs_where_forward_is_called_directly(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    manifest = compressknow.convert(source, tmp_path / "out", **options)
    original, states = compute_states(source), compute_states(tmp_path / "out")
    assert 0 < (states - original).norm() / original.norm() < 0.2
    assert not compressknow.verify(tmp_path / "out").differences
    name = "sentence_bert_config.json"
    assert manifest["files"][name] != manifest["source"]["files"][name]
    assert "dequantize" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_modules_are_copied_with_their_weights(source: Path, tmp_path: Path) -> None:
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    files = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    for name in ("2_Dense/model.safetensors", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert files[name].read_bytes() == (source / name).read_bytes()
    assert "onnx/model.safetensors" not in files
    (source / "modules.json").write_text("{")
    compressknow.convert(source, tmp_path / "out", prune=0.2, overwrite=True)
    assert (tmp_path / "out" / "modules.json").read_text() == "{"


def test_a_module_that_is_a_linked_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "1_Pooling").rename(source / "pooling")
    (source / "1_Pooling").symlink_to("pooling")
    with pytest.raises(CheckpointError, match=r"1_Pooling is a link to a folder\."):
        compressknow.convert(source, tmp_path / "out", prune=0.2)
    assert not (tmp_path / "out").exists()


def test_settings_are_written_where_a_folder_has_none(source: Path, tmp_path: Path) -> None:
    (source / "sentence_bert_config.json").unlink()
    planned = compressknow.convert(source, tmp_path / "out", quantize="int8", dry_run=True)["planned_files"]
    compressknow.convert(source, tmp_path / "out", quantize="int8")
    written = (tmp_path / "out" / "sentence_bert_config.json").read_bytes()
    assert planned["sentence_bert_config.json"] == len(written)
    assert json.loads(written)["config_args"]["quantization_config"]["dequantize"] is True


def test_other_settings_stay_where_sentence_transformers_reads_them(source: Path, tmp_path: Path) -> None:
    settings = {"max_seq_length": 32, "config_kwargs": {"layer_norm_eps": 1e-6}}
    (source / "sentence_bert_config.json").unlink()
    (source / "sentence_xlnet_config.json").write_text(json.dumps(settings))
    compressknow.convert(source, tmp_path / "out", quantize="int8")
    written = json.loads((tmp_path / "out" / "sentence_xlnet_config.json").read_text())
    assert written["config_kwargs"].pop("quantization_config")["dequantize"] is True
    assert written == settings
    assert not (tmp_path / "out" / "sentence_bert_config.json").exists()


def test_settings_stay_as_they_are_where_transformers_cannot_dequantize_on_loading(
    source: Path, tmp_path: Path
) -> None:
    steps = [{"quantize": "int8", "scope": ["attention"]}, {"quantize": "int8-weights", "scope": ["feed-forward"]}]
    compressknow.convert(source, tmp_path / "out", recipe={"steps": steps})
    name = "sentence_bert_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
