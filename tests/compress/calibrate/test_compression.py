"""Calibrated conversions equal the same steps done by hand on the whole model."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.base.progress import silence_libraries
from compressknow.cli.convert import build_manifest_page
from compressknow.compress.calibrate import model as streaming
from compressknow.compress.calibrate.compensation import round_by_gptq
from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.compress.calibrate.model import read_tensor
from compressknow.compress.calibrate.smooth import check_smoothable
from compressknow.compress.calibrate.text import CalibrationText
from compressknow.compress.convert import execute, prepare_plan
from compressknow.compress.manifest import predict_manifest
from compressknow.compress.output import NewFolder
from compressknow.compress.pruning import METHODS
from compressknow.compress.recipe import Recipe
from compressknow.compress.schemes import SCHEMES
from compressknow.compress.steps import Calibration, DropNeurons, Prune, Quantize, Step, Where
from compressknow.model.manifest import describe_calibration, list_dropped_neurons, summarize_calibration
from compressknow.model.tensors import OpenFiles, StoredTensor
from compressknow.pages.model_card import list_warnings
from tests.compress.calibrate.test_walk import make_batches, record_inputs
from tests.compress.deep import save_deep
from tests.compress.test_zoo_converts import try_build
from tests.long import long
from tests.models import convert, save_tiny, tiny

OVERALL, BLOCKS = Where(("overall",)), Where(("blocks",))


def draw_text(model: PreTrainedModel, count: int = 5) -> CalibrationText:
    batches = make_batches(model, count)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return CalibrationText("file", "drawn.txt", "0" * 64, 0, tokens, tokens, tuple(batches), ())


def compress(folder: Path, output: Path, *steps: Step, count: int = 5, threads: int = 2) -> dict[str, Any]:
    plan = prepare_plan(folder, Recipe(steps))
    return execute(plan, NewFolder(output, plan.checkpoint), draw_text(plan.tree, count), threads=threads)


def load_causal(folder: Path) -> PreTrainedModel:
    with silence_libraries():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def list_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))


def record_norms(model: PreTrainedModel, block: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the norm of each input channel of a block's layers, float64."""
    squares: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in list_linears(block)]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for each in hooks:
        each.remove()
    return {name: found.sqrt() for name, found in squares.items()}


def test_wanda_prunes_each_block_by_its_inputs_after_the_blocks_before_it(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    compress(folder, tmp_path / "out", Prune(0.5, "wanda", OVERALL))
    by_hand, batches = copy.deepcopy(tiny("llama")), make_batches(tiny("llama"))
    for block in by_hand.model.layers:
        norms = record_norms(by_hand, block, batches)
        for name, layer in list_linears(block):
            scores = layer.weight.data.double().abs() * norms[name]
            lowest = scores.argsort(dim=1, stable=True)[:, : round(0.5 * scores.shape[1])]
            layer.weight.data.scatter_(1, lowest, 0)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, by_hand.state_dict()[name]), name


