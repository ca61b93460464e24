"""Wanda, SparseGPT and GPTQ are compared with the papers' formulas and with each other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from compressknow.base.errors import CompressknowError
from compressknow.compress.blocks import Pool
from compressknow.compress.calibrate.compensation import factor_inverse, fit_scales, get_inverse, round_by_gptq
from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.compress.pruning import METHODS, Calibrated, Weights
from compressknow.compress.schemes import SCHEMES, Scheme, repeat_scales, round_to_nearest
from compressknow.model.tensors import StoredTensor
from tests.compress.layers import (
    Groups4,
    damp_products,
    error,
    gather_statistics,
    make_inputs,
    make_weights,
    prune_by_formula,
    round_by_formula,
)

SHARED = Path(__file__).parents[3] / "shared"
# No multiples of the block sizes 128 and 16; 8 is less than either.
CHANNELS = (8, 100, 300)
INTEGER_SCHEMES = {"int8": SCHEMES["int8"], "int8-weights": SCHEMES["int8-weights"], "4 bits in groups": Groups4()}
every_scheme = pytest.mark.parametrize("scheme", INTEGER_SCHEMES.values(), ids=INTEGER_SCHEMES.keys())


def get_method(name: str, pattern: str | None = None) -> Calibrated:
    configured = METHODS[name].with_values({"pattern": pattern})
    assert isinstance(configured, Calibrated)
    return configured


def prune_weights(name: str, weight: Tensor, inputs: Tensor, amount: float, pattern: str | None = None) -> Tensor:
    """Return the weights as they would be written, pruned ones as zeros."""
    mask, values = get_method(name, pattern).prune(weight, gather_statistics(inputs), amount)
    return (weight if values is None else values).masked_fill(mask, 0)


def prune_smallest(weight: Tensor, amount: float) -> Tensor:
    """Zero the smallest weights with torch."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight.clone())
    return prune.l1_unstructured(module, "weight", amount).weight.detach()


def compute_scales(weight: Tensor, scheme: Scheme) -> Tensor:
    groups = weight.shape[1] // scheme.scale_per if isinstance(scheme.scale_per, int) else 1
    return scheme.scales(weight.abs().view(len(weight), groups, -1).amax(2))


def describe_stored(*shape: int) -> StoredTensor:
    return StoredTensor("weight", "F32", shape, Path("model.safetensors"), 0)


