"""Figures of a diff of two checkpoints match a recount with NumPy, whatever the format of the files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from safetensors.torch import load_file

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError
from compressknow.base.reading import group_by
from compressknow.comparison.checkpoints import diff_checkpoints
from compressknow.comparison.diff import CheckpointDiff, DiffSums, TensorDiff
from compressknow.compress import blocks
from compressknow.engine.identity import describe, locate
from compressknow.model.checkpoint import open_checkpoint
from tests.compress.deep import save_deep
from tests.long import one_in
from tests.models import edit_config, edit_tensors, save_tiny, tiny, tiny_of_groups

Arrays = dict[str, npt.NDArray[np.float64]]
FAMILIES = ("bert", "llama", "t5-gated", "t5-tied", "gpt2", "mixtral")


def compare(a: Path, b: Path, **options: Any) -> CheckpointDiff:
    return diff_checkpoints(open_checkpoint(a), open_checkpoint(b), **options)


def dequantize(folder: Path) -> Arrays:
    """Read every tensor in float64, integers times their scales."""
    stored = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    floats = {}
    for name, tensor in stored.items():
        if name.endswith(("_scale", "_shape")):
            continue
        if name.endswith("_packed"):
            name = name.removesuffix("_packed")
            columns = int(stored[f"{name}_shape"][1])
            floats[name] = unpack(tensor.numpy(), stored[f"{name}_scale"], columns)
            continue
        scale = stored.get(f"{name}_scale")
        floats[name] = (tensor.float() * scale.float() if scale is not None else tensor).double().numpy()
    return floats


def unpack(packed: npt.NDArray[np.int32], scales: torch.Tensor, columns: int) -> npt.NDArray[np.float64]:
    """Unpack a weight whose integers of 4 or 8 bits are stored plus 8 or 128, the first in the lowest bits."""
    bits = 4 if packed.shape[1] == -(-columns // 8) else 8
    offset = 1 << (bits - 1)
    parts = [(packed >> bits * place & 2 * offset - 1) - offset for place in range(32 // bits)]
    integers = np.stack(parts, axis=-1).reshape(len(packed), -1)[:, :columns]
    size = columns // scales.shape[1]
    return (torch.from_numpy(integers).float() * scales.float().repeat_interleave(size, 1)).double().numpy()


def check_sums(sums: DiffSums, a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> None:
    a, b = a.ravel(), b.ravel()
    assert sums.numel == a.size
    assert (sums.zeros_a, sums.zeros_b) == (int((a == 0).sum()), int((b == 0).sum()))
    norms = np.linalg.norm(a), np.linalg.norm(b), np.linalg.norm(b - a)
    assert sums.relative_error == pytest.approx(norms[2] / norms[0], rel=1e-9)
    assert sums.cosine == pytest.approx(a @ b / norms[0] / norms[1], rel=1e-9)
    assert sums.largest_change == np.abs(b - a).max()
    if norms[2]:
        assert sums.snr_db == pytest.approx(20 * math.log10(norms[0] / norms[2]), rel=1e-9)
    else:
        assert sums.snr_db is None


def index_by_name(found: CheckpointDiff) -> dict[str, TensorDiff]:
    return {tensor.name: tensor for tensor in found.tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_a_pruned_model_match_a_recount(family: str, tmp_path: Path) -> None:
    a = save_tiny(family, tmp_path / "a")
    b = tmp_path / "b"
    compressknow.convert(a, b, prune=0.4)
    diff, before, after = compare(a, b), dequantize(a), dequantize(b)
    assert not diff.structure
    assert len(diff.tensors) == len(before)
    for tensor in diff.tensors:
        # Mixtral's router is stored under its former name.
        name = tensor.name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "mixtral" else tensor.name
        check_sums(tensor.sums, before[name], after[name])
        assert tensor.same_bytes == np.array_equal(before[name], after[name])
    assert any(not tensor.same_bytes for tensor in diff.tensors)
    assert any(tensor.same_bytes for tensor in diff.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("scheme", ["int8", "int8-paper", "int8-weights", "fp8"])
@pytest.mark.parametrize("family", one_in(2, ["bert", "llama", "t5-gated", "gpt-neox"]))
def test_8_bit_weights_are_dequantized_before_they_are_compared(
    family: str, scheme: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    a = save_tiny(family, tmp_path / "a", dtype)
    attention_only = family == "bert" or (family, scheme) == ("t5-gated", "fp8")
    scopes = ["attention"] if attention_only else ["attention", "final"]
    manifest = compressknow.convert(a, tmp_path / "b", scope=scopes, prune=0.2, quantize=scheme)
    diff = compare(a, tmp_path / "b")
    assert {change.kind for change in diff.structure} == {"retyped"}
    tensors, before, after = index_by_name(diff), dequantize(a), dequantize(tmp_path / "b")
    for row in manifest["tensors"]:
        # GPT-NeoX's final layer is stored under its former name.
        tensor = tensors[row["name"].replace("embed_out", "lm_head")]
        check_sums(tensor.sums, before[row["name"]], after[row["name"]])
        assert tensor.sums.relative_error == pytest.approx(row["relative_error"], rel=1e-4, abs=1e-7)
        # The shape of a packed weight is stored as two integers of 64 bits.
        shape = 16 if row.get("stored") else 0
        assert (tensor.sums.zeros_b, tensor.bytes_b + shape) == (row["zeros"], row["bytes_after"])


def test_packed_rows_may_end_within_a_word(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**tiny("llama").config.to_dict() | {"intermediate_size": 50})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    compressknow.convert(tmp_path / "a", tmp_path / "b", scope="feed-forward", quantize="int8-weights")
    diff = compare(tmp_path / "a", tmp_path / "b")
    errors = [tensor.sums.relative_error for tensor in diff.tensors if tensor.module and "down_proj" in tensor.module]
    assert len(errors) == config.num_hidden_layers
    assert all(0 < (error or 0) < 0.01 for error in errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5-gated", "gpt-neox"])
def test_int4_weights_are_dequantized_before_they_are_compared(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each block has a few rows.
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 9)
    tiny_of_groups(family).to(dtype).save_pretrained(tmp_path / "a")
    scopes = ["attention"] if family == "bert" else ["attention", "final"]
    options = {"quantize": "int4", "scope": scopes, "parameters": {"group_size": 32}}
    manifest = compressknow.convert(tmp_path / "a", tmp_path / "b", **options)
    compressknow.convert(tmp_path / "a", tmp_path / "c", prune=0.5, **options)
    a, b, c = (dequantize(tmp_path / name) for name in "abc")
    diff = compare(tmp_path / "a", tmp_path / "b")
    assert {(change.kind, change.b.split()[0]) for change in diff.structure} == {("retyped", "I4")}
    tensors, both = index_by_name(diff), index_by_name(compare(tmp_path / "b", tmp_path / "c"))
    for row in manifest["tensors"]:
        name = row["name"].replace("embed_out", "lm_head")
        check_sums(tensors[name].sums, a[row["name"]], b[row["name"]])
        assert tensors[name].sums.relative_error == pytest.approx(row["relative_error"], rel=1e-4, abs=1e-7)
        check_sums(both[name].sums, b[row["name"]], c[row["name"]])
        assert both[name].same_bytes == (not row["in_scope"])
    back = compare(tmp_path / "b", tmp_path / "a")
    assert {change.kind for change in back.structure} == {"retyped"}
    assert compare(tmp_path / "b", tmp_path / "b").same_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("options", [{"layers": "0", "prune": 0.4}, {"scope": "overall", "quantize": "int8"}], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama-tied", "t5-gated"])
def test_manifest_report_and_comparison_give_the_same_relative_error(
    family: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    a = save_tiny(family, tmp_path / "a", dtype)
    manifest = compressknow.convert(a, tmp_path / "b", **options)
    diff, before, after = compare(a, tmp_path / "b"), dequantize(a), dequantize(tmp_path / "b")
    in_report = describe(locate(tmp_path / "b"))["groups"]
    for group, tensors in group_by(diff.tensors, lambda tensor: tensor.group).items():
        changes = [after[t.name].ravel() - before[t.name].ravel() for t in tensors if t.name in before]
        error = sum((t.sums for t in tensors), DiffSums()).relative_error
        assert manifest["groups"][group]["relative_error"] == pytest.approx(error, rel=1e-5, abs=1e-9)
        assert in_report[group]["relative_error"] == manifest["groups"][group]["relative_error"]
        if len(changes) == len(tensors):
            norm = np.linalg.norm(np.concatenate([before[t.name].ravel() for t in tensors]))
            assert error == pytest.approx(np.linalg.norm(np.concatenate(changes)) / norm, rel=1e-5, abs=1e-9)
    assert manifest["totals"]["relative_error"] == pytest.approx(diff.total.relative_error, rel=1e-5)


def test_two_int8_models_can_be_compared(tmp_path: Path) -> None:
    a = save_tiny("llama", tmp_path / "in")
    for name, amount in (("a", 0.2), ("b", 0.5)):
        compressknow.convert(a, tmp_path / name, prune=amount, quantize="int8")
    copy = shutil.copytree(tmp_path / "a", tmp_path / "copy")
    diff = compare(tmp_path / "a", tmp_path / "b")
    before, after = dequantize(tmp_path / "a"), dequantize(tmp_path / "b")
    assert not diff.structure
    assert not diff.config
    for tensor in diff.tensors:
        check_sums(tensor.sums, before[tensor.name], after[tensor.name])
    # Only a scale differs.
    name = next(name for name in before if "q_proj" in name)
    edit_tensors(tmp_path / "a", lambda tensors: tensors[f"{name}_scale"].mul_(2))
    (changed,) = (tensor for tensor in compare(tmp_path / "a", copy).tensors if not tensor.same_bytes)
    check_sums(changed.sums, dequantize(tmp_path / "a")[name], before[name])


@pytest.mark.parametrize("row", [0, -1])
def test_sums_cover_all_blocks_of_a_large_tensor(row: int, tmp_path: Path) -> None:
    """The last block has fewer rows. Only that one or the first differs."""
    a, b = (save_tiny("bert", tmp_path / name) for name in "ab")
    large = torch.randn(300_000, 3)
    for folder in (a, b):
        edit_tensors(folder, lambda tensors: tensors.update(large=large.clone()))
    edit_tensors(b, lambda tensors: tensors["large"][row].mul_(2))
    tensor = index_by_name(compare(a, b))["large"]
    check_sums(tensor.sums, dequantize(a)["large"], dequantize(b)["large"])
    assert not tensor.same_bytes
    assert tensor.sums.largest_change == large[row].double().abs().max()


@pytest.mark.parametrize("family", ["bert", "llama", "t5-gated"])
def test_sums_of_groups_and_layers_match_a_recount(family: str, tmp_path: Path) -> None:
    a = save_tiny(family, tmp_path / "a")
    manifest = compressknow.convert(a, tmp_path / "b", prune=0.4)
    diff, before, after = compare(a, tmp_path / "b"), dequantize(a), dequantize(tmp_path / "b")
    groups = {row["name"]: row["group"] for row in manifest["tensors"]}
    assert {tensor.name: tensor.group for tensor in diff.tensors} == groups

    def concatenate(arrays: Arrays, tensors: Sequence[TensorDiff]) -> npt.NDArray[np.float64]:
        return np.concatenate([arrays[tensor.name].ravel() for tensor in tensors])

    by_layer = group_by(diff.tensors, lambda t: (t.stack, t.layer) if t.layer is not None else None)
    stacks = ("encoder", "decoder") if family == "t5-gated" else (None,)
    assert list(by_layer) == [(stack, layer) for stack in stacks for layer in (0, 1)]
    for tensors in [diff.tensors, *by_layer.values(), *group_by(diff.tensors, lambda t: t.group).values()]:
        sums = sum((tensor.sums for tensor in tensors), DiffSums())
        check_sums(sums, concatenate(before, tensors), concatenate(after, tensors))


def test_a_module_has_one_name_in_all_layers_and_stacks(tmp_path: Path) -> None:
    a = save_tiny("t5-gated", tmp_path / "a")
    diff = compare(a, a)
    modules = group_by(diff.tensors, lambda t: t.module)
    assert len(modules["layer.SelfAttention.q"]) == 4
    assert len(modules["layer.EncDecAttention.o"]) == 2
    assert {t.group for t in modules["layer.DenseReluDense.wi_1"]} == {"feed-forward"}
    assert index_by_name(diff)["lm_head.weight"].module is None


def test_a_checkpoint_does_not_differ_from_itself(tmp_path: Path) -> None:
    a = save_tiny("llama", tmp_path / "a")
    diff = compare(a, a)
    assert diff.same_weights
    assert diff.config == ()
    assert (diff.total.relative_error, diff.total.cosine, diff.total.snr_db) == (0.0, 1.0, None)


def test_shards_and_torch_files_compare_equal(tmp_path: Path) -> None:
    one = save_tiny("llama", tmp_path / "one")
    many = save_tiny("llama", tmp_path / "many", max_shard_size="30KB")
    pickled = save_tiny("llama", tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert len(list(many.glob("*.safetensors"))) > 2
    for other in (many, pickled):
        diff = compare(one, other)
        assert diff.same_weights
        assert len(diff.tensors) == len(dequantize(one))


def test_a_retyped_tensor_is_named_and_compared(tmp_path: Path) -> None:
    a, b = save_tiny("bert", tmp_path / "a"), save_tiny("bert", tmp_path / "b", torch.bfloat16)
    diff, before, after = compare(a, b), dequantize(a), dequantize(b)
    assert {(c.kind, c.a[:3], c.b[:4]) for c in diff.structure} == {("retyped", "F32", "BF16")}
    assert len(diff.structure) == len(before)
    assert diff.config == ()
    for tensor in diff.tensors:
        check_sums(tensor.sums, before[tensor.name], after[tensor.name])


def test_missing_and_reshaped_tensors_are_named(tmp_path: Path) -> None:
    a, b = (save_tiny("bert", tmp_path / name) for name in "ab")
    bias, table = "bert.encoder.layer.1.output.dense.bias", "bert.embeddings.position_embeddings.weight"
    edit_tensors(a, lambda tensors: tensors.update(extra=torch.ones(3)))
    edit_tensors(b, lambda tensors: (tensors.pop(bias), tensors.update({table: torch.ones(20, 32)})))
    diff = compare(a, b)
    assert {(c.name, c.kind, c.a, c.b) for c in diff.structure} == {
        ("extra", "missing", "F32 [3]", "-"),
        (bias, "missing", "F32 [32]", "-"),
        (table, "reshaped", "F32 [40, 32]", "F32 [20, 32]"),
    }
    assert not {bias, table, "extra"} & set(index_by_name(diff))
    assert {c.kind for c in compare(b, a).structure} == {"added", "reshaped"}


@pytest.mark.parametrize("family", ["bert", "llama-tied", "t5-tied"])
def test_an_untied_final_layer_is_compared_with_its_embedding(family: str, tmp_path: Path) -> None:
    a = save_tiny(family, tmp_path / "a")
    compressknow.convert(a, tmp_path / "b", scope="final", prune=0.5, quantize="int8")
    diff, before, after = compare(a, tmp_path / "b"), dequantize(a), dequantize(tmp_path / "b")
    (final,) = [tensor for tensor in diff.tensors if tensor.group == "final"]
    (untied,) = [change for change in diff.structure if change.kind == "untied" and change.name == final.name]
    embedding = untied.a.removeprefix("tied to ")
    check_sums(final.sums, before[embedding], after[final.name])
    assert final.sums.relative_error > 0.1
    # T5's class ties its layers whatever the config says.
    assert ("tie_word_embeddings" in {change.key for change in diff.config}) == (family != "t5-tied")
    back = compare(tmp_path / "b", a)
    assert ("tied", final.name) in {(change.kind, change.name) for change in back.structure}
    assert {change.kind for change in back.structure} <= {"tied", "retyped"}


def test_the_name_that_stores_a_tied_weight_is_no_difference(tmp_path: Path) -> None:
    """One checkpoint stores the embedding, the other the final layer that is tied to it."""
    a, b = (save_tiny("llama-tied", tmp_path / name) for name in "ab")
    edit_tensors(b, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    diff = compare(a, b)
    assert diff.same_weights
    assert len(diff.tensors) == len(dequantize(a))


def test_settings_are_compared_by_effect_and_noise_is_left_out(tmp_path: Path) -> None:
    a, b = (save_tiny("llama", tmp_path / name) for name in "ab")
    edit_config(
        b,
        *("tie_word_embeddings", "mlp_bias"),
        rms_norm_eps=0.5,
        transformers_version="4.0",
        _name_or_path="elsewhere",
        dtype=None,
        torch_dtype="float32",
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5.0},
    )
    diff = compare(a, b)
    assert [(c.key, c.b) for c in diff.config] == [("rms_norm_eps", "0.5"), ("rope_parameters.rope_theta", "5.0")]


def test_sums_over_nan_give_no_figures(tmp_path: Path) -> None:
    a, b = (save_tiny("bert", tmp_path / name) for name in "ab")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    edit_tensors(b, lambda tensors: tensors[name][0].fill_(float("nan")))
    sums = index_by_name(compare(a, b))[name].sums
    assert not sums.finite
    assert (sums.relative_error, sums.cosine, sums.snr_db, sums.largest_change) == (None, None, None, None)
    assert compare(a, b).total.relative_error is None
    assert index_by_name(compare(b, b))[name].same_bytes


def test_a_change_of_an_all_zero_tensor_has_no_relative_error() -> None:
    assert DiffSums(4, 4, 0, 0.0, 4.0, 4.0, 1.0).relative_error is None
    assert DiffSums(4, 4, 4).relative_error == 0.0
    assert DiffSums(4, 4, 4).cosine is None


def test_the_cosine_of_an_unchanged_tensor_is_exactly_1() -> None:
    assert {DiffSums(9, energy_a=energy, energy_b=energy).cosine for energy in (3.0, 7.0, 10.7, 45.1, 1e300)} == {1.0}


PACKED: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "pack-quantized": lambda tensors, x: tensors.update(
        {f"{x}.weight_packed": torch.ones(32, 4, dtype=torch.int32), f"{x}.weight_scale": torch.ones(32, 1)}
    ),
    "awq": lambda tensors, x: tensors.update(
        {f"{x}.qweight": torch.ones(32, 4, dtype=torch.int32), f"{x}.scales": torch.ones(1, 32)}
    ),
    "bitsandbytes": lambda tensors, x: tensors.update(
        {f"{x}.weight": torch.ones(512, 1, dtype=torch.uint8), f"{x}.weight.absmax": torch.ones(8)}
    ),
    "int8 with a zero point": lambda tensors, x: tensors.update(
        {
            f"{x}.weight": torch.ones(32, 32, dtype=torch.int8),
            f"{x}.weight_scale": torch.ones(32, 1),
            f"{x}.weight_zero_point": torch.ones(32, 1, dtype=torch.int8),
        }
    ),
    "int8 in groups that are not neighbours": lambda tensors, x: tensors.update(
        {
            f"{x}.weight": torch.ones(32, 32, dtype=torch.int8),
            f"{x}.weight_scale": torch.ones(32, 4),
            f"{x}.weight_g_idx": torch.arange(32, dtype=torch.int32) % 4,
        }
    ),
    "fp8 in blocks, as many as rows": lambda tensors, x: tensors.update(
        {f"{x}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn), f"{x}.weight_scale": torch.ones(4, 8)}
    ),
    "int8 with scales of another shape": lambda tensors, x: tensors.update(
        {f"{x}.weight": torch.ones(32, 32, dtype=torch.int8), f"{x}.weight_scale": torch.ones(32, 5)}
    ),
}


@pytest.mark.parametrize("form", PACKED)
def test_unreadable_packed_weights_are_named_and_left_out(form: str, tmp_path: Path) -> None:
    a, b = (save_tiny("llama", tmp_path / name) for name in "ab")
    module = "model.layers.1.self_attn.q_proj"
    edit_config(b, quantization_config={"quant_method": form})
    edit_tensors(b, lambda tensors: (tensors.pop(f"{module}.weight"), PACKED[form](tensors, module)))
    diff = compare(a, b)
    (change,) = diff.structure
    assert (change.kind, change.name, change.a) == ("packed", f"{module}.weight", "F32 [32, 32]")
    assert f"{module}.{change.b.split()[0]}" in load_file(b / "model.safetensors")
    assert f"{module}.weight" not in index_by_name(diff)
    assert len(diff.tensors) == len(dequantize(a)) - 1


def test_figures_do_not_depend_on_threads_and_progress_ends_at_the_total(tmp_path: Path) -> None:
    a = save_tiny("llama", tmp_path / "a")
    compressknow.convert(a, tmp_path / "b", prune=0.5, quantize="int8")
    calls: list[tuple[int, int]] = []
    diff = compare(a, tmp_path / "b", threads=1, advance=lambda done, total: calls.append((done, total)))
    assert diff == compare(a, tmp_path / "b", threads=3)
    assert calls[-1][0] == calls[-1][1] > 0
    assert sorted(calls) == calls


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    a, b = save_tiny("bert", tmp_path / "a"), save_tiny("roberta", tmp_path / "b")
    with pytest.raises(CompressknowError, match="a and b cannot be compared: their architectures differ") as e:
        compare(a, b)
    assert "BertForMaskedLM" in str(e.value)
    assert "RobertaForMaskedLM" in str(e.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    a, b = (save_tiny("bert", tmp_path / name) for name in "ab")
    (b / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="b has no weights"):
        compare(a, b)


def test_dropped_blocks_are_named_and_the_others_matched_by_original_number(tmp_path: Path) -> None:
    source = save_deep("llama", tmp_path / "source")
    compressknow.convert(source, tmp_path / "a", drop_blocks="1")
    compressknow.convert(source, tmp_path / "b", drop_blocks="0,1", quantize="int8")
    opened = {name: open_checkpoint(tmp_path / name) for name in ("source", "a", "b")}
    diff = diff_checkpoints(opened["source"], opened["a"])
    assert all(tensor.same_bytes for tensor in diff.tensors)
    assert {change.kind for change in diff.structure} == {"missing"}
    assert {change.name for change in diff.structure} == {n for n in opened["source"].tensors if ".layers.1." in n}
    # Two conversions of one original are both numbered as it is.
    diff = diff_checkpoints(opened["a"], opened["b"])
    assert {change.name for change in diff.structure if change.kind == "missing"} == {
        name for name in opened["source"].tensors if ".layers.0." in name
    }
    errors = [tensor.sums.relative_error for tensor in diff.tensors]
    assert max(error for error in errors if error is not None) < 0.02
    assert {tensor.layer for tensor in diff.tensors if tensor.layer is not None} == {2, 3}
    # A conversion of a conversion is numbered as the first.
    compressknow.convert(tmp_path / "a", tmp_path / "c", drop_blocks="0")
    diff = diff_checkpoints(opened["a"], open_checkpoint(tmp_path / "c"))
    assert all(tensor.same_bytes for tensor in diff.tensors)
    assert {change.name for change in diff.structure} == {n for n in opened["a"].tensors if ".layers.0." in n}
