"""`compressknow inspect` on the command line."""

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
from tests.models import edit_tensors, tiny_of_groups

ALBERT = BERT | {"embedding_size": 8, "num_hidden_layers": 6}


def save_config(folder: Path, architecture: str, **config: Any) -> Path:
    model_class = getattr(transformers, architecture)
    settings = model_class.config_class(**config).to_dict() | {"architectures": [architecture]} | config
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def save_model(folder: Path, architecture: str, **config: Any) -> Path:
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**config))
    if not config.get("tie_word_embeddings", True):
        # T5's class ties the weights anyway.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(inspect(capsys, *arguments, "--json"))
    return result


def fail_to_inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = main(["inspect", *map(str, arguments)])
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return code, output.err


def test_json_has_the_documented_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = inspect_json(capsys, save_model(tmp_path / "bert", "BertForMaskedLM", **BERT))
    assert (summary["model"], summary["model_type"], summary["module_map"]) == ("bert", "bert", "structural")
    assert list(summary["groups"]) == ["attention", "feed-forward", "final", "other"]
    assert {"modules": 8, "stored": 2048, "used": 2048}.items() <= summary["groups"]["attention"].items()
    assert list(summary["scopes"]) == ["blocks", "attention", "feed-forward", "final", "overall", "self-attention"]
    assert summary["scopes"]["overall"] == {"prune": 2048 + 1536 + 256, "quantize": 2048 + 1536 + 256 + 1440}
    assert summary["unplaced"] == []
    assert ["cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"] in summary["tied"]


def test_json_lists_every_weight_with_shape_and_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = inspect_json(capsys, save_model(tmp_path, "BertForMaskedLM", **BERT))
    first = summary["groups"]["feed-forward"]["weights"][0]
    assert first["name"] == "bert.encoder.layer.0.intermediate.dense.weight"
    assert (first["shape"], first["dtype"], first["layer"]) == ([24, 16], "BF16", 0)
    assert summary["groups"]["final"]["weights"][0]["dtype"] == "BF16"


def test_int4_weights_are_listed_as_int4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_of_groups("llama-tied").save_pretrained(tmp_path / "llama")
    options = {"quantize": "int4", "scope": ["attention", "final"], "parameters": {"group_size": 32}}
    compressknow.convert(tmp_path / "llama", tmp_path / "int4", **options)
    assert inspect_json(capsys, tmp_path / "int4")["tied"] == []
    groups = inspect_json(capsys, tmp_path / "int4")["groups"]
    assert {weight["dtype"] for weight in groups["attention"]["weights"]} == {"I4"}
    assert {weight["dtype"] for weight in groups["feed-forward"]["weights"]} == {"F32"}
    assert "4 x [32, 32] int4\n" in inspect(capsys, tmp_path / "int4")


def test_counts_agree_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path, "BertForMaskedLM", **BERT)
    expected = transformers.BertForMaskedLM.from_pretrained(folder).num_parameters()
    assert inspect_json(capsys, folder)["parameters"] == {"stored": expected, "used": expected}


def test_config_without_weights_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_config = inspect_json(capsys, save_config(tmp_path / "bert", "BertForMaskedLM", **BERT))
    from_weights = inspect_json(capsys, save_model(tmp_path / "bert", "BertForMaskedLM", **BERT))
    assert from_config["scopes"] == from_weights["scopes"]
    assert from_config["parameters"] == from_weights["parameters"]
    assert from_config["groups"]["attention"]["weights"][0]["dtype"] is None


def test_paper_map_moves_parameters_between_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(tmp_path, "BertForMaskedLM", **BERT)
    structural = inspect_json(capsys, folder)["scopes"]
    paper = inspect_json(capsys, folder, "--module-map", "paper")["scopes"]
    assert structural["attention"]["prune"] - paper["attention"]["prune"] == 2 * 16 * 16
    assert structural["overall"] == paper["overall"]


def test_unknown_module_map_is_refused_in_python(tmp_path: Path) -> None:
    with pytest.raises(compressknow.UsageError, match="Unknown module map 'papr'"):
        compressknow.inspect(save_config(tmp_path, "BertForMaskedLM", **BERT), module_map="papr")  # type: ignore[arg-type]


def test_output_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for architecture, config in (("BertForMaskedLM", BERT), ("T5ForConditionalGeneration", T5)):
        page = inspect(capsys, save_config(tmp_path, architecture, **config))
        assert max(map(len, page.splitlines())) <= 80


