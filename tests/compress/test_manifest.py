"""The manifest counts what was written; the same input and recipe give the same bytes; a dry run tells the truth."""

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
from tests.models import logits, put_into_hub_cache, save_tiny, tiny, tiny_of_groups

COUNTS = ("parameters", "in_scope", "pruned", "zeros_before", "zeros_after", "quantized", "bytes_before", "bytes_after")
BOTH = {"prune": 0.3, "quantize": "int8"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    names = ("bert", "albert", "t5-tied", "llama", "llama-tied", "mixtral", "gpt2")
    return {name: save_tiny(name, root / name) for name in names}


def written_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("how", [{"prune": 0.3}, {"quantize": "int8"}, BOTH, {**BOTH, "quantize": "int8-paper"}])
@pytest.mark.parametrize("name", ["bert", "albert", "t5-tied", "llama"])
def test_counts_are_those_of_the_written_tensors(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, how: Any
) -> None:
    manifest = compressknow.convert(checkpoints[name], tmp_path / "out", **how)
    tensors = dict(written_tensors(tmp_path / "out"))
    rows = {row["name"]: row for row in manifest["tensors"]}
    scales = {row["scale"]["name"] for row in rows.values() if row["scheme"]}
    assert set(tensors) == set(rows) | scales
    for name_, row in rows.items():
        tensor = tensors[name_]
        assert row["shape"] == list(tensor.shape)
        assert row["numel"] == tensor.numel()
        assert row["zeros"] == int((tensor == 0).sum())
        assert (row["scheme"] is not None) == (tensor.dtype == torch.int8)
        scale = tensors[row["scale"]["name"]].nbytes if row["scheme"] else 0
        assert row["bytes_after"] == tensor.nbytes + scale
        assert row["sha256"] == hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    totals = manifest["totals"]
    assert totals["parameters"] == sum(tensors[name_].numel() for name_ in rows)
    assert totals["zeros_after"] == sum(int((tensors[name_] == 0).sum()) for name_ in rows)
    assert totals["quantized"] == sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.int8)
    assert totals["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["bert", "albert", "t5-tied", "llama", "mixtral"])
def test_groups_add_up_to_the_totals(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    manifest = compressknow.convert(checkpoints[name], tmp_path / "out", prune=0.4)
    assert set(manifest["totals"]) == {*COUNTS, "relative_error"}
    for count in COUNTS:
        assert sum(group[count] for group in manifest["groups"].values()) == manifest["totals"][count]
    assert json.loads((tmp_path / "out" / "compressknow.json").read_text()) == manifest


@pytest.mark.parametrize("amount", [0.01, 0.3, 0.99])
def test_exactly_the_asked_share_is_pruned(checkpoints: dict[str, Path], tmp_path: Path, amount: float) -> None:
    totals = compressknow.convert(checkpoints["llama"], tmp_path / "out", prune=amount)["totals"]
    assert totals["pruned"] == totals["zeros_after"] == round(amount * totals["in_scope"])


def test_the_same_input_and_recipe_give_the_same_bytes_whatever_the_threads(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    outputs = [tmp_path / str(threads) / "out" for threads in (1, 2, 4, 1)]
    for output, threads in zip([*outputs[:3], tmp_path / "again" / "out"], (1, 2, 4, 1), strict=True):
        compressknow.convert(checkpoints["bert"], output, threads=threads, **BOTH)
    digests = [digest(path) for path in (*outputs[:3], tmp_path / "again" / "out")]
    assert digests[0]["model.safetensors"]
    assert all(found == digests[0] for found in digests[1:])


@pytest.mark.parametrize("how", [BOTH, {"prune": 0.2, "prune_method": "random-unstructured", "seed": 3}])
def test_a_recipe_comes_back_from_the_manifest_and_from_toml_with_the_same_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, how: Any
) -> None:
    first = compressknow.convert(checkpoints["llama"], tmp_path / "flags", scope=["attention", "final"], **how)
    (tmp_path / "recipe.toml").write_text(to_toml(first["recipe"]))
    recipes = (tmp_path / "flags", tmp_path / "flags" / "compressknow.json", tmp_path / "recipe.toml")
    for i, recipe in enumerate(recipes):
        output = tmp_path / str(i) / "flags"
        assert main(["convert", str(checkpoints["llama"]), str(output), "--recipe", str(recipe)]) == 0
        assert digest(output) == digest(tmp_path / "flags")
    assert len({read_recipe(recipe) for recipe in recipes}) == 1


PRUNING = [{"prune": 0.3}, {"prune": 0.5, "per_layer": True}]
PLANNED = [(name, how) for name in ("mixtral", "gpt2") for how in PRUNING] + [
    (name, how)
    for name in ("bert", "albert", "t5-tied", "llama-tied")
    for how in (*PRUNING, {"quantize": "int8"}, BOTH)
]


@pytest.mark.parametrize(
    ("numpys", "pythons"),
    [
        ({"prune": np.float64(0.25)}, {"prune": 0.25}),
        (
            {"prune": np.float32(0.25), "prune_method": "random-unstructured", "seed": np.int64(3)},
            {"prune": 0.25, "prune_method": "random-unstructured", "seed": 3},
        ),
        ({"quantize": "int4", "group_size": np.int64(32)}, {"quantize": "int4", "group_size": 32}),
    ],
    ids=["float64", "float32", "int64"],
)
def test_numbers_of_an_array_are_taken_as_they_are(numpys: dict[str, Any], pythons: Any, tmp_path: Path) -> None:
    tiny_of_groups("llama").save_pretrained(tmp_path / "in")
    for name, options in (("a", numpys), ("b", pythons)):
        compressknow.convert(tmp_path / "in", tmp_path / name, **options)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize(("name", "how"), PLANNED)
def test_a_dry_run_tells_what_the_manifest_will_hold(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, how: Any
) -> None:
    planned = compressknow.convert(checkpoints[name], tmp_path / "out", dry_run=True, **how)
    assert not (tmp_path / "out").exists()
    done = compressknow.convert(checkpoints[name], tmp_path / "out", **how)
    assert planned["totals"] == {count: done["totals"][count] for count in planned["totals"]}
    assert planned["totals"].keys() == set(COUNTS) - {"zeros_before", "zeros_after"}
    for group, counts in planned["groups"].items():
        known = {count: value for count, value in counts.items() if value is not None}
        assert known.items() <= done["groups"][group].items()
    assert planned["untied"] == done["untied"]
    assert planned["setup"] == done["setup"]


@pytest.mark.parametrize("form", ["zip", "legacy", "sharded"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bin_checkpoints_become_what_safetensors_become(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, form: str
) -> None:
    source = save_tiny(name, tmp_path / "in")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]} if form == "sharded" else {"pytorch_model.bin": names}
    for file, held in parts.items():
        torch.save({n: state[n] for n in held}, source / file, _use_new_zipfile_serialization=form != "legacy")
    if form == "sharded":
        index = {"weight_map": {n: file for file, held in parts.items() for n in held}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    before = digest(source)
    manifest = compressknow.convert(source, tmp_path / "out", **BOTH)
    expected = compressknow.convert(checkpoints[name], tmp_path / "expected", **BOTH)
    found, wanted = dict(written_tensors(tmp_path / "out")), dict(written_tensors(tmp_path / "expected"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert manifest["totals"] == expected["totals"]
    assert manifest["source"]["files"] == before
    assert digest(source) == before
    assert not list((tmp_path / "out").glob("*.bin*"))
    compressknow.verify(tmp_path / "out")


def test_a_snapshot_of_the_hubs_cache_becomes_files_of_its_own(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = put_into_hub_cache(checkpoints["llama"], tmp_path / "hub", "org/tiny")
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    named = compressknow.convert("org/tiny", tmp_path / "named", **BOTH)
    assert (named["source"]["name"], named["source"]["revision"]) == ("org/tiny", commit)
    compressknow.convert(snapshot, tmp_path / "linked", **BOTH)
    local = compressknow.convert(checkpoints["llama"], tmp_path / "local", **BOTH)
    assert named["source"]["files"] == local["source"]["files"]
    for output in (tmp_path / "named", tmp_path / "linked"):
        assert not any(path.is_symlink() for path in output.iterdir())
        assert digest(output)["model.safetensors"] == digest(tmp_path / "local")["model.safetensors"]


def test_shards_come_out_as_they_went_in_and_load(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "in", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "in").glob("*.safetensors"))
    assert len(shards) > 2
    manifest = compressknow.convert(tmp_path / "in", tmp_path / "out", prune=0.01, quantize="int8-weights")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(written_tensors(tmp_path / "out")).keys()
    assert index["metadata"]["total_size"] == manifest["totals"]["bytes_after"]
    compressknow.verify(tmp_path / "out")
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert float((logits(model) - logits(tiny("llama"))).norm() / logits(tiny("llama")).norm()) < 0.1


def test_shards_in_folders_of_their_own_come_out_beside_each_other(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "in", max_shard_size="30KB")
    compressknow.convert(source, tmp_path / "expected", **BOTH)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for number, file in enumerate(sorted(set(index["weight_map"].values()))):
        (source / f"part{number}").mkdir()
        (source / file).rename(source / f"part{number}" / "weights.safetensors")
        moved = {
            name: f"part{number}/weights.safetensors" for name, place in index["weight_map"].items() if place == file
        }
        index["weight_map"] |= moved
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not LlamaForCausalLM.from_pretrained(source, output_loading_info=True)[1]["missing_keys"]
    compressknow.convert(source, tmp_path / "out", **BOTH)
    compressknow.verify(tmp_path / "out")
    expected = {name: sha for name, sha in digest(tmp_path / "expected").items() if "safetensors" in name}
    assert {name: sha for name, sha in digest(tmp_path / "out").items() if "safetensors" in name} == expected


def test_small_files_come_along_and_weights_of_other_formats_do_not(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = save_tiny("bert", tmp_path / "in")
    kept = {"tokenizer.json": "{}", "LICENSE": "mine", "code/modeling.py": "pass", "generation_config.json": "{}"}
    # transformers puts an adapter onto the model as it loads it, and fails where half of one is there.
    kept |= {"adapter_config.json": "{}", "adapter_model.safetensors": "x", "eyes/adapter_config.json": "{}"}
    kept |= {"eyes/adapter_model.bin": "x"}
    dropped = ("pytorch_model.bin", "tf_model.h5", "training_args.bin", ".git/config", "README.md")
    dropped += ("old/adapter_model.bin", "onnx/model.onnx", "onnx/model.onnx.data")
    # What transformers' Trainer leaves.
    dropped += ("trainer_state.json", "checkpoint-500/config.json", "runs/Nov29/events.out.tfevents.1764")
    for name, text in {**kept, **dict.fromkeys(dropped, "x")}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    manifest = compressknow.convert(source, tmp_path / "out", prune=0.1)
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_text() == text
        assert manifest["files"][name] == hashlib.sha256(text.encode()).hexdigest()
    assert not any((tmp_path / "out" / name).exists() for name in dropped if name != "README.md")
    assert "compressknow" in (tmp_path / "out" / "README.md").read_text()
