"""A config.json gives a module tree and its structure, or an error that says what is wrong with it."""

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
from compressknow.model.meta import build_meta_model, parse_config
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


def write_config(tmp_path: Path, config: Any) -> Path:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


def test_a_meta_model_has_no_weights_and_draws_no_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model = build_meta_model(write_config(tmp_path, BERT))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not model.training
    assert torch.equal(torch.rand(3), expected)
    assert not torch.nn.modules.module._global_module_registration_hooks, "later models are not counted"


def test_a_model_of_70_billion_parameters_needs_no_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | sizes
    assert build_meta_model(write_config(tmp_path, config)).num_parameters() > 60e9


def test_building_a_model_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = BERT | {"architectures": ["BertLMHeadModel"], "is_decoder": False}
    build_meta_model(write_config(tmp_path, decoder))
    assert capfd.readouterr() == ("", "")


def test_a_model_without_a_head_has_no_final_layer(tmp_path: Path) -> None:
    structure = read_structure(build_meta_model(write_config(tmp_path, BERT | {"architectures": ["BertModel"]})))
    assert not [weight for weight in structure.linears if weight.group == "final"]


def test_an_attention_kernel_that_is_not_installed_does_not_matter(tmp_path: Path) -> None:
    assert build_meta_model(write_config(tmp_path, BERT | {"attn_implementation": "flash_attention_2"}))