def test_output_shows_shapes_and_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = inspect(capsys, save_model(tmp_path, "BertForMaskedLM", **BERT))
    assert "8 x [16, 16] bf16" in page
    assert "2 x [24, 16] bf16" in page
    assert "cls.predictions.decoder.weight = bert.embeddings.word_embeddings.weight" in page
    assert "Unplaced" not in page


def test_shared_layers_of_albert_are_counted_as_stored_and_as_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path, "AlbertForMaskedLM", **ALBERT)
    values = inspect_json(capsys, folder)
    attention = values["groups"]["attention"]
    assert (attention["stored"], attention["used"]) == (4 * 256, 6 * 4 * 256)
    shared = sum(group["used"] - group["stored"] for group in values["groups"].values())
    assert values["parameters"]["used"] - values["parameters"]["stored"] == shared > 0
    assert "4 x [16, 16] bf16, each used 6 times" in inspect(capsys, folder)


def test_encoder_and_decoder_have_their_scopes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scopes = inspect_json(capsys, save_config(tmp_path, "T5ForConditionalGeneration", **T5))["scopes"]
    assert {"cross-attention", "encoder-attention", "decoder-attention", "encoder", "decoder"} <= scopes.keys()
    both = scopes["encoder-attention"]["prune"] + scopes["decoder-attention"]["prune"]
    assert both == scopes["attention"]["prune"]


def test_weights_that_differ_are_not_tied_even_if_the_class_ties_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = inspect_json(capsys, save_model(tmp_path / "tied", "T5ForConditionalGeneration", **T5))
    folder = save_model(tmp_path / "untied", "T5ForConditionalGeneration", **T5 | {"tie_word_embeddings": False})
    untied = inspect_json(capsys, folder)
    assert ["lm_head.weight", "shared.weight"] in tied["tied"]
    assert "lm_head.weight" not in [name for name, _ in untied["tied"]]
    assert untied["parameters"]["stored"] - tied["parameters"]["stored"] == 90 * 16
    assert untied["scopes"] == tied["scopes"]
    edit_tensors(
        tmp_path / "tied", lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"].clone()})
    )
    assert inspect_json(capsys, tmp_path / "tied")["tied"] == tied["tied"]


def test_config_decides_about_ties_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(tmp_path, "T5ForConditionalGeneration", **T5 | {"tie_word_embeddings": False})
    assert "lm_head.weight" not in [name for name, _ in inspect_json(capsys, folder)["tied"]]


def test_matrices_outside_linear_layers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_config(tmp_path, "XLNetLMHeadModel", vocab_size=90, d_model=16, n_layer=2, n_head=2, d_inner=24)
    assert inspect_json(capsys, folder)["opaque"]["transformer.layer.1.rel_attn.k"] == "attention"
    assert "2 x transformer.layer.N.rel_attn.k" in inspect(capsys, folder)


def test_missing_folder_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = fail_to_inspect(capsys, tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in message


def test_revision_of_a_gguf_file_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").touch()
    code, message = fail_to_inspect(capsys, tmp_path / "model.gguf", "--revision", "v1")
    assert code == 2
    assert "model.gguf is a local file, which has no revision v1." in message


def test_config_without_an_architecture_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    code, message = fail_to_inspect(capsys, tmp_path)
    assert code == 1
    assert "names no architecture" in message


def test_unknown_module_map_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = fail_to_inspect(capsys, tmp_path, "--module-map", "martian")
    assert code == 2
    assert "structural" in message


def test_weights_already_on_a_quantization_grid_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = save_model(tmp_path / "llama", "LlamaForCausalLM", vocab_size=90, num_key_value_heads=2, **llama)
    assert "grid" not in inspect(capsys, folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
            # 16 values per group of 32, from a scale and a minimum, as in Q4_1.
            groups = linear.weight.data.float().reshape(-1, 32)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            steps = ((groups - low) / (high - low) * 15).round()
            linear.weight.data = (low + steps * (high - low) / 15).reshape_as(linear.weight).bfloat16()
        # A pruned matrix is not on a grid (half of its zeros are negative), nor one of which half the rows are.
        layer.mlp.down_proj.weight.data *= torch.rand_like(layer.mlp.down_proj.weight) > 0.7
        layer.mlp.gate_proj.weight.data[:48] = layer.mlp.up_proj.weight.data[:48]
    model.save_pretrained(folder)
    assert inspect_json(capsys, folder)["grid"]["weights"] == 2
    assert "On a grid already: 2 of 9 matrices" in inspect(capsys, folder)
