"""Targets in quantization_config name the quantized layers, in the whole model and in other classes on its base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.quantization.utils.helpers import is_module_quantized
from compressed_tensors.utils.match import is_match
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import compressknow
from compressknow.comparison.checkpoints import diff_checkpoints
from compressknow.compress import schemes
from compressknow.compress.output_config import build_quantization_config, build_target_patterns, count_targets
from compressknow.model.checkpoint import open_checkpoint
from compressknow.model.groups import read_structure
from compressknow.model.structure import select
from tests.models import QUANTIZABLE, VOCABULARY, logits, save_tiny, tiny

SCHEMES = ("int8", "int8-paper", "int8-weights", "fp8")
module_names = st.lists(
    st.lists(st.sampled_from(["model", "layers", "0", "1", "12", "q-proj", "up.down", "projector"]), min_size=1).map(
        ".".join
    ),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(module_names, st.data())
def test_patterns_match_the_named_modules_and_no_others(modules: list[str], data: Any) -> None:
    selected = data.draw(st.lists(st.sampled_from(modules), unique=True, min_size=1))
    others = [module for module in modules if module not in selected]
    patterns = build_target_patterns(selected, "model", others)
    linear = torch.nn.Linear(1, 1)
    assert [name for name in modules if is_match(name, linear, patterns)] == [m for m in modules if m in selected]
    # One pattern matches a module with and without the prefix.
    assert count_targets(patterns) == len({module.removeprefix("model.") for module in selected})


def test_layers_that_differ_only_in_numbers_share_a_pattern() -> None:
    modules = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(3) for j in range(4)]
    (pattern,) = build_target_patterns([*modules], "model")
    assert pattern == r"re:^(?:model\.)?layers\.(?:0|1|2)\.mlp\.experts\.(?:0|1|2|3)\.up_proj$"
    assert len(build_target_patterns(modules[1:], "model")) == 2  # One expert of one layer is not a target.


def test_modules_whose_names_differ_only_in_the_prefix_are_told_apart() -> None:
    for one, other in (("model.projector", "projector"), ("projector", "model.projector")):
        assert build_target_patterns([one], "model", [other]) == [f"re:^{re.escape(one)}$"]
        settings = build_quantization_config({schemes.SCHEMES["int8"]: [one]}, [other], "0", "model")
        assert settings["config_groups"]["group_0"]["targets"] == [f"re:^{re.escape(one)}$"]
        assert settings["ignore"] == [f"re:^{re.escape(other)}$"]


def list_quantized_modules(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_module_quantized(module)}


def convert_tiny(
    name: str, tmp_path: Path, scope: str = "overall", layers: str | None = None, scheme: Any = "int8"
) -> tuple[Path, set[str]]:
    """Convert a tiny model; return the folder and the names of its quantized modules."""
    compressknow.convert(
        save_tiny(name, tmp_path / "in"), tmp_path / "out", scope=scope, layers=layers, quantize=scheme
    )
    selected = select(read_structure(tiny(name)), [scope], "quantize", layers=layers)
    return tmp_path / "out", {weight.module for weight in selected}


@pytest.mark.parametrize("name", QUANTIZABLE)
@pytest.mark.parametrize(("scope", "layers"), [("overall", None), ("attention", "0")])
def test_whole_model_and_base_model_load_the_same_layers_as_int8(
    tmp_path: Path, name: str, scope: str, layers: str | None
) -> None:
    folder, expected = convert_tiny(name, tmp_path, scope, layers)
    assert list_quantized_modules(type(tiny(name)).from_pretrained(folder)) == expected
    base = hf.AutoModel.from_pretrained(folder)
    inside = {name.removeprefix(f"{base.base_model_prefix}.") for name in expected} & {
        n for n, _ in base.named_modules()
    }
    assert list_quantized_modules(base) == inside != set()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert", "opt", "llama-tied", "qwen3", "gpt-neox"])
def test_the_base_model_computes_the_same_hidden_states(tmp_path: Path, name: str, scheme: str) -> None:
    folder, _ = convert_tiny(name, tmp_path, scheme=scheme)
    ids = torch.arange(5, 15)[None]
    whole = type(tiny(name)).from_pretrained(folder)
    with torch.inference_mode():
        expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        hidden = hf.AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama-tied", "t5-tied"])
def test_a_new_classification_head_is_float_over_int8_layers(tmp_path: Path, name: str) -> None:
    folder, expected = convert_tiny(name, tmp_path)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    inner = {module.removeprefix("transformer.") for module in list_quantized_modules(model)}
    assert {module for module in inner if "classif" not in module and "score" not in module} == inner
    assert inner == {module for module in expected if module in inner} != set()
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_encoder_of_t5_loads_alone(tmp_path: Path) -> None:
    folder, expected = convert_tiny("t5-tied", tmp_path)
    encoder = hf.T5EncoderModel.from_pretrained(folder)
    assert list_quantized_modules(encoder) == {module for module in expected if module.startswith("encoder.")}
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        expected_states = compressknow.load(folder).get_encoder()(input_ids=ids).last_hidden_state
        states = encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, expected_states, rtol=0.05, atol=0.05)


def save_tokenizer(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(VOCABULARY - 5))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "cls_token": "[CLS]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]", **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction"])
def test_pipelines_load_a_converted_folder(tmp_path: Path, task: Any) -> None:
    folder, _ = convert_tiny("bert", tmp_path)
    results = hf.pipeline(task, model=str(save_tokenizer(folder)), device="cpu")("word1 [MASK] word3")
    assert len(results) == (5 if task == "fill-mask" else 1)


def name_each_module(folder: Path) -> None:
    """Rewrite a converted folder's config with the full name of each module, as compressknow 0.1.0 wrote it."""
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    linears = [name for name, module in tiny("bert").named_modules() if isinstance(module, torch.nn.Linear)]
    for holder, key in ((settings["config_groups"]["group_0"], "targets"), (settings, "ignore")):
        patterns = [re.compile(pattern.removeprefix("re:")) for pattern in holder[key]]
        holder[key] = [name for name in linears if any(pattern.match(name) for pattern in patterns)]
    (folder / "config.json").write_text(json.dumps(config))


