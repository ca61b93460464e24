"""Blocks run one after the other: what their layers are seen to read is what they read when the whole model runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D

from compressknow.base.errors import CompressknowError
from compressknow.compress.blocks import Pool
from compressknow.compress.calibrate.gathering import InputRecorder, InputStatistics, InputSums, Key
from compressknow.compress.calibrate.model import Call, StreamedModel
from compressknow.compress.calibrate.walk import Visitor, observe, walk
from compressknow.compress.sources import Sources
from compressknow.model.groups import read_structure
from compressknow.model.loading import open_complete
from compressknow.model.tensors import OpenFiles
from tests.compress.test_zoo_converts import try_build
from tests.models import save_tiny, tiny

FAMILIES = ("bert", "albert", "t5-gated", "bart", "gpt2", "llama-tied", "opt", "gpt-neox")
Batches = list[dict[str, torch.Tensor]]


class Seeing(Visitor):
    """Looks at every block, and changes none; `keeps` what each gives, or has it run once more."""

    def __init__(self, weights: Mapping[str, list[str]], check: Callable[[], None], keeps: bool = False) -> None:
        self.weights, self.keeps = weights, keeps
        self.by_block = {
            block: InputSums(names, products=True, peaks=True, check=check) for block, names in weights.items()
        }
        self.order: list[str] = []

    def list_watched(self, module: str) -> Collection[str]:
        return self.weights[module]

    def get_sums(self, module: str) -> InputSums:
        return self.by_block[module]

    def keeps_output(self, module: str, batch: int) -> bool:  # noqa: ARG002
        return self.keeps

    def visit(self, module: str, rerun: Callable[[], Any]) -> None:  # noqa: ARG002
        self.order.append(module)


def make_batches(model: PreTrainedModel, count: int = 5) -> Batches:
    drawing = torch.Generator().manual_seed(3)

    def drawn(length: int) -> torch.Tensor:
        return torch.randint(5, model.config.vocab_size, (2, length), generator=drawing)

    two = model.config.is_encoder_decoder
    return [{"input_ids": drawn(11), **({"decoder_input_ids": drawn(7)} if two else {})} for _ in range(count)]


def walked(
    folder: Path,
    batches: Batches,
    threads: int = 2,
    *,
    keeps: bool = False,
    change: Callable[[PreTrainedModel], object] = id,
) -> tuple[Seeing, dict[str, Any]]:
    checkpoint, tree = open_complete(folder)
    structure = read_structure(tree)
    with OpenFiles() as files, Pool(threads) as pool:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, structure), files)
        change(streamed.model)
        weights = {
            block: [w.parameter for w in structure.linears if f"{w.module}.".startswith(f"{block}.")]
            for block in streamed.blocks
        }
        seeing = Seeing(weights, pool.check, keeps)
        walk(streamed, batches, seeing, pool)
    found = {name: seeing.by_block[block].get(Key(name)) for block, names in weights.items() for name in names}
    return seeing, found


def seen_by_hooks(model: PreTrainedModel, batches: Batches) -> dict[str, torch.Tensor]:
    """X^T X of every Linear, in float64, of the whole model."""
    products: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            products[name] = products.get(name, torch.zeros(1)) + rows.T @ rows

        return add

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return products


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_seen_block_by_block_is_what_the_whole_model_shows(name: str, keeps: bool, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path / "in")
    model = copy.deepcopy(tiny(name))
    batches = make_batches(model)
    seeing, found = walked(folder, batches, keeps=keeps)
    expected = seen_by_hooks(model, batches)
    assert len(set(seeing.order)) >= 2 or name == "albert"
    assert found
    for parameter, statistics in found.items():
        products = expected[parameter.removesuffix(".weight")].float()
        assert statistics is not None, parameter
        assert torch.allclose(statistics.products, products, rtol=1e-3, atol=1e-3 * float(products.abs().max()))
        assert torch.equal(statistics.squares, statistics.products.diagonal())


def test_a_matrix_whose_rows_read_different_inputs_is_seen_with_all_of_them() -> None:
    """DeepSeek V4 multiplies each group of its rows with a part of the heads."""
    weight, inputs = torch.rand(6, 4), torch.rand(3, 5, 4)
    with InputRecorder({"matrix": weight, "stack": (stack := torch.rand(3, 2, 4))}) as watch:
        torch.bmm(inputs, weight.view(3, 2, 4).transpose(1, 2))
        torch.bmm(inputs, stack.transpose(1, 2))
    assert [key for key, _ in watch.seen] == [Key("matrix")] * 3 + [Key("stack", number) for number in range(3)]
    assert torch.equal(torch.stack([read for _, read in watch.seen]), torch.cat([inputs, inputs]))


def test_a_copy_is_of_what_was_read_though_another_lay_in_its_place() -> None:
    weights, read = {str(number): torch.rand(3, 64) for number in range(20)}, list(torch.rand(20, 10, 64))
    with InputRecorder(weights, copies=True) as watch:
        for inputs, weight in zip(read, weights.values(), strict=True):
            functional.linear(inputs.clone(), weight)
    assert all(torch.equal(seen, inputs) for (_, seen), inputs in zip(watch.seen, read, strict=True))


@pytest.mark.parametrize("name", ["ZambaForCausalLM", "Zamba2ForCausalLM"])
def test_a_weight_that_blocks_share_is_seen_in_each_of_them(name: str, tmp_path: Path) -> None:
    """An adapter of Zamba2's shared block is used in one of them alone, where it reads what a shared weight does."""
    model, _ = try_build(name)
    model.save_pretrained(tmp_path / "in")
    checkpoint, tree = open_complete(tmp_path / "in")
    batches, found = make_batches(model, 2), {}
    observe(checkpoint, tree, [batches], lambda seen, *_: found.update(seen), products=True, threads=2)
    expected = seen_by_hooks(model, batches)
    shared = [weight for weight in read_structure(tree).linears if weight.sharing]
    assert shared
    for weight in shared:
        products = sum(expected[module] for module in weight.modules if module in expected).float()
        statistics = found[Key(weight.parameter)]
        assert torch.allclose(statistics.products, products, rtol=1e-3, atol=1e-3 * float(products.abs().max()))


