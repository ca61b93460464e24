"""Dropping blocks and neurons chosen on a calibration text equals plain references on whole models and matrices."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError, UsageError
from compressknow.comparison.checkpoints import diff_checkpoints
from compressknow.comparison.diff import CheckpointDiff
from compressknow.compress import blocks, process
from compressknow.compress.calibrate.text import CalibrationText
from compressknow.compress.convert import VariantMaker, execute, prepare_plan
from compressknow.compress.manifest import Manifest, predict_manifest
from compressknow.compress.output import NewFolder
from compressknow.compress.recipe import Recipe, build_recipe
from compressknow.compress.removal.neurons import choose_neurons, fit_down
from compressknow.compress.removal.smaller import choose_blocks
from compressknow.compress.steps import DropBlocks, DropNeurons, Where
from compressknow.compress.verify import compare_to_manifest
from compressknow.model.checkpoint import open_checkpoint
from compressknow.model.manifest import read_manifest
from tests.compress.deep import BUILDERS, build_deep, remove_blocks, save_deep
from tests.long import one_in
from tests.models import edit_tensors, load, logits, save_tiny, tiny

DAMPING = 0.01


def test_the_blocks_that_change_their_input_least_are_chosen() -> None:
    assert choose_blocks([0.9, 0.2, 0.95, 0.9, 0.1], 1) == (2,)
    assert choose_blocks([0.9, 0.2, 0.95, 0.9, 0.1], 2) == (0, 2)
    assert choose_blocks([0.5, 0.5, 0.5], 2) == (0, 1)


def test_the_neurons_that_add_most_to_the_output_remain() -> None:
    torch.manual_seed(0)
    down, inputs = torch.randn(8, 20), torch.randn(50, 20) * torch.rand(20)
    # The contribution of each neuron to the outputs of all tokens.
    added = [torch.linalg.matrix_norm(torch.outer(inputs[:, j], down[:, j]).double()) for j in range(20)]
    expected = sorted(sorted(range(20), key=lambda j: -float(added[j]))[:7])
    assert choose_neurons(down, inputs.square().sum(0), 7).tolist() == expected
    assert choose_neurons(torch.ones(3, 6), torch.ones(6), 4).tolist() == [0, 1, 2, 3]


def test_the_fit_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    down = torch.randn(6, 24, dtype=torch.float64)
    inputs = torch.randn(200, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3, 7, 8, 11, 15, 20])
    fitted = fit_down(down, inputs.T @ inputs, kept)
    # Damping is the same as further rows that ask the weights not to change.
    damping = DAMPING * inputs[:, kept].square().sum(0).mean()
    rows = torch.cat([inputs[:, kept], damping.sqrt() * torch.eye(8, dtype=torch.float64)])
    targets = torch.cat([inputs @ down.T, damping.sqrt() * down[:, kept].T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-5, atol=1e-5)
    # It is nearer to the original output than the kept weights alone.
    errors = [float((inputs[:, kept] @ w.double().T - inputs @ down.T).norm()) for w in (fitted, down[:, kept])]
    assert errors[0] < 0.9 * errors[1]


def test_a_neuron_that_is_always_zero_keeps_its_weights() -> None:
    torch.manual_seed(0)
    down, inputs = torch.randn(4, 10), torch.randn(100, 10)
    inputs[:, 3] = 0
    fitted = fit_down(down, inputs.T @ inputs, torch.tensor([1, 3, 5]))
    torch.testing.assert_close(fitted[:, 1], down[:, 3])


def test_a_singular_matrix_is_an_error() -> None:
    with pytest.raises(CompressknowError, match="of layer cannot be inverted"):
        fit_down(torch.ones(2, 4), torch.zeros(4, 4), torch.tensor([0, 1]), "layer")


class Network(NamedTuple):
    """The projections of a model's feed-forward blocks, by the ends of their names."""

    into: tuple[str, ...]
    out: str
    width: int = 48


