"""verify names the files and tensors that differ from the manifest, and no others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError, VerificationError
from compressknow.cli import main
from compressknow.model.tensors import read_header
from tests.models import edit_tensors, save_tiny

WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def converted_folder(tmp_path: Path) -> Path:
    source = save_tiny("bert", tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    compressknow.convert(source, tmp_path / "out", prune=0.3, quantize="int8")
    return tmp_path / "out"


def flip_bit(file: Path, position: int) -> None:
    with file.open("r+b") as content:
        content.seek(position)
        byte = content.read(1)[0]
        content.seek(position)
        content.write(bytes([byte ^ 1]))


def flip_bit_of_tensor(folder: Path, tensor: str) -> None:
    flip_bit(folder / "model.safetensors", read_header(folder / "model.safetensors")[tensor].offset + 1)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "compressknow.json").read_text())
    change(manifest)
    (folder / "compressknow.json").write_text(json.dumps(manifest))


def describe_storage(row: dict[str, Any], **settings: object) -> None:
    names = {"name": "name", "shape": "shape", "dtype": "dtype_after", "sha256": "sha256"}
    row["stored"] = [{key: row[name] for key, name in names.items()} | settings]


def test_an_output_of_convert_matches_its_manifest(converted_folder: Path) -> None:
    result = compressknow.verify(converted_folder)
    rows = json.loads((converted_folder / "compressknow.json").read_text())["tensors"]
    assert result.tensors == len(rows) + sum("scale" in row for row in rows)
    assert not result.differences


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of a weight": (lambda folder: flip_bit_of_tensor(folder, WEIGHT), f"model.safetensors: {WEIGHT}: "),
    "a byte of a scale": (
        lambda folder: flip_bit_of_tensor(folder, WEIGHT + "_scale"),
        f"model.safetensors: {WEIGHT}_scale: its bytes differ",
    ),
    "a byte of a norm": (
        lambda folder: flip_bit_of_tensor(folder, "bert.embeddings.LayerNorm.weight"),
        "bert.embeddings.LayerNorm.weight: its bytes differ",
    ),
    "zeros in a weight": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors[WEIGHT].zero_()),
        f"{WEIGHT}: 1,024 zeros, expected",
    ),
    "a dtype": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].short()})),
        f"{WEIGHT}: I16 [32, 32], expected I8 [32, 32]",
    ),
    "a shape": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].view(16, 64)})),
        f"{WEIGHT}: I8 [16, 64], expected I8 [32, 32]",
    ),
    "an extra tensor": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update(more=torch.ones(2))),
        "model.safetensors: more: not in the manifest",
    ),
    "a lost tensor": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(WEIGHT)), f"{WEIGHT}: missing"),
    "the metadata of a file": (
        lambda folder: save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors"),
        "model.safetensors: its metadata is {}, expected {'format': 'pt'}",
    ),
    "the config": (lambda folder: flip_bit(folder / "config.json", 10), "config.json: its bytes differ"),
    "the tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "a count": (
        lambda folder: edit_manifest(folder, lambda manifest: manifest["totals"].update(pruned=1)),
        "compressknow.json: totals.pruned is 1, its tensors add up to",
    ),
    "a count of a group": (
        lambda folder: edit_manifest(folder, lambda manifest: manifest["groups"]["attention"].update(zeros_after=9**9)),
        "compressknow.json: groups.attention.zeros_after is 387420489, its tensors add up to",
    ),
    "the stored form of a weight": (
        lambda folder: edit_manifest(folder, lambda manifest: describe_storage(manifest["tensors"][0], zeros="some")),
        "compressknow.json: it was edited",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_with_its_file_and_tensor(
    converted_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, message = CHANGES[name]
    change(converted_folder)
    capsys.readouterr()
    assert main(["verify", str(converted_folder)]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "differs from its manifest in" in errors
    edited = "Copy or download it again: the recipe in this compressknow.json cannot be trusted."
    damaged = "Copy or download it again, or convert the model again: the manifest holds the recipe (--recipe)."
    assert (edited if message.startswith("compressknow.json") else damaged) in errors
    with pytest.raises(VerificationError):
        compressknow.verify(converted_folder)
    assert main(["verify", str(converted_folder), "--json"]) == 1
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert {difference["file"] for difference in differences} <= {"model.safetensors", *message.split(":")}


def test_verify_does_not_import_transformers() -> None:
    code = "import sys, compressknow.compress.verify; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_the_model_card_may_be_edited(converted_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (converted_folder / "README.md").write_text("# Mine")
    capsys.readouterr()
    assert main(["verify", str(converted_folder)]) == 0
    assert "match the manifest" in capsys.readouterr().out


def test_extra_files_in_a_folder_are_named(converted_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("report.html", "old.safetensors", "onnx/model.onnx")
    (converted_folder / "onnx").mkdir()
    for name in names:
        (converted_folder / name).write_text("mine")
    assert main(["verify", str(converted_folder)]) == 1
    errors = capsys.readouterr().err
    assert all(f"{name}: not in the manifest" in errors for name in names)
    assert "Move the files that convert did not write to another folder." in errors
    flip_bit(converted_folder / "config.json", 10)
    assert main(["verify", str(converted_folder)]) == 1
    assert "Copy or download it again, or convert the model again" in capsys.readouterr().err


def test_the_recipe_of_an_edited_manifest_is_refused_unless_copied(
    converted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(converted_folder, lambda manifest: manifest["recipe"]["steps"][0].update(prune=0.6))
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "again"), "--dry-run", "--recipe"]
    for path in (converted_folder, converted_folder / "compressknow.json"):
        assert main([*arguments, str(path)]) == 2
        assert "compressknow.json was edited: its sha256 does not match" in capsys.readouterr().err
    recipe = json.loads((converted_folder / "compressknow.json").read_text())["recipe"]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main([*arguments, str(tmp_path / "recipe.json")]) == 0


def test_many_differences_are_counted_and_the_first_20_named(
    converted_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = len(load_file(converted_folder / "model.safetensors"))
    (converted_folder / "model.safetensors").unlink()
    assert main(["verify", str(converted_folder)]) == 1
    errors = capsys.readouterr().err
    assert f"differs from its manifest in {tensors + 1} places." in errors
    assert errors.count(": missing") == 20
    assert f"and {tensors - 19} more: see --json" in errors


def test_a_manifest_of_an_older_version_verifies_with_a_note(
    converted_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not compressknow.verify(converted_folder).notes
    edit_manifest(converted_folder, lambda manifest: manifest.pop("sha256"))
    capsys.readouterr()
    assert main(["verify", str(converted_folder)]) == 0
    assert "! The manifest has no hash of itself" in capsys.readouterr().out


def test_a_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "in", max_shard_size="30KB")
    compressknow.convert(tmp_path / "in", tmp_path / "out", prune=0.2)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert f"{shard.name}: missing" in capsys.readouterr().err
    files = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 1
    differences = json.loads(capsys.readouterr().out)["differences"]
    missing = {name for name, file in files.items() if file == shard.name}
    assert {(found["file"], found["what"]) for found in differences} == {(shard.name, "missing")}
    assert {found["tensor"] for found in differences} == missing | {None}


def test_a_tensor_that_two_shards_hold_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "in", max_shard_size="30KB")
    compressknow.convert(tmp_path / "in", tmp_path / "out", prune=0.2)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    name, tensor = next(iter(load_file(shards[0]).items()))
    save_file({**load_file(shards[1]), name: tensor + 1}, shards[1], {"format": "pt"})
    with pytest.raises(VerificationError, match=f"{re.escape(shards[1].name)}: {re.escape(name)}: stored twice"):
        compressknow.verify(tmp_path / "out")


def test_a_damaged_weight_file_is_named_and_other_files_are_compared(converted_folder: Path) -> None:
    weights = converted_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    flip_bit(converted_folder / "config.json", 10)
    with pytest.raises(VerificationError) as caught:
        compressknow.verify(converted_folder)
    assert f"{weights} is not a sound safetensors file" in str(caught.value)
    assert "config.json: its bytes differ" in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_detected(converted_folder: Path, data: st.DataObject) -> None:
    file = converted_folder / data.draw(st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]))
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
    # Most bits are of the header, which no hash covers.
    position = data.draw(st.integers(0, end - 1) | st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(changed)
    try:
        with pytest.raises(VerificationError, match=re.escape(file.name)):
            compressknow.verify(converted_folder)
    finally:
        file.write_bytes(content)
    compressknow.verify(converted_folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_manifest_gives_a_verdict_or_a_message(converted_folder: Path, data: st.DataObject) -> None:
    sound = (converted_folder / "compressknow.json").read_text()
    manifest = json.loads(sound)
    row = data.draw(st.sampled_from([row for row in manifest["tensors"] if row["scheme"]]))
    parent = data.draw(st.sampled_from([manifest, manifest["totals"], manifest["files"], row, row["scale"]]))
    key = data.draw(st.sampled_from(sorted(parent)))
    parent[key] = data.draw(st.sampled_from([None, 3, -1.5, "text", True, [], [[]], {}, {"name": 3}]))
    if data.draw(st.booleans()):
        del parent[key]
    (converted_folder / "compressknow.json").write_text(json.dumps(manifest))
    try:
        compressknow.verify(converted_folder)
    except CompressknowError as error:
        assert "compressknow.json" in str(error) or "differs from its manifest" in str(error)  # noqa: PT017
    finally:
        (converted_folder / "compressknow.json").write_text(sound)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema=99), "has schema 99, but this version reads schema 1"),
        (lambda manifest: manifest.pop("schema"), "has schema None, but this version reads schema 1"),
        (lambda manifest: manifest["tensors"][0].update(stored=[{}]), "damaged: tensors[0].stored[0].name is missing"),
        (lambda manifest: manifest.update(calibration={}), "is damaged: calibration.kind is missing"),
        (lambda manifest: manifest.update(removed={}), "is damaged: removed.parameters is missing"),
        (lambda manifest: manifest.pop("tensors"), "is damaged: tensors is missing"),
        (lambda manifest: manifest.update(groups={"attention": 3}), "is damaged: groups.attention is not an object"),
        (lambda manifest: manifest["tensors"][2].pop("sha256"), "is damaged: tensors[2].sha256 is missing"),
        (lambda manifest: manifest["files"].update({"../in/config.json": "0"}), "names '../in/config.json', outside"),
        (lambda manifest: manifest["files"].update({"/etc/hostname": "0"}), "names '/etc/hostname', outside"),
    ],
)
def test_an_invalid_manifest_is_refused_with_the_reason(
    converted_folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(converted_folder, change)
    with pytest.raises(CheckpointError) as caught:
        compressknow.verify(converted_folder)
    assert message in str(caught.value)


def test_a_folder_that_convert_did_not_write_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert main(["verify", str(tmp_path)]) == 1
    (tmp_path / "config.json").touch()
    assert main(["verify", str(tmp_path / "config.json")]) == 1
    errors = capsys.readouterr().err
    assert f"config.json is a file, not a folder.\n  Give its folder, {tmp_path}." in errors
    assert "no such folder" in errors
    assert "has no compressknow.json" in errors
