"""verify says which file and which tensor is not as the manifest says, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.cli import main
from compressknow.errors import VerificationError
from compressknow.model.safetensors_header import read_header
from tests.models import save_tiny

WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    source = save_tiny("bert", tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    compressknow.convert(source, tmp_path / "out", prune=0.3, quantize="int8")
    return tmp_path / "out"


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as content:
        content.seek(position)
        byte = content.read(1)[0]
        content.seek(position)
        content.write(bytes([byte ^ 1]))


def flip_in(folder: Path, tensor: str) -> None:
    flip(folder / "model.safetensors", read_header(folder / "model.safetensors")[tensor].offset + 1)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "compressknow.json").read_text())
    change(manifest)
    (folder / "compressknow.json").write_text(json.dumps(manifest))


def test_what_convert_wrote_is_as_its_manifest_says(converted: Path) -> None:
    result = compressknow.verify(converted)
    rows = json.loads((converted / "compressknow.json").read_text())["tensors"]
    assert result.tensors == len(rows) + sum("scale" in row for row in rows)
    assert not result.differences


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of a weight": (lambda folder: flip_in(folder, WEIGHT), f"model.safetensors: {WEIGHT}: "),
    "a byte of a scale": (
        lambda folder: flip_in(folder, WEIGHT + "_scale"),
        f"model.safetensors: {WEIGHT}_scale: its bytes differ",
    ),
    "a byte of a norm": (
        lambda folder: flip_in(folder, "bert.embeddings.LayerNorm.weight"),
        "bert.embeddings.LayerNorm.weight: its bytes differ",
    ),
    "zeros": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors[WEIGHT].zero_()),
        f"{WEIGHT}: 1,024 zeros, expected",
    ),
    "a dtype": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].short()})),
        f"{WEIGHT}: I16 [32, 32], expected I8 [32, 32]",
    ),
    "a tensor more": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update(more=torch.ones(2))),
        "model.safetensors: more: not in the manifest",
    ),
    "a tensor less": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(WEIGHT)), f"{WEIGHT}: missing"),
    "the config": (lambda folder: flip(folder / "config.json", 10), "config.json: its bytes differ"),
    "the tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "a count": (
        lambda folder: edit_manifest(folder, lambda manifest: manifest["totals"].update(pruned=1)),
        "compressknow.json: totals.pruned is 1, its tensors add up to",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_with_its_file_and_tensor(
    converted: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, message = CHANGES[name]
    change(converted)
    capsys.readouterr()
    assert main(["verify", str(converted)]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "differs from its manifest in" in errors
    with pytest.raises(VerificationError):
        compressknow.verify(converted)
    assert main(["verify", str(converted), "--json"]) == 1
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert {difference["file"] for difference in differences} <= {"model.safetensors", "weights", *message.split(":")}


def test_the_model_card_may_be_edited(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (converted / "README.md").write_text("# Mine")
    capsys.readouterr()
    assert main(["verify", str(converted)]) == 0
    assert "as in the manifest" in capsys.readouterr().out


def test_a_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "in", max_shard_size="30KB")
    compressknow.convert(tmp_path / "in", tmp_path / "out", prune=0.2)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert shard.name in capsys.readouterr().err


def test_a_folder_that_convert_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert main(["verify", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "no such folder" in errors
    assert "has no compressknow.json" in errors
