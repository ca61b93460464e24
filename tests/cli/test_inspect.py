"""`compressknow inspect`, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compressknow
from compressknow.cli import main
from tests.model.test_groups import BERT, T5
from tests.models import tiny_of_groups

ALBERT = BERT | {"embedding_size": 8, "num_hidden_layers": 6}


def config_only(folder: Path, architecture: str, **config: Any) -> Path:
    model_class = getattr(transformers, architecture)
    described = model_class.config_class(**config).to_dict() | {"architectures": [architecture]} | config
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def with_weights(folder: Path, architecture: str, **config: Any) -> Path:
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**config))
    if not config.get("tie_word_embeddings", True):
        # T5's class shares the weight at first; the two are told apart by their values alone.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def record(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json"))
    return result


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = main(["inspect", *map(str, arguments)])
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return code, output.err


def test_json_has_the_keys_that_others_rely_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = record(capsys, with_weights(tmp_path / "bert", "BertForMaskedLM", **BERT))
    assert (summary["model"], summary["model_type"], summary["module_map"]) == ("bert", "bert", "structural")
    assert list(summary["groups"]) == ["attention", "feed-forward", "final", "other"]
    assert {"modules": 8, "stored": 2048, "used": 2048}.items() <= summary["groups"]["attention"].items()
    assert list(summary["scopes"]) == ["blocks", "attention", "feed-forward", "final", "overall", "self-attention"]
    assert summary["scopes"]["overall"] == {"prune": 2048 + 1536 + 256, "quantize": 2048 + 1536 + 256 + 1440}
    assert summary["unplaced"] == []
    assert ["cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"] in summary["tied"]


def test_json_lists_every_weight_with_shape_and_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = record(capsys, with_weights(tmp_path, "BertForMaskedLM", **BERT))
    first = summary["groups"]["feed-forward"]["weights"][0]
    assert first["name"] == "bert.encoder.layer.0.intermediate.dense.weight"
    assert (first["shape"], first["dtype"], first["layer"]) == ([24, 16], "BF16", 0)
    assert summary["groups"]["final"]["weights"][0]["dtype"] == "BF16"


def test_weights_of_four_bits_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_of_groups("llama-tied").save_pretrained(tmp_path / "llama")
    options = {"quantize": "int4", "scope": ["attention", "final"], "parameters": {"group_size": 32}}
    compressknow.convert(tmp_path / "llama", tmp_path / "int4", **options)
    assert record(capsys, tmp_path / "int4")["tied"] == []
    groups = record(capsys, tmp_path / "int4")["groups"]
    assert {weight["dtype"] for weight in groups["attention"]["weights"]} == {"I4"}
    assert {weight["dtype"] for weight in groups["feed-forward"]["weights"]} == {"F32"}
    assert "4 x [32, 32] int4\n" in printed(capsys, tmp_path / "int4")


def test_counts_agree_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_weights(tmp_path, "BertForMaskedLM", **BERT)
    expected = transformers.BertForMaskedLM.from_pretrained(folder).num_parameters()
    assert record(capsys, folder)["parameters"] == {"stored": expected, "used": expected}


def test_a_config_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = record(capsys, config_only(tmp_path / "bert", "BertForMaskedLM", **BERT))
    stored = record(capsys, with_weights(tmp_path / "bert", "BertForMaskedLM", **BERT))
    assert described["scopes"] == stored["scopes"]
    assert described["parameters"] == stored["parameters"]
    assert described["groups"]["attention"]["weights"][0]["dtype"] is None


def test_the_papers_map_moves_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_only(tmp_path, "BertForMaskedLM", **BERT)
    structural = record(capsys, folder)["scopes"]
    paper = record(capsys, folder, "--module-map", "paper")["scopes"]
    assert structural["attention"]["prune"] - paper["attention"]["prune"] == 2 * 16 * 16
    assert structural["overall"] == paper["overall"]


def test_a_map_that_there_is_not_is_no_other_one(tmp_path: Path) -> None:
    with pytest.raises(compressknow.UsageError, match="Unknown module map 'papr'"):
        compressknow.inspect(config_only(tmp_path, "BertForMaskedLM", **BERT), module_map="papr")  # type: ignore[arg-type]


def test_the_page_fits_eighty_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for architecture, config in (("BertForMaskedLM", BERT), ("T5ForConditionalGeneration", T5)):
        page = printed(capsys, config_only(tmp_path, architecture, **config))
        assert max(map(len, page.splitlines())) <= 80


def test_the_page_shows_shapes_scopes_and_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, with_weights(tmp_path, "BertForMaskedLM", **BERT))
    assert "8 x [16, 16] bf16" in page
    assert "2 x [24, 16] bf16" in page
    assert "cls.predictions.decoder.weight = bert.embeddings.word_embeddings.weight" in page
    assert "Unplaced" not in page


def test_albert_shows_both_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_weights(tmp_path, "AlbertForMaskedLM", **ALBERT)
    attention = record(capsys, folder)["groups"]["attention"]
    assert (attention["stored"], attention["used"]) == (4 * 256, 6 * 4 * 256)
    assert "4 x [16, 16] bf16, each used 6 times" in printed(capsys, folder)


def test_both_stacks_have_their_scopes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scopes = record(capsys, config_only(tmp_path, "T5ForConditionalGeneration", **T5))["scopes"]
    assert {"cross-attention", "encoder-attention", "decoder-attention", "encoder", "decoder"} <= scopes.keys()
    both = scopes["encoder-attention"]["prune"] + scopes["decoder-attention"]["prune"]
    assert both == scopes["attention"]["prune"]


def test_weights_that_differ_are_not_tied_whatever_the_class_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = record(capsys, with_weights(tmp_path / "tied", "T5ForConditionalGeneration", **T5))
    folder = with_weights(tmp_path / "untied", "T5ForConditionalGeneration", **T5 | {"tie_word_embeddings": False})
    untied = record(capsys, folder)
    assert ["lm_head.weight", "shared.weight"] in tied["tied"]
    assert "lm_head.weight" not in [name for name, _ in untied["tied"]]
    assert untied["parameters"]["stored"] - tied["parameters"]["stored"] == 90 * 16
    assert untied["scopes"] == tied["scopes"]


def test_a_config_that_says_untied_is_believed_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_only(tmp_path, "T5ForConditionalGeneration", **T5 | {"tie_word_embeddings": False})
    assert "lm_head.weight" not in [name for name, _ in record(capsys, folder)["tied"]]


def test_matrices_that_are_no_linear_layers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_only(tmp_path, "XLNetLMHeadModel", vocab_size=90, d_model=16, n_layer=2, n_head=2, d_inner=24)
    assert record(capsys, folder)["opaque"]["transformer.layer.1.rel_attn.k"] == "attention"
    assert "2 x transformer.layer.N.rel_attn.k" in printed(capsys, folder)


def test_a_missing_folder_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failure(capsys, tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in message


def test_a_config_without_an_architecture_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    code, message = failure(capsys, tmp_path)
    assert code == 1
    assert "names no architecture" in message


def test_an_unknown_module_map_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failure(capsys, tmp_path, "--module-map", "martian")
    assert code == 2
    assert "structural" in message


def test_weights_that_lie_on_a_grid_already_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = with_weights(tmp_path / "llama", "LlamaForCausalLM", vocab_size=90, num_key_value_heads=2, **llama)
    assert "grid" not in printed(capsys, folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
            # 16 values of a group, as Q4_1 has them: a scale and a smallest.
            groups = linear.weight.data.float().reshape(-1, 32)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            steps = ((groups - low) / (high - low) * 15).round()
            linear.weight.data = (low + steps * (high - low) / 15).reshape_as(linear.weight).bfloat16()
        # Zeros are not values of a grid.
        layer.mlp.down_proj.weight.data[torch.rand_like(layer.mlp.down_proj.weight) < 0.7] = 0
    model.save_pretrained(folder)
    assert record(capsys, folder)["grid"]["weights"] == 2
    assert "On a grid already: 2 of 9 matrices" in printed(capsys, folder)
