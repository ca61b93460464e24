"""The engine's int4 layers are exact but for rounding to bfloat16, and give a row the same bits in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

import compressknow
from compressknow.engine import layers
from compressknow.engine.language_model import LanguageModel
from compressknow.engine.layers import Int4Linear, disable_rounding, has_rounded_activations
from compressknow.engine.load import load
from compressknow.evaluate.runtimes import Settings
from tests.knowing import save_trained, write_facts
from tests.models import VOCABULARY, logits, tiny_of_groups

pytestmark = pytest.mark.skipif(
    not layers.Int4Kind().runs_on("cpu"), reason="this CPU has no fast kernel: int4 layers run as floats"
)
SIZES = (32, 64, 128)
FAMILIES = ("llama", "bert", "opt", "gpt-neox", "bart")
# Half a step of bfloat16, relative to the smallest number with such steps.
HALF_STEP = 2**-8


def make_layer(rows: int, columns: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Int4Linear, Tensor]:
    """Return a layer with random scales, and its weight in float64."""
    torch.manual_seed(rows + columns + size)
    integers = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, columns // size) / 100 + 1e-4).to(dtype)
    weight = integers.double() * scale.double().repeat_interleave(size, dim=1)
    return Int4Linear(integers, scale, torch.randn(rows).to(dtype)), weight


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [16, 48, 80, 1536])
def test_products_are_exact_but_for_rounding_to_bfloat16(rows: int, size: int) -> None:
    linear, _ = make_layer(rows, 3 * size, size)
    x = torch.randn(7, 5, 3 * size)
    rounded = linear.weight_scale.bfloat16().double().repeat_interleave(size, dim=1)
    exact = x.bfloat16().double() @ (linear.integers().double() * rounded).T
    with torch.no_grad():
        products = linear(x) - linear.bias
    assert products.shape == (7, 5, rows)
    assert products.dtype == torch.float32
    # The bias was added in float32 and is subtracted here.
    assert ((products - exact).abs() <= HALF_STEP * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_as_near_to_the_float_layer_as_bfloat16(dtype: torch.dtype, size: int) -> None:
    linear, weight = make_layer(64, 4 * size, size, dtype)
    x = torch.randn(33, 4 * size).to(dtype)
    expected = functional.linear(x.double(), weight, linear.bias.double())
    with torch.no_grad():
        assert linear(x).dtype == dtype
        assert (linear(x).double() - expected).norm() / expected.norm() < 0.004
        linear.rounds = False
        assert (linear(x).double() - expected).norm() / expected.norm() < (0.004 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_packed_integers_are_unpacked_unchanged(size: int) -> None:
    integers = torch.randint(-8, 8, (112, 2 * size), dtype=torch.int8)
    integers[0], integers[1] = -8, 7
    linear = Int4Linear(integers, torch.rand(112, 2), None)
    assert torch.equal(linear.integers(), integers)
    assert linear.packed.nbytes == integers.numel() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    linear, _ = make_layer(192, 576, 64)
    x = torch.randn(300, 576, dtype=dtype)
    with torch.no_grad():
        expected = linear(x)
        for first, last in ((0, 1), (1, 2), (5, 9), (0, 17), (100, 163), (3, 300)):
            assert torch.equal(linear(x[first:last]), expected[first:last])
        assert torch.equal(linear(x.view(30, 10, 576)), expected.view(30, 10, 192))
        assert torch.equal(linear(x.t().contiguous().t()), expected)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2 if threads == 1 else 1)
            assert torch.equal(linear(x), expected)
        finally:
            torch.set_num_threads(threads)


def test_zeros_give_the_bias_and_no_rows_give_none() -> None:
    linear, _ = make_layer(16, 32, 32)
    with torch.no_grad():
        assert torch.equal(linear(torch.zeros(2, 3, 32)), linear.bias.expand(2, 3, 16))
        assert linear(torch.zeros(0, 32)).shape == (0, 16)


def convert_tiny(name: str, folder: Path, **options: Any) -> Path:
    tiny_of_groups(name).save_pretrained(folder / "in")
    defaults = {"scope": ["attention", "feed-forward"], "quantize": "int4", "parameters": {"group_size": 32}}
    compressknow.convert(folder / "in", folder / "out", **{**defaults, **options})
    return folder / "out"


def load_in_floats(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers.Int4Kind, "runs_on", lambda *_: False)
        return load(folder)


def list_int4_layers(model: nn.Module) -> dict[str, Int4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_stay_packed_and_compute_nearly_as_transformers(name: str, tmp_path: Path) -> None:
    folder = convert_tiny(name, tmp_path)
    ours, plain = load(folder), load_in_floats(folder)
    stored = load_file(folder / "model.safetensors")
    packed = {key.removesuffix(".weight_packed") for key in stored if key.endswith("_packed")}
    assert set(list_int4_layers(ours)) == packed
    assert not list_int4_layers(plain)
    for path, module in list_int4_layers(ours).items():
        weight = module.integers() * module.weight_scale.repeat_interleave(32, dim=1)
        assert torch.equal(weight, plain.get_submodule(path).weight)
    rounded = logits(ours)
    assert 0 < (rounded - logits(plain)).norm() / logits(plain).norm() < 0.02
    with disable_rounding(ours):
        torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(ours), rounded)


def test_layers_take_at_most_a_fifth_of_the_memory_of_float32(tmp_path: Path) -> None:
    for module in list_int4_layers(load(convert_tiny("llama", tmp_path))).values():
        tensors = [*module.buffers(), module.weight_scale]
        assert sum(tensor.nbytes for tensor in tensors) <= 0.2 * 4 * module.out_features * module.in_features


def test_parameters_are_counted_as_in_floats(tmp_path: Path) -> None:
    folder = convert_tiny("opt", tmp_path)
    models = [LanguageModel(model, None, "causal") for model in (load(folder), load_in_floats(folder))]  # type: ignore[arg-type]
    assert models[0].parameters == models[1].parameters
    assert [model.dtype for model in models] == ["float32 + int4", "float32"]
    assert has_rounded_activations(models[0].model)


def test_a_layer_that_the_kernel_does_not_support_runs_in_floats(tmp_path: Path) -> None:
    """99 outputs are not a multiple of 16."""
    folder = convert_tiny("llama", tmp_path, scope="overall")
    model = load(folder)
    assert len(list_int4_layers(model)) == 14
    assert type(model.lm_head) is not Int4Linear
    assert model.lm_head.weight.dtype == torch.float32


def test_weights_that_torch_packs_in_an_unknown_order_run_in_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert_tiny("llama", tmp_path)
    plain = load_in_floats(folder)
    monkeypatch.setattr(layers, "_BLOCK", 16)
    model = load(folder)
    assert not list_int4_layers(model)
    assert torch.equal(logits(model), logits(plain))


def test_model_code_may_read_the_dtype_of_a_weight(tmp_path: Path) -> None:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    config = NllbMoeConfig(vocab_size=VOCABULARY, d_model=32, num_experts=4, **sizes)
    NllbMoeForConditionalGeneration(config).save_pretrained(tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", quantize="int4", parameters={"group_size": 32})
    ours, plain = load(tmp_path / "out"), load_in_floats(tmp_path / "out")
    assert list_int4_layers(ours)
    with disable_rounding(ours):
        torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)


def test_a_recipe_of_two_schemes_runs_in_layers_of_each(tmp_path: Path) -> None:
    recipe = {
        "steps": [
            {"quantize": "int4", "group_size": 32, "scope": ["attention"]},
            {"quantize": "int8", "scope": ["feed-forward"]},
        ]
    }
    tiny_of_groups("llama").save_pretrained(tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", recipe=compressknow.Recipe.from_dict(recipe))
    model = LanguageModel(load(tmp_path / "out"), None, "causal")  # type: ignore[arg-type]
    assert "int4" in model.dtype
    assert len(list_int4_layers(model.model)) == 8


def test_a_loaded_model_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    model = load(convert_tiny("llama", tmp_path))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_answers_have_the_same_bits_for_any_batch_size(family: str, tmp_path: Path) -> None:
    facts, folder = f"facts:{write_facts(tmp_path / 'facts.jsonl')}", tmp_path / "int4"
    compressknow.convert(
        save_trained(family, tmp_path / "model"), folder, quantize="int4", parameters={"group_size": 32}
    )
    runs = [
        compressknow.probe(folder, tmp_path / str(size), [facts], settings=Settings(batch_size=size))
        for size in (1, 128)
    ]
    assert runs[0].record.model.computed_in == "float32 + int4"
    small, large = ({a.fact_id: (a.logp_gold, a.top5, a.top5_logp, a.total_logp) for a in run.answers} for run in runs)
    assert small == large


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_facts_are_answered_as_by_the_model_in_floats(family: str, tmp_path: Path) -> None:
    facts, folder = f"facts:{write_facts(tmp_path / 'facts.jsonl')}", tmp_path / "int4"
    compressknow.convert(
        save_trained(family, tmp_path / "model"), folder, quantize="int4", parameters={"group_size": 32}
    )
    ours = compressknow.probe(folder, tmp_path / "ours", [facts])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers.Int4Kind, "runs_on", lambda *_: False)
        plain = compressknow.probe(folder, tmp_path / "plain", [facts])
    assert plain.record.model.computed_in == "float32"
    assert [answer.predicted for answer in ours.answers] == [answer.predicted for answer in plain.answers]
    assert [a.logp_gold for a in ours.answers] == pytest.approx([a.logp_gold for a in plain.answers], abs=0.05)