class TestInverse:
    @pytest.mark.parametrize("channels", [1, 7, 256, 601])
    def test_is_an_upper_factor_of_the_damped_inverse(self, channels: int) -> None:
        inputs = make_inputs(400, 2 * channels)[:, :channels]
        factor = factor_inverse(gather_statistics(inputs), torch.arange(channels)).double()
        assert torch.equal(factor, factor.triu())
        assert bool((factor.diagonal() > 0).all())
        identity = factor.T @ factor @ damp_products(inputs)
        assert float((identity - torch.eye(channels)).abs().max()) < 1e-3
        exact = torch.linalg.cholesky(torch.linalg.inv(damp_products(inputs)), upper=True)
        assert float((factor - exact).abs().max() / exact.abs().max()) < 1e-5

    def test_channels_may_come_in_any_order(self) -> None:
        inputs, order = make_inputs(300, 40), torch.randperm(40)
        assert torch.allclose(
            factor_inverse(gather_statistics(inputs), order),
            factor_inverse(gather_statistics(inputs[:, order]), torch.arange(40)),
            atol=1e-5,
        )

    def test_fewer_tokens_than_channels_and_dead_channels_are_damped(self) -> None:
        inputs = make_inputs(20, 64)
        inputs[:, 5] = 0
        assert bool(torch.isfinite(factor_inverse(gather_statistics(inputs), torch.arange(64))).all())

    def test_ten_times_the_damping_is_tried_next(self) -> None:
        # An eigenvalue is -0.05 times the mean diagonal: damping by 1 % is too little, by 10 % enough.
        products = torch.eye(4) * 100
        products[0, 1] = products[1, 0] = 105
        inputs = InputStatistics("layer", 9, products.diagonal().clone(), products=products)
        exact = torch.linalg.inv(products.double() + 10 * torch.eye(4, dtype=torch.float64))
        factor = factor_inverse(inputs, torch.arange(4)).double()
        assert torch.allclose(factor.T @ factor, exact, rtol=1e-4)

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("use", ["sparsegpt", "gptq"])
    def test_an_error_names_the_layer_that_cannot_be_inverted(self, value: float, use: str) -> None:
        inputs, weight = gather_statistics(torch.full((5, 8), value), "model.layers.3.mlp.up_proj"), make_weights(4, 8)
        scheme = SCHEMES["int8"]
        uses = {
            "gptq": partial(round_by_gptq, weight, compute_scales(weight, scheme), scheme, inputs),
            "sparsegpt": partial(get_method("sparsegpt").prune, weight, inputs, 0.5),
        }
        with pytest.raises(CompressknowError, match=r"inputs of model\.layers\.3\.mlp\.up_proj cannot be inverted"):
            uses[use]()

    def test_is_computed_once_and_freed_with_its_statistics(self) -> None:
        inputs = gather_statistics(make_inputs(50, 16))
        with Pool(2) as pool:
            found = pool.map(partial(get_inverse, by_activation=True), [inputs] * 8)
        assert all(each is found[0] for each in found)
        fourfold = replace(inputs, tokens=200, squares=inputs.squares * 4, products=inputs.products * 4)
        assert torch.allclose(get_inverse(fourfold, by_activation=True)[0] * 2, found[0][0])
        assert get_inverse(inputs) is not found[0]
        reference = weakref.ref(found[0][0])
        del found, inputs
        gc.collect()
        assert reference() is None


class TestWanda:
    @pytest.mark.parametrize("amount", [0.01, 0.3, 0.5, 0.99])
    def test_prunes_the_lowest_scores_of_each_row(self, amount: float) -> None:
        weight, inputs = make_weights(30, 70), make_inputs(200, 70)
        mask, values = get_method("wanda").prune(weight, gather_statistics(inputs), amount)
        assert values is None
        scores = weight.double().abs() * inputs.double().norm(dim=0)
        expected = torch.zeros_like(mask).scatter(1, scores.argsort(dim=1, stable=True)[:, : round(amount * 70)], True)
        assert torch.equal(mask, expected)
        for stored, transposed in (((30, 70), False), ((70, 30), True)):
            assert int(mask.sum()) == METHODS["wanda"].count(Weights(describe_stored(*stored), transposed), amount)

    def test_prunes_zeros_first_and_ties_by_index(self) -> None:
        weight = torch.tensor([[1.0, -1, 1, 1, -1], [2, -1, -0.0, 0, 1]])
        mask, _ = get_method("wanda").prune(weight, gather_statistics(torch.ones(3, 5)), 0.6)
        assert mask.tolist() == [[True, True, True, False, False], [False, True, True, True, False]]

    def test_prunes_a_zero_before_a_weight_of_a_dead_channel(self) -> None:
        inputs = torch.ones(3, 4)
        inputs[:, 0] = 0
        mask, _ = get_method("wanda").prune(torch.tensor([[1.0, 2, 0, 3]]), gather_statistics(inputs), 0.25)
        assert mask.tolist() == [[False, False, True, False]]

    def test_needs_only_the_norms_of_inputs(self) -> None:
        inputs = InputStatistics("layer", 3, torch.tensor([1.0, 100, 1, 1]))
        mask, _ = get_method("wanda").prune(torch.tensor([[3.0, 1, 2, 4]]), inputs, 0.5)
        assert mask.tolist() == [[True, False, True, False]]


