"""From a config.json to a module tree and its record; and configs that describe none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressknow.base.errors import CheckpointError
from compressknow.engine.language_model import find_family
from compressknow.model.groups import read_structure
from compressknow.model.meta import build_meta_model
from compressknow.model.structure import GROUPS, LinearWeight
from compressknow.model.summary import summarize

BERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 25,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def folder(tmp_path: Path, config: Any) -> Path:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


def test_the_tree_has_no_weights_and_costs_no_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model = build_meta_model(folder(tmp_path, BERT))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(torch.rand(3), expected)


def test_a_model_of_seventy_billion_parameters_needs_no_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    model = build_meta_model(folder(tmp_path, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | sizes))
    assert model.num_parameters() > 60e9


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = BERT | {"architectures": ["BertLMHeadModel"], "is_decoder": False}
    build_meta_model(folder(tmp_path, decoder))
    assert capfd.readouterr() == ("", "")


def test_a_model_without_a_head_has_no_final_layer(tmp_path: Path) -> None:
    structure = read_structure(build_meta_model(folder(tmp_path, BERT | {"architectures": ["BertModel"]})))
    assert not [weight for weight in structure.linears if weight.group == "final"]


def test_an_attention_kernel_that_is_not_installed_does_not_matter(tmp_path: Path) -> None:
    assert build_meta_model(folder(tmp_path, BERT | {"attn_implementation": "flash_attention_2"}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("not json", "cannot be read"),
        ("[]", "no JSON object"),
        ({"model_type": "bert"}, "BertForMaskedLM"),
        (BERT | {"architectures": []}, "names no architecture"),
        (BERT | {"architectures": "BertForMaskedLM"}, "names no architecture"),
        ({"architectures": ["BertForMaskedLM"]}, "names no model_type"),
        (BERT | {"model_type": "martian"}, "martian"),
        (BERT | {"hidden_size": "wide"}, "hidden_size"),
        (BERT | {"hidden_size": -16}, "negative dimension"),
        (BERT | {"num_attention_heads": 5}, "attention heads"),
        (BERT | {"hidden_act": "martian"}, "martian"),
        (BERT | {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        (BERT | {"architectures": ["BertConfig"]}, "BertForMaskedLM, BertLMHeadModel"),
        (BERT | {"architectures": ["BertPreTrainedModel"]}, "BertForMaskedLM, BertLMHeadModel"),
    ],
)
def test_a_config_that_describes_no_model_is_an_error_that_says_why(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        build_meta_model(folder(tmp_path, config))
    assert said in str(error.value)
    assert "config.json" in error.value.what


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        build_meta_model(tmp_path)


REMOTE = BERT | {"architectures": ["TinyModel"], "model_type": "tiny-remote"}
REMOTE["auto_map"] = {"AutoConfig": "tiny.TinyConfig", "AutoModelForMaskedLM": "tiny.TinyModel"}
REMOTE_CODE = """
from transformers import BertConfig, BertForMaskedLM

class TinyConfig(BertConfig):
    model_type = "tiny-remote"

class TinyModel(BertForMaskedLM):
    config_class = TinyConfig
"""


def test_a_checkpoints_own_code_is_not_run_unasked(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "tiny.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        build_meta_model(folder(tmp_path, REMOTE))
    assert not trap.exists()


def test_a_checkpoints_own_code_is_run_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text(REMOTE_CODE)
    structure = read_structure(build_meta_model(folder(tmp_path, REMOTE), trust_remote_code=True))
    assert structure.architecture == "TinyModel"
    assert not structure.unplaced


def test_own_code_that_names_neither_its_family_nor_its_head_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NeoBERT's: its config says what its class is for, and its head has a row per token."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text(f"{REMOTE_CODE}\n    def get_output_embeddings(self):\n        return None\n")
    model = build_meta_model(folder(tmp_path, REMOTE), trust_remote_code=True)
    assert find_family(model) == "masked"
    final = [weight.module for weight in read_structure(model).linears if weight.group == "final"]
    assert final == ["cls.predictions.decoder"]


def test_the_own_code_of_a_class_that_transformers_has_is_not_run(tmp_path: Path) -> None:
    """That of Phi-3 is older than transformers' class of its name, which its config lacks settings for."""
    config = BERT | {"auto_map": {"AutoConfig": "tiny.BertConfig", "AutoModelForMaskedLM": "tiny.BertForMaskedLM"}}
    (tmp_path / "tiny.py").write_text("1 / 0")
    model = build_meta_model(folder(tmp_path, config), trust_remote_code=True)
    assert type(model) is transformers.BertForMaskedLM


