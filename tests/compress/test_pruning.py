"""Each pruning method zeroes the weights that torch.nn.utils.prune does, in a fixed order where weights tie."""

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
from compressknow.model.tensors import OpenFiles, read_header
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


def random_weights(*, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def pruned(weights: dict[str, Tensor], step: Prune, folder: Path) -> dict[str, Tensor]:
    """Where a step prunes the weights of a file (bool, by name); ties are broken in the order of `weights`."""
    save_file(weights, folder / "model.safetensors")
    stored = read_header(folder / "model.safetensors")
    tensors = [stored[name] for name in weights]
    with Pool(2) as pool, OpenFiles() as files:
        reader = Reader(pool, files, lambda _: None)
        found = {}
        for tensor, mask in zip(
            tensors, choose_masks(reader, step, [Weights(tensor) for tensor in tensors]), strict=True
        ):
            block_mask = mask.start()
            rows = [torch.tensor(block_mask(block)) for block in reader.blocks(tensor)]
            found[tensor.name] = torch.cat(rows).view(tensor.shape)
    return found


def pruned_by_torch(weights: dict[str, Tensor], step: Prune) -> dict[str, Tensor]:
    """Where torch.nn.utils.prune prunes the same weights; it draws from a seed of each tensor's own."""
    modules = {name: holder(weight) for name, weight in weights.items()}
    if step.is_global:
        parameters = [(module, "weight") for module in modules.values()]
        # torch has no global random pruning. It prunes single tensors where its draws are largest.
        scores = {(modules[name], "weight"): 1 - draws(step, name, weight) for name, weight in weights.items()}
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


def holder(weight: Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight)
    return module


def draws(step: Prune, name: str, weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, generator=make_generator(step.seed, name))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_step
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_conversion_zeroes_what_torch_prunes_and_nothing_else(model: str, step: Prune, tmp_path: Path) -> None:
    source = load_file(save_tiny(model, tmp_path / "source") / "model.safetensors")
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe((replace(step, where=Where(("overall",))),)))
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    in_scope = {row["name"]: source[row["name"]] for row in manifest["tensors"] if row["in_scope"]}
    assert len(in_scope) == {"bert": 13, "llama": 14}[model]
    zeroed = pruned_by_torch(in_scope, step)
    assert written.keys() == source.keys()
    for name, weight in source.items():
        expected = weight.masked_fill(zeroed[name], 0) if name in in_scope else weight
        assert torch.equal(written[name], expected), name


