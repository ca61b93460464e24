"""What looks at activations, wanda, SparseGPT and GPTQ, against the papers' formulas and against each other."""

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
    correlated,
    damped,
    error,
    gptq_by_formula,
    sparsegpt_by_formula,
    statistics_of,
    weights_of,
)

SHARED = Path(__file__).parents[3] / "shared"
# Not multiples of the blocks of 128 and 16 columns, and less than one of them.
CHANNELS = (8, 100, 300)
ROUNDED = {"int8": SCHEMES["int8"], "int8-weights": SCHEMES["int8-weights"], "4 bits in groups": Groups4()}
every_scheme = pytest.mark.parametrize("scheme", ROUNDED.values(), ids=ROUNDED.keys())


def method(name: str, pattern: str | None = None) -> Calibrated:
    chosen = METHODS[name].with_values({"pattern": pattern})
    assert isinstance(chosen, Calibrated)
    return chosen


def pruned_by(name: str, weight: Tensor, inputs: Tensor, amount: float, pattern: str | None = None) -> Tensor:
    """The weights that are written, those that fall zero."""
    mask, values = method(name, pattern).prune(weight, statistics_of(inputs), amount)
    return (weight if values is None else values).masked_fill(mask, 0)


def smallest_magnitudes(weight: Tensor, amount: float) -> Tensor:
    """By torch, the smallest of the tensor zeroed."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight.clone())
    return prune.l1_unstructured(module, "weight", amount).weight.detach()


def scales_of(weight: Tensor, scheme: Scheme) -> Tensor:
    groups = weight.shape[1] // scheme.scale_per if isinstance(scheme.scale_per, int) else 1
    return scheme.scales(weight.abs().view(len(weight), groups, -1).amax(2))


def stored(*shape: int) -> StoredTensor:
    return StoredTensor("weight", "F32", shape, Path("model.safetensors"), 0)


class TestInverse:
    @pytest.mark.parametrize("channels", [1, 7, 256, 601])
    def test_it_is_an_upper_factor_of_the_damped_inverse(self, channels: int) -> None:
        inputs = correlated(400, 2 * channels)[:, :channels]
        factor = factor_inverse(statistics_of(inputs), torch.arange(channels)).double()
        assert torch.equal(factor, factor.triu())
        assert bool((factor.diagonal() > 0).all())
        identity = factor.T @ factor @ damped(inputs)
        assert float((identity - torch.eye(channels)).abs().max()) < 1e-3
        exact = torch.linalg.cholesky(torch.linalg.inv(damped(inputs)), upper=True)
        assert float((factor - exact).abs().max() / exact.abs().max()) < 1e-5

    def test_channels_may_come_in_any_order(self) -> None:
        inputs, order = correlated(300, 40), torch.randperm(40)
        assert torch.allclose(
            factor_inverse(statistics_of(inputs), order),
            factor_inverse(statistics_of(inputs[:, order]), torch.arange(40)),
            atol=1e-5,
        )

    def test_fewer_tokens_than_channels_and_dead_channels_are_damped(self) -> None:
        inputs = correlated(20, 64)
        inputs[:, 5] = 0
        assert bool(torch.isfinite(factor_inverse(statistics_of(inputs), torch.arange(64))).all())

    def test_more_damping_is_tried_once(self) -> None:
        # An eigenvalue of -0.05 times the mean diagonal: 1 % does not make up for it, 10 % does.
        products = torch.eye(4) * 100
        products[0, 1] = products[1, 0] = 105
        inputs = InputStatistics("layer", 9, products.diagonal().clone(), products=products)
        exact = torch.linalg.inv(products.double() + 10 * torch.eye(4, dtype=torch.float64))
        factor = factor_inverse(inputs, torch.arange(4)).double()
        assert torch.allclose(factor.T @ factor, exact, rtol=1e-4)

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("use", ["sparsegpt", "gptq"])
    def test_what_cannot_be_inverted_names_the_layer(self, value: float, use: str) -> None:
        inputs, weight = statistics_of(torch.full((5, 8), value), "model.layers.3.mlp.up_proj"), weights_of(4, 8)
        scheme = SCHEMES["int8"]
        uses = {
            "gptq": partial(round_by_gptq, weight, scales_of(weight, scheme), scheme, inputs),
            "sparsegpt": partial(method("sparsegpt").prune, weight, inputs, 0.5),
        }
        with pytest.raises(CompressknowError, match=r"inputs of model\.layers\.3\.mlp\.up_proj cannot be inverted"):
            uses[use]()

    def test_it_is_computed_once_and_goes_with_its_statistics(self) -> None:
        inputs = statistics_of(correlated(50, 16))
        with Pool(2) as pool:
            found = pool.map(partial(get_inverse, by_activation=True), [inputs] * 8)
        assert all(each is found[0] for each in found)
        more = replace(inputs, tokens=200, squares=inputs.squares * 4, products=inputs.products * 4)
        assert torch.allclose(get_inverse(more, by_activation=True)[0] * 2, found[0][0])
        assert get_inverse(inputs) is not found[0]
        kept = weakref.ref(found[0][0])
        del found, inputs
        gc.collect()
        assert kept() is None


class TestWanda:
    @pytest.mark.parametrize("amount", [0.01, 0.3, 0.5, 0.99])
    def test_it_takes_the_lowest_scores_of_each_row(self, amount: float) -> None:
        weight, inputs = weights_of(30, 70), correlated(200, 70)
        mask, values = method("wanda").prune(weight, statistics_of(inputs), amount)
        assert values is None
        scores = weight.double().abs() * inputs.double().norm(dim=0)
        expected = torch.zeros_like(mask).scatter(1, scores.argsort(dim=1, stable=True)[:, : round(amount * 70)], True)
        assert torch.equal(mask, expected)
        assert int(mask.sum()) == METHODS["wanda"].count(Weights(stored(30, 70)), amount)

    def test_ties_go_in_the_order_of_the_index_after_zeros(self) -> None:
        weight = torch.tensor([[1.0, -1, 1, 1, -1], [2, -1, -0.0, 0, 1]])
        mask, _ = method("wanda").prune(weight, statistics_of(torch.ones(3, 5)), 0.6)
        assert mask.tolist() == [[True, True, True, False, False], [False, True, True, True, False]]

    def test_a_zero_falls_before_a_weight_of_a_dead_channel(self) -> None:
        inputs = torch.ones(3, 4)
        inputs[:, 0] = 0
        mask, _ = method("wanda").prune(torch.tensor([[1.0, 2, 0, 3]]), statistics_of(inputs), 0.25)
        assert mask.tolist() == [[False, False, True, False]]

    def test_norms_suffice(self) -> None:
        inputs = InputStatistics("layer", 3, torch.tensor([1.0, 100, 1, 1]))
        mask, _ = method("wanda").prune(torch.tensor([[3.0, 1, 2, 4]]), inputs, 0.5)
        assert mask.tolist() == [[True, False, True, False]]


class TestSparseGPT:
    @pytest.mark.parametrize("channels", CHANNELS)
    @pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
    def test_it_prunes_and_updates_as_the_papers_formulas_say(self, channels: int, amount: float) -> None:
        weight, inputs = weights_of(24, channels), correlated(500, channels)
        mask, values = method("sparsegpt").prune(weight, statistics_of(inputs), amount)
        expected_mask, expected = sparsegpt_by_formula(weight, inputs, amount)
        assert torch.equal(mask, expected_mask)
        assert values is not None
        assert values.dtype == torch.float32
        assert float((values.masked_fill(mask, 0) - expected).abs().max()) < 1e-5

    @pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 5), (1, 25), (150, 300)])
    def test_with_a_pattern_too(self, pattern: tuple[int, int]) -> None:
        keep, of = pattern
        weight, inputs = weights_of(24, 300 - 300 % of), correlated(500, 300 - 300 % of)
        mask, values = method("sparsegpt", f"{keep}:{of}").prune(weight, statistics_of(inputs), 1 - keep / of)
        expected_mask, expected = sparsegpt_by_formula(weight, inputs, 1 - keep / of, pattern)
        assert torch.equal(mask, expected_mask)
        assert bool((mask.view(24, -1, of).sum(2) == of - keep).all())
        assert values is not None
        assert float((values.masked_fill(mask, 0) - expected).abs().max()) < 1e-5

    @pytest.mark.parametrize("shape", [(7, 129), (1, 1), (3, 300), (33, 128)])
    @pytest.mark.parametrize("amount", [0.013, 0.5, 0.77])
    def test_counts_are_exact(self, shape: tuple[int, int], amount: float) -> None:
        inputs = statistics_of(correlated(50, shape[1] + 1)[:, : shape[1]])
        mask, _ = method("sparsegpt").prune(weights_of(*shape), inputs, amount)
        assert int(mask.sum()) == round(amount * mask.numel())
        assert int(mask.sum()) == METHODS["sparsegpt"].count(Weights(stored(*shape)), amount)

    def test_zeros_fall_first_and_none_comes_back(self) -> None:
        weight, inputs = weights_of(16, 200), correlated(400, 200)
        weight[weights_of(16, 200, seed=5) > 0] = 0
        zero = weight == 0
        for amount in (0.3, 0.7):
            mask, values = method("sparsegpt").prune(weight, statistics_of(inputs), amount)
            assert int(mask.sum()) == round(amount * mask.numel())
            assert values is not None
            assert bool((values[zero] == 0).all())
            assert bool((zero[mask] if amount < 0.5 else values.masked_fill(mask, 0)[mask] == 0).all())
            expected_mask, expected = sparsegpt_by_formula(weight, inputs, amount)
            assert torch.equal(mask, expected_mask)
            assert float((values.masked_fill(mask, 0) - expected).abs().max()) < 1e-5

    def test_ties_go_in_the_order_of_rows_then_of_columns(self) -> None:
        inputs = InputStatistics("layer", 9, torch.ones(6), products=torch.eye(6))
        mask, values = method("sparsegpt").prune(torch.ones(4, 6), inputs, 0.5)
        assert torch.equal(mask, torch.arange(24).view(4, 6) < 12)
        assert values is not None
        assert torch.equal(values.masked_fill(mask, 1), torch.ones(4, 6))


class TestGPTQ:
    def test_scales_of_groups_are_those_of_the_least_error(self) -> None:
        weight, inputs, scheme = weights_of(24, 96), correlated(600, 96), Groups4()
        given = scales_of(weight, scheme)
        found = fit_scales(weight, given, scheme, statistics_of(inputs))
        squares = inputs.double().square().mean(0).view(-1, 1, scheme.scale_per)
        groups = weight.double().view(24, -1, scheme.scale_per).transpose(0, 1)

        def lost(scales: Tensor) -> Tensor:
            steps = scales.double().T[:, :, None]
            rounded = (groups / steps).round().clamp(-8, 7) * steps
            return ((rounded - groups).square() * squares).sum(-1)

        tried = torch.stack([lost(given * percent / 100) for percent in range(108, 56, -4)])
        torch.testing.assert_close(lost(found), tried.amin(0), rtol=1e-4, atol=0)
        assert float(lost(found).sum()) < 0.9 * float(lost(given).sum())

    @every_scheme
    @pytest.mark.parametrize("channels", [16, 112, 304])
    @pytest.mark.parametrize("zeros", [False, True], ids=["dense", "pruned"])
    def test_it_rounds_as_the_papers_formulas_say(self, scheme: Scheme, channels: int, zeros: bool) -> None:
        weight, inputs = weights_of(24, channels), correlated(600, channels)
        fixed = weights_of(24, channels, seed=4) > 0 if zeros else None
        weight = weight if fixed is None else weight.masked_fill(fixed, 0)
        scales = scales_of(weight, scheme)
        found = round_by_gptq(weight, scales, scheme, statistics_of(inputs))
        bounds = (scheme.lowest, scheme.highest)
        assert found.dtype == torch.int8
        assert torch.equal(found, gptq_by_formula(weight, inputs, repeat_scales(scales, channels), bounds, fixed))
        assert fixed is None or not bool(found[fixed].any())

    @every_scheme
    def test_rows_do_not_depend_on_each_other(self, scheme: Scheme) -> None:
        weight, inputs = weights_of(20, 208), statistics_of(correlated(300, 208))
        scales = scales_of(weight, scheme)
        whole = round_by_gptq(weight, scales, scheme, inputs)
        parts = [round_by_gptq(weight[rows], scales[rows], scheme, inputs) for rows in (slice(0, 7), slice(7, 20))]
        assert torch.equal(torch.cat(parts), whole)

    def test_floats_of_8_bits_lose_less_than_to_nearest_and_zeros_stay(self) -> None:
        weight, inputs, scheme = weights_of(24, 112), correlated(600, 112), SCHEMES["fp8"]
        fixed = weights_of(24, 112, seed=4) > 0
        weight = weight.masked_fill(fixed, 0)
        scales = scales_of(weight, scheme)
        codes = round_by_gptq(weight, scales, scheme, statistics_of(inputs))
        assert codes.dtype == torch.float8_e4m3fn
        found, plain = (scheme.dequantize(each, scales) for each in (codes, round_to_nearest(weight, scales, scheme)))
        assert not bool(found[fixed].any())
        assert error(inputs, weight, found) < 0.8 * error(inputs, weight, plain)

    def test_one_scale_for_all_of_a_tensor(self) -> None:
        weight, inputs, scheme = weights_of(8, 96), correlated(300, 96), SCHEMES["int8-paper"]
        scales = scheme.scales(weight.abs().max().view(1))
        found = round_by_gptq(weight, scales, scheme, statistics_of(inputs))
        assert torch.equal(found, gptq_by_formula(weight, inputs, scales, (-128, 127)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_weights_of_16_bits_are_left_as_they_are(self, dtype: torch.dtype) -> None:
        weight, inputs, scheme = weights_of(8, 96).to(dtype), statistics_of(correlated(300, 96)), SCHEMES["int8"]
        before, scales = weight.clone(), scales_of(weight, scheme)
        found = round_by_gptq(weight, scales, scheme, inputs)
        assert torch.equal(weight, before)
        assert torch.equal(found, round_by_gptq(weight.float(), scales.float(), scheme, inputs))

    def test_inputs_that_do_not_correlate_are_rounded_to_nearest(self) -> None:
        weight, scheme = weights_of(8, 96), Groups4()
        inputs = InputStatistics("layer", 9, torch.ones(96), products=torch.eye(96))
        scales = scales_of(weight, scheme)
        assert torch.equal(round_by_gptq(weight, scales, scheme, inputs), round_to_nearest(weight, scales, scheme))


class TestError:
    """||X (W - W')^T|| on the calibration data."""

    @pytest.mark.parametrize("seed", range(3))
    def test_each_method_does_better_than_the_one_before(self, seed: int) -> None:
        weight, inputs = weights_of(64, 256, seed=seed), correlated(1000, 256, seed=seed)
        for pattern in (None, "2:4"):
            errors = pruning_errors(weight, inputs, pattern)
            assert errors == sorted(errors)
        check_rounding(weight, inputs)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 12), st.integers(0, 999))
    def test_the_loss_of_one_weight_is_never_made_worse(self, groups: int, seed: int) -> None:
        """What is then done to the others is the best that can be, but for the damping."""
        weight, inputs = weights_of(1, 16 * groups, seed=seed), correlated(300, 16 * groups, seed=seed + 1)
        mask, values = method("sparsegpt").prune(weight, statistics_of(inputs), 1 / weight.numel())
        assert values is not None
        assert int(mask.sum()) == 1
        assert error(inputs, weight, values.masked_fill(mask, 0)) <= 1.02 * error(inputs, weight, weight * ~mask)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(16, 40), st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.8]))
    def test_compensation_does_not_cost(self, outputs: int, groups: int, seed: int, amount: float) -> None:
        """Over many rows: of a single one, what made up for a weight may be pruned after it, and be lost."""
        weight, inputs = weights_of(outputs, 16 * groups, seed=seed), correlated(300, 16 * groups, seed=seed + 1)
        mask, values = method("sparsegpt").prune(weight, statistics_of(inputs), amount)
        assert values is not None
        # For the same zeros: 1 % of damping is all that the update may cost.
        assert error(inputs, weight, values.masked_fill(mask, 0)) <= 1.02 * error(inputs, weight, weight * ~mask)

    @pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data is not here")
    @pytest.mark.parametrize("name", ["minilm-facts", "t5-facts"])
    def test_on_the_layers_of_models_that_know(self, name: str) -> None:
        layers = list(inputs_of_layers(SHARED / "models" / name))
        assert len(layers) > 10
        for pattern in (None, "2:4"):
            errors = [pruning_errors(*layer, pattern) for layer in layers]
            assert all(sparsegpt < min(others) for sparsegpt, *others in errors)
            # Inputs that a norm has made alike tell wanda little: in single layers it comes out as magnitudes do.
            _, wanda, magnitudes = (sum(each) / len(errors) for each in zip(*errors, strict=True))
            assert wanda < 0.96 * magnitudes
        for layer in layers[::3]:
            check_rounding(*layer)


