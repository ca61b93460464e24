"""Figures of each tensor in the manifest match a recount of the written weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressknow.base.errors import CompressknowError
from compressknow.compress.blocks import Block, Pool
from compressknow.compress.output import OutputFiles, lay_out
from compressknow.compress.plan import PlannedTensor
from compressknow.compress.process import TensorConverter, TensorStats
from compressknow.compress.pruning import EachBlock, Pruned
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Prune, Quantize, Step, Where
from compressknow.model.tensors import OpenFiles, read_header
from tests.long import one_in
from tests.models import convert, save_tiny

PRUNES = {
    "5 %": Prune(0.05),
    "40 %": Prune(0.4),
    "95 % per layer": Prune(0.95, per_layer=True),
    "20 % of rows": Prune(0.2, "ln-structured", norm=2),
    "20 % at random": Prune(0.2, "random-unstructured"),
}
STEPS: dict[str, tuple[Step, ...]] = {
    **{name: (prune,) for name, prune in PRUNES.items()},
    "int8": (Quantize("int8"),),
    "int8-paper": (Quantize("int8-paper"),),
    "5 %, then int8": (Prune(0.05), Quantize("int8")),
    "40 %, then int8-paper": (Prune(0.4), Quantize("int8-paper")),
    "20 % of rows, then int8-weights": (PRUNES["20 % of rows"], Quantize("int8-weights")),
    "5 %, then fp8": (Prune(0.05), Quantize("fp8")),
    "40 % of attention, int8 feed-forward": (
        Prune(0.4, where=Where(("attention",))),
        Quantize("int8", Where(("feed-forward",))),
    ),
}
every_recipe = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture(params=one_in(3, DTYPES), ids=str)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny Llama with zeros of both signs in its weights, embeddings and norms; one weight is all zero."""
    folder = save_tiny("llama", tmp_path / "source", request.param)
    weights = load_file(folder / "model.safetensors")
    for weight in weights.values():
        weight.view(-1)[::200] = 0.0
        weight.view(-1)[100::200] = -0.0
    weights["model.layers.0.self_attn.k_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def dequantize(written: dict[str, Tensor], name: str) -> Tensor:
    """Return a written weight in float64, integers times their scale."""
    scale = written.get(f"{name}_scale")
    if (packed := written.get(f"{name}_packed")) is not None:
        stored = unpack_from_int32(packed, 8, torch.Size(written[f"{name}_shape"].tolist()))
    else:
        stored = written[name]
    return stored.double() * (1 if scale is None else scale.double())


def count_zeros(weights: Iterable[Tensor]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights)


def compute_relative_error(written: Tensor, original: Tensor) -> float:
    norm = original.double().norm()
    return float((written - original.double()).norm() / norm) if norm else 0.0


@every_recipe
def test_relative_errors_match_the_written_weights(steps: tuple[Step, ...], source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path / "output", Recipe(steps))
    before, written = load_weights(source), load_weights(tmp_path / "output")
    for row in manifest["tensors"]:
        error = compute_relative_error(dequantize(written, row["name"]), before[row["name"]])
        assert row["relative_error"] == pytest.approx(error, rel=1e-4), row["name"]
    changed = [row for row in manifest["tensors"] if row["relative_error"]]
    assert changed
    assert all(row["in_scope"] for row in changed)


@every_recipe
def test_zeros_match_the_source_and_the_written_weights(steps: tuple[Step, ...], source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path / "output", Recipe(steps))
    before, written = load_weights(source), load_weights(tmp_path / "output")
    assert {row["name"] for row in manifest["tensors"]} == before.keys()
    for row in manifest["tensors"]:
        assert row["zeros_before"] == count_zeros([before[row["name"]]]) > 0, row["name"]
        assert row["zeros"] == count_zeros([dequantize(written, row["name"])]), row["name"]
    assert manifest["totals"]["zeros_before"] == count_zeros(before.values())
    assert manifest["totals"]["zeros_after"] == count_zeros(dequantize(written, name) for name in before)


@pytest.mark.parametrize("prune", PRUNES.values(), ids=PRUNES.keys())
def test_pruned_counts_include_weights_that_were_zero(prune: Prune, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    once = convert(tmp_path / "source", tmp_path / "once", Recipe((prune,)))
    written = load_weights(tmp_path / "once")
    pruned = {row["name"]: row["pruned"] for row in once["tensors"]}
    assert pruned == {row["name"]: count_zeros([written[row["name"]]]) for row in once["tensors"]}
    assert once["totals"]["pruned"] == sum(pruned.values()) > 0
    # Pruning again selects the same weights, which are zero now.
    if "random" not in prune.method:
        again = convert(tmp_path / "once", tmp_path / "again", Recipe((prune,)))
        assert {row["name"]: row["pruned"] for row in again["tensors"]} == pruned
        assert all(row["relative_error"] == 0 for row in again["tensors"])
        assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "once/model.safetensors").read_bytes()


@pytest.mark.parametrize("prune", PRUNES.values(), ids=PRUNES.keys())
@pytest.mark.parametrize("scheme", one_in(2, ["int8", "int8-paper"]))
def test_pruning_and_quantizing_equals_two_conversions(prune: Prune, scheme: Any, source: Path, tmp_path: Path) -> None:
    pruned = convert(source, tmp_path / "pruned", Recipe((prune,)))
    convert(tmp_path / "pruned", tmp_path / "in two", Recipe((Quantize(scheme),)))
    both = convert(source, tmp_path / "in one", Recipe((prune, Quantize(scheme))))
    assert (tmp_path / "in one/model.safetensors").read_bytes() == (tmp_path / "in two/model.safetensors").read_bytes()
    assert [row["pruned"] for row in both["tensors"]] == [row["pruned"] for row in pruned["tensors"]]
    before, after = load_weights(tmp_path / "pruned"), load_weights(tmp_path / "in one")
    for row in both["tensors"]:
        assert not after[row["name"]][before[row["name"]] == 0].any(), row["name"]


def test_hashes_of_scales_match_the_written_bytes(source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path / "output", Recipe((Quantize("int8"),)))
    path = tmp_path / "output" / "model.safetensors"
    content, stored = path.read_bytes(), read_header(path)
    scales = {row["scale"]["name"]: row["scale"]["sha256"] for row in manifest["tensors"] if row["scheme"]}
    assert scales.keys() == {name for name in stored if name.endswith("_scale")}
    for name, digest in scales.items():
        assert digest == hashlib.sha256(content[stored[name].offset :][: stored[name].nbytes]).hexdigest()


@every_recipe
def test_output_does_not_depend_on_the_number_of_threads(steps: tuple[Step, ...], source: Path, tmp_path: Path) -> None:
    manifests = [convert(source, tmp_path / f"{n}", Recipe(steps), threads=n) for n in (1, 3)]
    assert manifests[0] == manifests[1]
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "3").iterdir())
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


