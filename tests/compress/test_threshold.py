"""The threshold over a scope is exact: the pruned weights are the first of a stable sort of all weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressknow.base.errors import CheckpointError
from compressknow.compress import blocks
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Prune, Quantize, Step
from compressknow.model.tensors import StoredTensor, view_bytes
from tests.compress.test_pruning import compute_masks
from tests.models import convert, edit_tensors, save_tiny

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KINDS = ("normal", "few values", "one value", "zeros", "half zeros", "denormal", "all magnitudes")


@dataclass(frozen=True)
class WeightSpec:
    """A description of a weight, which Hypothesis shrinks better than an array."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    seed: int

    def weight(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        info = torch.finfo(self.dtype)
        values = {
            "normal": normal,
            "few values": torch.round(normal * 2) / 2,
            "one value": torch.sign(normal) * 0.75,
            "zeros": normal * 0,
            "half zeros": normal * (torch.rand(self.shape, generator=generator) < 0.5),
            "denormal": normal * info.tiny / 8,
            "all magnitudes": torch.sign(normal)
            * info.max ** (torch.rand(self.shape, generator=generator) * 1.9 - 0.9),
        }
        return values[self.kind].to(self.dtype)


def sizes(largest: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(st.integers(1, largest), st.integers(1, largest))


shapes = st.one_of(st.just((1, 1)), sizes(6), sizes(60), st.tuples(st.integers(1, 3), st.integers(1, 9), st.just(5)))
seeds = st.integers(0, 2**32)
amounts = st.floats(0.01, 0.99)
block_sizes = st.sampled_from([1, 16, 100, 1 << 18])


@st.composite
def scopes(draw: Any) -> list[WeightSpec]:
    """Draw one to eight weights of very different sizes, mostly of one dtype."""
    dtypes = st.sampled_from(draw(st.sampled_from([(dtype,) for dtype in DTYPE_NAMES] + [tuple(DTYPE_NAMES)])))
    return draw(st.lists(st.builds(WeightSpec, shapes, dtypes, st.sampled_from(KINDS), seeds), min_size=1, max_size=8))


def prune_weights(weights: list[Tensor], step: Prune, threads: int = 2) -> list[Tensor]:
    """Return the masks of a step over weights in memory, as those of an old PyTorch file are."""
    names = [f"weight {i}" for i in range(len(weights))]
    stored = [
        StoredTensor(name, DTYPE_NAMES[weight.dtype], tuple(weight.shape), Path("old.bin"), loaded=view_bytes(weight))
        for name, weight in zip(names, weights, strict=True)
    ]
    return compute_masks(stored, step, threads)


def prune_by_sorting(weights: list[Tensor], amount: float) -> list[Tensor]:
    """Return the masks of a stable sort of all magnitudes; float64 represents those of every dtype exactly."""
    magnitudes = torch.cat([weight.to(torch.float64).abs().flatten() for weight in weights])
    chosen = torch.zeros(len(magnitudes), dtype=torch.bool)
    chosen[torch.sort(magnitudes, stable=True).indices[: round(amount * len(magnitudes))]] = True
    parts = chosen.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def are_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@settings(max_examples=150, deadline=None)
@given(scopes(), amounts, block_sizes)
def test_the_smallest_weights_are_pruned_and_ties_in_order(
    specs: list[WeightSpec], amount: float, block_elements: int
) -> None:
    weights = [spec.weight() for spec in specs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        masks = prune_weights(weights, Prune(amount))
    assert are_equal(masks, prune_by_sorting(weights, amount))
    chosen = torch.cat([mask.flatten() for mask in masks])
    magnitudes = torch.cat([weight.to(torch.float64).abs().flatten() for weight in weights])
    assert int(chosen.sum()) == round(amount * len(chosen))
    if 0 < int(chosen.sum()) < len(chosen):
        assert magnitudes[chosen].max() <= magnitudes[~chosen].min()


@settings(max_examples=50, deadline=None)
@given(scopes(), amounts, block_sizes)
def test_each_tensor_has_its_own_threshold_per_layer(
    specs: list[WeightSpec], amount: float, block_elements: int
) -> None:
    weights = [spec.weight() for spec in specs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        masks = prune_weights(weights, Prune(amount, per_layer=True))
    assert are_equal(masks, [prune_by_sorting([weight], amount)[0] for weight in weights])


@settings(max_examples=30, deadline=None)
@given(scopes(), amounts, st.sampled_from(["l1-unstructured", "random-unstructured"]), st.booleans())
def test_masks_do_not_depend_on_the_number_of_threads(
    specs: list[WeightSpec], amount: float, method: Any, per_layer: bool
) -> None:
    weights = [expected.weight() for expected in specs]
    step = Prune(amount, method, per_layer=per_layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", 16)
        expected = prune_weights(weights, step, threads=1)
        assert are_equal(expected, prune_weights(weights, step, threads=2))
        assert are_equal(expected, prune_weights(weights, step, threads=5))


@pytest.mark.parametrize("amount", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_a_tensor_of_several_full_blocks_is_pruned_exactly(dtype: torch.dtype, amount: float) -> None:
    large = WeightSpec((700, 900), dtype, "normal", 1).weight()
    assert large.numel() > 2 * blocks.BLOCK_ELEMENTS
    weights = [WeightSpec((3, 5), dtype, "normal", 2).weight(), large, WeightSpec((1, 1), dtype, "zeros", 3).weight()]
    assert are_equal(prune_weights(weights, Prune(amount)), prune_by_sorting(weights, amount))


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_a_row_longer_than_a_block_is_pruned_exactly(dtype: torch.dtype) -> None:
    weights = [WeightSpec((2, blocks.BLOCK_ELEMENTS + 1), dtype, "few values", 1).weight()]
    assert are_equal(prune_weights(weights, Prune(0.3)), prune_by_sorting(weights, 0.3))


def test_a_large_tensor_of_one_magnitude_loses_its_first_weights() -> None:
    # All weights of several blocks tie.
    weights = [WeightSpec((700, 900), torch.float32, "one value", 1).weight()]
    (mask,) = prune_weights(weights, Prune(0.6))
    assert torch.equal(mask.flatten(), torch.arange(630_000) < 378_000)


def test_weights_of_several_dtypes_are_compared_by_value() -> None:
    weights = [
        torch.tensor([[1.0, 2**-20]], dtype=torch.float32),
        torch.tensor([[0.5, 2**-24]], dtype=torch.float16),
        torch.tensor([[0.25, 2**-130]], dtype=torch.bfloat16),
    ]
    masks = torch.cat(prune_weights(weights, Prune(4 / 6)))
    assert masks.tolist() == [[False, True], [False, True], [True, True]]


@pytest.mark.parametrize("method", ["l1-unstructured", "ln-structured", "random-unstructured"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
@pytest.mark.parametrize(
    ("value", "kind"),
    [(float("nan"), "NaN"), (-float("nan"), "NaN"), (float("inf"), "an infinity"), (-float("inf"), "an infinity")],
)
def test_a_tensor_that_is_not_finite_is_named(
    value: float, kind: str, dtype: torch.dtype, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16)
    weights = [WeightSpec((9, 9), dtype, "normal", seed).weight() for seed in range(3)]
    weights[1][8, 8] = value
    with pytest.raises(CheckpointError, match=rf"weight 1 in old\.bin holds {kind}\."):
        prune_weights(weights, Prune(0.3, method))


@pytest.mark.parametrize(
    "step",
    [Prune(0.3), Prune(0.3, "random-structured"), Quantize("int8"), Quantize("int8-paper")],
    ids=["L1", "random rows", "int8", "int8-paper"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_checkpoint_that_is_not_finite_is_not_converted(step: Step, value: float, tmp_path: Path) -> None:
    broken = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(save_tiny("llama", tmp_path / "source"), lambda weights: weights[broken][-1, -1].fill_(value))
    with pytest.raises(CheckpointError, match=broken.replace(".", r"\.")):
        convert(tmp_path / "source", tmp_path / "output", Recipe((step,)))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