@pytest.mark.parametrize(
    ("config", "message"),
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
def test_an_invalid_config_is_an_error_with_the_reason(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        build_meta_model(write_config(tmp_path, config))
    assert message in str(error.value)
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


OWN_HEAD = """
    def __init__(self, config):
        super().__init__(config)
        self.cls, self.decoder = None, self.cls.predictions.decoder

    def get_output_embeddings(self):
        return None
"""


def test_custom_code_is_not_run_without_trust(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "tiny.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        build_meta_model(write_config(tmp_path, REMOTE))
    assert not trap.exists()


@pytest.mark.parametrize("known", [{}, {"architectures": ["BertForMaskedLM"]}, {"model_type": "bert"}])
def test_custom_code_is_run_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: dict[str, Any]) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text(REMOTE_CODE)
    config = REMOTE | known | {"auto_map": REMOTE["auto_map"] | {"AutoTokenizer": ["tiny.TinyTokenizer", None]}}
    model = build_meta_model(write_config(tmp_path, config), trust_remote_code=True)
    structure = read_structure(model)
    assert structure.architecture == config["architectures"][0]
    assert not structure.unplaced
    assert [type(each).__name__ for each in (model.config, parse_config(model, config))] == ["TinyConfig"] * 2


def test_family_and_head_of_custom_code_that_names_neither_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeoBERT's is such code: the config gives the task of its class, and its head has a row per token."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text(REMOTE_CODE + OWN_HEAD)
    model = build_meta_model(write_config(tmp_path, REMOTE), trust_remote_code=True)
    assert find_family(model) == "masked"
    final = [weight.module for weight in read_structure(model).linears if weight.group == "final"]
    assert final == ["decoder"]


def test_custom_code_is_not_run_if_transformers_has_the_class(tmp_path: Path) -> None:
    """Phi-3's own config class is older than transformers' model class, and lacks settings that this needs."""
    config = BERT | {"auto_map": {"AutoConfig": "tiny.BertConfig", "AutoModelForMaskedLM": "tiny.BertForMaskedLM"}}
    (tmp_path / "tiny.py").write_text("1 / 0")
    model = build_meta_model(write_config(tmp_path, config), trust_remote_code=True)
    assert type(model) is transformers.BertForMaskedLM


def test_custom_code_that_fails_is_an_error_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text("1 / 0")
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        build_meta_model(write_config(tmp_path, REMOTE), trust_remote_code=True)


# AntiBERTy names an unpublished class; it has the tensors of BERT and three small heads.
UNKNOWN_CLASS = BERT | {"architectures": ["AntiBERTy"]}


def list_tensor_names(architecture: str) -> list[str]:
    model_class = getattr(transformers, architecture)
    settings = {name: value for name, value in BERT.items() if name not in ("architectures", "model_type")}
    with torch.device("meta"):
        return [*model_class(transformers.BertConfig(**settings)).state_dict(), "cls.species.weight"]


def test_an_unknown_class_is_recognized_by_its_tensors(tmp_path: Path) -> None:
    model = build_meta_model(write_config(tmp_path, UNKNOWN_CLASS), tensor_names=list_tensor_names("BertForMaskedLM"))
    assert type(model).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize("architecture", ["BartForConditionalGeneration", "BartForCausalLM"])
def test_an_unknown_class_is_the_known_one_that_has_no_other_tensors(tmp_path: Path, architecture: str) -> None:
    """Both have a decoder with a head of the same names."""
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= {"d_model": 16, "vocab_size": 25, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with torch.device("meta"):
        names = getattr(transformers, architecture)(transformers.BartConfig(**sizes)).state_dict()
    config = {"architectures": ["Unpublished"], "model_type": "bart"} | sizes
    model = build_meta_model(write_config(tmp_path, config), tensor_names=names)
    assert type(model).__name__ == architecture


@pytest.mark.parametrize("names", [(), list_tensor_names("BertModel"), ["weight"]])
def test_an_unknown_class_without_a_known_head_lists_the_candidates(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        build_meta_model(write_config(tmp_path, UNKNOWN_CLASS), tensor_names=names)
    assert "AntiBERTy" in error.value.what
    assert "BertForMaskedLM, BertLMHeadModel" in str(error.value.hint)


def test_the_text_part_of_a_multimodal_config_is_found(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 25, "num_attention_heads": 2}
    config = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4", "text_config": text}
    model = build_meta_model(write_config(tmp_path, config))
    assert model.config.hidden_size == 16


def test_a_weight_counts_once_as_stored_and_once_per_use() -> None:
    shared = LinearWeight("a.weight", "a", "linear", (3, 5), "attention", uses=4)
    assert (shared.stored, shared.used) == (15, 60)


def test_the_summary_counts_parameters_as_transformers_does(tmp_path: Path) -> None:
    for architecture in ("BertForMaskedLM", "BertModel"):
        model = build_meta_model(write_config(tmp_path, BERT | {"architectures": [architecture]}))
        counts = summarize(read_structure(model), "bert", None)["parameters"]
        assert counts == {"stored": model.num_parameters(), "used": model.num_parameters()}


def test_buffers_are_no_parameters(tmp_path: Path) -> None:
    model = build_meta_model(write_config(tmp_path, BERT))
    expected = model.num_parameters()
    model.register_buffer("statistics", torch.zeros(7, device="meta"))
    structure = read_structure(model)
    assert structure.parameters["statistics"] == (7,)
    assert summarize(structure, "bert", None)["parameters"]["stored"] == expected


def test_a_tied_layer_has_the_dtype_of_its_stored_weight(tmp_path: Path) -> None:
    structure = read_structure(build_meta_model(write_config(tmp_path, BERT)))
    summary = summarize(structure, "bert", {"bert.embeddings.word_embeddings.weight": "BF16"})
    assert summary["groups"]["final"]["weights"][0]["dtype"] == "BF16"
    assert summary["groups"]["other"]["weights"][0]["dtype"] is None


def test_groups_add_up_to_the_total(tmp_path: Path) -> None:
    generator = random.Random(0)
    for _ in range(5):
        heads = generator.randint(1, 4)
        sizes = {"hidden_size": 4 * heads, "num_attention_heads": heads, "num_hidden_layers": generator.randint(1, 5)}
        structure = read_structure(build_meta_model(write_config(tmp_path, BERT | sizes)))
        summary = summarize(structure, "bert", None)
        used = sum(summary["groups"][group]["used"] for group in GROUPS if group != "vision")
        assert used == summary["scopes"]["overall"]["quantize"] == sum(weight.used for weight in structure.linears)