@pytest.mark.parametrize("steps", [STEPS["40 %"], STEPS["int8"], STEPS["5 %, then int8"]], ids=str)
@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_relative_errors_are_right_where_squares_leave_float32(
    steps: tuple[Step, ...], factor: float, tmp_path: Path
) -> None:
    shard = save_tiny("llama", tmp_path / "source") / "model.safetensors"
    scaled = {name: weight * factor for name, weight in load_file(shard).items()}
    save_file(scaled, shard, metadata={"format": "pt"})
    manifest = convert(tmp_path / "source", tmp_path / "output", Recipe(steps))
    written = load_weights(tmp_path / "output")
    for row in manifest["tensors"]:
        error = compute_relative_error(dequantize(written, row["name"]), scaled[row["name"]])
        assert bool(row["relative_error"]) == row["in_scope"]
        assert row["relative_error"] == pytest.approx(error, rel=1e-4), row["name"]


def test_relative_error_is_right_where_a_weight_is_rounded_beyond_the_largest_float(tmp_path: Path) -> None:
    weight = torch.tensor([[-1.0, 0.3]]) * torch.finfo(torch.float32).max
    written, stats = convert_weight(weight, tmp_path, quantize=Quantize("int8"))
    rounded = dequantize(written, "weight")
    assert torch.isinf(rounded.float()[0, 0])
    assert stats.relative_error == pytest.approx(compute_relative_error(rounded, weight), rel=1e-4)