def read_layers(model: PreTrainedModel, block: nn.Module, batches: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the matrices [out, in] of a block, also those of its experts, each with the inputs that it multiplies."""
    calls: dict[nn.Module, list[tuple[torch.Tensor, ...]]] = {module: [] for module in block.modules()}
    hooks = [each.register_forward_pre_hook(lambda each, args: calls[each].append(args)) for each in calls]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    for module, args in calls.items():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.data
            yield weight.T if isinstance(module, Conv1D) else weight, torch.cat([x.flatten(0, -2) for x, *_ in args])
        elif isinstance(module, MixtralExperts):
            tokens, chosen = (torch.cat(each) for each in list(zip(*args, strict=True))[:2])
            for expert, (both, down) in enumerate(zip(module.gate_up_proj.data, module.down_proj.data, strict=True)):
                read = tokens[(chosen == expert).any(1)]
                gate, up = (read @ both.T).chunk(2, dim=1)
                yield both, read
                yield down, module.act_fn(gate) * up


@pytest.mark.parametrize(("name", "count", "unseen"), [("gpt2", 5, 0), ("mixtral", 20, 0), ("mixtral", 1, 24)])
def test_wanda_prunes_each_kind_of_layer_by_the_tokens_that_reach_it(
    name: str, count: int, unseen: int, tmp_path: Path
) -> None:
    """An expert that too few tokens reach is pruned by its weights alone."""
    by_hand = copy.deepcopy(tiny(name))
    manifest = compress(save_tiny(name, tmp_path / "in"), tmp_path / "out", Prune(0.5, "wanda", BLOCKS), count=count)
    assert len(manifest["calibration"]["unseen"]) == unseen
    for block in by_hand.transformer.h if name == "gpt2" else by_hand.model.layers:
        layers = list(read_layers(by_hand, block, make_batches(by_hand, count)))
        for number, (matrix, inputs) in enumerate(layers):
            is_expert = name == "mixtral" and number >= 4
            norms = inputs.double().norm(dim=0) if not is_expert or len(inputs) >= 32 else torch.ones(len(matrix.T))
            lowest = (matrix.double().abs() * norms).argsort(dim=1, stable=True)[:, : round(0.5 * len(norms))]
            matrix.scatter_(1, lowest, 0)
    by_hand.save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for parameter, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[parameter]), parameter


def test_experts_are_read_as_often_as_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()

    def read(files: OpenFiles, stored: StoredTensor) -> torch.Tensor:
        reads[stored.name] += 1
        return read_tensor(files, stored)

    monkeypatch.setattr(streaming, "read_tensor", read)
    compress(save_tiny("mixtral", tmp_path / "in"), tmp_path / "out", Prune(0.5, "wanda", BLOCKS))
    experts, others = (
        {count for name, count in reads.items() if module in name} for module in (".experts.", ".self_attn.")
    )
    # Twice if this process has not made the text before, otherwise once.
    assert experts == others
    assert len(experts) == 1


def test_gptq_compensates_for_the_rounding_of_earlier_blocks(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    coarse = Quantize("int4", Where(layers="0", exclude=("down_proj",)), parameters={"group_size": 32})
    steps = coarse, Quantize("int8-weights", Where(layers="1"), rounding="gptq")
    compress(folder, tmp_path / "out", *steps, count=20)
    original, converted, name = tiny("llama"), load_causal(tmp_path / "out"), "model.layers.1.self_attn.q_proj"
    batches = make_batches(original, 20)
    before, after = (record_inputs(model, name, batches).float() for model in (original, converted))
    products = after.T @ after
    inputs = InputStatistics(name, len(after), products.diagonal(), None, products, (before - after).T @ after)
    weight, scheme = original.get_submodule(name).weight.data, SCHEMES["int8-weights"]
    scales = scheme.scales(weight.abs().amax(1, keepdim=True))
    expected, plain = (
        scheme.dequantize(round_by_gptq(weight, scales, scheme, statistics), scales)
        for statistics in (inputs, replace(inputs, drift=None))
    )
    rounded = converted.get_submodule(name).weight.data
    assert float((rounded - expected).norm()) < 0.1 * float((rounded - plain).norm())


@pytest.mark.parametrize(
    "steps",
    [
        (Prune(0.5, "sparsegpt", BLOCKS), Quantize("int8", BLOCKS, rounding="gptq")),
        (Quantize("int8", BLOCKS, smooth=0.5),),
        (Prune(0.3, where=BLOCKS), Quantize("int8-weights", OVERALL, rounding="gptq")),
    ],
    ids=["sparsegpt-gptq", "smooth", "l1-gptq-overall"],
)
def test_bytes_do_not_depend_on_the_number_of_threads(steps: tuple[Step, ...], tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    hashes = []
    for threads in (1, 3):
        compress(folder, tmp_path / str(threads), *steps, threads=threads, count=9)
        content = (tmp_path / str(threads) / "model.safetensors").read_bytes()
        hashes.append(hashlib.sha256(content).hexdigest())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("method", ["l1-unstructured", "wanda", "sparsegpt"])
def test_gptq_keeps_the_zeros_of_the_prune_step(method: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    compress(folder, tmp_path / "pruned", Prune(0.5, method, BLOCKS))
    compress(folder, tmp_path / "out", Prune(0.5, method, BLOCKS), Quantize("int8", BLOCKS, rounding="gptq"))
    pruned, both = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    quantized = [name for name, tensor in both.items() if tensor.dtype == torch.int8]
    assert len(quantized) == 14
    # Only the first block has the same inputs in both, and so the same zeros by wanda and SparseGPT.
    for name in quantized if method == "l1-unstructured" else quantized[:7]:
        assert bool((both[name][pruned[name] == 0] == 0).all()), name
    zeros, zeros_before = (sum(int((tensors[n] == 0).sum()) for n in quantized) for tensors in (both, pruned))
    assert zeros >= zeros_before > 0.49 * sum(both[name].numel() for name in quantized)


def test_pruning_and_gptq_in_one_conversion_equals_two(tmp_path: Path) -> None:
    """GPTQ compensates for the rounding of a pruned model, not for its pruning."""
    prune, quantize = Prune(0.5, "l1-unstructured", BLOCKS), Quantize("int8", BLOCKS, rounding="gptq")
    folder = save_tiny("llama", tmp_path / "in")
    compress(folder, tmp_path / "pruned", prune)
    compress(tmp_path / "pruned", tmp_path / "twice", quantize)
    compress(folder, tmp_path / "once", prune, quantize)
    once, twice = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert once == twice


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_gptq_keeps_the_pattern_of_a_pruned_source(smooth: float | None, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    compress(folder, tmp_path / "pruned", Prune(0.5, "sparsegpt", BLOCKS, parameters={"pattern": "2:4"}))
    manifest = compress(tmp_path / "pruned", tmp_path / "out", Quantize("int8", BLOCKS, rounding="gptq", smooth=smooth))
    pruned, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    names = [name for name, tensor in rounded.items() if tensor.dtype == torch.int8]
    assert len(names) == 14
    for name in names:
        zero = pruned[name] == 0
        assert bool((zero.view(-1, 4).sum(dim=1) >= 2).all()), name
        assert not rounded[name][zero].any(), name
    assert not list(list_warnings(manifest))


def test_refilled_zeros_of_the_source_are_counted_and_warned_of(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    compress(folder, tmp_path / "pruned", Prune(0.5, "l1-unstructured", BLOCKS))
    again = Prune(0.2, "l1-unstructured", BLOCKS, per_layer=True)
    manifest = compress(tmp_path / "pruned", tmp_path / "out", DropNeurons(0.25), again)
    pruned, fitted = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    (entry,) = manifest["removed"]["neurons"]
    refilled = {}
    for module, dropped in list_dropped_neurons(entry).items():
        name = f"{module}.weight"
        before = pruned[name][:, [n for n in range(entry["before"]) if not any(n in each for each in dropped)]]
        refilled[name] = int(((before == 0) & (fitted[name] != 0)).sum())
    assert {row["name"]: row["refilled"] for row in manifest["tensors"] if "refilled" in row} == refilled
    (warning,) = list_warnings(manifest)
    assert f"The source is pruned, and {sum(refilled.values()):,} of " in warning
    # A source without zeros gives no warning.
    assert not list(list_warnings(compress(folder, tmp_path / "first", DropNeurons(0.25))))


def save_with_outliers(folder: Path) -> Path:
    """Write a model with a few channels far larger than all others, as in large language models."""
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[3] *= 60
                norm.weight[7] *= 40
            for name, linear in list_linears(layer):
                if linear.weight.shape[1] == norm.weight.shape[0] and "o_proj" not in name:
                    linear.weight[:, 3] /= 60
                    linear.weight[:, 7] /= 40
    model.save_pretrained(folder)
    return folder


def test_smoothing_brings_logits_of_a_model_with_outliers_nearer(tmp_path: Path) -> None:
    folder = save_with_outliers(tmp_path / "in")
    convert(folder, tmp_path / "plain", Recipe((Quantize("int8", BLOCKS),)))
    manifest = compress(folder, tmp_path / "smooth", Quantize("int8", BLOCKS, smooth=0.5))
    assert sorted(manifest["calibration"]["smoothed"]) == [
        f"model.layers.{layer}.{norm}_layernorm" for layer in (0, 1) for norm in ("input", "post_attention")
    ]
    inputs = make_batches(tiny("llama"), 8)[-1]
    with torch.no_grad():
        original, plain, smooth = (load_causal(tmp_path / name)(**inputs).logits for name in ("in", "plain", "smooth"))
    assert (smooth - original).norm() < 0.5 * (plain - original).norm()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_smoothing_divides_norms_and_multiplies_weights_by_the_papers_factors(rounding: str, tmp_path: Path) -> None:
    folder, model, scheme = save_with_outliers(tmp_path / "in"), load_causal(tmp_path / "in"), SCHEMES["int8"]
    manifest = compress(folder, tmp_path / "out", Quantize("int8", BLOCKS, rounding=rounding, smooth=0.8))
    before, after = model.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    errors = {row["name"]: row["relative_error"] for row in manifest["tensors"]}
    assert manifest["groups"]["not-linear"]["relative_error"] < 1e-6
    assert manifest["groups"]["not-linear"]["zeros_after"] == 0
    readers = {"input_layernorm": ("self_attn", "qkv"), "post_attention_layernorm": ("mlp", ("gate", "up"))}
    for block in ("model.layers.0", "model.layers.1"):
        for norm, (parent, parts) in readers.items():
            modules = [f"{block}.{parent}.{part}_proj" for part in parts]
            inputs = record_inputs(model, modules[0], make_batches(model))
            largest = torch.cat([before[f"{module}.weight"] for module in modules]).abs().amax(0)
            factors = before[f"{block}.{norm}.weight"] / after[f"{block}.{norm}.weight"]
            # The inputs come from layers that are already rounded.
            torch.testing.assert_close(factors.double(), inputs.abs().amax(0) ** 0.8 / largest**0.2, rtol=0.1, atol=0)
            for module in modules:
                weight, scale = before[f"{module}.weight"], after[f"{module}.weight_scale"]
                torch.testing.assert_close(scale, (weight * factors).abs().amax(1, keepdim=True) / 127.5)
                written = after[f"{module}.weight"] * scale / factors
                assert errors[f"{module}.weight"] == pytest.approx(
                    float((written - weight).norm() / weight.norm()), 1e-3
                )
            if rounding == "gptq" and (block, norm) == ("model.layers.0", "input_layernorm"):
                products = ((inputs / factors).T @ (inputs / factors)).float()
                statistics = InputStatistics("q_proj", len(inputs), products.diagonal(), products=products)
                name = f"{modules[0]}.weight"
                expected = round_by_gptq(before[name] * factors, after[f"{name}_scale"], scheme, statistics)
                assert float((after[name] == expected).double().mean()) > 0.99


def test_a_norm_that_feeds_the_residual_stream_is_not_smoothed(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "in")
    with pytest.raises(UnsupportedError, match="can be smoothed"):
        compress(folder, tmp_path / "out", Quantize("int8", BLOCKS, smooth=0.5))
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("layers", "block"), [("0-3", 0), ("3", 3)])
def test_one_norm_cannot_be_smoothed_by_two_amounts(tmp_path: Path, layers: str, block: int) -> None:
    """In Phi attention and feed-forward share one norm; in Llama each has its own."""
    feed_forward = Where(("feed-forward",), layers=layers)
    steps = [Quantize("int8", Where(("attention",)), smooth=0.3), Quantize("int8", feed_forward, smooth=0.8)]
    if block:
        steps.append(Quantize("int8", Where(("feed-forward",), layers=f"0-{block - 1}"), smooth=0.3))
    recipe = Recipe(tuple(steps))
    check_smoothable(prepare_plan(save_deep("llama", tmp_path / "llama"), recipe))
    message = f"smooth the output of model.layers.{block}.input_layernorm, by 0.3 and by 0.8"
    with pytest.raises(UsageError, match=message):
        check_smoothable(prepare_plan(save_deep("phi", tmp_path / "phi"), recipe))


@pytest.mark.parametrize("name", ["T5Gemma2ForConditionalGeneration", "PegasusXForConditionalGeneration"])
def test_a_norm_whose_layers_have_other_inputs_too_is_not_smoothed(name: str, tmp_path: Path) -> None:
    """In T5Gemma 2's decoder, keys and values of the encoder's output come from the same layers; PegasusX has two norms
    before one layer."""
    model, _ = try_build(name)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if "norm" in parameter:
                values.mul_(torch.linspace(1, 4, len(values)))
            if parameter.endswith("norm.bias"):
                values.copy_(torch.linspace(-1, 1, len(values)))
    model.save_pretrained(tmp_path / "in")
    manifest = compress(tmp_path / "in", tmp_path / "out", Quantize("int8", BLOCKS, smooth=0.5))
    assert manifest["calibration"]["smoothed"]
    inputs = make_batches(model)[0]
    with torch.no_grad():
        before, after = model(**inputs).logits, type(model).from_pretrained(tmp_path / "out")(**inputs).logits
    assert float((after - before).norm() / before.norm()) < 0.05


def test_gemmas_norms_are_smoothed_including_the_one_they_add(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=96, pad_token_id=0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0, 4)
    model.save_pretrained(tmp_path / "in")
    compress(tmp_path / "in", tmp_path / "out", Quantize("int8-weights", BLOCKS, rounding="gptq"))
    manifest = compress(tmp_path / "in", tmp_path / "smooth", Quantize("int8", BLOCKS, smooth=0.5))
    assert len(manifest["calibration"]["smoothed"]) == 4
    assert manifest["groups"]["not-linear"]["relative_error"] < 1e-6
    inputs = make_batches(model)[0]
    with torch.no_grad():
        before, after = model(**inputs).logits, load_causal(tmp_path / "smooth")(**inputs).logits
    assert float((after - before).norm() / before.norm()) < 0.05


@long
def test_the_next_conversion_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.compress.calibrate.test_compression import *\n"
        "import compressknow.compress.calibrate.compression as c\n"
        "act = c._Compressor.act\n"
        "def slow(*a, **k):\n    act(*a, **k)\n    print('block', flush=True)\n    time.sleep(60)\n"
        "c._Compressor.act = slow\n"
        "compress(Path(sys.argv[1]), Path(sys.argv[2]), Prune(0.5, 'wanda', BLOCKS))\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "block\n"
        run.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) > 1
    compress(folder, tmp_path / "out", Prune(0.5, "wanda", BLOCKS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_progress_counts_blocks(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "in")
    plan = prepare_plan(folder, Recipe((Prune(0.5, "wanda", BLOCKS),)))
    calls: list[tuple[str, int, int]] = []
    execute(
        plan,
        NewFolder(tmp_path / "out", plan.checkpoint),
        draw_text(plan.tree),
        begin=lambda work: nullcontext(lambda *counts: calls.append((work, *counts))),
    )
    assert calls == [("calibrate", 1, 2), ("calibrate", 2, 2)]


def test_a_model_that_cannot_run_blockwise_is_run_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is then pruned by its inputs in the original model, and the manifest says so."""
    folder = save_tiny("llama", tmp_path / "in")
    by_hand, batches = copy.deepcopy(tiny("llama")), make_batches(tiny("llama"))
    norms = record_norms(by_hand, by_hand.model, batches)
    for name, layer in list_linears(by_hand.model):
        scores = layer.weight.data.double().abs() * norms[name]
        lowest = scores.argsort(dim=1, stable=True)[:, : round(0.5 * scores.shape[1])]
        layer.weight.data.scatter_(1, lowest, 0)
    forward = LlamaModel.forward

    def read_a_block(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        assert float(self.layers[1].mlp.down_proj.weight.abs().sum()) > 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", read_a_block)
    manifest = compress(folder, tmp_path / "out", Prune(0.5, "wanda", BLOCKS))
    assert not manifest["calibration"]["blocks_apart"]
    assert "cannot be run one by one" in " ".join(describe_calibration(summarize_calibration(manifest)))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, by_hand.state_dict()[name]), name


def test_a_dry_run_counts_the_whole_model_if_it_writes_its_own_text(tmp_path: Path) -> None:
    """It is whole in memory while it writes, and only one block is while it is calibrated."""
    model = LlamaForCausalLM(LlamaConfig(**tiny("llama").config.to_dict() | {"num_hidden_layers": 12}))
    model.save_pretrained(tmp_path / "in")
    needed = []
    for text in ("self", "notes.txt"):
        recipe = Recipe((Prune(0.5, "wanda", BLOCKS),), calibration=Calibration(text, 64))
        planned = predict_manifest(prepare_plan(tmp_path / "in", recipe))
        page = " ".join("\n".join(build_manifest_page(planned, "in", Path("out"), dry_run=True)).split())
        assert "for 12 blocks" in page
        assert ("the model writes the text" in page) == (text == "self")
        needed.append(planned["estimate"]["bytes"])
    whole = 2 * model.num_parameters()
    assert needed[0] in (whole, 2 * whole)
    assert needed[1] < whole


def test_an_error_while_pruning_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("a fault")

    monkeypatch.setattr(type(METHODS["wanda"]), "prune", fail)
    folder = save_tiny("llama", tmp_path / "in")
    with pytest.raises(ValueError, match="a fault"):
        compress(folder, tmp_path / "out", Prune(0.5, "wanda", BLOCKS))
    assert list(tmp_path.iterdir()) == [folder]
