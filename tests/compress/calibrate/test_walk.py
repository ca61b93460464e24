"""Inputs of layers recorded block by block equal those of the whole model."""

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


class BlockRecorder(Visitor):
    """A visitor that records every block and changes none; unless it `keeps` outputs, each block runs twice."""

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
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(5, model.config.vocab_size, (2, length), generator=generator)

    two = model.config.is_encoder_decoder
    return [{"input_ids": draw(11), **({"decoder_input_ids": draw(7)} if two else {})} for _ in range(count)]


def walk_recording(
    folder: Path,
    batches: Batches,
    threads: int = 2,
    *,
    keeps: bool = False,
    change: Callable[[PreTrainedModel], object] = id,
) -> tuple[BlockRecorder, dict[str, Any]]:
    checkpoint, tree = open_complete(folder)
    structure = read_structure(tree)
    with OpenFiles() as files, Pool(threads) as pool:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, structure), files)
        change(streamed.model)
        weights = {
            block: [w.parameter for w in structure.linears if f"{w.module}.".startswith(f"{block}.")]
            for block in streamed.blocks
        }
        recorder = BlockRecorder(weights, pool.check, keeps)
        walk(streamed, batches, recorder, pool)
    statistics = {name: recorder.by_block[block].get(Key(name)) for block, names in weights.items() for name in names}
    return recorder, statistics


def record_products(model: PreTrainedModel, batches: Batches) -> dict[str, torch.Tensor]:
    """Run the whole model; return X^T X of every Linear, in float64."""
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
def test_inputs_recorded_block_by_block_equal_those_of_the_whole_model(name: str, keeps: bool, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path / "in")
    model = copy.deepcopy(tiny(name))
    batches = make_batches(model)
    recorder, recorded = walk_recording(folder, batches, keeps=keeps)
    expected = record_products(model, batches)
    assert len(set(recorder.order)) >= 2 or name == "albert"
    assert recorded
    for parameter, statistics in recorded.items():
        products = expected[parameter.removesuffix(".weight")].float()
        assert statistics is not None, parameter
        assert torch.allclose(statistics.products, products, rtol=1e-3, atol=1e-3 * float(products.abs().max()))
        assert torch.equal(statistics.squares, statistics.products.diagonal())


def test_all_inputs_of_a_matrix_multiplied_in_parts_are_recorded() -> None:
    """DeepSeek V4 multiplies each group of its rows by a part of the heads."""
    weight, inputs = torch.rand(6, 4), torch.rand(3, 5, 4)
    with InputRecorder({"matrix": weight, "stack": (stack := torch.rand(3, 2, 4))}) as recorder:
        torch.bmm(inputs, weight.view(3, 2, 4).transpose(1, 2))
        torch.bmm(inputs, stack.transpose(1, 2))
    assert [key for key, _ in recorder.seen] == [Key("matrix")] * 3 + [Key("stack", number) for number in range(3)]
    assert torch.equal(torch.stack([read for _, read in recorder.seen]), torch.cat([inputs, inputs]))


def test_copied_inputs_are_right_though_memory_is_reused() -> None:
    weights, inputs_read = {str(number): torch.rand(3, 64) for number in range(20)}, list(torch.rand(20, 10, 64))
    with InputRecorder(weights, copies=True) as recorder:
        for inputs, weight in zip(inputs_read, weights.values(), strict=True):
            functional.linear(inputs.clone(), weight)
    assert all(torch.equal(seen, inputs) for (_, seen), inputs in zip(recorder.seen, inputs_read, strict=True))


@pytest.mark.parametrize("name", ["ZambaForCausalLM", "Zamba2ForCausalLM"])
def test_inputs_of_a_shared_weight_are_recorded_in_every_block(name: str, tmp_path: Path) -> None:
    """Each adapter of Zamba2's shared block is used in only one place, with the same input as a shared weight."""
    model, _ = try_build(name)
    model.save_pretrained(tmp_path / "in")
    checkpoint, tree = open_complete(tmp_path / "in")
    batches, recorded = make_batches(model, 2), {}
    observe(checkpoint, tree, [batches], lambda seen, *_: recorded.update(seen), products=True, threads=2)
    expected = record_products(model, batches)
    shared = [weight for weight in read_structure(tree).linears if weight.sharing]
    assert shared
    for weight in shared:
        products = sum(expected[module] for module in weight.modules if module in expected).float()
        statistics = recorded[Key(weight.parameter)]
        assert torch.allclose(statistics.products, products, rtol=1e-3, atol=1e-3 * float(products.abs().max()))