def test_relative_error_of_such_a_weight_leaves_out_the_factors_of_smoothing(tmp_path: Path) -> None:
    weight, factors = torch.tensor([[-1.0, 0.3]]) * torch.finfo(torch.float32).max / 4, torch.tensor([4.0, 2.0])
    written, stats = convert_weight(weight, tmp_path, quantize=Quantize("int8"), factors=factors)
    rounded = dequantize(written, "weight")
    assert torch.isinf(rounded.float()[0, 0])
    assert stats.relative_error == pytest.approx(compute_relative_error(rounded / factors, weight), rel=1e-4)


def test_smoothing_that_leaves_float16_is_refused(tmp_path: Path) -> None:
    weight, factors = torch.tensor([[30000.0, 1.0]], dtype=torch.float16), torch.tensor([4.0, 1.0])
    with pytest.raises(CompressknowError, match=r"Smoothing layer\.weight gives infinity\."):
        convert_weight(weight, tmp_path, quantize=Quantize("int8"), factors=factors)


def shift_columns(block: Block) -> Pruned:
    """Prune every second column and add it to the next one, as methods do that compensate for pruning."""
    values = block.values.clone()
    values[:, 1::2] += values[:, ::2]
    mask = torch.zeros(values.shape, dtype=torch.bool)
    mask[:, ::2] = True
    return Pruned(mask.numpy(), values)


def convert_weight(
    weight: Tensor,
    folder: Path,
    prune: Prune | None = None,
    quantize: Quantize | None = None,
    mask: EachBlock | None = None,
    factors: Tensor | None = None,
) -> tuple[dict[str, Tensor], TensorStats]:
    """Convert one weight; return the written tensors, by name without the layer, and their statistics."""
    save_file({"layer.weight": weight}, folder / "source.safetensors")
    (stored,) = read_header(folder / "source.safetensors").values()
    plan = PlannedTensor("layer.weight", stored, "other", "layer", prune, quantize)
    outputs = OutputFiles(folder, lay_out([plan], ["source.safetensors"]))
    with Pool(1) as pool, OpenFiles() as files:
        try:
            stats = TensorConverter(pool, files, lambda _: None, outputs.writer).write(plan, mask, factors=factors)
        finally:
            outputs.close()
    written = load_file(folder / "model.safetensors")
    return {name.removeprefix("layer."): tensor for name, tensor in written.items()}, stats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [None, "int8", "int8-paper", "int8-weights"])
def test_a_method_may_change_the_weights_that_stay(
    scheme: str | None, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressknow.compress.blocks.BLOCK_ELEMENTS", 100)
    weight = torch.randn((20, 30), generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = weight.clone()
    expected[:, 1::2] += expected[:, ::2]
    expected[:, ::2] = 0
    written, stats = convert_weight(
        weight, tmp_path, Prune(0.5), Quantize(scheme) if scheme else None, EachBlock(shift_columns)
    )
    if scheme is None:
        assert torch.equal(written["weight"], expected)
    else:
        scales = written["weight_scale"].double()
        errors = (dequantize(written, "weight") - expected.double()).abs()
        # In 16 bits the quotient itself is rounded before it is rounded to an integer.
        assert (errors <= scales * (0.5001 if dtype == torch.float32 else 1.01)).all()
        assert (dequantize(written, "weight")[:, ::2] == 0).all()
    assert (stats.pruned, stats.zeros_before) == (300, 0)
    assert stats.zeros == count_zeros([dequantize(written, "weight")])
    change = compute_relative_error(dequantize(written, "weight"), weight)
    assert stats.relative_error == pytest.approx(change, rel=1e-5)


def test_new_values_with_nan_or_infinity_are_refused(tmp_path: Path) -> None:
    def divide_by_zero(block: Block) -> Pruned:
        return Pruned(torch.zeros(block.values.shape, dtype=torch.bool).numpy(), block.values / 0)

    with pytest.raises(CompressknowError, match=r"Pruning layer.weight gives NaN or infinity"):
        convert_weight(torch.ones(4, 4), tmp_path, Prune(0.5), mask=EachBlock(divide_by_zero))