def test_code_that_fails_is_an_error_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text("1 / 0")
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        build_meta_model(folder(tmp_path, REMOTE), trust_remote_code=True)


# AntiBERTy names a class of its authors' own; its tensors are BERT's, with three small heads more.
OWN_CLASS = BERT | {"architectures": ["AntiBERTy"]}


def names_of(architecture: str) -> list[str]:
    model_class = getattr(transformers, architecture)
    settings = {name: value for name, value in BERT.items() if name not in ("architectures", "model_type")}
    with torch.device("meta"):
        return [*model_class(transformers.BertConfig(**settings)).state_dict(), "cls.species.weight"]


def test_an_unknown_class_is_told_by_the_stored_tensors(tmp_path: Path) -> None:
    model = build_meta_model(folder(tmp_path, OWN_CLASS), tensor_names=names_of("BertForMaskedLM"))
    assert type(model).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize("names", [(), names_of("BertModel"), ["weight"]])
def test_an_unknown_class_without_a_head_to_tell_it_lists_the_candidates(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        build_meta_model(folder(tmp_path, OWN_CLASS), tensor_names=names)
    assert "AntiBERTy" in error.value.what
    assert "BertForMaskedLM, BertLMHeadModel" in str(error.value.hint)


def test_the_text_part_of_a_multimodal_config_is_found(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 25, "num_attention_heads": 2}
    config = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4", "text_config": text}
    model = build_meta_model(folder(tmp_path, config))
    assert model.config.hidden_size == 16


def weight(group: Any, shape: tuple[int, ...], uses: int = 1) -> LinearWeight:
    return LinearWeight("a.weight", "a", "linear", shape, group, uses=uses)


def test_a_weight_counts_once_as_stored_and_once_a_use_as_used() -> None:
    shared = weight("attention", (3, 5), uses=4)
    assert (shared.stored, shared.used) == (15, 60)


def test_the_summary_counts_what_transformers_counts(tmp_path: Path) -> None:
    for architecture in ("BertForMaskedLM", "BertModel"):
        model = build_meta_model(folder(tmp_path, BERT | {"architectures": [architecture]}))
        counts = summarize(read_structure(model), "bert", None)["parameters"]
        assert counts == {"stored": model.num_parameters(), "used": model.num_parameters()}


def test_buffers_are_no_parameters(tmp_path: Path) -> None:
    model = build_meta_model(folder(tmp_path, BERT))
    expected = model.num_parameters()
    model.register_buffer("statistics", torch.zeros(7, device="meta"))
    structure = read_structure(model)
    assert structure.parameters["statistics"] == (7,)
    assert summarize(structure, "bert", None)["parameters"]["stored"] == expected


def test_a_tied_layer_takes_the_dtype_of_the_name_it_is_stored_under(tmp_path: Path) -> None:
    structure = read_structure(build_meta_model(folder(tmp_path, BERT)))
    summary = summarize(structure, "bert", {"bert.embeddings.word_embeddings.weight": "BF16"})
    assert summary["groups"]["final"]["weights"][0]["dtype"] == "BF16"
    assert summary["groups"]["other"]["weights"][0]["dtype"] is None


def test_groups_add_up_whatever_the_sizes(tmp_path: Path) -> None:
    generator = random.Random(0)
    for _ in range(5):
        heads = generator.randint(1, 4)
        sizes = {"hidden_size": 4 * heads, "num_attention_heads": heads, "num_hidden_layers": generator.randint(1, 5)}
        structure = read_structure(build_meta_model(folder(tmp_path, BERT | sizes)))
        summary = summarize(structure, "bert", None)
        taken = sum(summary["groups"][group]["used"] for group in GROUPS if group != "vision")
        assert taken == summary["scopes"]["overall"]["quantize"] == sum(weight.used for weight in structure.linears)