def test_a_layer_outside_the_blocks_stays_in_memory_for_the_next_walk(tmp_path: Path) -> None:
    checkpoint, tree = open_complete(save_tiny("albert", tmp_path / "in"))
    outputs: list[dict[str, torch.Tensor]] = []

    class OutputRecorder(Visitor):
        lone_layers = ("albert.encoder.embedding_hidden_mapping_in",)

        def receive_output(self, module: str, batch: int, call: Call, output: Any) -> None:  # noqa: ARG002
            outputs[-1][module] = output[0]

    with OpenFiles() as files, Pool(2) as pool:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, read_structure(tree)), files)
        for lone_layers in (OutputRecorder.lone_layers, ()):
            outputs.append({})
            visitor = OutputRecorder()
            visitor.lone_layers = lone_layers
            walk(streamed, make_batches(tiny("albert"), 1), visitor, pool)
    first, second = outputs
    assert first.keys() - second.keys() == set(OutputRecorder.lone_layers)
    assert all(torch.equal(first[module], second[module]) for module in second)


def test_multiplying_by_a_weight_that_is_not_in_memory_is_an_error(tmp_path: Path) -> None:
    """torch itself accepts one on the meta device, and returns whatever was in memory."""
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


def test_token_ids_are_embedded_before_a_model_moves_them_to_its_device(tmp_path: Path) -> None:
    """Llama 4 moves them; on the meta device ids have no values, and all that follows would be noise."""
    model, _ = try_build("Llama4ForCausalLM")
    model.save_pretrained(tmp_path / "in")
    batches, recorded = make_batches(model, 2), {}
    observe(*open_complete(tmp_path / "in"), [batches], lambda seen, *_: recorded.update(seen), products=True)
    inputs = record_inputs(model, "model.layers.0.self_attn.q_proj", batches)
    products = recorded[Key("model.layers.0.self_attn.q_proj.weight")].products
    assert torch.allclose(products.double(), inputs.T @ inputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("keeps", "overwrites", "runs"), [(False, False, 2), (True, False, 1), (True, True, 2)])