def test_a_layer_outside_the_blocks_is_still_in_memory_in_the_next_walk(tmp_path: Path) -> None:
    checkpoint, tree = open_complete(save_tiny("albert", tmp_path / "in"))
    outputs: list[dict[str, torch.Tensor]] = []

    class Listening(Visitor):
        lone_layers = ("albert.encoder.embedding_hidden_mapping_in",)

        def receive_output(self, module: str, batch: int, call: Call, output: Any) -> None:  # noqa: ARG002
            outputs[-1][module] = output[0]

    with OpenFiles() as files, Pool(2) as pool:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, read_structure(tree)), files)
        for lone_layers in (Listening.lone_layers, ()):
            outputs.append({})
            visitor = Listening()
            visitor.lone_layers = lone_layers
            walk(streamed, make_batches(tiny("albert"), 1), visitor, pool)
    first, second = outputs
    assert first.keys() - second.keys() == set(Listening.lone_layers)
    assert all(torch.equal(first[module], second[module]) for module in second)


def test_a_weight_that_is_not_in_memory_multiplies_nothing(tmp_path: Path) -> None:
    """Torch itself takes one on the meta device, and returns what happens to be in memory."""
    checkpoint, tree = open_complete(save_tiny("llama", tmp_path / "in"))
    with OpenFiles() as files:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, read_structure(tree)), files)
        name = "model.layers.1.self_attn.q_proj"
        weight, width = streamed.model.get_parameter(f"{name}.weight"), tree.config.hidden_size
        for multiply in (streamed.model.get_submodule(name), lambda rows: rows @ weight.T):
            with pytest.raises(RuntimeError, match="a weight that is not in memory"):
                multiply(torch.ones(1, width))
        with streamed.load("model.layers.1"):
            assert streamed.model.get_submodule(name)(torch.ones(1, width)).isfinite().all()
        with pytest.raises(RuntimeError, match="a weight that is not in memory"):
            streamed.model.get_submodule(name)(torch.ones(1, width))


