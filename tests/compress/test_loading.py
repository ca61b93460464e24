"""Transformers loads what convert writes, and computes the logits of the same model compressed in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import compressknow
from compressknow.base.errors import UnsupportedError
from compressknow.cli import main
from compressknow.engine import layers
from compressknow.model.groups import read_structure
from compressknow.model.structure import list_scopes, select
from tests.long import one_in
from tests.models import BUILDERS, QUANTIZABLE, edit_config, load, logits, needs_packed_t5, save_tiny, tiny

AMOUNT = 0.3
SCHEMES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "int8": ("channel", {"num_bits": 8, "strategy": "token", "symmetric": True}),
    "int8-paper": ("tensor", {"num_bits": 7, "strategy": "tensor", "symmetric": False}),
    "int8-weights": ("channel", None),
    "fp8": ("channel", {"num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(name, root / name) for name in BUILDERS}


@pytest.mark.parametrize("scope", ["attention", "final"])
def test_convert_does_not_need_the_attention_kernel_of_the_config(scope: str, tmp_path: Path) -> None:
    source = save_tiny("llama-tied", tmp_path / "in")
    edit_config(source, attn_implementation="flash_attention_2")
    compressknow.convert(source, tmp_path / "out", scope=scope, quantize="int8")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["attn_implementation"] == "flash_attention_2"


def compress_in_memory(name: str, scope: str, scheme: str | None, pruned: bool) -> transformers.PreTrainedModel:
    """Compress the model in memory with functions of torch and compressed-tensors."""
    model = BUILDERS[name]()
    separate_final_layer(model)
    model.load_state_dict(tiny(name).state_dict())
    structure = read_structure(model)
    if pruned:
        weights = [get_holder(model, weight.parameter) for weight in select(structure, [scope], "prune")]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=AMOUNT)
        for module, parameter in weights:
            prune.remove(module, parameter)
    if scheme:
        quantize_in_memory(model, [weight.module for weight in select(structure, [scope], "quantize")], scheme)
    return model.eval()


def separate_final_layer(model: transformers.PreTrainedModel) -> None:
    """Give a tied final layer a weight of its own, so that compressing it leaves the embedding alone."""
    final = model.get_output_embeddings()
    final.weight = nn.Parameter(final.weight.detach().clone())


def get_holder(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    module, _, name = parameter.rpartition(".")
    return model.get_submodule(module), name


def quantize_in_memory(model: nn.Module, modules: list[str], scheme: str) -> None:
    strategy, activations = SCHEMES[scheme]
    number_type = "float" if scheme == "fp8" else "int"
    weights = {"num_bits": 8, "type": number_type, "symmetric": True, "dynamic": False, "strategy": strategy}
    inputs = {"type": number_type, "dynamic": True, **activations} if activations else None
    group = {"targets": modules, "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(config_groups={"group_0": group}, quantization_status="frozen")
    apply_quantization_config(model, config)
    dims = {"dim": 1, "keepdim": True} if strategy == "channel" else {}
    for name in modules:
        module = model.get_submodule(name)
        low, high = module.weight.detach().amin(**dims), module.weight.detach().amax(**dims)
        scale, _ = calculate_qparams(low, high, module.quantization_scheme.weights)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape)
        if scheme == "int8-paper":
            # Round as quantize_dynamic does, by the inverse of the scale; rounding that again changes nothing.
            rounded = torch.quantize_per_tensor(module.weight.detach(), float(scale), 0, torch.qint8)
            module.weight.data = rounded.dequantize()
        module.quantization_status = QuantizationStatus.FROZEN


def list_setups() -> Iterator[Any]:
    for name in BUILDERS:
        structure = read_structure(tiny(name))
        for scope in list_scopes(structure):
            for scheme in (None, *SCHEMES) if name in QUANTIZABLE else (None,):
                if (name[:2], scheme) == ("t5", "fp8") and scope in ("final", "overall"):
                    continue
                yield pytest.param(name, scope, scheme, id=f"{name}-{scope}-{scheme}")


def test_fp8_is_refused_where_the_model_compares_final_layer_and_embedding(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight with .*, but torch cannot compare 8-bit floats"):
        compressknow.convert(save_tiny("t5-tied", tmp_path / "in"), tmp_path / "out", scope="final", quantize="fp8")
    assert not (tmp_path / "out").exists()
    compressknow.convert(save_tiny("llama-tied", tmp_path / "tied"), tmp_path / "out", scope="final", quantize="fp8")


@pytest.mark.parametrize(("name", "scope", "scheme"), one_in(12, list_setups()))
def test_logits_equal_those_of_the_model_compressed_in_memory(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, scope: str, scheme: Any
) -> None:
    compressknow.convert(checkpoints[name], tmp_path / "out", scope=scope, prune=AMOUNT, quantize=scheme)
    expected = logits(compress_in_memory(name, scope, scheme, pruned=True))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny(name)), atol=1e-3)


@pytest.mark.parametrize("name", one_in(3, QUANTIZABLE))
def test_int8_without_pruning_equals_the_model_compressed_in_memory(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    compressknow.convert(checkpoints[name], tmp_path / "out", scope="overall", quantize="int8")
    expected = logits(compress_in_memory(name, "overall", "int8", pruned=False))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "t5-tied", "llama-tied"])
def test_half_precision_checkpoints_keep_their_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save_tiny(name, tmp_path / "in", dtype)
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="overall", prune=0.3, quantize="int8")
    model = load(tmp_path / "out")
    assert model.get_input_embeddings().weight.dtype == dtype
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("name", one_in(3, ["bert", "albert", "t5-tied", "bart", "opt", "llama-tied", "gpt2"]))
@pytest.mark.parametrize("options", [{"prune": 0.5}, {"quantize": "int8"}])
def test_compressing_a_tied_final_layer_does_not_change_the_embedding(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, options: Any
) -> None:
    manifest = compressknow.convert(checkpoints[name], tmp_path / "out", scope="final", **options)
    model = compressknow.load(tmp_path / "out")
    embedding, original = (m.get_input_embeddings().weight for m in (model, tiny(name)))
    assert torch.equal(embedding, original)
    assert not torch.equal(model.get_output_embeddings().weight, original)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    (untied,) = manifest["untied"]
    assert untied["bytes"] > 0


@needs_packed_t5
def test_an_untied_t5_still_scales_the_inputs_of_its_final_layer(tmp_path: Path) -> None:
    """Published configs do not say so, and transformers derives it from the tie."""
    edit_config(save_tiny("t5-tied", tmp_path / "in"), "scale_decoder_outputs")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", quantize="int8-weights")
    before, after = (logits(load(tmp_path / folder)) for folder in ("in", "out"))
    assert 0 < (after - before).norm() / before.norm() < 0.02


def test_a_shared_layer_is_compressed_once_and_stays_shared(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    manifest = compressknow.convert(checkpoints["albert"], tmp_path / "out", scope="attention", prune=0.5)
    model = load(tmp_path / "out")
    rows = [row for row in manifest["tensors"] if row["group"] == "attention" and row["in_scope"]]
    assert len(rows) == 4
    zeros = sum(int((model.get_parameter(row["name"]) == 0).sum()) for row in rows)
    assert zeros == manifest["totals"]["pruned"] == round(0.5 * sum(row["numel"] for row in rows))


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("name", ["t5-gated", "t5-tied", "bart"])
def test_generate_and_the_encoder_alone_are_right_after_load(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, scheme: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The engine's own layers are tested in tests/engine/test_int8.py.
    monkeypatch.setattr(layers.Int8Kind, "runs_on", lambda *_: False)
    scope = "blocks" if scheme == "fp8" else "overall"
    compressknow.convert(checkpoints[name], tmp_path / "out", scope=scope, prune=AMOUNT, quantize=scheme)
    model, expected = compressknow.load(tmp_path / "out"), compress_in_memory(name, scope, scheme, pruned=True)
    ids = torch.arange(5, 15)[None]
    # compressed-tensors caches tensors; made in inference mode, they would allow no gradient later.
    with torch.no_grad():
        hidden, expected_hidden = (m.get_encoder()(input_ids=ids).last_hidden_state for m in (model, expected))
    torch.testing.assert_close(hidden, expected_hidden, rtol=1e-5, atol=1e-5)
    tokens, expected_tokens = (m.generate(ids, max_new_tokens=6, do_sample=False) for m in (model, expected))
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize(
    ("name", "scope", "scheme", "generates"),
    [
        ("t5-tied", "attention", "int8", False),
        ("bart", "attention", "int8", False),
        ("t5-tied", "final", "int8", True),
        pytest.param("t5-tied", "attention", "int8-weights", True, marks=needs_packed_t5),
    ],
)
def test_card_and_terminal_say_if_plain_transformers_cannot_generate(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: Any, name: str, scope: str, scheme: str, *, generates: bool
) -> None:
    arguments = ["convert", str(checkpoints[name]), str(tmp_path / "out"), "--scope", scope, "--quantize", scheme]
    assert main(arguments) == 0
    ids = torch.arange(5, 15)[None]
    with nullcontext() if generates else pytest.raises(RuntimeError, match="dtype"):
        load(tmp_path / "out").generate(ids, max_new_tokens=2)
    assert compressknow.load(tmp_path / "out").generate(ids, max_new_tokens=2).shape[0] == 1
    assert ("`generate` fails" in (tmp_path / "out" / "README.md").read_text("utf-8")) is not generates
    assert ("Load it with compressknow.load" in capsys.readouterr().out) is not generates


def test_a_tied_weight_stored_under_the_name_of_the_head_is_untied(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    rename_tensors(checkpoints["llama-tied"], tmp_path / "in", {"model.embed_tokens.weight": "lm_head.weight"})
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", prune=0.5)
    model = load(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, tiny("llama-tied").get_input_embeddings().weight)
    assert float((model.lm_head.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_tied_weight_stored_twice_is_untied(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    rename_tensors(
        checkpoints["llama-tied"], tmp_path / "in", {}, copies={"lm_head.weight": "model.embed_tokens.weight"}
    )
    manifest = compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", quantize="int8")
    model = compressknow.load(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, tiny("llama-tied").get_input_embeddings().weight)
    assert manifest["totals"]["bytes_after"] < manifest["totals"]["bytes_before"]


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("name", one_in(3, ["bert", "albert", "bart", "t5-tied", "llama-tied"]))
def test_a_pickle_with_both_names_of_a_tied_weight_is_untied_as_any_other(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, is_reversed: bool
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(checkpoints[name] / "config.json", tmp_path / "in")
    state = list(tiny(name).state_dict().items())
    torch.save(dict(state[::-1] if is_reversed else state), tmp_path / "in" / "pytorch_model.bin")
    manifests = [
        compressknow.convert(source, tmp_path / output, scope="final", prune=0.5)
        for source, output in ((tmp_path / "in", "pickled"), (checkpoints[name], "safe"))
    ]
    for key in ("untied", "groups", "totals"):
        assert manifests[0][key] == manifests[1][key]
    assert manifests[0]["untied"][0]["tied_to"] in load_file(checkpoints[name] / "model.safetensors")
    found, expected = (load_file(tmp_path / output / "model.safetensors") for output in ("pickled", "safe"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_pickle_with_one_storage_for_weights_that_are_not_tied_keeps_both(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(checkpoints["llama-tied"] / "config.json", tmp_path / "in")
    edit_config(tmp_path / "in", tie_word_embeddings=False)
    torch.save(tiny("llama-tied").state_dict(), tmp_path / "in" / "pytorch_model.bin")
    compressknow.convert(tmp_path / "in", tmp_path / "out", prune=0.2)
    model = load(tmp_path / "out")
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert torch.equal(weight, tiny("llama-tied").lm_head.weight)


def test_former_names_of_tensors_still_load(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    rename_tensors(checkpoints["gpt-neox"], tmp_path / "in", {"lm_head.weight": "embed_out.weight"})
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="overall", prune=AMOUNT, quantize="int8")
    expected = logits(compress_in_memory("gpt-neox", "overall", "int8", pruned=True))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def rename_tensors(source: Path, target: Path, names: dict[str, str], copies: dict[str, str] | None = None) -> None:
    """Write a copy of a checkpoint with some tensors renamed, or stored under a second name too."""
    tensors = load_file(source / "model.safetensors")
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    renamed |= {copy: tensors[original].clone() for copy, original in (copies or {}).items()}
    save_file(renamed, target / "model.safetensors", {"format": "pt"})