class TestSparseGPT:
    @pytest.mark.parametrize("channels", CHANNELS)
    @pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
    def test_prunes_and_updates_by_the_papers_formulas(self, channels: int, amount: float) -> None:
        weight, inputs = make_weights(24, channels), make_inputs(500, channels)
        mask, values = get_method("sparsegpt").prune(weight, gather_statistics(inputs), amount)
        expected_mask, expected = prune_by_formula(weight, inputs, amount)
        assert torch.equal(mask, expected_mask)
        assert values is not None
        assert values.dtype == torch.float32
        assert float((values.masked_fill(mask, 0) - expected).abs().max()) < 1e-5

    @pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 5), (1, 25), (150, 300)])
    def test_prunes_a_pattern_by_the_papers_formulas(self, pattern: tuple[int, int]) -> None:
        keep, of = pattern
        weight, inputs = make_weights(24, 300 - 300 % of), make_inputs(500, 300 - 300 % of)
        mask, values = get_method("sparsegpt", f"{keep}:{of}").prune(weight, gather_statistics(inputs), 1 - keep / of)
        expected_mask, expected = prune_by_formula(weight, inputs, 1 - keep / of, pattern)
        assert torch.equal(mask, expected_mask)
        assert bool((mask.view(24, -1, of).sum(2) == of - keep).all())
        assert values is not None
        assert float((values.masked_fill(mask, 0) - expected).abs().max()) < 1e-5

    @pytest.mark.parametrize("shape", [(7, 129), (1, 1), (3, 300), (33, 128)])
    @pytest.mark.parametrize("amount", [0.013, 0.5, 0.77])
    def test_prunes_exactly_the_share(self, shape: tuple[int, int], amount: float) -> None:
        inputs = gather_statistics(make_inputs(50, shape[1] + 1)[:, : shape[1]])
        mask, _ = get_method("sparsegpt").prune(make_weights(*shape), inputs, amount)
        assert int(mask.sum()) == round(amount * mask.numel())
        assert int(mask.sum()) == METHODS["sparsegpt"].count(Weights(describe_stored(*shape)), amount)

    def test_prunes_zeros_first_and_keeps_them_zero(self) -> None:
        weight, inputs = make_weights(16, 200), make_inputs(400, 200)
        weight[make_weights(16, 200, seed=5) > 0] = 0
        # In the second block, which the errors of the first one reach, more than are pruned.
        weight[:, 128:][make_weights(16, 72, seed=6) > -0.8] = 0
        zero = weight == 0
        for amount in (0.3, 0.7):
            mask, values = get_method("sparsegpt").prune(weight, gather_statistics(inputs), amount)
            assert int(mask.sum()) == round(amount * mask.numel())
            assert values is not None
            assert bool((values[zero] == 0).all())
            assert bool((zero[mask] if amount < 0.5 else values.masked_fill(mask, 0)[mask] == 0).all())
            expected_mask, expected = prune_by_formula(weight, inputs, amount)
            assert torch.equal(mask, expected_mask)
            assert float((values.masked_fill(mask, 0) - expected).abs().max()) < 1e-5

    def test_prunes_ties_by_row_then_by_column(self) -> None:
        inputs = InputStatistics("layer", 9, torch.ones(6), products=torch.eye(6))
        mask, values = get_method("sparsegpt").prune(torch.ones(4, 6), inputs, 0.5)
        assert torch.equal(mask, torch.arange(24).view(4, 6) < 12)
        assert values is not None
        assert torch.equal(values.masked_fill(mask, 1), torch.ones(4, 6))


