"""The engine's int4 layers: exact but for rounding to bfloat16, a row's bits the same in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
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
# Half a step of bfloat16, which has 8 bits, beside the smallest number that has such steps.
HALF_STEP = 2**-8


def layer(rows: int, columns: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Int4Linear, torch.Tensor]:
    """A layer, and its weight in float64; scales are as random as can be."""
    torch.manual_seed(rows + columns + size)
    integers = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, columns // size) / 100 + 1e-4).to(dtype)
    weight = integers.double() * scale.double().repeat_interleave(size, dim=1)
    return Int4Linear(integers, scale, torch.randn(rows).to(dtype)), weight


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [16, 48, 80, 1536])
def test_products_are_exact_but_for_rounding_to_bfloat16(rows: int, size: int) -> None:
    linear, _ = layer(rows, 3 * size, size)
    x = torch.randn(7, 5, 3 * size)
    rounded = linear.weight_scale.bfloat16().double().repeat_interleave(size, dim=1)
    exact = x.bfloat16().double() @ (linear.integers().double() * rounded).T
    with torch.no_grad():
        found = linear(x) - linear.bias
    assert found.shape == (7, 5, rows)
    assert found.dtype == torch.float32
    # The bias is added in float32, and taken away again.
    assert ((found - exact).abs() <= HALF_STEP * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_near_to_the_float_layer_as_bfloat16_is(dtype: torch.dtype, size: int) -> None:
    linear, weight = layer(64, 4 * size, size, dtype)
    x = torch.randn(33, 4 * size).to(dtype)
    expected = functional.linear(x.double(), weight, linear.bias.double())
    with torch.no_grad():
        assert linear(x).dtype == dtype
        assert (linear(x).double() - expected).norm() / expected.norm() < 0.004
        linear.rounds = False
        assert (linear(x).double() - expected).norm() / expected.norm() < (0.004 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_integers_come_back_as_they_were(size: int) -> None:
    integers = torch.randint(-8, 8, (112, 2 * size), dtype=torch.int8)
    integers[0], integers[1] = -8, 7
    linear = Int4Linear(integers, torch.rand(112, 2), None)
    assert torch.equal(linear.integers(), integers)
    assert linear.packed.nbytes == integers.numel() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    linear, _ = layer(192, 576, 64)
    x = torch.randn(300, 576, dtype=dtype)
    with torch.no_grad():
        together = linear(x)
        for first, last in ((0, 1), (1, 2), (5, 9), (0, 17), (100, 163), (3, 300)):
            assert torch.equal(linear(x[first:last]), together[first:last])
        assert torch.equal(linear(x.view(30, 10, 576)), together.view(30, 10, 192))
        assert torch.equal(linear(x.t().contiguous().t()), together)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2 if threads == 1 else 1)
            assert torch.equal(linear(x), together)
        finally:
            torch.set_num_threads(threads)


def test_zeros_and_nothing() -> None:
    linear, _ = layer(16, 32, 32)
    with torch.no_grad():
        assert torch.equal(linear(torch.zeros(2, 3, 32)), linear.bias.expand(2, 3, 16))
        assert linear(torch.zeros(0, 32)).shape == (0, 16)


def converted(name: str, folder: Path, **options: Any) -> Path:
    tiny_of_groups(name).save_pretrained(folder / "in")
    given = {"scope": ["attention", "feed-forward"], "quantize": "int4", "parameters": {"group_size": 32}}
    compressknow.convert(folder / "in", folder / "out", **{**given, **options})
    return folder / "out"


def in_floats(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers.Int4Kind, "runs_on", lambda *_: False)
        return load(folder)


def int4_layers(model: nn.Module) -> dict[str, Int4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_stay_packed_and_give_nearly_what_plain_transformers_does(name: str, tmp_path: Path) -> None:
    folder = converted(name, tmp_path)
    ours, plain = load(folder), in_floats(folder)
    stored = load_file(folder / "model.safetensors")
    packed = {key.removesuffix(".weight_packed") for key in stored if key.endswith("_packed")}
    assert set(int4_layers(ours)) == packed
    assert not int4_layers(plain)
    for path, module in int4_layers(ours).items():
        weight = module.integers() * module.weight_scale.repeat_interleave(32, dim=1)
        assert torch.equal(weight, plain.get_submodule(path).weight)
    error = (logits(ours) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < error < 0.02
    with disable_rounding(ours):
        torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)


def test_weights_take_a_fifth_of_float32_at_most_with_all_that_is_beside_them(tmp_path: Path) -> None:
    for module in int4_layers(load(converted("llama", tmp_path))).values():
        held = [*module.buffers(), module.weight_scale]
        assert sum(tensor.nbytes for tensor in held) <= 0.2 * 4 * module.out_features * module.in_features


def test_parameters_are_counted_as_in_floats(tmp_path: Path) -> None:
    folder = converted("opt", tmp_path)
    models = [LanguageModel(model, None, "causal") for model in (load(folder), in_floats(folder))]  # type: ignore[arg-type]
    assert models[0].parameters == models[1].parameters
    assert [model.dtype for model in models] == ["float32 + int4", "float32"]
    assert has_rounded_activations(models[0].model)


def test_what_the_kernel_does_not_take_runs_in_floats(tmp_path: Path) -> None:
    """99 outputs are not a multiple of 16."""
    folder = converted("llama", tmp_path, scope="overall")
    model = load(folder)
    assert len(int4_layers(model)) == 14
    assert type(model.lm_head) is not Int4Linear
    assert model.lm_head.weight.dtype == torch.float32


def test_code_that_asks_for_the_dtype_of_a_weight_runs(tmp_path: Path) -> None:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    config = NllbMoeConfig(vocab_size=VOCABULARY, d_model=32, num_experts=4, **sizes)
    NllbMoeForConditionalGeneration(config).save_pretrained(tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", quantize="int4", parameters={"group_size": 32})
    ours, plain = load(tmp_path / "out"), in_floats(tmp_path / "out")
    assert int4_layers(ours)
    with disable_rounding(ours):
        torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)


def test_a_recipe_that_mixes_schemes_runs_each_in_its_own_layers(tmp_path: Path) -> None:
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
    assert len(int4_layers(model.model)) == 8


def test_a_loaded_model_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    model = load(converted("llama", tmp_path))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_batches_of_any_size_give_the_same_bits(family: str, tmp_path: Path) -> None:
    facts, folder = f"facts:{write_facts(tmp_path / 'facts.jsonl')}", tmp_path / "int4"
    compressknow.convert(
        save_trained(family, tmp_path / "model"), folder, quantize="int4", parameters={"group_size": 32}
    )
    found = [
        compressknow.probe(folder, tmp_path / str(size), [facts], settings=Settings(batch_size=size))
        for size in (1, 128)
    ]
    assert found[0].record.model.computed_in == "float32 + int4"
    one, many = ({a.fact_id: (a.logp_gold, a.top5, a.top5_logp, a.total_logp) for a in each.answers} for each in found)
    assert one == many


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_facts_are_answered_as_in_floats(family: str, tmp_path: Path) -> None:
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