def test_targets_of_version_0_1_0_still_load_and_compare(tmp_path: Path) -> None:
    folder, expected = convert_tiny("bert", tmp_path, "attention")
    before = logits(compressknow.load(folder))
    (tmp_path / "old").mkdir()
    for path in folder.iterdir():
        (tmp_path / "old" / path.name).write_bytes(path.read_bytes())
    name_each_module(tmp_path / "old")
    assert list_quantized_modules(hf.BertForMaskedLM.from_pretrained(tmp_path / "old")) == expected
    assert torch.equal(logits(compressknow.load(tmp_path / "old")), before)
    diff = diff_checkpoints(open_checkpoint(tmp_path / "old"), open_checkpoint(folder))
    assert diff.same_weights
    assert diff.config == ()


def save_tiny_llava(folder: Path) -> Path:
    """Write a LLaVA with a vision tower of three blocks and a language model of two."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = hf.CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=32, patch_size=16)
    text = hf.LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "start", "layers"),
    [
        ({}, "model.language_model.layers.", "01"),
        ({"layers": "0"}, "model.language_model.layers.", "0"),
        ({"scope": "vision"}, "model.vision_tower.", "012"),
        ({"scope": "vision", "layers": "0,2"}, "model.vision_tower.", "02"),
    ],
)
def test_a_scope_selects_the_language_model_or_the_vision_tower(
    tmp_path: Path, options: dict[str, str], start: str, layers: str
) -> None:
    compressknow.convert(save_tiny_llava(tmp_path / "in"), tmp_path / "out", quantize="int8", **options)  # type: ignore[arg-type]
    quantized = list_quantized_modules(hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out"))
    assert all(module.startswith(start) for module in quantized)
    assert {found.group(1) for module in quantized if (found := re.search(r"\.layers\.(\d)\.", module))} == set(layers)
