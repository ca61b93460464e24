"""N:M patterns keep N of each M neighbouring input channels, however a layer is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.cli import main
from compressknow.compress import blocks
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.compress.pruning import METHODS, Calibrated, Weights
from compressknow.compress.pruning.masks import mask_smallest_of_rows
from compressknow.compress.recipe import Recipe, read_recipe
from compressknow.compress.steps import Prune, Where, choose_masks
from compressknow.engine.load import load
from compressknow.model.tensors import OpenFiles, read_header
from tests.compress.test_pruning import GPT_OSS, list_feed_forward_matrices
from tests.compress.test_targets import save_tokenizer
from tests.models import convert, save_tiny


def mask_by_magnitude(weight: Tensor, keep: int, of: int) -> Tensor:
    """Mask the smallest weights of each group in a matrix [..., outputs, inputs]; of ties, the first."""
    groups = weight.abs().unflatten(-1, (-1, of))
    lowest = groups.argsort(dim=-1, stable=True)[..., : of - keep]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter(-1, lowest, True).flatten(-2)


def prune_tensor(weight: Tensor, pattern: str, amount: float, folder: Path, *, transposed: bool) -> Tensor:
    """Return the mask of l1-unstructured for a stored tensor."""
    save_file({"weight": weight.contiguous()}, folder / "model.safetensors")
    tensor = read_header(folder / "model.safetensors")["weight"]
    step = Prune(amount, parameters={"pattern": pattern})
    with Pool(2) as pool, OpenFiles() as files:
        reader = Reader(pool, files, lambda _: None)
        (mask,) = choose_masks(reader, step, [Weights(tensor, transposed)])
        for _ in range(2):
            mask_block = mask.start()
            rows = [torch.tensor(mask_block(block)) for block in reader.blocks(tensor)]
    return torch.cat(rows).view(weight.shape)


@pytest.mark.parametrize("block_elements", [1, 50, 130, 1 << 18])
@pytest.mark.parametrize("shape", [(24, 12), (3, 12, 24), (12, 60)], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "5:12"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_smallest_weights_of_each_group_of_input_channels_are_pruned(
    dtype: torch.dtype,
    transposed: bool,
    pattern: str,
    shape: tuple[int, ...],
    block_elements: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    # Few values, so that many tie.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).round().to(dtype)
    keep, of = map(int, pattern.split(":"))
    found = prune_tensor(weight, pattern, 1 - keep / of, tmp_path, transposed=transposed)
    if transposed:
        found, weight = found.mT, weight.mT
    assert torch.equal(found, mask_by_magnitude(weight, keep, of))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 5), st.data())
def test_the_smallest_of_a_row_are_those_of_a_stable_sort(
    rows: int, columns: int, highest: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, columns))
    values = st.lists(st.integers(-1, highest), min_size=rows * columns, max_size=rows * columns)
    keys = np.array(data.draw(values), dtype=np.int32).reshape(rows, columns)
    expected = np.zeros(keys.shape, dtype=bool)
    np.put_along_axis(expected, np.argsort(keys, axis=1, kind="stable")[:, :count], True, axis=1)
    assert np.array_equal(mask_smallest_of_rows(keys, count), expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["wanda", "sparsegpt"]), st.integers(1, 9), st.integers(2, 40), st.integers(1, 12), st.data())
def test_calibrated_methods_keep_the_same_number_in_every_group(
    name: str, outputs: int, of: int, groups: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, of - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    inputs = torch.randn(30, of * groups, generator=generator).mul(2).round()
    weight = torch.randn(outputs, of * groups, generator=generator).mul(2).round()
    products = inputs.T @ inputs + torch.eye(of * groups)
    statistics = InputStatistics("layer", 30, products.diagonal().clone(), products=products)
    method = METHODS[name].with_values({"pattern": f"{keep}:{of}"})
    assert isinstance(method, Calibrated)
    mask, values = method.prune(weight, statistics, 1 - keep / of)
    assert bool((mask.unflatten(1, (-1, of)).sum(2) == of - keep).all())
    if name == "wanda":
        assert values is None
        assert torch.equal(mask, mask_by_magnitude(weight * inputs.square().sum(0).add(1).sqrt(), keep, of))


@pytest.mark.parametrize(("name", "number"), [("llama", 6), ("gpt2", 4), ("mixtral", 24), ("gpt-oss", 6)])
def test_a_converted_model_has_the_pattern_in_every_group(name: str, number: int, tmp_path: Path) -> None:
    if name == "gpt-oss":
        torch.manual_seed(0)
        hf.GptOssForCausalLM(GPT_OSS).save_pretrained(tmp_path / "source")
    else:
        save_tiny(name, tmp_path / "source")
    step = Prune(0.75, where=Where(("feed-forward",)), parameters={"pattern": "1:4"})
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe((step,)))
    before, after = (load_matrices(tmp_path / folder) for folder in ("source", "pruned"))
    assert len(after) == number
    for original, matrix in zip(before, after, strict=True):
        assert torch.equal(matrix, original.masked_fill(mask_by_magnitude(original, 1, 4), 0))
    rows = [row for row in manifest["tensors"] if row["in_scope"]]
    assert [row["pruned"] for row in rows] == [row["numel"] // 4 * 3 for row in rows]
    assert read_recipe(tmp_path / "pruned").steps == (step,)


def load_matrices(folder: Path) -> list[Tensor]:
    model = load(folder)
    if isinstance(model, hf.LlamaForCausalLM):
        parts = [part for layer in model.model.layers for part in layer.mlp.children()]
        return [part.weight.detach() for part in parts if isinstance(part, torch.nn.Linear)]
    return [matrix.detach() for matrix in list_feed_forward_matrices(model)]


def test_convert_takes_a_pattern(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    options = ["--prune", "50%", "--pattern", "2:4", "--quantize", "int8"]
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), *options]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    quantized = {name: weight for name, weight in weights.items() if weight.dtype == torch.int8}
    assert len(quantized) == 14
    assert all(bool((weight.view(-1, 4) == 0).sum(1).ge(2).all()) for weight in quantized.values())


@pytest.mark.parametrize("method", ["l1-unstructured", "wanda", "sparsegpt"])
def test_an_amount_that_contradicts_the_pattern_is_refused_with_the_right_one(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", tmp_path / "source")
    options = ["--prune", "0.3", "--prune-method", method, "--pattern", "2:8"]
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err
    assert "The pattern 2:8 prunes 0.75 of the weights, not 0.3." in message
    assert "Pass --prune 0.75" in message
    assert not (tmp_path / "out").exists()


def test_a_rounded_amount_is_accepted(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    step = Prune(0.3333, parameters={"pattern": "2:3"}, where=Where(include=("down_proj",)))
    manifest = convert(tmp_path / "source", tmp_path / "out", Recipe((step,)))
    assert manifest["totals"]["pruned"] == 2 * 32 * 16


def test_layers_that_a_pattern_does_not_fit_are_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    step = Prune(2 / 3, parameters={"pattern": "1:3"})
    with pytest.raises(UnsupportedError) as error:
        convert(tmp_path / "source", tmp_path / "out", Recipe((step,)))
    # 32 input channels are not a multiple of 3; the 48 of down_proj are.
    assert "L1-unstructured 1:3 does not fit model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj" in str(
        error.value
    )
    assert "and 9 more" in str(error.value)
    assert "down_proj" not in str(error.value)
    assert "Its 32 input channels are not a multiple of 3." in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_pattern_follows_the_rows_of_a_conv1d(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "source")
    # c_fc has 32 inputs and 128 outputs, c_proj of the feed-forward block 128 and 32.
    step = Prune(63 / 64, parameters={"pattern": "1:64"}, where=Where(("feed-forward",)))
    with pytest.raises(
        UnsupportedError, match=r"does not fit transformer\.h\.0\.mlp\.c_fc, transformer\.h\.1\.mlp\.c_fc"
    ):
        convert(tmp_path / "source", tmp_path / "out", Recipe((step,)))


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "2", "2:4:8", "two:four", "", "2: 4", 2])
def test_an_invalid_pattern_is_refused(pattern: object) -> None:
    with pytest.raises(UsageError, match="pattern must be N:M with N below M, such as 2:4"):
        Prune(0.5, parameters={"pattern": pattern})


def test_a_misspelled_parameter_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"no parameter 'patern'\.\nDid you mean pattern\? It has per_layer, pattern"):
        Prune(0.5, parameters={"patern": "2:4"})


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_pattern_is_never_global(per_layer: bool) -> None:
    assert not Prune(0.5, per_layer=per_layer, parameters={"pattern": "2:4"}).is_global
    assert Prune(0.5).is_global


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_calibrated_methods_apply_a_pattern_to_every_kind_of_layer(name: str, method: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"word{number} " for number in range(94)) * 20, encoding="utf-8")
    options = ["--scope", "feed-forward", "--prune", "0.75", "--prune-method", method, "--pattern", "1:4"]
    calibration = ["--calibration", str(text), "--calibration-tokens", "1024"]
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), *options, *calibration]) == 0
    before, after = (load_matrices(tmp_path / folder) for folder in ("source", "out"))
    assert len(after) == {"gpt2": 4, "mixtral": 24}[name]
    for original, matrix in zip(before, after, strict=True):
        assert bool((matrix.unflatten(-1, (-1, 4)) == 0).sum(-1).eq(3).all())
        assert torch.equal(matrix[matrix != 0], original[matrix != 0]) is (method == "wanda")
