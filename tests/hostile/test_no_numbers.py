"""Weights with NaN or infinity are named and refused before any fact is evaluated, in every file format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressknow.base.errors import CheckpointError
from compressknow.engine.identity import READ_BYTES, LocatedModel, locate, read_contents
from compressknow.model.tensors import TORCH_NAMES, StoredTensor, find_not_finite, view_bytes
from tests.engine.gguf_files import F32, write_gguf
from tests.hostile.bounded import run_refused
from tests.knowing import save_trained, write_facts
from tests.models import edit_tensors, save_tiny

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Llama, a copy with one NaN in a query weight, and facts."""
    folder = tmp_path_factory.mktemp("models")
    save_trained("llama", folder / "sound")
    shutil.copytree(folder / "sound", folder / "broken")
    edit_tensors(folder / "broken", lambda weights: weights[QUERY][3, 5].fill_(float("nan")))
    write_facts(folder / "facts.jsonl")
    return folder


def use_safetensors(models: Path, folder: Path) -> Path:
    return models / "broken"


def save_pickle(models: Path, folder: Path, **options: bool) -> Path:
    model = shutil.copytree(models / "broken", folder / "model")
    weights = load_file(model / "model.safetensors")
    # A pickle may hold views of a tensor too, such as its first rows.
    torch.save({"first_rows": weights[QUERY][:2], **weights}, model / "pytorch_model.bin", **options)
    (model / "model.safetensors").unlink()
    return model


def save_old_pickle(models: Path, folder: Path) -> Path:
    return save_pickle(models, folder, _use_new_zipfile_serialization=False)


def save_gguf(models: Path, folder: Path) -> Path:
    return write_gguf(models / "broken", folder / "model.gguf", F32)


@pytest.mark.parametrize("save", [use_safetensors, save_pickle, save_old_pickle, save_gguf])
def test_probe_and_report_name_the_weight_and_evaluate_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], save: Callable[[Path, Path], Path]
) -> None:
    model, facts = save(models, tmp_path), ("-p", f"facts:{models / 'facts.jsonl'}")
    name = "blk.0.attn_q.weight" if model.suffix == ".gguf" else QUERY
    for command in (
        ("probe", model, *facts, "-o", tmp_path / "answers"),
        ("report", models / "sound", model, *facts, "-o", tmp_path / "r.html", "--answers", tmp_path / "answers"),
        (
            "report",
            models / "sound",
            model,
            *facts,
            "--fail-under",
            "0.9",
            "--early",
            "--answers",
            tmp_path / "answers",
        ),
    ):
        errors = run_refused(capsys, *command)
        assert f"{name} in {model.name if model.suffix else ''}" in errors
        assert "holds NaN" in errors
        assert not (tmp_path / "answers").exists()


def test_sweep_refuses_an_original_with_nan(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = ("-p", f"facts:{models / 'facts.jsonl'}")
    assert f"{QUERY} in model.safetensors holds NaN" in run_refused(
        capsys, "sweep", models / "broken", "-o", tmp_path / "study", *facts
    )


def test_infinite_scale_is_refused(tmp_path: Path) -> None:
    import compressknow

    source = save_tiny("bert", tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    compressknow.convert(source, tmp_path / "out", quantize="int8")
    scale = "bert.encoder.layer.0.attention.self.query.weight_scale"
    edit_tensors(tmp_path / "out", lambda weights: weights[scale][0].fill_(float("inf")))
    located = locate(tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"{scale} in model.safetensors holds an infinity"):
        read_contents(located).check_finite(located)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.masked_bias", "position_mask"])
def test_unused_masks_may_have_infinities(tmp_path: Path, name: str) -> None:
    """GPT-2 and GPT-J have masks in float16, where -1e9 is infinite; transformers no longer reads them."""
    located = locate(save_tiny("gpt2", tmp_path / "model"))
    edit_tensors(located.path, lambda weights: weights.update({name: torch.full((4,), float("-inf"))}))
    contents = read_contents(located)
    assert [tensor.name for tensor, _ in contents.not_finite] == [name]
    contents.check_finite(located)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -448.0])
def test_nan_and_infinity_are_found_in_every_dtype(dtype: str, value: float) -> None:
    values = torch.ones(64)
    values[17] = value
    stored = values.to(getattr(torch, TORCH_NAMES[dtype]))
    loaded = stored.to(torch.float32)
    expected = "NaN" if loaded.isnan().any() else "an infinity" if loaded.isinf().any() else None
    assert find_not_finite(view_bytes(stored), StoredTensor("x", dtype, (64,), Path())) == expected


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_nan_is_found_in_all_floats_of_a_gguf_file(dtype: str, tmp_path: Path) -> None:
    values = torch.ones(2, 32, dtype=getattr(torch, TORCH_NAMES[dtype]))
    values[1, 5] = float("nan")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("a", values.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    contents = read_contents(LocatedModel("x", tmp_path / "model.gguf"))
    assert [(tensor.name, tensor.shape, what) for tensor, what in contents.not_finite] == [("a", (2, 32), "NaN")]


@pytest.mark.parametrize("index", [0, 1, -1])
def test_every_value_of_a_large_tensor_is_checked_and_hashed(tmp_path: Path, index: int) -> None:
    import hashlib

    numbers = torch.ones(2 * READ_BYTES // 2 + 77, dtype=torch.bfloat16)
    numbers[index] = float("inf")
    save_file({"a": torch.ones(3), "b": numbers, "c": torch.zeros(0)}, tmp_path / "model.safetensors")
    contents = read_contents(LocatedModel("x", tmp_path))
    assert [(tensor.name, what) for tensor, what in contents.not_finite] == [("b", "an infinity")]
    sha256 = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert contents.sha256 == hashlib.sha256(f"model.safetensors\0{sha256}\n".encode()).hexdigest()