def test_a_block_whose_output_is_kept_runs_once_unless_it_overwrites_its_input(
    keeps: bool, overwrites: bool, runs: int, tmp_path: Path
) -> None:
    folder, batches = save_tiny("llama", tmp_path / "in"), make_batches(tiny("llama"))
    calls: list[int] = []

    def change(tree: PreTrainedModel) -> None:
        block = tree.model.layers[0]
        forward = block.forward

        def record_call(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            calls.append(1)
            if overwrites:
                hidden_states.mul_(2)
            return forward(hidden_states, **kwargs)

        block.forward = record_call

    _, recorded = walk_recording(folder, batches, keeps=keeps, change=change)
    assert len(calls) == runs * len(batches)
    _, expected = walk_recording(folder, batches, change=change)
    assert all(torch.equal(recorded[name].products, expected[name].products) for name in expected)


def test_inputs_count_as_a_layer_read_them_even_if_they_are_overwritten_later(tmp_path: Path) -> None:
    folder, batches = save_tiny("llama", tmp_path / "in"), make_batches(tiny("llama"))

    def overwrite(_: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        args[0].zero_()

    def change(tree: PreTrainedModel) -> None:
        tree.model.layers[0].mlp.register_forward_hook(overwrite)

    _, recorded = walk_recording(folder, batches, change=change)
    _, expected = walk_recording(folder, batches)
    assert all(torch.equal(recorded[name].products, expected[name].products) for name in expected)


@pytest.mark.parametrize("overwrites", [False, True])
def test_two_passes_measure_the_drift_of_inputs_from_the_original(
    overwrites: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one of the two passes, changes of a visit to a block reach the blocks after it."""
    folder, model = save_tiny("llama", tmp_path / "in"), copy.deepcopy(tiny("llama"))
    if overwrites:
        forward = LlamaDecoderLayer.forward
        monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, **kwargs: forward(self, x.mul_(2), **kwargs))
    recorded: dict[str, InputStatistics] = {}

    def visit(seen: Mapping[Key, InputStatistics], weights: Mapping[str, torch.Tensor], _: Pool) -> None:
        recorded.update({key.parameter: statistics for key, statistics in seen.items()})
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
                inputs, original = (record_inputs(each, module, text) for each in (changed, model))
                scale = inputs.square().sum(dim=0).mean()
                products, drift = products + inputs.T @ inputs / scale, drift + (original - inputs).T @ inputs / scale
            statistics = recorded[f"{module}.weight"]
            for measured, expected in ((statistics.products, products), (statistics.drift, drift)):
                assert torch.allclose(measured.double(), expected, rtol=1e-3, atol=1e-4 * float(products.max())), module
            assert bool(statistics.drift.any()) == (number > 0)


def record_inputs(model: PreTrainedModel, module: str, batches: Batches) -> torch.Tensor:
    """Return the inputs of a layer, float64 [tokens, in]."""
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
    one, several = (walk_recording(folder, batches, threads)[1] for threads in (1, 3))
    for parameter, statistics in one.items():
        assert torch.equal(statistics.products, several[parameter].products), parameter
        assert torch.equal(statistics.peaks, several[parameter].peaks), parameter


def test_batches_are_added_in_order_whatever_layers_they_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch waits only for the one before it; if that ended early, two would add to the same sums at once."""
    sums = InputSums(["a", "b"], products=True, peaks=False, check=lambda: None)
    started, go = threading.Event(), threading.Event()
    add = Tensor.addmm_

    def wait_and_add(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(self) == 4:
            started.set()
            assert go.wait(10)
        return add(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "addmm_", wait_and_add)
    narrow, wide = (Key("a"), torch.ones(2, 3)), (Key("b"), torch.ones(2, 4))
    threads = [
        threading.Thread(target=sums.add, args=(number, seen)) for number, seen in enumerate([[narrow, wide], [narrow]])
    ]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    threads[1].join(0.5)
    assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join(10)
    assert torch.equal(sums.get(Key("a")).products, torch.full((3, 3), 4.0))


def test_a_head_is_not_computed_to_record_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = save_tiny("llama", tmp_path / "in"), tiny("llama")
    forward, widths = nn.Linear.forward, set()

    def record_width(self: nn.Linear, inputs: Tensor) -> Tensor:
        output = forward(self, inputs)
        widths.add(self.out_features)
        return output

    monkeypatch.setattr(nn.Linear, "forward", record_width)
    recorded: dict[Key, InputStatistics] = {}
    observe(*open_complete(folder), [make_batches(model)], lambda seen, *_: recorded.update(seen), products=True)
    assert recorded[Key("lm_head.weight")].tokens == 5 * 2 * 11
    assert model.config.intermediate_size in widths
    assert model.config.vocab_size not in widths


def test_layers_with_the_same_input_share_their_sums(tmp_path: Path) -> None:
    _, recorded = walk_recording(save_tiny("llama", tmp_path / "in"), make_batches(tiny("llama")))
    layer = "model.layers.0"
    q, k, v = (recorded[f"{layer}.self_attn.{name}_proj.weight"].products for name in "qkv")
    assert q is k is v
    gate, up = (recorded[f"{layer}.mlp.{name}_proj.weight"].products for name in ("gate", "up"))
    assert gate is up
    assert recorded[f"{layer}.self_attn.o_proj.weight"].products is not q


def test_products_of_many_channels_are_complete_and_symmetric_at_every_call() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 50, 300, generator=generator) for _ in range(3)]
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
def test_concurrent_threads_get_one_object(texts: int) -> None:
    key, width, threads = Key("a"), 2048, 4
    batches = [1] * texts if texts > 1 else ()
    sums = InputSums([key.parameter], products=True, peaks=False, check=lambda: None, texts=batches)
    for number in range(texts):
        sums.add(number, [(key, torch.full((4, width), number + 1.0))])
    start = threading.Barrier(threads)

    def get(_: int) -> InputStatistics:
        start.wait()
        results = sums.get(key)
        assert results is not None
        return results

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(get, range(threads)))
    assert len(set(map(id, results))) == 1
    # With several texts, each is divided by its mean square.
    torch.testing.assert_close(results[0].squares, torch.full((width,), 4.0 if texts == 1 else 2.0))


def test_a_weight_that_is_nan_is_named(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(CompressknowError, match=r"layers\.1\.post_attention_layernorm\.weight in .* holds NaN"):
        walk_recording(tmp_path / "in", make_batches(model))


def test_a_failing_walk_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(CompressknowError):
        walk_recording(tmp_path / "in", make_batches(model))
    assert threading.active_count() == before


@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_and_head_are_not_in_memory_while_blocks_run(name: str, tmp_path: Path) -> None:
    checkpoint, tree = open_complete(save_tiny(name, tmp_path / "in"))
    shapes: list[list[str]] = []
    with OpenFiles() as files, Pool(2) as pool:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, read_structure(tree)), files)
        rows = streamed.model.get_input_embeddings().weight.shape[0]

        class MemoryRecorder(BlockRecorder):
            def list_watched(self, module: str) -> Collection[str]:  # noqa: ARG002
                outside = [streamed.model.get_parameter(each) for each in streamed.outside if "bias" not in each]
                shapes.append([str(each.shape) for each in outside if each.shape[0] == rows and not each.is_meta])
                return ()

        walk(streamed, make_batches(tiny(name)), MemoryRecorder({}, pool.check), pool)
    assert shapes
    assert not any(shapes)