@every_step
@pytest.mark.parametrize("block_elements", [1, 50, 1 << 18])
def test_choice_does_not_depend_on_the_blocks_in_which_weights_are_read(
    step: Prune, block_elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    weights = random_weights(**SHAPES)
    assert same(pruned(weights, step, tmp_path), pruned_by_torch(weights, step))


@pytest.mark.parametrize("amount", [0.01, 0.1, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("method", ["l1-unstructured", "ln-structured", "random-unstructured", "random-structured"])
def test_amount_is_rounded_as_torch_rounds_it(method: str, amount: float, tmp_path: Path) -> None:
    # Halves among them: 0.5 of 5 and of 7 rows, 0.1 of 5.
    weights = random_weights(five=(5, 5), seven=(7, 3), one=(1, 4))
    step = Prune(amount, method, per_layer="unstructured" in method)
    assert same(pruned(weights, step, tmp_path), pruned_by_torch(weights, step))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_prunes_as_many_as_torch_and_the_smallest(dtype: torch.dtype, tmp_path: Path) -> None:
    source = load_file(save_tiny("llama", tmp_path / "source", dtype) / "model.safetensors")
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe((Prune(0.4),)))
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    in_scope = {row["name"]: source[row["name"]] for row in manifest["tensors"] if row["in_scope"]}
    by_torch = sum(int(mask.sum()) for mask in pruned_by_torch(in_scope, Prune(0.4)).values())
    before = torch.cat([weight.flatten() for weight in in_scope.values()]).float().abs()
    kept = torch.cat([written[name].flatten() for name in in_scope]) != 0
    threshold = before[kept].min()
    assert int((~kept).sum()) == by_torch == round(0.4 * len(before))
    assert before[~kept].max() <= threshold
    # More weights than are to go lie at the threshold or below: a plain comparison would prune too many.
    assert int((before <= threshold).sum()) > by_torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ties_go_in_the_order_of_tensors_then_of_index(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {
        "second by name": torch.tensor([[3, 1], [2, -2]], dtype=dtype),
        "first by name": torch.tensor([[-2, 2], [0.5, 2]], dtype=dtype),
    }
    together = pruned(weights, Prune(5 / 8), tmp_path)
    assert together["second by name"].tolist() == [[False, True], [True, True]]
    assert together["first by name"].tolist() == [[True, False], [True, False]]
    each = pruned(weights, Prune(2 / 4, per_layer=True), tmp_path)
    assert each["second by name"].tolist() == [[False, True], [True, False]]
    assert each["first by name"].tolist() == [[True, False], [True, False]]


def test_rows_and_columns_of_one_norm_go_in_order(tmp_path: Path) -> None:
    weights = {"w": torch.tensor([[4.0, 0, 0], [0, 0, -1], [0, 1, 0], [1, 0, 0]])}
    rows = pruned(weights, Prune(0.5, "ln-structured", dim=0), tmp_path)["w"]
    assert rows[:, 0].tolist() == [False, True, True, False]
    columns = pruned(weights, Prune(0.34, "ln-structured", dim=1), tmp_path)["w"]
    assert columns[0].tolist() == [False, True, False]


def test_ties_of_a_checkpoint_go_in_the_order_of_its_files(tmp_path: Path) -> None:
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
def test_zeros_are_the_first_to_count_as_pruned(per_layer: bool, tmp_path: Path) -> None:
    weights = random_weights(a=(20, 10), b=(30, 10))
    for weight in weights.values():
        weight[::4, ::2] = 0.0
        weight[::4, 1::2] = -0.0
    zeros = {name: weight == 0 for name, weight in weights.items()}
    some = pruned(weights, Prune(0.2, per_layer=per_layer), tmp_path)
    assert sum(int(mask.sum()) for mask in some.values()) == 100
    assert all(bool(zeros[name][some[name]].all()) for name in weights)
    more = pruned(weights, Prune(0.5, per_layer=per_layer), tmp_path)
    assert sum(int(mask.sum()) for mask in more.values()) == 250
    assert all(bool(more[name][zeros[name]].all()) for name in weights)


@pytest.mark.parametrize("dim", [0, 1])
def test_channels_of_zeros_are_the_first_to_go(dim: int, tmp_path: Path) -> None:
    weight = random_weights(w=(8, 8))["w"]
    weight.select(dim, 6).zero_()
    weight.select(dim, 2).zero_()
    channels = pruned({"w": weight}, Prune(0.25, "ln-structured", norm=2, dim=dim), tmp_path)["w"].select(1 - dim, 0)
    assert channels.nonzero().flatten().tolist() == [2, 6]


@every_structured_step
@pytest.mark.parametrize("block_elements", [1, 50, 1 << 18])
def test_each_of_stacked_matrices_is_pruned_by_itself(
    step: Prune, block_elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    experts = random_weights(experts=(5, 12, 7))["experts"]
    experts *= torch.tensor([1.0, 100, 0.01, 1, 1])[:, None, None]
    modules = [holder(expert) for expert in experts]
    with torch.random.fork_rng():
        # The matrices of a stack share its draws, one after the other.
        torch.manual_seed(make_generator(step.seed, "experts").initial_seed())
        for module in modules:
            prune_one(module, step)
    expected = torch.stack([module.weight_mask == 0 for module in modules])
    assert torch.equal(pruned({"experts": experts}, step, tmp_path)["experts"], expected)


def test_stacked_matrices_share_one_threshold(tmp_path: Path) -> None:
    weights = random_weights(experts=(5, 12, 7), router=(5, 7))
    assert same(pruned(weights, Prune(0.4), tmp_path), pruned_by_torch(weights, Prune(0.4)))


def test_each_step_has_a_threshold_of_its_own(tmp_path: Path) -> None:
    source = load_file(save_tiny("llama", tmp_path / "source") / "model.safetensors")
    steps = (Prune(0.2, where=Where(("attention",))), Prune(0.6, where=Where(("feed-forward",))))
    manifest = convert(tmp_path / "source", tmp_path / "pruned", Recipe(steps))
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    for step, group in zip(steps, ("attention", "feed-forward"), strict=True):
        weights = {row["name"]: source[row["name"]] for row in manifest["tensors"] if row["group"] == group}
        assert same({name: written[name] == 0 for name in weights}, pruned_by_torch(weights, step))


@pytest.mark.parametrize("method", ["random-unstructured", "random-structured"])
def test_random_choice_depends_on_seed_and_name_alone(method: str, tmp_path: Path) -> None:
    weights = random_weights(a=(20, 20), b=(20, 20))
    step = Prune(0.3, method, per_layer=True, seed=1)
    first = pruned(weights, step, tmp_path)
    assert same(first, pruned(weights, step, tmp_path))
    assert not torch.equal(first["a"], first["b"])
    assert torch.equal(pruned({"b": weights["a"]}, step, tmp_path)["b"], first["b"])
    other = pruned(weights, Prune(0.3, method, per_layer=True, seed=2), tmp_path)
    assert not torch.equal(first["a"], other["a"])


def test_norm_that_overflows_is_refused(tmp_path: Path) -> None:
    weights = {"enormous": torch.full((4, 4), 1e38)}
    with pytest.raises(CheckpointError, match=r"L9 norm of enormous overflows"):
        pruned(weights, Prune(0.5, "ln-structured", norm=9), tmp_path)


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


def feed_forward(model: torch.nn.Module) -> list[Tensor]:
    """The matrices [output, input] of the feed-forward blocks that are stored apart, as the blocks multiply by them."""
    if isinstance(model, hf.GPT2LMHeadModel):
        return [part.weight.T for block in model.transformer.h for part in (block.mlp.c_fc, block.mlp.c_proj)]
    experts = [layer.mlp.experts for layer in model.model.layers]
    if isinstance(model, hf.GptOssForCausalLM):
        return [matrix.T for each in experts for stack in (each.gate_up_proj, each.down_proj) for matrix in stack]
    halves = [half for each in experts for half in each.gate_up_proj.chunk(2, dim=1)]
    return [matrix for stack in (*halves, *(each.down_proj for each in experts)) for matrix in stack]


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
    matrices = feed_forward(load(tmp_path / "pruned"))
    assert len(matrices) == number
    for matrix in matrices:
        zero = matrix == 0
        channels = zero.all(1 - dim)
        assert int(channels.sum()) == matrix.shape[dim] // 4
        assert int(zero.sum()) == int(channels.sum()) * matrix.shape[1 - dim]