_GATED = Network(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_BERT = Network(("intermediate.dense",), "output.dense")
NETWORKS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"), _GATED),
    **dict.fromkeys(("bert", "roberta", "electra"), _BERT),
    "distilbert": Network(("ffn.lin1",), "ffn.lin2"),
    "albert": Network(("ffn",), "ffn_output"),
    "modernbert": Network(("mlp.Wi",), "mlp.Wo"),
    "t5": Network(("DenseReluDense.wi",), "DenseReluDense.wo"),
    "mt5": Network(("DenseReluDense.wi_0", "DenseReluDense.wi_1"), "DenseReluDense.wo"),
    "gpt2": Network(("mlp.c_fc",), "mlp.c_proj", 128),
    "gpt-neox": Network(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "opt": Network(("fc1",), "fc2"),
    "phi": Network(("mlp.fc1",), "mlp.fc2"),
    "phi3": Network(("mlp.gate_up_proj",), "mlp.down_proj"),
}


def build_original(name: str) -> PreTrainedModel:
    return tiny(name) if name == "albert" else build_deep(name)


def save_original(name: str, folder: Path) -> Path:
    return save_tiny(name, folder) if name == "albert" else save_deep(name, folder)


def draw_text(model: PreTrainedModel) -> CalibrationText:
    generator = torch.Generator().manual_seed(3)
    batches: list[dict[str, torch.Tensor]] = []
    # As in a text, the last may have fewer sequences.
    for rows in (6, 6, 6, 2):
        batches.append({"input_ids": torch.randint(5, 99, (rows, 16), generator=generator)})
        if model.config.is_encoder_decoder:
            batches[-1]["decoder_input_ids"] = torch.randint(5, 99, (rows, 9), generator=generator)
    return CalibrationText("file", "text.txt", "0" * 64, 0, 320, 320, tuple(batches), ())


def convert(source: Path, output: Path, recipe: Recipe, **options: Any) -> Manifest:
    plan = prepare_plan(source, recipe)
    assert plan.removal is not None
    return execute(plan, NewFolder(output, plan.checkpoint), draw_text(plan.removal.original[1]), **options)


def run_all(model: PreTrainedModel, text: CalibrationText) -> None:
    with torch.no_grad():
        for batch in text.batches:
            model(**batch)


def narrow_by_hand(name: str, count: int, *, repair: bool = True) -> PreTrainedModel:
    """Narrow one feed-forward block after the other in float64, each by its inputs in the model as it then is."""
    model, network, text = copy.deepcopy(build_original(name)), NETWORKS[name], draw_text(build_original(name))
    outs = [n for n, m in model.named_modules() if n.endswith(network.out) and "attention" not in n]
    for out in outs:
        module, rows = model.get_submodule(out), []
        hook = module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2)))
        run_all(model, text)
        hook.remove()
        inputs = torch.cat(rows).double()
        weight = module.weight.detach().double()
        weight = weight.T if isinstance(module, Conv1D) else weight
        scores = inputs.norm(dim=0) * weight.norm(dim=0)
        remaining = torch.sort(torch.topk(scores, count).indices).values
        dropped = torch.tensor([j for j in range(network.width) if j not in remaining.tolist()])
        new, products = weight[:, remaining], inputs.T @ inputs
        if repair:
            inner = products[remaining][:, remaining]
            inner = inner + DAMPING * inner.diagonal().mean() * torch.eye(count, dtype=torch.float64)
            new = new + weight[:, dropped] @ products[dropped][:, remaining] @ torch.linalg.inv(inner)
        module.weight = nn.Parameter((new.T if isinstance(module, Conv1D) else new).float().contiguous())
        block = out.removesuffix(network.out)
        for into in network.into:
            cut_rows(model.get_submodule(block + into), remaining, network.width)
    return model


