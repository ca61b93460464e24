"""8-bit weights and scales equal those of compressed-tensors bit for bit; weights and logits of `int8-paper` are those
of torch.ao.quantization.quantize_dynamic."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.ao.quantization import default_weight_observer
from transformers import PreTrainedModel

from compressknow.compress import blocks
from compressknow.compress.output_config import build_quantization_config
from compressknow.compress.recipe import Recipe
from compressknow.compress.schemes import SCHEMES, round_to_nearest
from compressknow.compress.steps import Prune, Quantize, Where
from tests.compress.test_process import convert_weight
from tests.models import convert, logits, save_tiny, tiny

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERYWHERE = Where(("overall",))
SCHEMES_OF_8_BITS = ("int8", "int8-paper", "int8-weights", "fp8")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES_OF_8_BITS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def build_scheme(scheme: str, targets: list[str] | None = None) -> QuantizationScheme:
    """Build a scheme as compressed-tensors defines it."""
    row_weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False)
    weights, activations = {
        "int8": (
            row_weights,
            QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True),
        ),
        "int8-paper": (
            QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=True, dynamic=False),
            QuantizationArgs(num_bits=7, type="int", strategy="tensor", symmetric=False, dynamic=True),
        ),
        "int8-weights": (row_weights, None),
        "fp8": (
            QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False),
            QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True),
        ),
    }[scheme]
    layout = {"int8-weights": "pack-quantized", "fp8": "float-quantized"}.get(scheme, "int-quantized")
    return QuantizationScheme(
        targets=targets or ["Linear"], weights=weights, input_activations=activations, format=layout
    )


def compress_with_library(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """Return the tensors that compressed-tensors stores for a float weight: `weight` or `weight_packed`, ..."""
    intended = build_scheme(scheme)
    if intended.weights.strategy == "channel":
        lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        lowest, highest = weight.min(), weight.max()
    scale, _ = calculate_qparams(lowest, highest, intended.weights)
    state = {"weight": weight, "weight_scale": scale}
    return dict(BaseCompressor.load_from_registry(str(intended.format)).compress(state, intended))


def quantize_with_torch(weight: Tensor) -> dict[str, Tensor]:
    """Return int8 weight and scale [1] as torch.ao computes them, the scale in the dtype of the weight."""
    observer = default_weight_observer()
    observer(weight.float())
    scale = observer.calculate_qparams()[0].to(weight.dtype)
    integers = torch.quantize_per_tensor(weight.float(), scale.item(), 0, torch.qint8).int_repr()
    return {"weight": integers, "weight_scale": scale}


def quantize_expected(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    return quantize_with_torch(weight) if scheme == "int8-paper" else compress_with_library(weight, scheme)


def has_same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Compare dtype, shape and bits: 0.0 is not -0.0 here."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    return ours.dtype == theirs.dtype and torch.equal(ours.view(bits), theirs.view(bits))


def check_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not has_same_bits(ours[name], theirs[name])] == []


# Rows are zero, denormal, huge, or near the limits of the dtype.
ROW_KINDS = ("zero", "denormal", "smallest", "small", "one", "huge", "negative at its largest")


@st.composite
def weights(draw: Any) -> Tensor:
    rows, columns, dtype = draw(st.integers(1, 12)), draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.rand((rows, columns), generator=generator, dtype=torch.float64) * 2 - 1
    info = torch.finfo(dtype)
    factors = {"zero": 0, "denormal": info.tiny / 16, "smallest": info.tiny, "small": 1e-3, "one": 1, "huge": info.max}
    kinds = draw(st.lists(st.sampled_from(ROW_KINDS), min_size=rows, max_size=rows))
    for row, kind in zip(weight, kinds, strict=True):
        row *= factors.get(kind, 1)
        if kind == "negative at its largest":
            # This is -127.5 scales, a tie between -128 and -127.
            row[0] = -1.0001
    return weight.to(dtype)


@settings(max_examples=150, deadline=None)
@given(weights(), st.sampled_from(SCHEMES_OF_8_BITS), st.sampled_from([1, 30, 1 << 18]))
def test_written_weights_equal_those_of_compressed_tensors_or_torch(
    weight: Tensor, scheme: str, block_elements: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        written, _ = convert_weight(weight, Path(folder), quantize=Quantize(scheme))
    check_same(written, quantize_expected(weight, scheme))
    assert written["weight_scale"].shape == SCHEMES[scheme].scale_shape(tuple(weight.shape))


@settings(max_examples=100, deadline=None)
@given(weights())
def test_rounding_equals_compressed_tensors_and_errs_by_half_a_step_at_most(weight: Tensor) -> None:
    scheme = SCHEMES["int8"]
    scales = scheme.scales(weight.abs().amax(1, keepdim=True))
    quantized = round_to_nearest(weight, scales, scheme)
    check_same({"weight": quantized, "weight_scale": scales}, compress_with_library(weight, "int8"))
    if weight.dtype == torch.float32 and scales.min() > torch.finfo(torch.float32).tiny and scales.max() < 1e36:
        error = (scheme.dequantize(quantized, scales).double() - weight.double()).abs()
        assert (error <= scales.double() * 0.5001).all()


@every_scheme
@every_dtype
def test_a_converted_model_equals_one_quantized_layer_by_layer(dtype: torch.dtype, scheme: str, tmp_path: Path) -> None:
    shard = save_tiny("llama", tmp_path / "source", dtype) / "model.safetensors"
    source = load_file(shard)
    source["model.layers.0.mlp.up_proj.weight"][3] = 0
    source["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(source, shard, metadata={"format": "pt"})
    convert(tmp_path / "source", tmp_path / "int8", Recipe((Quantize(scheme, EVERYWHERE),)))
    written = load_file(tmp_path / "int8" / "model.safetensors")
    linears = {
        f"{name}.weight" for name, module in tiny("llama").named_modules() if isinstance(module, torch.nn.Linear)
    }
    expected = {name: weight for name, weight in source.items() if name not in linears}
    for name in linears:
        stored = quantize_expected(source[name], scheme)
        expected |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in stored.items()}
    check_same(written, expected)


@every_scheme
@every_dtype
@pytest.mark.parametrize("value", [0, 1e-6])
def test_a_weight_of_zeros_or_nearly_has_a_positive_finite_scale(
    value: float, dtype: torch.dtype, scheme: str, tmp_path: Path
) -> None:
    weight = torch.full((3, 5), value, dtype=dtype)
    written, _ = convert_weight(weight, tmp_path, quantize=Quantize(scheme))
    scale = written["weight_scale"]
    check_same(written, quantize_expected(weight, scheme))
    assert scale.isfinite().all()
    assert (scale > 0).all()


@every_scheme
def test_pruned_rows_have_a_positive_finite_scale(scheme: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    steps = (Prune(0.5, "ln-structured"), Quantize(scheme))
    manifest = convert(tmp_path / "source", tmp_path / "both", Recipe(steps))
    written = load_file(tmp_path / "both" / "model.safetensors")
    for row in manifest["tensors"]:
        if row["scheme"] and row["pruned"]:
            scale = written[f"{row['name']}_scale"]
            assert scale.isfinite().all()
            assert (scale > 0).all()
            assert row["zeros"] >= row["pruned"] == row["shape"][0] // 2 * row["shape"][1]


@every_scheme
def test_the_config_describes_the_intended_scheme(scheme: str) -> None:
    described = QuantizationConfig.model_validate(
        build_quantization_config({SCHEMES[scheme]: ["b", "a"]}, ["c"], "0.20.0")
    )
    assert described.config_groups == {"group_0": build_scheme(scheme, ["re:^a$", "re:^b$"])}
    assert described.ignore == ["re:^c$"]
    assert described.format == build_scheme(scheme).format
    assert described.quantization_status == "compressed"
    assert described.kv_cache_scheme is None


def test_convert_prints_nothing_that_libraries_log(tmp_path: Path) -> None:
    save_tiny("t5-gated", tmp_path / "in")
    code = "import compressknow; compressknow.convert('in', 'out', quantize='int8-weights')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_config_names_each_linear_module_once(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    steps = (Quantize("int8", Where(("attention",))), Quantize("int8-paper", Where(("feed-forward",), layers="0")))
    convert(tmp_path / "source", tmp_path / "int8", Recipe(steps))
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    described = QuantizationConfig.model_validate(config["quantization_config"])
    attention = [rf"re:^(?:model\.)?layers\.(?:0|1)\.self_attn\.{part}_proj$" for part in "koqv"]
    feed_forward = [
        [rf"re:^(?:model\.)?layers\.{i}\.mlp\.{part}_proj$" for part in ("down", "gate", "up")] for i in (0, 1)
    ]
    assert described.config_groups == {
        "group_0": build_scheme("int8", attention),
        "group_1": build_scheme("int8-paper", feed_forward[0]),
    }
    assert described.ignore == [*feed_forward[1], r"re:^(?:model\.)?lm_head$"]


@contextmanager
def use_x86_engine() -> Iterator[None]:
    """Use torch's int8 kernels for x86, as the paper did; skip the test if there are none."""
    if not hasattr(getattr(torch.ao, "quantization", None), "quantize_dynamic"):
        pytest.skip("this torch has no quantize_dynamic any more")
    available = [engine for engine in ("fbgemm", "x86") if engine in torch.backends.quantized.supported_engines]
    if not available:
        pytest.skip(f"no x86 engine: {torch.backends.quantized.supported_engines}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = available[0]
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def quantize_dynamically(model: PreTrainedModel) -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def measure_distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def load_as(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return type(model).from_pretrained(folder).eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["bert", "llama", "llama-tied", "roberta", "distilbert", "t5-gated"])
def test_int8_paper_gives_the_logits_of_quantize_dynamic(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    save_tiny(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "int8", Recipe((Quantize("int8-paper", EVERYWHERE),)))
    with use_x86_engine():
        expected = logits(quantize_dynamically(model))
    error = measure_distance(logits(load_as(model, tmp_path / "int8")), expected)
    assert error < 1e-3
    # quantize_dynamic gives activations 7 bits. With 8, logits are closer to the float model than to its own.
    path = tmp_path / "int8" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["num_bits"] = 8
    path.write_text(json.dumps(config))
    assert measure_distance(logits(load_as(model, tmp_path / "int8")), expected) > max(10 * error, 5e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "bert", "t5-gated"])
def test_int8_paper_weights_equal_those_of_quantize_dynamic(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    save_tiny(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "int8", Recipe((Quantize("int8-paper", EVERYWHERE),)))
    written = load_file(tmp_path / "int8" / "model.safetensors")
    with use_x86_engine():
        theirs = dict(quantize_dynamically(model).named_modules())
    compared = 0
    for name in [key.removesuffix("_scale") for key in written if key.endswith("weight_scale")]:
        weight = theirs[name.removesuffix(".weight")].weight()
        assert weight.q_scale() == written[f"{name}_scale"].item()
        assert torch.equal(written[name], weight.int_repr())
        compared += weight.numel()
    assert compared > 10_000