class TestGPTQ:
    def test_scales_of_groups_have_the_least_error(self) -> None:
        weight, inputs, scheme = make_weights(24, 96), make_inputs(600, 96), Groups4()
        inputs[:, :16] = 0
        initial = compute_scales(weight, scheme)
        fitted = fit_scales(weight, initial, scheme, gather_statistics(inputs))
        # Nothing is clipped where the text gives no reason to.
        assert torch.equal(fitted[:, 0], initial[:, 0])
        squares = inputs.double().square().mean(0).view(-1, 1, scheme.scale_per)
        groups = weight.double().view(24, -1, scheme.scale_per).transpose(0, 1)

        def sum_errors(scales: Tensor) -> Tensor:
            steps = scales.double().T[:, :, None]
            rounded = (groups / steps).round().clamp(-8, 7) * steps
            return ((rounded - groups).square() * squares).sum(-1)

        errors = torch.stack([sum_errors(initial * percent / 100) for percent in range(108, 56, -4)])
        torch.testing.assert_close(sum_errors(fitted), errors.amin(0), rtol=1e-4, atol=0)
        assert float(sum_errors(fitted).sum()) < 0.9 * float(sum_errors(initial).sum())

    @every_scheme
    @pytest.mark.parametrize("channels", [16, 112, 304])
    @pytest.mark.parametrize("zeros", [False, True], ids=["dense", "pruned"])
    def test_rounds_by_the_papers_formulas(self, scheme: Scheme, channels: int, zeros: bool) -> None:
        weight, inputs = make_weights(24, channels), make_inputs(600, channels)
        fixed = make_weights(24, channels, seed=4) > 0 if zeros else None
        weight = weight if fixed is None else weight.masked_fill(fixed, 0)
        scales = compute_scales(weight, scheme)
        rounded = round_by_gptq(weight, scales, scheme, gather_statistics(inputs))
        bounds = (scheme.lowest, scheme.highest)
        assert rounded.dtype == torch.int8
        assert torch.equal(rounded, round_by_formula(weight, inputs, repeat_scales(scales, channels), bounds, fixed))
        assert fixed is None or not bool(rounded[fixed].any())

    @every_scheme
    @pytest.mark.parametrize("tokens", [100, 200, 1000])
    def test_moves_by_a_quarter_towards_the_outputs_of_the_original(self, scheme: Scheme, tokens: int) -> None:
        """As after rounding W + W (Y - X)^T X (X^T X)^-1 / 4, and closer to W with fewer than 4 tokens a channel."""
        weight, original = make_weights(24, 96), make_inputs(1000, 96)[:tokens]
        after = original + 0.2 * make_inputs(1000, 96, seed=2)[:tokens]
        inputs = replace(gather_statistics(after), drift=(original - after).T @ after)
        change = torch.linalg.solve(damp_products(after), inputs.drift.double(), left=False)
        moved = weight + (0.25 * min(1, tokens / (4 * 96)) * (weight.double() @ change)).float()
        scales = compute_scales(weight, scheme)
        rounded = round_by_gptq(weight, scales, scheme, inputs)
        assert torch.equal(rounded, round_by_gptq(moved, scales, scheme, gather_statistics(after)))
        pruned = weight.masked_fill(make_weights(24, 96, seed=4) > 0, 0)
        assert not bool(round_by_gptq(pruned, scales, scheme, inputs)[pruned == 0].any())

    @every_scheme
    def test_rounds_each_row_independently(self, scheme: Scheme) -> None:
        weight, inputs = make_weights(20, 208), gather_statistics(make_inputs(300, 208))
        scales = compute_scales(weight, scheme)
        whole = round_by_gptq(weight, scales, scheme, inputs)
        parts = [round_by_gptq(weight[rows], scales[rows], scheme, inputs) for rows in (slice(0, 7), slice(7, 20))]
        assert torch.equal(torch.cat(parts), whole)

    def test_fp8_loses_less_than_rounding_to_nearest_and_keeps_zeros(self) -> None:
        weight, inputs, scheme = make_weights(24, 112), make_inputs(600, 112), SCHEMES["fp8"]
        fixed = make_weights(24, 112, seed=4) > 0
        weight = weight.masked_fill(fixed, 0)
        scales = compute_scales(weight, scheme)
        codes = round_by_gptq(weight, scales, scheme, gather_statistics(inputs))
        assert codes.dtype == torch.float8_e4m3fn
        fitted, plain = (scheme.dequantize(each, scales) for each in (codes, round_to_nearest(weight, scales, scheme)))
        assert not bool(fitted[fixed].any())
        assert error(inputs, weight, fitted) < 0.8 * error(inputs, weight, plain)
        # A weight beyond the grid gets the largest value, not NaN.
        assert float(round_by_gptq(weight, scales / 2, scheme, gather_statistics(inputs)).float().abs().max()) == 448

    def test_takes_one_scale_for_a_tensor(self) -> None:
        weight, inputs, scheme = make_weights(8, 96), make_inputs(300, 96), SCHEMES["int8-paper"]
        scales = scheme.scales(weight.abs().max().view(1))
        rounded = round_by_gptq(weight, scales, scheme, gather_statistics(inputs))
        assert torch.equal(rounded, round_by_formula(weight, inputs, scales, (-128, 127)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_does_not_change_weights_of_16_bits(self, dtype: torch.dtype) -> None:
        weight, inputs, scheme = make_weights(8, 96).to(dtype), gather_statistics(make_inputs(300, 96)), SCHEMES["int8"]
        before, scales = weight.clone(), compute_scales(weight, scheme)
        rounded = round_by_gptq(weight, scales, scheme, inputs)
        assert torch.equal(weight, before)
        assert torch.equal(rounded, round_by_gptq(weight.float(), scales.float(), scheme, inputs))

    def test_uncorrelated_inputs_are_rounded_to_nearest(self) -> None:
        weight, scheme = make_weights(8, 96), Groups4()
        inputs = InputStatistics("layer", 9, torch.ones(96), products=torch.eye(96))
        scales = compute_scales(weight, scheme)
        assert torch.equal(round_by_gptq(weight, scales, scheme, inputs), round_to_nearest(weight, scales, scheme))


class TestError:
    """The error ||X (W - W')^T|| on the calibration data."""

    @pytest.mark.parametrize("seed", range(3))
    def test_sparsegpt_beats_wanda_and_wanda_beats_magnitude(self, seed: int) -> None:
        weight, inputs = make_weights(64, 256, seed=seed), make_inputs(1000, 256, seed=seed)
        for pattern in (None, "2:4"):
            errors = measure_pruning_errors(weight, inputs, pattern)
            assert errors == sorted(errors)
        check_rounding(weight, inputs)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 12), st.integers(0, 999))
    def test_compensation_for_one_weight_does_not_raise_the_error(self, groups: int, seed: int) -> None:
        """Apart from the damping, the update of the other weights is optimal."""
        weight, inputs = make_weights(1, 16 * groups, seed=seed), make_inputs(300, 16 * groups, seed=seed + 1)
        mask, values = get_method("sparsegpt").prune(weight, gather_statistics(inputs), 1 / weight.numel())
        assert values is not None
        assert int(mask.sum()) == 1
        assert error(inputs, weight, values.masked_fill(mask, 0)) <= 1.02 * error(inputs, weight, weight * ~mask)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(16, 40), st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.8]))
    def test_compensation_does_not_raise_the_error(self, outputs: int, groups: int, seed: int, amount: float) -> None:
        """In a single row, a weight that compensates for another may itself be pruned later."""
        weight, inputs = make_weights(outputs, 16 * groups, seed=seed), make_inputs(300, 16 * groups, seed=seed + 1)
        mask, values = get_method("sparsegpt").prune(weight, gather_statistics(inputs), amount)
        assert values is not None
        # The zeros are the same, so the update may cost no more than the damping of 1 %.
        assert error(inputs, weight, values.masked_fill(mask, 0)) <= 1.02 * error(inputs, weight, weight * ~mask)

    @pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data does not exist")
    @pytest.mark.parametrize("name", ["minilm-facts", "t5-facts"])
    def test_is_lower_on_the_layers_of_trained_models(self, name: str) -> None:
        layers = list(record_layer_inputs(SHARED / "models" / name))
        assert len(layers) > 10
        for pattern in (None, "2:4"):
            errors = [measure_pruning_errors(*layer, pattern) for layer in layers]
            assert all(sparsegpt < min(others) for sparsegpt, *others in errors)
            # Where a norm has made inputs alike, wanda prunes as magnitude does, so only the mean is compared.
            _, wanda, magnitudes = (sum(each) / len(errors) for each in zip(*errors, strict=True))
            assert wanda < 0.96 * magnitudes
        for layer in layers[::3]:
            check_rounding(*layer)


