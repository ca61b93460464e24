"""The manifest counts what was written, the same input and recipe give the same bytes, and a dry run predicts both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import compressknow
from compressknow.cli import main
from compressknow.compress.recipe import read_recipe, to_toml
from tests.compress.conftest import hash_files
from tests.long import one_in
from tests.models import edit_tensors, logits, put_into_hub_cache, save_tiny, tiny, tiny_of_groups

COUNTS = ("parameters", "in_scope", "pruned", "zeros_before", "zeros_after", "quantized", "bytes_before", "bytes_after")
BOTH = {"prune": 0.3, "quantize": "int8"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    names = ("bert", "albert", "t5-tied", "llama", "llama-tied", "mixtral", "gpt2")
    saved = {name: save_tiny(name, root / name) for name in names}
    # Its final layer shares these zeros.
    edit_tensors(saved["albert"], lambda tensors: tensors["albert.embeddings.word_embeddings.weight"][0].zero_())
    return saved


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118


UNTIED = {"prune": 0.3, "scope": "final"}


@pytest.mark.parametrize(
    "options", [{"prune": 0.3}, {"quantize": "int8"}, BOTH, {**BOTH, "quantize": "int8-paper"}, UNTIED]
)
@pytest.mark.parametrize("name", one_in(2, ["bert", "albert", "t5-tied", "llama"]))
def test_counts_match_written_tensors(checkpoints: dict[str, Path], tmp_path: Path, name: str, options: Any) -> None:
    manifest = compressknow.convert(checkpoints[name], tmp_path / "out", **options)
    tensors = dict(read_tensors(tmp_path / "out"))
    rows = {row["name"]: row for row in manifest["tensors"]}
    scales = {row["scale"]["name"] for row in rows.values() if row["scheme"]}
    assert set(tensors) == set(rows) | scales
    for tensor_name, row in rows.items():
        tensor = tensors[tensor_name]
        assert row["shape"] == list(tensor.shape)
        assert row["numel"] == tensor.numel()
        assert row["zeros"] == int((tensor == 0).sum())
        assert (row["scheme"] is not None) == (tensor.dtype == torch.int8)
        scale = tensors[row["scale"]["name"]].nbytes if row["scheme"] else 0
        assert row["bytes_after"] == tensor.nbytes + scale
        assert row["sha256"] == hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    totals = manifest["totals"]
    assert totals["parameters"] == sum(tensors[tensor_name].numel() for tensor_name in rows)
    assert totals["zeros_after"] == sum(int((tensors[tensor_name] == 0).sum()) for tensor_name in rows)
    assert totals["quantized"] == sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.int8)
    assert totals["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())
    source = [tensor for _, tensor in read_tensors(checkpoints[name])]
    assert totals["bytes_before"] == sum(tensor.nbytes for tensor in source)
    assert totals["zeros_before"] == sum(int((tensor == 0).sum()) for tensor in source)


@pytest.mark.parametrize("name", ["bert", "albert", "t5-tied", "llama", "mixtral"])
def test_groups_add_up_to_the_totals(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    manifest = compressknow.convert(checkpoints[name], tmp_path / "out", prune=0.4)
    assert set(manifest["totals"]) == {*COUNTS, "relative_error"}
    for count in COUNTS:
        assert sum(group[count] for group in manifest["groups"].values()) == manifest["totals"][count]
    assert json.loads((tmp_path / "out" / "compressknow.json").read_text()) == manifest


@pytest.mark.parametrize("amount", [0.01, 0.3, 0.99])
def test_exactly_the_given_share_is_pruned(checkpoints: dict[str, Path], tmp_path: Path, amount: float) -> None:
    totals = compressknow.convert(checkpoints["llama"], tmp_path / "out", prune=amount)["totals"]
    assert totals["pruned"] == totals["zeros_after"] == round(amount * totals["in_scope"])


@pytest.mark.parametrize("options", [BOTH, {"prune": 0.2, "prune_method": "random-unstructured", "seed": 3}])
def test_a_recipe_read_from_manifest_or_toml_gives_the_same_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, options: Any
) -> None:
    first = compressknow.convert(checkpoints["llama"], tmp_path / "flags", scope=["attention", "final"], **options)
    (tmp_path / "recipe.toml").write_text(to_toml(first["recipe"]))
    recipes = (tmp_path / "flags", tmp_path / "flags" / "compressknow.json", tmp_path / "recipe.toml")
    for i, recipe in enumerate(recipes):
        output = tmp_path / str(i) / "flags"
        assert main(["convert", str(checkpoints["llama"]), str(output), "--recipe", str(recipe)]) == 0
        assert hash_files(output) == hash_files(tmp_path / "flags")
    assert len({read_recipe(recipe) for recipe in recipes}) == 1


def test_python_writes_the_same_bytes_as_the_command_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    words = ["--prune", "0.2", "--prune-method", "ln-structured"]
    assert main(["convert", str(checkpoints["llama"]), str(tmp_path / "flags"), *words]) == 0
    compressknow.convert(checkpoints["llama"], tmp_path / "out", prune=0.2, prune_method="ln-structured")
    assert hash_files(tmp_path / "out") == hash_files(tmp_path / "flags")


PRUNING = [{"prune": 0.3}, {"prune": 0.5, "per_layer": True}]
CHANNELS = {"prune": 0.3, "prune_method": "ln-structured"}
DRY_RUNS = [(name, options) for name in ("mixtral", "gpt2") for options in (*PRUNING, CHANNELS)] + [
    (name, options)
    for name in ("bert", "albert", "t5-tied", "llama-tied")
    for options in (*PRUNING, {"quantize": "int8"}, BOTH)
]


@pytest.mark.parametrize(
    "options",
    [
        {"prune": np.float64(0.25)},
        {"prune": np.float32(0.25), "prune_method": "random-unstructured", "seed": np.int64(3)},
        {"prune": np.array(0.25), "per_layer": np.bool_(True)},
        {"quantize": "int4", "group_size": np.int64(32)},
    ],
    ids=["float64", "float32", "bool", "int64"],
)
def test_numpy_numbers_give_the_same_bytes_as_python_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    tiny_of_groups("llama").save_pretrained(tmp_path / "in")
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in options.items()}
    compressknow.convert(tmp_path / "in", tmp_path / "a", **options)
    compressknow.convert(tmp_path / "in", tmp_path / "b", **plain)
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")


@pytest.mark.parametrize(("name", "options"), one_in(3, DRY_RUNS))
def test_a_dry_run_predicts_the_manifest(checkpoints: dict[str, Path], tmp_path: Path, name: str, options: Any) -> None:
    planned = compressknow.convert(checkpoints[name], tmp_path / "out", dry_run=True, **options)
    assert not (tmp_path / "out").exists()
    manifest = compressknow.convert(checkpoints[name], tmp_path / "out", **options)
    assert planned["totals"] == {count: manifest["totals"][count] for count in planned["totals"]}
    assert planned["totals"].keys() == set(COUNTS) - {"zeros_before", "zeros_after"}
    for group, counts in planned["groups"].items():
        known = {count: value for count, value in counts.items() if value is not None}
        assert known.items() <= manifest["groups"][group].items()
    assert planned["untied"] == manifest["untied"]
    assert planned["setup"] == manifest["setup"]


@pytest.mark.parametrize(
    ("prune", "unknown"),
    [({"scope": "attention"}, {"attention"}), ({"per_layer": True}, set())],
    ids=["over the scope", "per layer"],
)
def test_a_dry_run_leaves_open_only_what_depends_on_the_weights(
    checkpoints: dict[str, Path], tmp_path: Path, prune: dict[str, Any], unknown: set[str]
) -> None:
    recipe = {"steps": [{"prune": 0.2, **prune}, {"quantize": "int8", "scope": "feed-forward"}]}
    planned, manifest = (
        compressknow.convert(checkpoints["llama"], tmp_path / "out", recipe=recipe, dry_run=is_dry)
        for is_dry in (True, False)
    )
    for group, counts in planned.groups.items():
        assert counts["pruned"] == (None if group in unknown else manifest.groups[group]["pruned"]), group
    for before, after in zip(planned.tensors, manifest.tensors, strict=True):
        is_open = before["group"] in unknown and after["in_scope"]
        assert before["pruned"] == (None if is_open else after["pruned"]), before["name"]


@pytest.mark.parametrize("form", ["zip", "legacy", "sharded"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bin_checkpoints_convert_as_safetensors_do(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, form: str
) -> None:
    source = save_tiny(name, tmp_path / "in")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]} if form == "sharded" else {"pytorch_model.bin": names}
    for file, tensor_names in parts.items():
        torch.save({n: state[n] for n in tensor_names}, source / file, _use_new_zipfile_serialization=form != "legacy")
    if form == "sharded":
        index = {"weight_map": {n: file for file, tensor_names in parts.items() for n in tensor_names}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    before = hash_files(source)
    manifest = compressknow.convert(source, tmp_path / "out", **BOTH)
    expected = compressknow.convert(checkpoints[name], tmp_path / "expected", **BOTH)
    found, expected_tensors = dict(read_tensors(tmp_path / "out")), dict(read_tensors(tmp_path / "expected"))
    assert found.keys() == expected_tensors.keys()
    assert all(torch.equal(found[n], expected_tensors[n]) for n in expected_tensors)
    assert manifest["totals"] == expected["totals"]
    assert manifest["source"]["files"] == before
    assert hash_files(source) == before
    assert not list((tmp_path / "out").glob("*.bin*"))
    compressknow.verify(tmp_path / "out")


def test_a_snapshot_in_the_hub_cache_is_converted_without_symlinks(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = put_into_hub_cache(checkpoints["llama"], tmp_path / "hub", "org/tiny")
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    manifest = compressknow.convert("org/tiny", tmp_path / "named", **BOTH)
    assert (manifest["source"]["name"], manifest["source"]["revision"]) == ("org/tiny", commit)
    compressknow.convert(snapshot, tmp_path / "linked", **BOTH)
    local = compressknow.convert(checkpoints["llama"], tmp_path / "local", **BOTH)
    assert manifest["source"]["files"] == local["source"]["files"]
    for output in (tmp_path / "named", tmp_path / "linked"):
        assert not any(path.is_symlink() for path in output.iterdir())
        assert hash_files(output)["model.safetensors"] == hash_files(tmp_path / "local")["model.safetensors"]


def test_shards_keep_their_names_and_load(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "in", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "in").glob("*.safetensors"))
    assert len(shards) > 2
    manifest = compressknow.convert(tmp_path / "in", tmp_path / "out", prune=0.01, quantize="int8-weights")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(read_tensors(tmp_path / "out")).keys()
    assert index["metadata"]["total_size"] == manifest["totals"]["bytes_after"]
    compressknow.verify(tmp_path / "out")
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert float((logits(model) - logits(tiny("llama"))).norm() / logits(tiny("llama")).norm()) < 0.1


def test_shards_in_separate_folders_are_written_to_one(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "in", max_shard_size="30KB")
    compressknow.convert(source, tmp_path / "expected", **BOTH)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    # The second one stays outside, under the same name.
    for file, folder in zip(files, ["a", ".", *(f"x{number:03}" for number in range(2, len(files)))], strict=True):
        (source / folder).mkdir(exist_ok=True)
        renamed = (Path(folder) / "weights.safetensors").as_posix()
        (source / file).rename(source / renamed)
        index["weight_map"] |= {name: renamed for name, place in index["weight_map"].items() if place == file}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not LlamaForCausalLM.from_pretrained(source, output_loading_info=True)[1]["missing_keys"]
    compressknow.convert(source, tmp_path / "out", **BOTH)
    compressknow.verify(tmp_path / "out")
    expected = {name: sha for name, sha in hash_files(tmp_path / "expected").items() if "safetensors" in name}
    assert {name: sha for name, sha in hash_files(tmp_path / "out").items() if "safetensors" in name} == expected


def test_small_files_are_copied_and_weights_of_other_formats_are_not(tmp_path: Path) -> None:
    source = save_tiny("bert", tmp_path / "in")
    copied = {"tokenizer.json": "{}", "LICENSE": "mine", "code/modeling.py": "pass", "generation_config.json": "{}"}
    # transformers applies an adapter as it loads the model, and fails if one of its files is missing.
    copied |= {"adapter_config.json": "{}", "adapter_model.safetensors": "x", "eyes/adapter_config.json": "{}"}
    copied |= {"eyes/adapter_model.bin": "x", "checkpoints/notes.txt": "x"}
    dropped = ("pytorch_model.bin", "tf_model.h5", "training_args.bin", ".git/config", "README.md")
    dropped += ("old/adapter_model.bin", "onnx/model.onnx", "onnx/model.onnx.data", "onnx/model.onnx_data")
    dropped += ("model.gguf", "original/consolidated.00.pth", "flax_model.msgpack", "rust_model.ot", "model.ckpt")
    dropped += ("model.tflite", "coreml/model.mlmodel", "weights.npz", "weights.pkl", "weights.pickle", "0.distcp")
    # The Trainer of transformers leaves these.
    dropped += ("trainer_state.json", "checkpoint-500/config.json", "runs/Nov29/events.out.tfevents.1764")
    dropped += ("runs/trainer_state.json", "optimizer.pt")
    # Of weights that are not read, since model.safetensors is.
    dropped += ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    for name, text in {**copied, **dict.fromkeys(dropped, "x")}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    manifest = compressknow.convert(source, tmp_path / "out", prune=0.1)
    for name, text in copied.items():
        assert (tmp_path / "out" / name).read_text() == text
        assert manifest["files"][name] == hashlib.sha256(text.encode()).hexdigest()
    assert not any((tmp_path / "out" / name).exists() for name in dropped if name != "README.md")
    assert "compressknow" in (tmp_path / "out" / "README.md").read_text()
    # The manifest and the card of an output are replaced too.
    compressknow.convert(tmp_path / "out", tmp_path / "again", prune=0.2)
    assert not compressknow.verify(tmp_path / "again").differences