def pruning_errors(weight: Tensor, inputs: Tensor, pattern: str | None) -> list[float]:
    """Of SparseGPT, wanda and magnitudes at 50 %, relative to ||X W^T||."""
    by_magnitude = smallest_magnitudes(weight, 0.5)
    if pattern is not None:
        groups = weight.view(-1, 4)
        by_magnitude = groups.scatter(1, groups.abs().argsort(1)[:, :2], 0).view_as(weight)
    made = [*(pruned_by(name, weight, inputs, 0.5, pattern) for name in ("sparsegpt", "wanda")), by_magnitude]
    return [error(inputs, weight, after) / float((inputs @ weight.T).norm()) for after in made]


def check_rounding(weight: Tensor, inputs: Tensor) -> None:
    pruned = pruned_by("sparsegpt", weight, inputs, 0.5)
    for scheme in ROUNDED.values():
        for start, fixed in ((weight, None), (pruned, pruned == 0)):
            scales = scales_of(start, scheme)
            by_gptq = round_by_gptq(start, scales, scheme, statistics_of(inputs))
            by_nearest = round_to_nearest(start, scales, scheme)
            made, plain = (scheme.dequantize(each, scales) for each in (by_gptq, by_nearest))
            assert error(inputs, start, made) < error(inputs, start, plain)
            assert fixed is None or not bool(by_gptq[fixed].any())