def measure_pruning_errors(weight: Tensor, inputs: Tensor, pattern: str | None) -> list[float]:
    """Return the errors of SparseGPT, wanda and magnitude at 50 %, relative to ||X W^T||."""
    by_magnitude = prune_smallest(weight, 0.5)
    if pattern is not None:
        groups = weight.view(-1, 4)
        by_magnitude = groups.scatter(1, groups.abs().argsort(1)[:, :2], 0).view_as(weight)
    pruned = [*(prune_weights(name, weight, inputs, 0.5, pattern) for name in ("sparsegpt", "wanda")), by_magnitude]
    return [error(inputs, weight, after) / float((inputs @ weight.T).norm()) for after in pruned]


def check_rounding(weight: Tensor, inputs: Tensor) -> None:
    pruned = prune_weights("sparsegpt", weight, inputs, 0.5)
    for scheme in INTEGER_SCHEMES.values():
        for start, fixed in ((weight, None), (pruned, pruned == 0)):
            scales = compute_scales(start, scheme)
            by_gptq = round_by_gptq(start, scales, scheme, gather_statistics(inputs))
            by_nearest = round_to_nearest(start, scales, scheme)
            compensated, plain = (scheme.dequantize(each, scales) for each in (by_gptq, by_nearest))
            assert error(inputs, start, compensated) < error(inputs, start, plain)
            assert fixed is None or not bool(by_gptq[fixed].any())