def cut_rows(module: nn.Module, remaining: torch.Tensor, width: int) -> None:
    transposed = isinstance(module, Conv1D)
    weight = module.weight.detach().T if transposed else module.weight.detach()
    rows = torch.cat([remaining + part * width for part in range(len(weight) // width)])
    module.weight = nn.Parameter((weight[rows].T if transposed else weight[rows]).contiguous())
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[rows])
    if transposed:
        module.nf = len(rows)


@pytest.mark.parametrize("name", one_in(2, NETWORKS))
def test_logits_equal_those_of_the_model_narrowed_by_hand(tmp_path: Path, name: str) -> None:
    manifest = convert(save_original(name, tmp_path / "in"), tmp_path / "out", build_recipe(Where(), drop_neurons=0.25))
    width = NETWORKS[name].width * 3 // 4
    found = logits(load(tmp_path / "out"))
    torch.testing.assert_close(found, logits(narrow_by_hand(name, width)), rtol=1e-3, atol=2e-4)
    assert not torch.allclose(found, logits(build_original(name)), atol=1e-3)
    assert {one["after"] for one in manifest["removed"]["neurons"]} == {width}
    assert not compare_to_manifest(tmp_path / "out").differences
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_encoder_and_decoder_of_different_widths_are_narrowed_separately(tmp_path: Path) -> None:
    source = save_deep("bart", tmp_path / "in")
    convert(source, tmp_path / "out", build_recipe(Where(("decoder",)), drop_neurons=0.25))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["encoder_ffn_dim"], config["decoder_ffn_dim"]) == (48, 48)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    reshaped = {name for name in before if before[name].shape != after[name].shape}
    assert reshaped == {
        f"model.decoder.layers.{i}.{leaf}" for i in range(4) for leaf in ("fc1.weight", "fc1.bias", "fc2.weight")
    }
    load(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_fit_brings_logits_nearer_to_the_original(name: str) -> None:
    expected, width = logits(build_original(name)), NETWORKS[name].width * 3 // 4
    errors = [float((logits(narrow_by_hand(name, width, repair=repair)) - expected).norm()) for repair in (True, False)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", one_in(4, [name for name in BUILDERS if name != "bart"]))
def test_the_dropped_blocks_are_those_of_highest_similarity(tmp_path: Path, name: str) -> None:
    model, text = build_deep(name), draw_text(build_deep(name))
    manifest = convert(save_deep(name, tmp_path / "in"), tmp_path / "out", build_recipe(Where(), drop_blocks=2))
    dropped: dict[str, Sequence[int]] = {}
    for entry in manifest["removed"]["blocks"]:
        stack = entry["stack"]
        expected = [measure_cosine(model, f"{stack}.{i}", text) for i in range(entry["before"])]
        assert entry["similarities"] == pytest.approx(expected, rel=1e-5)
        order = sorted(range(len(expected)), key=lambda i: -expected[i])
        assert entry["dropped"] == sorted(order[:2])
        dropped[stack] = entry["dropped"]
    found = logits(load(tmp_path / "out"))
    torch.testing.assert_close(found, logits(remove_blocks(name, dropped)), rtol=1e-5, atol=1e-5)
    assert manifest["calibration"]["blocks_apart"]


def measure_cosine(model: PreTrainedModel, block: str, text: CalibrationText) -> float:
    """Return the mean cosine similarity of a block's input and output over all tokens."""
    cosines: list[torch.Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, torch.Tensor) else output[0]
        cosines.append(torch.cosine_similarity(before.double(), after.double(), dim=-1).flatten())

    hook = model.get_submodule(block).register_forward_hook(record, with_kwargs=True)
    run_all(model, text)
    hook.remove()
    return float(torch.cat(cosines).mean())


def test_blocks_go_without_a_run_of_the_head_that_follows(tmp_path: Path) -> None:
    """BART's classifier reads the state of an end token, which packed text need not hold."""
    config = transformers.BartConfig(
        d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, max_position_embeddings=40,
    )  # fmt: skip
    transformers.BartForSequenceClassification(config).save_pretrained(tmp_path / "in")
    manifest = convert(tmp_path / "in", tmp_path / "out", build_recipe(Where(), drop_blocks=1))
    assert [len(entry["similarities"]) for entry in manifest["removed"]["blocks"]] == [3, 3]
    assert manifest["calibration"]["blocks_apart"]


def test_two_steps_drop_what_two_conversions_would(tmp_path: Path) -> None:
    encoder, decoder = (DropBlocks(1, where=Where((side,))) for side in ("encoder", "decoder"))
    source = save_deep("bart", tmp_path / "in")
    both = convert(source, tmp_path / "both", Recipe((encoder, decoder)))
    parts = (
        convert(source, tmp_path / "a", Recipe((encoder,))),
        convert(tmp_path / "a", tmp_path / "b", Recipe((decoder,))),
    )
    assert both["removed"]["blocks"] == [entry for part in parts for entry in part["removed"]["blocks"]]
    renamed = [{row["name"]: row.get("name_before") for row in part.tensors} for part in (both, *parts)]
    assert renamed[0] == {name: before or renamed[1][name] for name, before in renamed[2].items()}
    tensors = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("both", "b")]
    assert tensors[0] == tensors[1]


def test_neurons_are_dropped_from_the_remaining_blocks(tmp_path: Path) -> None:
    """Blocks are dropped first, then neurons, then weights are pruned and quantized."""
    steps = {"drop_blocks": "1", "drop_neurons": 0.25, "prune": 0.3, "quantize": "int8"}
    manifest = convert(save_deep("llama", tmp_path / "in"), tmp_path / "out", build_recipe(Where(), **steps))
    assert manifest.setup == "Drop1 + DropNeurons 25% + Blocks_GPQ 30%"
    source = load_file(tmp_path / "in" / "model.safetensors")
    rows = {row["name"]: row for row in manifest.tensors}
    last = rows["model.layers.2.mlp.down_proj.weight"]
    assert last["name_before"] == "model.layers.3.mlp.down_proj.weight"
    assert (last["shape_before"], last["shape"]) == ([32, 48], [32, 36])
    assert last["bytes_before"] == 32 * 48 * 4
    assert manifest.totals["bytes_before"] == sum(t.numel() * t.element_size() for t in source.values())
    assert manifest["removed"]["parameters"] + manifest.totals["parameters"] == sum(t.numel() for t in source.values())
    assert manifest["removed"]["bytes"] == 4 * manifest["removed"]["parameters"]
    assert not compare_to_manifest(tmp_path / "out").differences
    load(tmp_path / "out")


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2"])
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, name: str) -> None:
    source, recipe = save_deep(name, tmp_path / "in"), build_recipe(Where(), drop_blocks=1, drop_neurons=0.25)
    for threads in (1, 3):
        convert(source, tmp_path / str(threads), recipe, threads=threads)
    for file in ("model.safetensors", "compressknow.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


def test_16_bit_weights_stay_in_their_dtype(tmp_path: Path) -> None:
    source = tmp_path / "in"
    copy.deepcopy(build_deep("llama")).to(torch.bfloat16).save_pretrained(source, max_shard_size="30KB")
    convert(source, tmp_path / "out", build_recipe(Where(), drop_blocks=2, drop_neurons=0.25))
    assert {p.dtype for p in load(tmp_path / "out").parameters()} == {torch.bfloat16}
    assert not compare_to_manifest(tmp_path / "out").differences


# In LFM2, config and size depend on which block is dropped.
@pytest.mark.parametrize(("name", "neurons"), [("llama", 0.25), ("lfm2", None)])
def test_a_variant_in_memory_equals_what_convert_writes(tmp_path: Path, name: str, neurons: float | None) -> None:
    source = save_deep(name, tmp_path / "in")
    recipe = build_recipe(Where(), drop_blocks=1, drop_neurons=neurons, prune=0.2)
    manifest = convert(source, tmp_path / "out", recipe)
    maker = VariantMaker(source)
    assert recipe.calibration is not None
    # Reading a text would need a tokenizer.
    maker.use_text(recipe.calibration, draw_text(build_deep(name)))
    variant = maker.make(maker.plan(recipe))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == variant.tensors.keys()
    assert all(torch.equal(tensor, variant.tensors[name]) for name, tensor in written.items())
    assert variant.config == json.loads((tmp_path / "out" / "config.json").read_text())
    assert variant.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert variant.manifest["removed"] == manifest["removed"]
    assert variant.manifest["calibration"] == manifest["calibration"]


def test_a_dry_run_says_how_much_is_dropped_but_not_what(tmp_path: Path) -> None:
    source = save_deep("llama", tmp_path / "in")
    planned = predict_manifest(prepare_plan(source, build_recipe(Where(), drop_blocks=1, drop_neurons=0.25)))
    manifest = convert(source, tmp_path / "out", build_recipe(Where(), drop_blocks=1, drop_neurons=0.25))
    for key in ("bytes_before", "bytes_after", "parameters"):
        assert planned.totals[key] == manifest.totals[key]
    assert planned["removed"]["blocks"][0]["dropped"] == []
    assert [entry | {"dropped": []} for entry in planned["removed"]["neurons"]] == [
        entry | {"dropped": []} for entry in manifest["removed"]["neurons"]
    ]
    assert not any("dropped" in entry for entry in planned["removed"]["neurons"])
    assert not any("name_before" in row for row in planned.tensors)


def find_rows(before: torch.Tensor, after: torch.Tensor, parts: int) -> list[int]:
    """Return the numbers of the remaining neurons, found by the values of their rows."""
    first = after[: len(after) // parts]
    numbers = [next(i for i, row in enumerate(before) if torch.equal(row, kept)) for kept in first]
    assert numbers == sorted(set(numbers))
    return numbers


@pytest.mark.parametrize("name", one_in(2, NETWORKS))
def test_remaining_neurons_are_compared_with_the_same_ones_of_the_other_model(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each block has a few rows.
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 8)
    source, network = save_original(name, tmp_path / "in"), NETWORKS[name]
    for folder, amount in (("a", 0.25), ("b", 0.5)):
        convert(source, tmp_path / folder, build_recipe(Where(), drop_neurons=amount))
    stored = {folder: load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "a", "b")}
    opened = {folder: open_checkpoint(tmp_path / folder) for folder in stored}
    whole, narrow = diff_checkpoints(opened["in"], opened["a"]), diff_checkpoints(opened["b"], opened["a"])
    for diff in (whole, narrow):
        assert len(diff.tensors) == len(opened["a"].tensors)
        assert {change.kind for change in diff.structure} == {"reshaped"}
    transposed = name == "gpt2"
    downs = [key for key in stored["a"] if key.endswith(f"{network.out}.weight") and "attention" not in key]
    for down in downs:
        into = [f"{down.removesuffix(f'{network.out}.weight')}{each}.weight" for each in network.into]
        weights = {
            folder: {each: tensors[each].T if transposed else tensors[each] for each in (down, *into)}
            for folder, tensors in stored.items()
        }
        fused = len(weights["in"][into[0]]) // network.width
        rows_of = {folder: find_rows(weights["in"][into[0]], weights[folder][into[0]], fused) for folder in ("a", "b")}
        assert read_dropped(tmp_path / "a", down) == [n for n in range(network.width) if n not in rows_of["a"]]
        both = [number for number in rows_of["a"] if number in rows_of["b"]]
        check_error(whole, down, weights["in"][down][:, rows_of["a"]], weights["a"][down])
        check_error(
            narrow,
            down,
            *(weights[folder][down][:, [rows_of[folder].index(number) for number in both]] for folder in ("b", "a")),
        )
        for each in into:
            for diff, rows in ((whole, len(rows_of["a"])), (narrow, len(both))):
                (tensor,) = (tensor for tensor in diff.tensors if tensor.name == each)
                assert tensor.same_bytes
                assert tensor.sums.numel == rows * fused * weights["in"][each].shape[1]


def read_dropped(folder: Path, down: str) -> list[int]:
    """Return the dropped neurons by the manifest."""
    entries = json.loads((folder / "compressknow.json").read_text())["removed"]["neurons"]
    (dropped,) = (
        numbers
        for entry in entries
        for module, numbers in zip(entry["modules"], entry["dropped"], strict=True)
        if f"{module}.weight".endswith(down)
    )
    runs = [[int(limit) for limit in part.split("-")] for part in dropped.split(", ")]
    return [number for run in runs for number in range(run[0], run[-1] + 1)]


def check_error(diff: CheckpointDiff, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    (tensor,) = (tensor for tensor in diff.tensors if tensor.name == name)
    expected = float((b.double() - a.double()).norm() / a.double().norm())
    assert tensor.sums.relative_error == pytest.approx(expected, rel=1e-9)
    assert tensor.sums.numel == a.numel()
    assert expected > 0


@pytest.mark.parametrize("scheme", [{"quantize": "int8"}, {"quantize": "int4", "parameters": {"group_size": 32}}])
def test_narrower_layers_of_any_scheme_can_be_compared(tmp_path: Path, scheme: Any) -> None:
    source = tmp_path / "in"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny("llama").config.to_dict() | {"intermediate_size": 128})
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    convert(source, tmp_path / "a", build_recipe(Where(), drop_neurons=0.5))
    convert(source, tmp_path / "b", build_recipe(Where(), drop_neurons=0.25, **scheme))
    opened = {folder: open_checkpoint(tmp_path / folder) for folder in ("in", "a", "b")}
    for a, b in (("in", "b"), ("a", "b"), ("b", "a"), ("b", "in")):
        diff = diff_checkpoints(opened[a], opened[b])
        assert len(diff.tensors) == len(opened["in"].tensors)
        for tensor in diff.tensors:
            if tensor.module and "up_proj" in tensor.module:
                assert 0 < (tensor.sums.relative_error or 0) < (0.01 if scheme["quantize"] == "int8" else 0.15)
            elif tensor.module and "down_proj" in tensor.module:
                assert 0 < (tensor.sums.relative_error or 0) < 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("llama", {}), ("gpt2", {"prune": 0.3})),
        ("llama", {"prune": 0.5, "prune_method": "sparsegpt", "quantize": "int8-paper"}),
    ],
    ids=str,
)
def test_relative_errors_of_fitted_weights_match_the_diff(
    tmp_path: Path, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each block has a few rows, and tensors are copied in pieces.
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 8)
    monkeypatch.setattr(process, "COPY_BYTES", 1 << 8)
    source = save_original(name, tmp_path / "in")
    edit_tensors(source, lambda tensors: [tensors[key].view(-1)[::5].zero_() for key in tensors if "mlp" in key])
    manifest = convert(source, tmp_path / "out", build_recipe(Where(), drop_neurons=0.25, **options))
    diff = diff_checkpoints(open_checkpoint(source), open_checkpoint(tmp_path / "out"))
    assert manifest["groups"]["feed-forward"]["relative_error"] > 0.01
    assert manifest["totals"]["relative_error"] == pytest.approx(diff.total.relative_error, rel=1e-5)
    rows = {row["name"]: row for row in manifest["tensors"]}
    for tensor in diff.tensors:
        row, sums = rows[tensor.name], tensor.sums
        assert row["relative_error"] == pytest.approx(sums.relative_error, rel=1e-5, abs=1e-9)
        assert (row["zeros_before"], row["zeros"]) == (sums.zeros_a, sums.zeros_b)