def test_an_embedding_is_read_before_a_model_moves_token_ids_to_its_device(tmp_path: Path) -> None:
    """As Llama 4 does: on no device ids have no values, and all that follows would be noise."""
    model, _ = try_build("Llama4ForCausalLM")
    model.save_pretrained(tmp_path / "in")
    batches, found = make_batches(model, 2), {}
    observe(*open_complete(tmp_path / "in"), [batches], lambda seen, *_: found.update(seen), products=True)
    read = read_by(model, "model.layers.0.self_attn.q_proj", batches)
    products = found[Key("model.layers.0.self_attn.q_proj.weight")].products
    assert torch.allclose(products.double(), read.T @ read, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("keeps", "overwrites", "runs"), [(False, False, 2), (True, False, 1), (True, True, 2)])
def test_a_block_whose_output_is_kept_runs_once_unless_it_overwrites_what_it_reads(
    keeps: bool, overwrites: bool, runs: int, tmp_path: Path
) -> None:
    folder, batches = save_tiny("llama", tmp_path / "in"), make_batches(tiny("llama"))
    ran: list[int] = []

    def change(tree: PreTrainedModel) -> None:
        block = tree.model.layers[0]
        forward = block.forward

        def counted(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            ran.append(1)
            if overwrites:
                hidden_states.mul_(2)
            return forward(hidden_states, **kwargs)

        block.forward = counted

    _, found = walked(folder, batches, keeps=keeps, change=change)
    assert len(ran) == runs * len(batches)
    _, expected = walked(folder, batches, change=change)
    assert all(torch.equal(found[name].products, expected[name].products) for name in expected)


@pytest.mark.parametrize("overwrites", [False, True])
def test_a_pair_of_passes_shows_how_far_inputs_have_drifted_from_the_originals(
    overwrites: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a visit makes of a block is what the blocks after it read, in one pass of two."""
    folder, model = save_tiny("llama", tmp_path / "in"), copy.deepcopy(tiny("llama"))
    if overwrites:
        forward = LlamaDecoderLayer.forward
        monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, **kwargs: forward(self, x.mul_(2), **kwargs))
    found: dict[str, InputStatistics] = {}

    def visit(seen: Mapping[Key, InputStatistics], weights: Mapping[str, torch.Tensor], _: Pool) -> None:
        found.update({key.parameter: statistics for key, statistics in seen.items()})
        for weight in weights.values():
            weight.mul_(0.9)

    texts = [make_batches(model, 3), make_batches(model, 2)]
    observe(*open_complete(folder), texts, visit, products=True, pairs=True, threads=3)
    for number in range(len(model.model.layers)):
        changed = copy.deepcopy(model)
        for parameter in changed.model.layers[:number].parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(0.9)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            module = f"model.layers.{number}.{name}"
            products, drift = torch.zeros(1), torch.zeros(1)
            for text in texts:
                own, original = (read_by(each, module, text) for each in (changed, model))
                scale = own.square().sum(dim=0).mean()
                products, drift = products + own.T @ own / scale, drift + (original - own).T @ own / scale
            statistics = found[f"{module}.weight"]
            for made, expected in ((statistics.products, products), (statistics.drift, drift)):
                assert torch.allclose(made.double(), expected, rtol=1e-3, atol=1e-4 * float(products.max())), module
            assert bool(statistics.drift.any()) == (number > 0)


def read_by(model: PreTrainedModel, module: str, batches: Batches) -> torch.Tensor:
    """What a layer reads, float64 [tokens, in]."""
    rows: list[torch.Tensor] = []
    hook = model.get_submodule(module).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(rows)


def test_sums_are_the_same_bits_whatever_the_number_of_threads(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    batches = make_batches(tiny("llama"), 9)
    one, several = (walked(folder, batches, threads)[1] for threads in (1, 3))
    for parameter, statistics in one.items():
        assert torch.equal(statistics.products, several[parameter].products), parameter
        assert torch.equal(statistics.peaks, several[parameter].peaks), parameter


def test_a_batch_ends_after_the_one_before_whatever_it_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the one after, which waits for this one alone, would add to the same sums at the same time."""
    sums = InputSums(["a", "b"], products=True, peaks=False, check=lambda: None)
    begun, go = threading.Event(), threading.Event()
    add = Tensor.addmm_

    def slow(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(self) == 4:
            begun.set()
            assert go.wait(10)
        return add(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "addmm_", slow)
    few, many = (Key("a"), torch.ones(2, 3)), (Key("b"), torch.ones(2, 4))
    threads = [
        threading.Thread(target=sums.add, args=(number, seen)) for number, seen in enumerate([[few, many], [few]])
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    threads[1].join(0.5)
    assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join(10)
    assert torch.equal(sums.get(Key("a")).products, torch.full((3, 3), 4.0))


def test_a_head_whose_inputs_alone_are_wanted_is_not_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = save_tiny("llama", tmp_path / "in"), tiny("llama")
    forward, widths = nn.Linear.forward, set()

    def noted(self: nn.Linear, inputs: Tensor) -> Tensor:
        output = forward(self, inputs)
        widths.add(self.out_features)
        return output

    monkeypatch.setattr(nn.Linear, "forward", noted)
    found: dict[Key, InputStatistics] = {}
    observe(*open_complete(folder), [make_batches(model)], lambda seen, *_: found.update(seen), products=True)
    assert found[Key("lm_head.weight")].tokens == 5 * 2 * 11
    assert model.config.intermediate_size in widths
    assert model.config.vocab_size not in widths


def test_layers_that_read_the_same_tensor_share_their_sums(tmp_path: Path) -> None:
    _, found = walked(save_tiny("llama", tmp_path / "in"), make_batches(tiny("llama")))
    layer = "model.layers.0"
    q, k, v = (found[f"{layer}.self_attn.{name}_proj.weight"].products for name in "qkv")
    assert q is k is v
    gate, up = (found[f"{layer}.mlp.{name}_proj.weight"].products for name in ("gate", "up"))
    assert gate is up
    assert found[f"{layer}.self_attn.o_proj.weight"].products is not q


def test_products_of_many_channels_are_whole_and_symmetric_however_often_they_are_asked_for() -> None:
    drawing = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 50, 300, generator=drawing) for _ in range(3)]
    key = Key("layer.weight")
    sums = InputSums([key.parameter], products=True, peaks=False, check=lambda: None)
    for number, batch in enumerate(inputs):
        sums.add(number, [(key, batch)])
        rows = torch.cat(inputs[: number + 1], dim=1)[0].double()
        statistics = sums.get(key)
        assert statistics is not None
        assert statistics.products is not None
        assert torch.allclose(statistics.products.double(), rows.T @ rows, atol=1e-4)
        assert torch.equal(statistics.products[:128, 128:], statistics.products[128:, :128].T)


@pytest.mark.parametrize("texts", [1, 2])
def test_threads_that_ask_at_once_get_one_object(texts: int) -> None:
    key, width, askers = Key("a"), 2048, 4
    of_each = [1] * texts if texts > 1 else ()
    asked = InputSums([key.parameter], products=True, peaks=False, check=lambda: None, texts=of_each)
    for number in range(texts):
        asked.add(number, [(key, torch.full((4, width), number + 1.0))])
    start = threading.Barrier(askers)

    def ask(_: int) -> InputStatistics:
        start.wait()
        found = asked.get(key)
        assert found is not None
        return found

    with ThreadPoolExecutor(askers) as pool:
        found = list(pool.map(ask, range(askers)))
    assert len(set(map(id, found))) == 1
    # Of several texts, each is divided by its mean square.
    torch.testing.assert_close(found[0].squares, torch.full((width,), 4.0 if texts == 1 else 2.0))


def test_a_block_that_gives_nan_is_named(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(CompressknowError, match=r"model\.layers\.1 gives NaN"):
        walked(tmp_path / "in", make_batches(model))


def test_a_walk_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(CompressknowError):
        walked(tmp_path / "in", make_batches(model))
    assert threading.active_count() == before


@pytest.mark.parametrize("name", FAMILIES)
def test_while_blocks_run_neither_embedding_nor_head_is_in_memory(name: str, tmp_path: Path) -> None:
    checkpoint, tree = open_complete(save_tiny(name, tmp_path / "in"))
    held: list[list[str]] = []
    with OpenFiles() as files, Pool(2) as pool:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, read_structure(tree)), files)
        rows = streamed.model.get_input_embeddings().weight.shape[0]

        class Looking(Seeing):
            def list_watched(self, module: str) -> Collection[str]:  # noqa: ARG002
                outside = [streamed.model.get_parameter(each) for each in streamed.outside if "bias" not in each]
                held.append([str(each.shape) for each in outside if each.shape[0] == rows and not each.is_meta])
                return ()

        walk(streamed, make_batches(tiny(name)), Looking({}, pool.check), pool)
    assert held
    assert not any(held)
