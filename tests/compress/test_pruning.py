"""Each pruning method zeroes the same weights as torch.nn.utils.prune; ties are pruned in a fixed order."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import prune

from compressknow.base.errors import CheckpointError
from compressknow.compress import blocks
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.pruning import Weights
from compressknow.compress.pruning.masks import make_generator
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Prune, Where, choose_masks
from compressknow.engine.load import load
from compressknow.model.tensors import OpenFiles, StoredTensor, read_header
from tests.long import one_in
from tests.models import convert, save_tiny

STEPS = {
    "L1 global": Prune(0.3),
    "L1 per layer": Prune(0.3, per_layer=True),
    "L1 rows": Prune(0.3, "ln-structured", norm=1, dim=0),
    "L1 columns": Prune(0.3, "ln-structured", norm=1, dim=1),
    "L2 rows": Prune(0.3, "ln-structured", norm=2, dim=0),
    "L2 columns": Prune(0.3, "ln-structured", norm=2, dim=1),
    "Linf rows": Prune(0.3, "ln-structured", norm=math.inf, dim=0),
    "Linf columns": Prune(0.3, "ln-structured", norm=math.inf, dim=1),
    "random global": Prune(0.3, "random-unstructured", seed=5),
    "random per layer": Prune(0.3, "random-unstructured", per_layer=True, seed=5),
    "random rows": Prune(0.3, "random-structured", dim=0, seed=5),
    "random columns": Prune(0.3, "random-structured", dim=1, seed=5),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
STRUCTURED = {name: step for name, step in STEPS.items() if "dim" in step.chosen.values()}
every_structured_step = pytest.mark.parametrize("step", STRUCTURED.values(), ids=STRUCTURED.keys())
SHAPES = {"square": (32, 32), "tall": (70, 9), "wide": (11, 60), "one": (1, 1)}


def make_weights(*, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def compute_masks(tensors: list[StoredTensor], step: Prune, threads: int = 2) -> list[Tensor]:
    """Return the masks of a step over stored tensors."""
    masks = []
    with Pool(threads) as pool, OpenFiles() as files:
        reader = Reader(pool, files, lambda _: None)
        chosen = choose_masks(reader, step, [Weights(tensor) for tensor in tensors])
        for tensor, mask in zip(tensors, chosen, strict=True):
            block_mask = mask.start()
            rows = [torch.tensor(block_mask(block)) for block in reader.blocks(tensor)]
            masks.append(torch.cat(rows).view(tensor.shape))
    return masks


def prune_tensors(weights: dict[str, Tensor], step: Prune, folder: Path) -> dict[str, Tensor]:
    """Return the masks of a step over the weights of a file, by name; ties are broken in the order of `weights`."""
    save_file(weights, folder / "model.safetensors")
    stored = read_header(folder / "model.safetensors")
    return dict(zip(weights, compute_masks([stored[name] for name in weights], step), strict=True))


def prune_with_torch(weights: dict[str, Tensor], step: Prune) -> dict[str, Tensor]:
    """Return the masks of torch.nn.utils.prune over the same weights, each tensor with its own seed."""
    modules = {name: wrap(weight) for name, weight in weights.items()}
    if step.is_global:
        parameters = [(module, "weight") for module in modules.values()]
        # torch has no global random pruning; in a single tensor it prunes where its draws are largest.
        scores = {(modules[name], "weight"): 1 - draw_scores(step, name, weight) for name, weight in weights.items()}
        prune.global_unstructured(
            parameters, prune.L1Unstructured, scores if "random" in step.method else None, amount=step.amount
        )
    else:
        for name, module in modules.items():
            with torch.random.fork_rng():
                torch.manual_seed(make_generator(step.seed, name).initial_seed())
                prune_one(module, step)
    return {name: module.weight_mask == 0 for name, module in modules.items()}


def prune_one(module: torch.nn.Module, step: Prune) -> None:
    match step.method:
        case "l1-unstructured":
            prune.l1_unstructured(module, "weight", step.amount)
        case "ln-structured":
            prune.ln_structured(module, "weight", step.amount, step.norm, step.dim)
        case "random-unstructured":
            prune.random_unstructured(module, "weight", step.amount)
        case "random-structured":
            prune.random_structured(module, "weight", step.amount, step.dim)


def wrap(weight: Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight)
    return module


def draw_scores(step: Prune, name: str, weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, generator=make_generator(step.seed, name))


def are_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_step
@pytest.mark.parametrize("model", one_in(2, ["bert", "llama"]))
def test_convert_zeroes_exactly_what_torch_prunes(model: str, step: Prune, tmp_path: Path) -> None:
    source = load_file(save_tiny(model, tmp_path / "source") / "model.safetensors")
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe((replace(step, where=Where(("overall",))),)))
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    in_scope = {row["name"]: source[row["name"]] for row in manifest["tensors"] if row["in_scope"]}
    assert len(in_scope) == {"bert": 13, "llama": 14}[model]
    zeroed = prune_with_torch(in_scope, step)
    assert written.keys() == source.keys()
    for name, weight in source.items():
        expected = weight.masked_fill(zeroed[name], 0) if name in in_scope else weight
        assert torch.equal(written[name], expected), name


@every_step
@pytest.mark.parametrize("block_elements", [1, 50, 1 << 18])
def test_masks_do_not_depend_on_the_size_of_blocks(
    step: Prune, block_elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    weights = make_weights(**SHAPES)
    assert are_equal(prune_tensors(weights, step, tmp_path), prune_with_torch(weights, step))


@pytest.mark.parametrize("amount", [0.01, 0.1, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("method", ["l1-unstructured", "ln-structured", "random-unstructured", "random-structured"])
def test_the_amount_is_rounded_as_by_torch(method: str, amount: float, tmp_path: Path) -> None:
    # Some counts are halves: 0.5 of 5 and of 7 rows, 0.1 of 5.
    weights = make_weights(five=(5, 5), seven=(7, 3), one=(1, 4))
    step = Prune(amount, method, per_layer="unstructured" in method)
    assert are_equal(prune_tensors(weights, step, tmp_path), prune_with_torch(weights, step))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_lose_the_smallest_and_as_many_as_in_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    source = load_file(save_tiny("llama", tmp_path / "source", dtype) / "model.safetensors")
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe((Prune(0.4),)))
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    in_scope = {row["name"]: source[row["name"]] for row in manifest["tensors"] if row["in_scope"]}
    expected = sum(int(mask.sum()) for mask in prune_with_torch(in_scope, Prune(0.4)).values())
    before = torch.cat([weight.flatten() for weight in in_scope.values()]).float().abs()
    kept = torch.cat([written[name].flatten() for name in in_scope]) != 0
    threshold = before[kept].min()
    assert int((~kept).sum()) == expected == round(0.4 * len(before))
    assert before[~kept].max() <= threshold
    # A plain comparison with the threshold would prune too many.
    assert int((before <= threshold).sum()) > expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ties_are_pruned_by_tensor_then_by_index(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {
        "second by name": torch.tensor([[3, 1], [2, -2]], dtype=dtype),
        "first by name": torch.tensor([[-2, 2], [0.5, 2]], dtype=dtype),
    }
    globally = prune_tensors(weights, Prune(5 / 8), tmp_path)
    assert globally["second by name"].tolist() == [[False, True], [True, True]]
    assert globally["first by name"].tolist() == [[True, False], [True, False]]
    per_layer = prune_tensors(weights, Prune(2 / 4, per_layer=True), tmp_path)
    assert per_layer["second by name"].tolist() == [[False, True], [True, False]]
    assert per_layer["first by name"].tolist() == [[True, False], [True, False]]


def test_rows_and_columns_of_equal_norm_are_pruned_in_order(tmp_path: Path) -> None:
    weights = {"w": torch.tensor([[4.0, 0, 0], [0, 0, -1], [0, 1, 0], [1, 0, 0]])}
    rows = prune_tensors(weights, Prune(0.5, "ln-structured", dim=0), tmp_path)["w"]
    assert rows[:, 0].tolist() == [False, True, True, False]
    columns = prune_tensors(weights, Prune(0.34, "ln-structured", dim=1), tmp_path)["w"]
    assert columns[0].tolist() == [False, True, False]


def test_ties_of_a_checkpoint_are_pruned_in_the_order_of_its_files(tmp_path: Path) -> None:
    shards = sorted(save_tiny("llama", tmp_path / "source", max_shard_size="20KB").glob("*.safetensors"))
    order = [name for shard in shards for name in read_header(shard)]
    assert order != sorted(order)
    for shard in shards:
        signs = {name: torch.sign(weight) for name, weight in load_file(shard).items()}
        save_file(signs, shard, metadata={"format": "pt"})
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe((Prune(0.3),)))
    written = {name: weight for shard in shards for name, weight in load_file(tmp_path / "pruned" / shard.name).items()}
    in_scope = {row["name"] for row in manifest["tensors"] if row["in_scope"]}
    zeroed = torch.cat([(written[name] == 0).flatten() for name in order if name in in_scope])
    assert torch.equal(zeroed, torch.arange(len(zeroed)) < round(0.3 * len(zeroed)))


@pytest.mark.parametrize("per_layer", [False, True], ids=["global", "per layer"])
def test_zeros_are_pruned_first(per_layer: bool, tmp_path: Path) -> None:
    weights = make_weights(a=(20, 10), b=(30, 10))
    for weight in weights.values():
        weight[::4, ::2] = 0.0
        weight[::4, 1::2] = -0.0
    zeros = {name: weight == 0 for name, weight in weights.items()}
    smaller = prune_tensors(weights, Prune(0.2, per_layer=per_layer), tmp_path)
    assert sum(int(mask.sum()) for mask in smaller.values()) == 100
    assert all(bool(zeros[name][smaller[name]].all()) for name in weights)
    larger = prune_tensors(weights, Prune(0.5, per_layer=per_layer), tmp_path)
    assert sum(int(mask.sum()) for mask in larger.values()) == 250
    assert all(bool(larger[name][zeros[name]].all()) for name in weights)


@pytest.mark.parametrize("dim", [0, 1])
def test_channels_of_zeros_are_pruned_first(dim: int, tmp_path: Path) -> None:
    weight = make_weights(w=(8, 8))["w"]
    weight.select(dim, 6).zero_()
    weight.select(dim, 2).zero_()
    mask = prune_tensors({"w": weight}, Prune(0.25, "ln-structured", norm=2, dim=dim), tmp_path)["w"]
    assert mask.select(1 - dim, 0).nonzero().flatten().tolist() == [2, 6]


@every_structured_step
@pytest.mark.parametrize("block_elements", [1, 50, 1 << 18])
def test_structured_pruning_treats_each_stacked_matrix_separately(
    step: Prune, block_elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    experts = make_weights(experts=(5, 12, 7))["experts"]
    experts *= torch.tensor([1.0, 100, 0.01, 1, 1])[:, None, None]
    modules = [wrap(expert) for expert in experts]
    with torch.random.fork_rng():
        # The matrices of a stack are drawn one after the other.
        torch.manual_seed(make_generator(step.seed, "experts").initial_seed())
        for module in modules:
            prune_one(module, step)
    expected = torch.stack([module.weight_mask == 0 for module in modules])
    assert torch.equal(prune_tensors({"experts": experts}, step, tmp_path)["experts"], expected)


def test_stacked_matrices_share_one_threshold(tmp_path: Path) -> None:
    weights = make_weights(experts=(5, 12, 7), router=(5, 7))
    assert are_equal(prune_tensors(weights, Prune(0.4), tmp_path), prune_with_torch(weights, Prune(0.4)))


def test_each_step_has_its_own_threshold(tmp_path: Path) -> None:
    source = load_file(save_tiny("llama", tmp_path / "source") / "model.safetensors")
    steps = (Prune(0.2, where=Where(("attention",))), Prune(0.6, where=Where(("feed-forward",))))
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe(steps))
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    for step, group in zip(steps, ("attention", "feed-forward"), strict=True):
        weights = {row["name"]: source[row["name"]] for row in manifest["tensors"] if row["group"] == group}
        assert are_equal({name: written[name] == 0 for name in weights}, prune_with_torch(weights, step))


@pytest.mark.parametrize("method", ["random-unstructured", "random-structured"])
def test_random_masks_depend_only_on_seed_and_name(method: str, tmp_path: Path) -> None:
    weights = make_weights(a=(20, 20), b=(20, 20))
    step = Prune(0.3, method, per_layer=True, seed=1)
    first = prune_tensors(weights, step, tmp_path)
    assert are_equal(first, prune_tensors(weights, step, tmp_path))
    assert not torch.equal(first["a"], first["b"])
    assert torch.equal(prune_tensors({"b": weights["a"]}, step, tmp_path)["b"], first["b"])
    other = prune_tensors(weights, Prune(0.3, method, per_layer=True, seed=2), tmp_path)
    assert not torch.equal(first["a"], other["a"])


def test_norm_that_overflows_is_refused(tmp_path: Path) -> None:
    weights = {"enormous": torch.full((4, 4), 1e38)}
    with pytest.raises(CheckpointError, match=r"L9 norm of enormous overflows"):
        prune_tensors(weights, Prune(0.5, "ln-structured", norm=9), tmp_path)


GPT_OSS = hf.GptOssConfig(
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=99,
    num_local_experts=3,
    num_experts_per_tok=2,
)


def list_feed_forward_matrices(model: torch.nn.Module) -> list[Tensor]:
    """Return the matrices [output, input] by which the feed-forward blocks multiply, fused ones split."""
    if isinstance(model, hf.GPT2LMHeadModel):
        return [part.weight.T for block in model.transformer.h for part in (block.mlp.c_fc, block.mlp.c_proj)]
    experts = [layer.mlp.experts for layer in model.model.layers]
    if isinstance(model, hf.GptOssForCausalLM):
        return [matrix.T for expert in experts for stack in (expert.gate_up_proj, expert.down_proj) for matrix in stack]
    halves = [half for expert in experts for half in expert.gate_up_proj.chunk(2, dim=1)]
    return [matrix for stack in (*halves, *(expert.down_proj for expert in experts)) for matrix in stack]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("method", ["ln-structured", "random-structured"])
@pytest.mark.parametrize(("name", "number"), [("gpt2", 4), ("mixtral", 24), ("gpt-oss", 6)])
def test_dim_0_means_output_channels_however_a_layer_is_stored(
    name: str, number: int, method: Any, dim: int, tmp_path: Path
) -> None:
    if name == "gpt-oss":
        torch.manual_seed(0)
        hf.GptOssForCausalLM(GPT_OSS).save_pretrained(tmp_path / "source")
    else:
        save_tiny(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "pruned", Recipe((Prune(0.25, method, Where(("feed-forward",)), dim=dim),)))
    matrices = list_feed_forward_matrices(load(tmp_path / "pruned"))
    assert len(matrices) == number
    for matrix in matrices:
        zero = matrix == 0
        channels = zero.all(1 - dim)
        assert int(channels.sum()) == matrix.shape[dim] // 4
        assert int(zero.sum()) == int(channels.sum()) * matrix.shape[1 - dim]
