"""Weights that hold NaN or infinity: named and refused before a fact is evaluated, in whatever file they lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressknow.base.errors import CheckpointError
from compressknow.engine.identity import READ_BYTES, LocatedModel, locate, read_contents
from compressknow.model.tensors import TORCH_NAMES, StoredTensor, find_not_finite, view_bytes
from tests.engine.gguf_files import F32, write_gguf
from tests.hostile.bounded import refused
from tests.knowing import save_trained, write_facts
from tests.models import edit_tensors, save_tiny

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, and the same with one NaN in a query weight; facts."""
    folder = tmp_path_factory.mktemp("place")
    save_trained("llama", folder / "sound")
    shutil.copytree(folder / "sound", folder / "broken")
    edit_tensors(folder / "broken", lambda weights: weights[QUERY][3, 5].fill_(float("nan")))
    write_facts(folder / "facts.jsonl")
    return folder


def in_safetensors(place: Path, folder: Path) -> Path:
    return place / "broken"


def in_pickle(place: Path, folder: Path, **options: bool) -> Path:
    model = shutil.copytree(place / "broken", folder / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin", **options)
    (model / "model.safetensors").unlink()
    return model


def in_old_pickle(place: Path, folder: Path) -> Path:
    return in_pickle(place, folder, _use_new_zipfile_serialization=False)


def in_gguf(place: Path, folder: Path) -> Path:
    return write_gguf(place / "broken", folder / "model.gguf", F32)


@pytest.mark.parametrize("form", [in_safetensors, in_pickle, in_old_pickle, in_gguf])
def test_probe_and_report_name_the_weight_and_evaluate_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Callable[[Path, Path], Path]
) -> None:
    model, facts = form(place, tmp_path), ("-p", f"facts:{place / 'facts.jsonl'}")
    name = "blk.0.attn_q.weight" if model.suffix == ".gguf" else QUERY
    for command in (
        ("probe", model, *facts, "-o", tmp_path / "answers"),
        ("report", place / "sound", model, *facts, "-o", tmp_path / "r.html", "--answers", tmp_path / "answers"),
        ("report", place / "sound", model, *facts, "--fail-under", "0.9", "--early", "--answers", tmp_path / "answers"),
    ):
        said = refused(capsys, *command)
        assert f"{name} in {model.name if model.suffix else ''}" in said
        assert "holds NaN" in said
        assert not (tmp_path / "answers").exists()


def test_a_sweep_refuses_its_original_too(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = ("-p", f"facts:{place / 'facts.jsonl'}")
    assert f"{QUERY} in model.safetensors holds NaN" in refused(
        capsys, "sweep", place / "broken", "-o", tmp_path / "study", *facts
    )


def test_a_scale_that_is_no_number_is_a_weight(tmp_path: Path) -> None:
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
def test_a_mask_beside_the_weights_may_hold_infinities(tmp_path: Path, name: str) -> None:
    """GPT-2 and GPT-J stored such in float16, where -1e9 is infinite; today's classes do not read them."""
    located = locate(save_tiny("gpt2", tmp_path / "model"))
    edit_tensors(located.path, lambda weights: weights.update({name: torch.full((4,), float("-inf"))}))
    contents = read_contents(located)
    assert [tensor.name for tensor, _ in contents.not_finite] == [name]
    contents.check_finite(located)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -448.0])
def test_what_is_no_number_is_told_in_every_float(dtype: str, value: float) -> None:
    values = torch.ones(64)
    values[17] = value
    stored = values.to(getattr(torch, TORCH_NAMES[dtype]))
    seen = stored.to(torch.float32)
    expected = "NaN" if seen.isnan().any() else "an infinity" if seen.isinf().any() else None
    assert find_not_finite(view_bytes(stored), StoredTensor("x", dtype, (64,), Path())) == expected


@pytest.mark.parametrize("place_of", [0, 1, -1])
def test_each_byte_of_a_large_tensor_is_looked_at_and_hashed(tmp_path: Path, place_of: int) -> None:
    import hashlib

    numbers = torch.ones(2 * READ_BYTES // 2 + 77, dtype=torch.bfloat16)
    numbers[place_of] = float("inf")
    save_file({"a": torch.ones(3), "b": numbers, "c": torch.zeros(0)}, tmp_path / "model.safetensors")
    contents = read_contents(LocatedModel("x", tmp_path))
    assert [(tensor.name, what) for tensor, what in contents.not_finite] == [("b", "an infinity")]
    whole = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert contents.sha256 == hashlib.sha256(f"model.safetensors\0{whole}\n".encode()).hexdigest()
