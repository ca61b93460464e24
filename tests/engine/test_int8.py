"""The engine's int8 layers compute as transformers does in floats, and give a row the same bits in any batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import compressknow
from compressknow.engine import layers
from compressknow.engine.language_model import LanguageModel
from compressknow.engine.layers import BatchInvariantLinear, Int8Linear, make_batch_invariant, undo_batch_invariant
from compressknow.engine.load import load
from compressknow.evaluate.runtimes import Settings
from tests.knowing import save_trained, write_facts
from tests.long import one_in
from tests.models import QUANTIZABLE, logits, save_tiny

pytestmark = pytest.mark.skipif(
    not layers.Int8Kind().runs_on("cpu"), reason="this CPU lacks VNNI: int8 layers run as floats"
)
SCHEMES = ("int8", "int8-paper")


@pytest.fixture(scope="module", params=one_in(3, [f"{name} {scheme}" for name in QUANTIZABLE for scheme in SCHEMES]))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers are all quantized, the final one too."""
    name, scheme = request.param.split()
    root = tmp_path_factory.mktemp(name)
    compressknow.convert(save_tiny(name, root / "in"), root / "out", scope="overall", quantize=scheme)
    return root / "out"


@contextlib.contextmanager
def disable_int8_kernel() -> Iterator[None]:
    """Run int8 layers in floats, as on a CPU without a fast kernel and as transformers does."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers.Int8Kind, "runs_on", lambda *_: False)
        yield


def load_in_floats(folder: Path) -> Any:
    with disable_int8_kernel():
        return load(folder)


def list_int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def make_layer(rows: int, columns: int, *, bits: int = 8, per_token: bool = True) -> Int8Linear:
    """Return a layer, two of whose rows have the lowest and the highest weight."""
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    weight[0], weight[1] = -128, 127
    scale = torch.rand(rows, 1) / 100 if per_token else torch.tensor([0.01])
    return Int8Linear(weight, scale, torch.randn(rows), bits=bits, per_token=per_token)


def test_each_layer_computes_as_in_transformers(checkpoint: Path) -> None:
    plain, ours = load_in_floats(checkpoint), list_int8_layers(load(checkpoint))
    recorded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    names = {plain.get_submodule(name): name for name in ours}

    def record(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        recorded[names[module]] = (inputs[0], output)

    for module in names:
        module.register_forward_hook(record)
    logits(plain)
    assert len(recorded) == len(ours) > 0
    assert not any(hasattr(module, "quantization_scheme") for module in load(checkpoint).modules())
    for name, (inputs, expected) in recorded.items():
        if inputs.dim() > 2 or not ours[name].per_token:
            with torch.no_grad():
                torch.testing.assert_close(ours[name](inputs), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_logits_are_near_those_of_transformers(checkpoint: Path) -> None:
    # They are not equal: the last bit of a sum can round an activation to another integer.
    ours, plain = logits(load(checkpoint)), logits(load_in_floats(checkpoint))
    assert (ours - plain).norm() / plain.norm() < 0.05


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_facts_are_answered_as_by_transformers(family: str, scheme: Any, tmp_path: Path) -> None:
    facts, folder = f"facts:{write_facts(tmp_path / 'facts.jsonl')}", tmp_path / "int8"
    compressknow.convert(save_trained(family, tmp_path / "model"), folder, quantize=scheme)
    ours = compressknow.probe(folder, tmp_path / "ours", probe=[facts])
    with disable_int8_kernel():
        plain = compressknow.probe(folder, tmp_path / "plain", probe=[facts])
    assert ours.record.model.computed_in == "float32 + int8"
    assert plain.record.model.computed_in == "float32"
    assert [answer.predicted for answer in ours.answers] == [answer.predicted for answer in plain.answers]
    assert [a.logp_gold for a in ours.answers] == pytest.approx([a.logp_gold for a in plain.answers], abs=0.05)


@pytest.mark.parametrize("scope", one_in(2, ["blocks", "attention"]))
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_answers_have_the_same_bits_for_any_batch_size(family: str, scope: str, tmp_path: Path) -> None:
    facts, folder = f"facts:{write_facts(tmp_path / 'facts.jsonl')}", tmp_path / "int8"
    compressknow.convert(save_trained(family, tmp_path / "model"), folder, scope=scope, quantize="int8")
    runs = [
        compressknow.probe(folder, tmp_path / str(size), [facts], settings=Settings(batch_size=size)).answers
        for size in (1, 3, 128)
    ]
    answers = [{a.fact_id: (a.logp_gold, a.top5, a.top5_logp, a.total_logp) for a in run} for run in runs]
    assert len(answers[0]) > 1
    assert answers[0] == answers[1] == answers[2]


def test_a_batch_invariant_float_layer_gives_a_row_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    linear, x = nn.Sequential(nn.Linear(1536, 192)), torch.randn(2, 400, 1536)
    expected = linear(x[0])
    make_batch_invariant(linear)
    assert torch.equal(linear(x), torch.stack([linear(row) for row in x]))
    assert all(torch.equal(linear(x[0, :rows]), linear(x[0])[:rows]) for rows in (*range(40), 127, 128, 129, 399))
    torch.testing.assert_close(linear(x[0]), expected)
    assert linear(x[0, 0]).shape == (192,)


def test_a_batch_invariant_layer_computes_fewer_rows_at_a_time_only_with_the_same_bits() -> None:
    torch.manual_seed(0)
    # In bfloat16, kernels for 16 or 32 rows add in another order.
    linear, x = nn.Sequential(nn.Linear(2048, 2048)).to(torch.bfloat16), torch.randn(128, 2048, dtype=torch.bfloat16)
    make_batch_invariant(linear)
    expected = linear(x)
    assert all(torch.equal(linear(x[-rows:]), expected[-rows:]) for rows in (1, 16, 17, 32, 64))


WIDE = {"vocab_size": 99, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 256}


@pytest.mark.parametrize(
    "config",
    [
        hf.GptOssConfig(**WIDE, num_local_experts=4, num_key_value_heads=2, intermediate_size=512, head_dim=64),
        # Falcon has one head of keys and values for all, and multiplies batches of matrices in attention.
        hf.FalconConfig(**WIDE),
        hf.MptConfig(vocab_size=99, d_model=256, n_heads=4, n_layers=1),
        hf.GPT2Config(vocab_size=99, n_embd=256, n_layer=1, n_head=4),
        hf.MixtralConfig(**WIDE, num_local_experts=4, num_key_value_heads=2, intermediate_size=512),
    ],
    ids=lambda config: config.model_type,
)
def test_a_batch_invariant_model_gives_a_row_the_same_bits_in_any_batch(config: Any) -> None:
    torch.manual_seed(0)
    model, ids = hf.AutoModelForCausalLM.from_config(config).eval(), torch.randint(99, (32, 9))
    expected = compute_logits(model, ids)
    make_batch_invariant(model)
    torch.testing.assert_close(compute_logits(model, ids), expected)
    assert torch.equal(compute_logits(model, ids), torch.cat([compute_logits(model, row) for row in ids.split(1)]))
    undo_batch_invariant(model)
    assert not [name for name, module in model.named_modules() if isinstance(module, BatchInvariantLinear)]
    assert not [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), partial)]
    torch.testing.assert_close(compute_logits(model, ids), expected)


def compute_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def test_models_without_int8_layers_are_not_made_batch_invariant(tmp_path: Path) -> None:
    compressknow.convert(save_tiny("llama", tmp_path / "in"), tmp_path / "out", quantize="int8-weights")
    for folder in (tmp_path / "in", tmp_path / "out"):
        assert not any(isinstance(module, BatchInvariantLinear) for module in load(folder).modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = make_layer(48, 200), torch.randn(37, 5, 200, dtype=dtype)
    expected = linear(x)
    assert expected.dtype == dtype
    assert all(torch.equal(linear(x[i]), expected[i]) for i in range(len(x)))
    assert torch.equal(linear(x[:, 2:3]), expected[:, 2:3])


@pytest.mark.parametrize("bits", [7, 8])
def test_sums_are_exact(bits: int) -> None:
    """The reference computes in float64, where sums of integers are exact."""
    torch.manual_seed(0)
    linear = make_layer(16, 4096, bits=bits, per_token=False)
    x = torch.randn(3, 4096)
    x[0], x[1] = 5.0, -5.0
    scale, zero = linear._compute_joint_scale(x)
    integers = (x / scale + zero).clamp(linear.lowest, linear.highest).round()
    expected = (integers - zero).double() @ linear.weight.double().T * scale.double() * 0.01 + linear.bias.double()
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [-5, 5])
@pytest.mark.parametrize("per_token", [True, False])
def test_products_of_inputs_of_one_sign_are_near_those_of_floats(per_token: bool, shift: int) -> None:
    torch.manual_seed(0)
    linear, x = make_layer(8, 64, per_token=per_token), torch.randn(3, 64).clamp(-1, 1) + shift
    rounded, linear.rounds = linear(x), False
    assert (rounded - linear(x)).norm() / linear(x).norm() < 0.02


@pytest.mark.parametrize("per_token", [True, False])
def test_zeros_give_the_bias_and_no_rows_give_none(per_token: bool) -> None:
    linear = make_layer(8, 16, per_token=per_token)
    assert torch.equal(linear(torch.zeros(2, 3, 16)), linear.bias.expand(2, 3, 8))
    if per_token:
        assert linear(torch.zeros(0, 16)).shape == (0, 8)


def test_the_largest_activation_does_not_wrap_around() -> None:
    """127.5 rounds to 128, which int8 lacks."""
    linear = Int8Linear(torch.ones(1, 4, dtype=torch.int8), torch.ones(1, 1), None, bits=8, per_token=True)
    x = torch.tensor([[[1.0, 0, 0, 0]], [[-1.0, 0, 0, 0]]])
    torch.testing.assert_close(linear(x).flatten(), torch.tensor([1.0, -1.0]), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ({"symmetric": False}, {}),
        ({"strategy": "group", "group_size": 16}, {}),
        ({"type": "float"}, {}),
        ({}, {"strategy": "tensor", "symmetric": False, "dynamic": False}),
        ({}, {"symmetric": False}),
        ({}, {"strategy": "tensor"}),
        ({}, {"num_bits": 16}),
        ({}, {"type": "float"}),
    ],
    ids=str,
)
def test_a_layer_that_another_tool_rounded_in_another_way_runs_in_floats(
    weights: dict[str, Any], inputs: dict[str, Any]
) -> None:
    module: Any = nn.Linear(32, 8)
    module.weight = nn.Parameter(torch.ones(8, 32, dtype=torch.int8), requires_grad=False)
    module.weight_scale = nn.Parameter(torch.ones(8, 1), requires_grad=False)

    def find_layer(weights: dict[str, Any], inputs: dict[str, Any]) -> Int8Linear | None:
        rows = QuantizationArgs(**{"num_bits": 8, "strategy": "channel", **weights})
        tokens = QuantizationArgs(**{"num_bits": 8, "strategy": "token", "dynamic": True, **inputs})
        scheme = QuantizationScheme(targets=["Linear"], weights=rows, input_activations=tokens)
        module.quantization_scheme = scheme
        return layers.Int8Kind().layer_of(module)

    assert find_layer({}, {}) is not None
    assert find_layer(weights, inputs) is None
    module.weight_zero_point = nn.Parameter(torch.ones(8, 1), requires_grad=False)
    assert find_layer({}, {}) is None


def test_weights_stay_int8_in_memory(tmp_path: Path) -> None:
    compressknow.convert(save_tiny("bert", tmp_path / "in"), tmp_path / "out", scope="overall", quantize="int8")
    model = load(tmp_path / "out")
    assert {linear.weight.dtype for linear in list_int8_layers(model).values()} == {torch.int8}


def test_a_head_stays_float_if_the_model_casts_to_its_dtype(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8, tie_word_embeddings=False)
    MambaForCausalLM(config).save_pretrained(tmp_path / "in")
    compressknow.convert(tmp_path / "in", tmp_path / "out", scope="final", quantize="int8")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load_in_floats(tmp_path / "out")))


def test_a_loaded_model_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    compressknow.convert(save_tiny("llama-tied", tmp_path / "in"), tmp_path / "out", scope="overall", quantize="int8")
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("scheme", ["int8", "int8-paper", "int8-weights", "fp8"])
@pytest.mark.parametrize("in_int8", [True, False])
def test_scales_do_not_count_as_parameters(scheme: Any, in_int8: bool, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "in")
    compressknow.convert(source, tmp_path / "out", quantize=scheme)
    with contextlib.nullcontext() if in_int8 else disable_int8_kernel():
        models = [LanguageModel(load(folder), None, "causal") for folder in (source, tmp_path / "out")]  # type: ignore[arg-type]
    assert models[0].parameters == models[1].parameters
