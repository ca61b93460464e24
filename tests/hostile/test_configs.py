"""Configs with billions of layers are refused with one message, within 20 s and 2 GB."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import transformers as hf

from compressknow.base.errors import CheckpointError
from compressknow.model.meta import build_meta_model, check_numbers
from tests.hostile.bounded import bounded, run_refused


def save_config(tmp_path: Path, config: hf.PreTrainedConfig, architecture: str, **changes: object) -> Path:
    values = config.to_dict() | {"architectures": [architecture]} | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("count", [9_999, 10**9])
@pytest.mark.parametrize(
    ("config", "architecture", "key"),
    [
        (hf.LlamaConfig(), "LlamaForCausalLM", "num_hidden_layers"),
        (hf.BertConfig(), "BertForMaskedLM", "num_hidden_layers"),
        (hf.T5Config(), "T5ForConditionalGeneration", "num_layers"),
        (hf.GPT2Config(), "GPT2LMHeadModel", "n_layer"),
        (hf.AlbertConfig(), "AlbertForMaskedLM", "inner_group_num"),
        (hf.SwitchTransformersConfig(), "SwitchTransformersForConditionalGeneration", "num_experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_too_many_layers_or_experts_are_refused(
    tmp_path: Path,
    config: hf.PreTrainedConfig,
    architecture: str,
    key: str,
    count: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors = run_refused(capsys, "inspect", save_config(tmp_path, config, architecture, **{key: count}))
    assert str(tmp_path / "config.json") in errors
    assert "too many to build" in errors or f"has {key} {count:,}" in errors


def test_too_many_labels_or_layers_of_a_part_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = save_config(tmp_path, hf.BertConfig(), "BertForMaskedLM", num_labels=10**9)
    assert "num_labels 1,000,000,000" in run_refused(capsys, "inspect", labels)
    vision = hf.Gemma3Config().to_dict()["vision_config"] | {"num_hidden_layers": 10**9}
    part = save_config(tmp_path, hf.Gemma3Config(), "Gemma3ForConditionalGeneration", vision_config=vision)
    assert "num_hidden_layers 1,000,000,000" in run_refused(capsys, "inspect", part)


@pytest.mark.parametrize("size", [10**7, 10**9, 10**13, 10**300])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"])
def test_huge_sizes_take_no_memory(tmp_path: Path, key: str, size: int) -> None:
    """On the meta device, a model of any size is built without memory, or refused with a message."""
    folder = save_config(tmp_path, hf.DistilBertConfig(), "DistilBertForMaskedLM", **{key: size})
    with bounded(), contextlib.suppress(CheckpointError):
        build_meta_model(folder)


def test_numbers_of_real_configs_are_accepted() -> None:
    real = {
        "num_hidden_layers": 126,
        "n_routed_experts": 256,
        "num_experts": 2048,
        "num_labels": 670_091,
        "n_words": 2_000_000,
        "max_position_embeddings": 10_485_760,
        "n_positions": 1_048_576,
        "vocab_size": 902_629,
        "rope_theta": 500_000_000.0,
        "time_step_limit": [0.0, float("inf")],
        "num_parameters": 70_000_000_000,
        "bos_token_id": 128_000,
        "mask_value": -1e30,
    }
    check_numbers(Path("config.json"), real)


def test_deeply_nested_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(tmp_path, hf.BertConfig(), "BertForMaskedLM")
    text = (folder / "config.json").read_text()
    for opened, closed in (('{"a":', "}"), ("[", "]")):
        nested = opened * 900 + "1" + closed * 900
        (folder / "config.json").write_text(f'{{"task_specific_params": {nested}, {text[1:]}')
        assert "nested more than 30 levels" in run_refused(capsys, "inspect", folder)