def record_layer_inputs(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Return weight and inputs of every third Linear layer of a model's blocks, on random tokens."""
    auto_class = hf.AutoModelForSeq2SeqLM if "t5" in folder.name else hf.AutoModelForMaskedLM
    model = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(1000, 8000, (24, 48), generator=torch.Generator().manual_seed(0))
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ("layer" in n or "block" in n)]
    recorded: dict[torch.nn.Module, Tensor] = {}
    for module in linears[::3]:
        module.register_forward_pre_hook(lambda module, args: recorded.update({module: args[0].flatten(0, -2)}))
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return ((module.weight.detach(), inputs) for module, inputs in recorded.items())


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "gptq"])
def test_bytes_do_not_depend_on_the_number_of_threads(name: str) -> None:
    weight, statistics = make_weights(200, 520), gather_statistics(make_inputs(700, 520))
    scheme = SCHEMES["int8"]
    scales, before = compute_scales(weight, scheme), torch.get_num_threads()

    def compress(inputs: InputStatistics) -> Tensor:
        if name == "gptq":
            return round_by_gptq(weight, scales, scheme, inputs)
        mask, values = get_method(name).prune(weight, inputs, 0.5)
        return (weight if values is None else values).masked_fill(mask, 0)

    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        # Each copy of the statistics is inverted anew.
        with Pool(threads) as pool:
            results += pool.map(compress, [replace(statistics, products=statistics.products.clone()) for _ in range(2)])
    torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_pruning_does_not_change_weights_or_statistics(name: str) -> None:
    weight, inputs = make_weights(20, 40), gather_statistics(make_inputs(99, 40))
    before = [each.clone() for each in (weight, inputs.squares, inputs.products)]
    get_method(name).prune(weight, inputs, 0.5)
    assert all(map(torch.equal, (weight, inputs.squares, inputs.products), before))
