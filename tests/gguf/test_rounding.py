"""GPTQ onto llama.cpp's grids is compared with bytes, dequantization and rounding of llama.cpp itself."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp_py_sync")

from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.gguf.gptq import LAYOUTS, pack, replace_rows, round_gptq
from compressknow.gguf.grids import dequantize, get_block_size, get_nbytes, quantize, roundtrip
from tests.shown import ROOT

ROWS, COLUMNS = 24, 512


def make_weight(scale: float = 0.05) -> torch.Tensor:
    """Draw a normal matrix with rows of several magnitudes, one row of zeros and one block of zeros."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * scale
    values *= torch.linspace(0.2, 3, ROWS)[:, None]
    values[3] = 0
    values[5, :256] = 0
    return values


def make_statistics(tokens: int = 2000) -> InputStatistics:
    """Draw correlated inputs with channels of several magnitudes; return their statistics."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, 64, generator=generator) @ torch.randn(64, COLUMNS, generator=generator) / 8
    inputs += torch.randn(tokens, COLUMNS, generator=generator)
    inputs *= torch.exp(torch.randn(COLUMNS, generator=generator))
    products = inputs.T @ inputs
    return InputStatistics("layer", tokens, products.diagonal().clone(), None, products)


def compute_error(rounded: np.ndarray, exact: torch.Tensor, inputs: InputStatistics) -> float:
    """Compute ||X (W - W')^T||^2."""
    change = torch.from_numpy(rounded) - exact
    return float(((change @ inputs.products) * change).sum())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_llama_cpp_reads_the_packed_codes(kind: str) -> None:
    """Packing the codes of llama.cpp gives its bytes again, and llama.cpp dequantizes any other codes right."""
    layout, width = LAYOUTS[kind], get_block_size(kind)
    blocks = quantize(make_weight().numpy(), kind).reshape(-1, get_nbytes(kind, (1, width)))
    assert layout.width == width
    first, last = layout.codes
    values = [
        dequantize(pack(blocks, np.full((len(blocks), width), code, np.int16), layout), kind, (len(blocks), width))
        for code in range(first, last + 1)
    ]
    dequantized = dequantize(blocks, kind, (len(blocks), width))
    codes = first + np.argmax(np.stack(values) == dequantized, axis=0).astype(np.int16)
    distinct = np.ptp(np.stack(values), axis=0).min(axis=1) > 0
    assert distinct.sum() > len(blocks) / 2
    repacked = pack(blocks, codes, layout)
    assert (repacked[distinct] == blocks[distinct]).mean() > (0.9999 if kind == "q8_0" else 0.99)
    np.testing.assert_array_equal(dequantize(repacked, kind, dequantized.shape), dequantized)
    random_codes = np.random.default_rng(2).integers(first, last + 1, dequantized.shape, np.int16)
    expected = np.take_along_axis(np.stack(values), (random_codes - first)[None].astype(np.int64), axis=0)[0]
    np.testing.assert_array_equal(dequantize(pack(blocks, random_codes, layout), kind, dequantized.shape), expected)


def test_rows_are_rounded_independently_in_whatever_pieces() -> None:
    """600,000 weights are three pieces, of which the last is shorter."""
    weight = np.random.default_rng(0).standard_normal((1200, COLUMNS), np.float32)
    packed = quantize(weight, "q8_0")
    values = dequantize(packed, "q8_0", weight.shape)
    for rows in (slice(0, 7), slice(505, 520), slice(1193, 1200)):
        np.testing.assert_array_equal(packed[rows], quantize(weight[rows], "q8_0"))
        np.testing.assert_array_equal(values[rows], dequantize(packed[rows], "q8_0", weight[rows].shape))
    assert np.abs(values - weight).max() < 0.05


@pytest.mark.parametrize("kind", ["q4_0", "q3_k"])
def test_the_importance_of_columns_lowers_their_error(kind: str) -> None:
    weight = make_weight().numpy()
    importance = np.ones(COLUMNS, np.float32)
    importance[::8] = 100
    errors = [np.square(roundtrip(weight, kind, each) - weight)[:, ::8].sum() for each in (importance, None)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_gptq_loses_less_than_llama_cpp_with_an_importance_matrix(kind: str) -> None:
    exact, inputs = make_weight(), make_statistics()
    packed = round_gptq(exact, kind, inputs)
    assert packed.shape == (ROWS, get_nbytes(kind, (1, COLUMNS)))
    ours = dequantize(packed, kind, exact.shape)
    theirs = dequantize(quantize(exact.numpy(), kind, (inputs.squares / inputs.tokens).numpy()), kind, exact.shape)
    assert compute_error(ours, exact, inputs) < 0.7 * compute_error(theirs, exact, inputs)
    if kind not in ("q2_k", "q4_1", "q5_1", "q4_k", "q5_k"):
        assert (ours[3] == 0).all(), "what is zero stays zero where the grid has no minimum"


@pytest.mark.parametrize("kind", LAYOUTS)
def test_pruned_weights_stay_zero_in_all_types_in_which_llama_cpp_keeps_them(kind: str) -> None:
    """Neither the compensation of errors nor that of earlier layers moves them."""
    exact, inputs = make_weight(), make_statistics()
    exact[exact.abs() < exact.abs().median(dim=1, keepdim=True).values] = 0
    inputs = replace(inputs, drift=0.2 * inputs.products.roll(1, dims=0))
    ours = dequantize(round_gptq(exact, kind, inputs), kind, exact.shape)
    theirs = dequantize(quantize(exact.numpy(), kind, (inputs.squares / inputs.tokens).numpy()), kind, exact.shape)
    zero = exact.numpy() == 0
    assert (ours[zero] == 0).all() == (theirs[zero] == 0).all() == LAYOUTS[kind].has_zero
    ours = dequantize(round_gptq(exact, kind, replace(inputs, drift=None)), kind, exact.shape)
    assert compute_error(ours, exact, inputs) < 0.8 * compute_error(theirs, exact, inputs)


def test_the_manual_names_the_types_in_which_llama_cpp_keeps_zeros_and_those_in_which_it_loses_them() -> None:
    exact = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).numpy()
    exact[np.abs(exact) < np.median(np.abs(exact))] = 0
    kept = {kind: (roundtrip(exact, kind)[exact == 0] == 0).mean() for kind in LAYOUTS}
    page = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8")
    sentences = page[page.index("A pruned checkpoint keeps") : page.index("The files `q4_k_m`")].split(". ")
    all_kept, nearly_none = (set(re.findall("`(.+?)`", sentence)) for sentence in sentences[:2])
    assert all_kept == {"f16", "bf16", *(kind for kind, share in kept.items() if share == 1)}
    assert nearly_none == {kind for kind, share in kept.items() if share < 0.05}


@pytest.mark.parametrize("kind", ["iq4_nl", "q4_k"])
def test_weights_with_uncorrelated_inputs_are_rounded_to_nearest(kind: str) -> None:
    """The nearest value is found by a search over the whole grid."""
    exact = make_weight()
    products = torch.eye(COLUMNS) * 100
    inputs = InputStatistics("layer", 100, products.diagonal().clone(), None, products)
    rounded = dequantize(round_gptq(exact, kind, inputs), kind, exact.shape)
    packed = quantize(exact.numpy(), kind, np.ones(COLUMNS, np.float32))
    width = get_block_size(kind)
    blocks = packed.reshape(-1, get_nbytes(kind, (1, width)))
    grid = np.stack(
        [
            dequantize(pack(blocks, np.full((len(blocks), width), code, np.int16), LAYOUTS[kind]), kind, exact.shape)
            for code in range(LAYOUTS[kind].codes[1] + 1)
        ]
    )
    nearest = np.abs(grid - exact.numpy()).min(axis=0)
    np.testing.assert_allclose(np.abs(rounded - exact.numpy()), nearest, atol=1e-6)


@pytest.mark.parametrize("tokens", [2048, 512])
@pytest.mark.parametrize("kind", ["q8_0", "q3_k"])
def test_errors_of_earlier_layers_are_partly_compensated(kind: str, tokens: int) -> None:
    """Weights move towards the least-squares solution that maps drifted inputs to the original outputs; with a quarter
    of the tokens, a quarter as far."""
    exact, generator = make_weight(), torch.Generator().manual_seed(2)
    original = torch.randn(2048, COLUMNS, generator=generator)
    after = original + 0.3 * torch.randn(2048, COLUMNS, generator=generator) + 0.2 * original.roll(1, dims=1)
    products = after.T @ after
    inputs = InputStatistics("layer", tokens, products.diagonal().clone(), None, products, (original - after).T @ after)

    def measure_loss(ours: np.ndarray) -> float:
        return float((after @ torch.from_numpy(ours).T - original @ exact.T).square().sum())

    ours = dequantize(round_gptq(exact, kind, inputs), kind, exact.shape)
    without = dequantize(round_gptq(exact, kind, replace(inputs, drift=None)), kind, exact.shape)
    assert measure_loss(ours) < (0.9 if tokens == 2048 else 0.98) * measure_loss(without)
    if kind == "q8_0":
        damped = products.double() + 0.01 * products.diagonal().double().mean() * torch.eye(COLUMNS)
        change = exact.double() @ torch.linalg.solve(damped, inputs.drift.double().T).T * 0.25 * tokens / 2048
        # The tolerance covers the rounding to 8 bits.
        assert float(((torch.from_numpy(ours) - exact) * change).sum()) == pytest.approx(float((change**2).sum()), 0.05)


def test_rows_are_replaced_in_whatever_order_the_converter_stores_them() -> None:
    weight = torch.arange(24.0).reshape(6, 4)
    exact = weight[[4, 0, 2]].numpy().copy()
    replace_rows(weight, exact, -exact)
    assert torch.equal(weight.sign()[1:, 0], torch.tensor([1.0, -1, 1, -1, 1]))
    assert torch.equal(weight.abs(), torch.arange(24.0).reshape(6, 4))
