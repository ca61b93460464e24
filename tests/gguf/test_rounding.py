"""GPTQ onto llama.cpp's grids: held against llama.cpp's own bytes, its own reading of them, and its own rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp_py_sync")

from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.gguf.gptq import LAYOUTS, pack, replace_rows, round_gptq
from compressknow.gguf.grids import dequantize, get_block_size, get_nbytes, quantize

ROWS, COLUMNS = 24, 512


def weight(scale: float = 0.05) -> torch.Tensor:
    """A matrix as layers have it: normal, with rows of several sizes, one of zeros and a block of zeros."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * scale
    values *= torch.linspace(0.2, 3, ROWS)[:, None]
    values[3] = 0
    values[5, :256] = 0
    return values


def statistics(tokens: int = 2000) -> InputStatistics:
    """Of inputs that depend on each other, and of channels of several sizes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, 64, generator=generator) @ torch.randn(64, COLUMNS, generator=generator) / 8
    inputs += torch.randn(tokens, COLUMNS, generator=generator)
    inputs *= torch.exp(torch.randn(COLUMNS, generator=generator))
    products = inputs.T @ inputs
    return InputStatistics("layer", tokens, products.diagonal().clone(), None, products)


def error(made: np.ndarray, exact: torch.Tensor, inputs: InputStatistics) -> float:
    """||X (W - W')^T||^2."""
    change = torch.from_numpy(made) - exact
    return float(((change @ inputs.products) * change).sum())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_codes_stand_where_llama_cpp_reads_them(kind: str) -> None:
    """Its own bytes, with the codes that its own reading tells, are its own bytes again; and with any other codes it
    reads these."""
    layout, width = LAYOUTS[kind], get_block_size(kind)
    blocks = quantize(weight().numpy(), kind).reshape(-1, get_nbytes(kind, (1, width)))
    assert layout.width == width
    first, last = layout.codes
    meanings = [
        dequantize(pack(blocks, np.full((len(blocks), width), code, np.int16), layout), kind, (len(blocks), width))
        for code in range(first, last + 1)
    ]
    read = dequantize(blocks, kind, (len(blocks), width))
    codes = first + np.argmax(np.stack(meanings) == read, axis=0).astype(np.int16)
    told = np.ptp(np.stack(meanings), axis=0).min(axis=1) > 0
    assert told.sum() > len(blocks) / 2
    again = pack(blocks, codes, layout)
    assert (again[told] == blocks[told]).mean() > (0.9999 if kind == "q8_0" else 0.99)
    np.testing.assert_array_equal(dequantize(again, kind, read.shape), read)
    drawn = np.random.default_rng(2).integers(first, last + 1, read.shape, np.int16)
    expected = np.take_along_axis(np.stack(meanings), (drawn - first)[None].astype(np.int64), axis=0)[0]
    np.testing.assert_array_equal(dequantize(pack(blocks, drawn, layout), kind, read.shape), expected)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_it_loses_less_than_llama_cpp_with_an_importance_matrix(kind: str) -> None:
    exact, inputs = weight(), statistics()
    packed = round_gptq(exact, kind, inputs)
    assert packed.shape == (ROWS, get_nbytes(kind, (1, COLUMNS)))
    made = dequantize(packed, kind, exact.shape)
    theirs = dequantize(quantize(exact.numpy(), kind, (inputs.squares / inputs.tokens).numpy()), kind, exact.shape)
    assert error(made, exact, inputs) < 0.7 * error(theirs, exact, inputs)
    if kind not in ("q2_k", "q4_1", "q5_1", "q4_k", "q5_k"):
        assert (made[3] == 0).all(), "what is zero stays zero where the grid has no minimum"


@pytest.mark.parametrize("kind", ["iq4_nl", "q4_k"])
def test_inputs_that_do_not_depend_on_each_other_leave_nothing_to_make_up_for(kind: str) -> None:
    """Then every weight goes to the nearest value of its grid, as a search over all of them finds it."""
    exact = weight()
    alone = torch.eye(COLUMNS) * 100
    made = dequantize(
        round_gptq(exact, kind, InputStatistics("layer", 100, alone.diagonal().clone(), None, alone)), kind, exact.shape
    )
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
    np.testing.assert_allclose(np.abs(made - exact.numpy()), nearest, atol=1e-6)


@pytest.mark.parametrize("tokens", [2048, 512])
@pytest.mark.parametrize("kind", ["q8_0", "q3_k"])
def test_what_layers_before_have_lost_is_made_up_for_in_part(kind: str, tokens: int) -> None:
    """Towards the weights that give, of what is read, what the original gives of its own inputs: by least squares, in
    float64. Of a quarter of the tokens, they go a quarter of the way."""
    exact, generator = weight(), torch.Generator().manual_seed(2)
    original = torch.randn(2048, COLUMNS, generator=generator)
    own = original + 0.3 * torch.randn(2048, COLUMNS, generator=generator) + 0.2 * original.roll(1, dims=1)
    products = own.T @ own
    inputs = InputStatistics("layer", tokens, products.diagonal().clone(), None, products, (original - own).T @ own)

    def lost(made: np.ndarray) -> float:
        return float((own @ torch.from_numpy(made).T - original @ exact.T).square().sum())

    made = dequantize(round_gptq(exact, kind, inputs), kind, exact.shape)
    without = dequantize(round_gptq(exact, kind, replace(inputs, drift=None)), kind, exact.shape)
    assert lost(made) < (0.9 if tokens == 2048 else 0.98) * lost(without)
    if kind == "q8_0":
        damped = products.double() + 0.01 * products.diagonal().double().mean() * torch.eye(COLUMNS)
        change = exact.double() @ torch.linalg.solve(damped, inputs.drift.double().T).T * 0.25 * tokens / 2048
        # Beside the change there is what rounding to 8 bits does.
        assert float(((torch.from_numpy(made) - exact) * change).sum()) == pytest.approx(float((change**2).sum()), 0.05)


def test_rows_are_found_wherever_the_converter_has_put_them() -> None:
    weight = torch.arange(24.0).reshape(6, 4)
    exact = weight[[4, 0, 2]].numpy().copy()
    replace_rows(weight, exact, -exact)
    assert torch.equal(weight.sign()[1:, 0], torch.tensor([1.0, -1, 1, -1, 1]))
    assert torch.equal(weight.abs(), torch.arange(24.0).reshape(6, 4))