def inputs_of_layers(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of the Linear layers of a model's blocks, and their inputs on sentences of its vocabulary's words."""
    kind = hf.AutoModelForSeq2SeqLM if "t5" in folder.name else hf.AutoModelForMaskedLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(1000, 8000, (24, 48), generator=torch.Generator().manual_seed(0))
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ("layer" in n or "block" in n)]
    seen: dict[torch.nn.Module, Tensor] = {}
    for module in linears[::3]:
        module.register_forward_pre_hook(lambda module, given: seen.update({module: given[0].flatten(0, -2)}))
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return ((module.weight.detach(), inputs) for module, inputs in seen.items())


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "gptq"])
def test_the_same_bytes_with_any_number_of_threads(name: str) -> None:
    weight, gathered = weights_of(200, 520), statistics_of(correlated(700, 520))
    scheme = SCHEMES["int8"]
    scales, before = scales_of(weight, scheme), torch.get_num_threads()

    def make(known: InputStatistics) -> Tensor:
        if name == "gptq":
            return round_by_gptq(weight, scales, scheme, known)
        mask, values = method(name).prune(weight, known, 0.5)
        return (weight if values is None else values).masked_fill(mask, 0)

    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        # Records of their own, so that each inverts anew.
        with Pool(threads) as pool:
            found += pool.map(make, [replace(gathered, products=gathered.products.clone()) for _ in range(2)])
    torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_they_leave_weights_and_statistics_as_they_are(name: str) -> None:
    weight, inputs = weights_of(20, 40), statistics_of(correlated(99, 40))
    before = [each.clone() for each in (weight, inputs.squares, inputs.products)]
    method(name).prune(weight, inputs, 0.5)
    assert all(map(torch.equal, (weight, inputs.squares, inputs.products), before))