@pytest.mark.parametrize(
    "dropped", [["0-11"], ["0-11", "0-12"], ["0-11", "x"], ["0-11", "40-51"], ["0-11", "5-9, 0-6"], ["0-11", "9-0"]]
)
def test_a_manifest_with_an_invalid_list_of_neurons_is_refused(tmp_path: Path, dropped: list[str]) -> None:
    source = save_tiny("llama", tmp_path / "in")
    manifest = convert(source, tmp_path / "out", build_recipe(Where(), drop_neurons=0.25))
    manifest["removed"]["neurons"][0]["dropped"] = dropped
    (tmp_path / "out" / "compressknow.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"removed.neurons\[0\].dropped does not list 12 neurons per module"):
        read_manifest(tmp_path / "out")
    # The last neurons can be dropped too.
    manifest["removed"]["neurons"][0]["dropped"] = ["36-47", "36-47"]
    (tmp_path / "out" / "compressknow.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path / "out")["removed"] == manifest["removed"]
    # Manifests of older versions have no such list.
    del manifest["removed"]["neurons"][0]["dropped"]
    (tmp_path / "out" / "compressknow.json").write_text(json.dumps(manifest))
    diff = diff_checkpoints(*(open_checkpoint(tmp_path / folder) for folder in ("in", "out")))
    assert not any("mlp" in tensor.name for tensor in diff.tensors)


def record_progress(source: Path, output: Path, recipe: Recipe) -> dict[str, list[tuple[int, int]]]:
    """Convert, and return the progress of each stage, in the order in which they began."""
    counts: dict[str, list[tuple[int, int]]] = {}

    def begin(work: str) -> Any:
        assert work not in counts
        counts[work] = []
        return nullcontext(lambda *count: counts[work].append(count[:2]))

    convert(source, output, recipe, begin=begin)
    return counts


def test_choosing_and_writing_are_stages_with_one_total_each(tmp_path: Path) -> None:
    source = save_deep("llama", tmp_path / "in")
    counts = record_progress(source, tmp_path / "a", build_recipe(Where(), drop_blocks=1, drop_neurons=0.25, prune=0.2))
    assert list(counts) == ["choose", "convert"]
    # 4 blocks are run to choose blocks, and the remaining 3 to choose neurons.
    assert list(dict.fromkeys(counts["choose"])) == [(done, 7) for done in range(1, 8)]
    assert counts["convert"][-1][0] == counts["convert"][-1][1] > 0
    assert len({total for _, total in counts["convert"]}) == 1
    wanda = build_recipe(Where(), drop_neurons=0.25, prune=0.2, prune_method="wanda")
    counts = record_progress(source, tmp_path / "b", wanda)
    assert list(counts) == ["choose", "calibrate"]
    assert list(dict.fromkeys(counts["choose"])) == [(done, 4) for done in range(1, 5)]
    assert counts["calibrate"] == [(done, 4) for done in range(1, 5)]


def test_neurons_of_encoder_and_decoder_are_chosen_in_one_stage(tmp_path: Path) -> None:
    sides = (DropNeurons(0.25, where=Where((side,))) for side in ("encoder", "decoder"))
    counts = record_progress(save_deep("bart", tmp_path / "in"), tmp_path / "out", Recipe(tuple(sides)))
    assert list(dict.fromkeys(counts["choose"])) == [(done, 7) for done in range(1, 8)]


def test_progress_counts_batches_where_a_model_cannot_run_blockwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, forward = save_deep("llama", tmp_path / "in"), transformers.LlamaModel.forward

    def read_a_block(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Only in the original, so that the smaller model can run blockwise.
        assert len(self.layers) < 4 or float(self.layers[1].mlp.down_proj.weight.abs().sum()) > 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", read_a_block)
    recipe = build_recipe(Where(), drop_blocks=1, prune=0.3, prune_method="wanda")
    counts = record_progress(source, tmp_path / "out", recipe)
    assert list(dict.fromkeys(counts["choose"])) == [(done, 4) for done in range(1, 5)]
    assert not read_manifest(tmp_path / "out")["calibration"]["blocks_apart"]


def test_fitted_weights_of_a_block_are_written_before_the_next_block_runs(tmp_path: Path) -> None:
    """Memory then does not grow with the number of blocks."""
    source = save_deep("llama", tmp_path / "in")
    written: list[int] = []

    def begin(work: str) -> Any:
        def advance(*_: float) -> None:
            if work == "choose":
                written.append(sum(path.stat().st_size for path in tmp_path.rglob(".cut-*/*.safetensors")))

        return nullcontext(advance)

    convert(source, tmp_path / "out", build_recipe(Where(), drop_neurons=0.25), begin=begin)
    # These are the down projections, float32 [32, 36]; the last call comes after all blocks.
    assert written[:4] == [4 * 32 * 36 * blocks for blocks in (1, 2, 3, 4)]


@pytest.mark.parametrize("blockwise", [True, False], ids=["blockwise", "whole"])
def test_a_weight_that_is_nan_is_named_and_nothing_is_written(
    blockwise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_deep("llama", tmp_path / "in")
    edit_tensors(source, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][0, 0].fill_(torch.nan))
    if not blockwise:
        forward = transformers.LlamaModel.forward

        def read_a_block(self: transformers.LlamaModel, *args: Any, **kwargs: Any) -> Any:
            float(self.layers[1].mlp.down_proj.weight.sum())
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(transformers.LlamaModel, "forward", read_a_block)
    for options in ({"drop_blocks": 1}, {"drop_neurons": 0.25}):
        with pytest.raises(CompressknowError, match=r"model\.layers\.2\.mlp\.up_proj\.weight in .* holds NaN"):
            convert(source, tmp_path / "out", build_recipe(Where(), **options))
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_number_of_neurons_is_rounded_as_documented(tmp_path: Path) -> None:
    source = save_deep("llama", tmp_path / "in")
    # 0.3 of 48 would leave 33.6, and 0.125 leave 42; the default multiple is 4, and half of it is rounded up.
    for amount, multiple, kept in ((0.3, None, 32), (0.3, 1, 34), (0.3, 16, 32), (0.125, None, 44)):
        plan = prepare_plan(source, Recipe((DropNeurons(amount, multiple),)))
        assert plan.config["intermediate_size"] == kept


REFUSED = {
    "all": (DropNeurons(0.99), UsageError, "would drop all"),
    "none": (DropNeurons(0.01), UsageError, "would drop none"),
    "side": (DropNeurons(0.25, where=Where(("encoder",))), UsageError, "no feed-forward blocks in its encoder"),
    "blocks": (DropBlocks(4), UsageError, "would leave none"),
}


@pytest.mark.parametrize(("step", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_choices_are_refused_by_the_plan(tmp_path: Path, step: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        prepare_plan(save_deep("llama", tmp_path / "in"), Recipe((step,)))


def test_a_width_shared_by_encoder_and_decoder_cannot_be_narrowed_in_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one width, d_ff"):
        prepare_plan(save_deep("t5", tmp_path / "in"), build_recipe(Where(("encoder",)), drop_neurons=0.25))


def test_neurons_of_experts_cannot_be_dropped(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        prepare_plan(save_deep("mixtral", tmp_path / "in"), build_recipe(Where(), drop_neurons=0.25))
