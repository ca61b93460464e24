"""Compare two checkpoints of one architecture: settings, structure, and weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressknow.base.errors import CompressknowError
from compressknow.base.progress import Advance, Listener, Stage, count_progress, ignore_advance, report_progress
from compressknow.base.reading import compute_sha256
from compressknow.comparison.diff import CheckpointDiff, ConfigChange, DiffSums, StructureChange, TensorDiff
from compressknow.comparison.weights import (
    LostNeurons,
    align,
    diff_values,
    read_lost_neurons,
    renumber_blocks,
    sum_values,
)
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.output_config import count_targets
from compressknow.compress.weights import StoredWeights, Values, read_stored_weights
from compressknow.engine.identity import LocatedModel
from compressknow.model.checkpoint import Checkpoint, find_weight_files, list_config_groups, open_checkpoint
from compressknow.model.gguf_file import EMBEDDING, Tensor, find_groups, list_tensors, open_gguf, read_value
from compressknow.model.manifest import MANIFEST_NAME, read_manifest
from compressknow.model.structure import NOT_LINEAR
from compressknow.model.tensors import OpenFiles, StoredTensor

# Settings about the file's origin or the form of results. The dtype is that of the tensors.
_NOISE = {
    *("transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "torchscript", "id2label", "label2id", "problem_type"),
}
# The same for GGUF files, by prefix.
_GGUF_NOISE = (
    *("GGUF.", "general.name", "general.file_type", "general.quantization_version"),
    *("compressknow.", "quantize.", "split."),
)
# Summarized, since its layers and groups would hide everything else.
_QUANTIZATION = "quantization_config"
# Values of a GGUF tensor to unpack at a time.
_VALUES = 1 << 22
# Longer values of a GGUF file are shown as a hash.
_LONGEST = 80


def diff_models(
    a: LocatedModel, b: LocatedModel, *, trust_remote_code: bool, threads: int | None, on_progress: Listener | None
) -> CheckpointDiff | None:
    """Compare two checkpoints or two GGUF files; return None for one of each, whose weights do not correspond."""
    are_gguf = [located.path.suffix == ".gguf" for located in (a, b)]
    if any(are_gguf) and not all(are_gguf):
        return None
    with report_progress(on_progress, Stage("compare", f"{a.name} and {b.name}")) as advance:
        if all(are_gguf):
            return diff_gguf(a.files, b.files, threads=threads, advance=advance)
        opened = [open_checkpoint(located.path) for located in (a, b)]
        return diff_checkpoints(*opened, trust_remote_code=trust_remote_code, threads=threads, advance=advance)


def find_other_files(a: LocatedModel, b: LocatedModel) -> Iterator[tuple[str, tuple[bool, bool]]]:
    """Yield small files that differ and affect answers too, of the tokenizer and modelling code, and who has each."""
    if ".gguf" in (a.path.suffix, b.path.suffix):
        return
    excluded = {"config.json", *find_weight_files(a.path), *find_weight_files(b.path)}
    for name in sorted({path.name for located in (a, b) for path in located.files} - excluded):
        hashes = [
            compute_sha256(located.path / name) if (located.path / name).is_file() else None for located in (a, b)
        ]
        if hashes[0] != hashes[1]:
            yield name, (hashes[0] is not None, hashes[1] is not None)


def diff_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    *,
    trust_remote_code: bool = False,
    threads: int | None = None,
    advance: Advance = ignore_advance,
) -> CheckpointDiff:
    """Compare two checkpoints, with one block per thread in memory; figures do not depend on the number of threads.
    Raises CheckpointError if one has no weights, or no model can be built from its config; CompressknowError if their
    architectures differ."""
    side_a, side_b = (read_stored_weights(checkpoint, trust_remote_code=trust_remote_code) for checkpoint in (a, b))
    architectures = side_a.structure.architecture, side_b.structure.architecture
    hint = "Compare an original with its conversion, or two checkpoints made from the same original."
    _check_architectures((side_a.name, side_b.name), architectures, hint)
    # Without a manifest of `convert`, nothing was removed.
    manifest_a, manifest_b = (read_manifest(c.folder) if (c.folder / MANIFEST_NAME).is_file() else {} for c in (a, b))
    lost = read_lost_neurons(manifest_a, side_a), read_lost_neurons(manifest_b, side_b)
    old_a, old_b = (side_a, manifest_a), (side_b, manifest_b)
    side_a, side_b = renumber_blocks(*old_a, *old_b), renumber_blocks(*old_b, *old_a)
    pairs = list(_pair_values(side_a, side_b, *lost))
    total = sum(values.bytes_read for _, *both in pairs for values in both)
    with Pool(threads) as pool, OpenFiles() as files:
        reader = Reader(pool, files, count_progress(advance, total))
        tensors = tuple(pool.map(lambda pair: _diff_tensor(reader, side_a, side_b, *pair), pairs))
    return CheckpointDiff(
        architecture=side_a.structure.architecture,
        config=_diff_settings(*(dict(_list_settings(side.config)) for side in (side_a, side_b))),
        structure=tuple(_diff_structure(side_a, side_b)),
        tensors=tensors,
    )


def _check_architectures(names: tuple[str, str], architectures: tuple[str, str], hint: str) -> None:
    if architectures[0] != architectures[1]:
        raise CompressknowError(
            f"{names[0]} and {names[1]} cannot be compared: their architectures differ.",
            why=f"{names[0]} is {architectures[0]}, {names[1]} is {architectures[1]}: their weights cannot be matched.",
            hint=hint,
        )


def _list_names(a: StoredWeights, b: StoredWeights) -> list[str]:
    """Return the names of all weights of both, in the order of the module tree, followed by those not in the tree."""
    index: dict[str, int] = {name: i for i, name in enumerate(a.structure.parameters | b.structure.parameters)}
    names = dict.fromkeys([*a.own, *b.own, *a.packed_weights(), *b.packed_weights()])

    def get_index(name: str) -> int:
        return index.get(a.loaded_to.get(name, name), len(index))

    return sorted(names, key=get_index)


def _pair_values(
    a: StoredWeights, b: StoredWeights, lost_a: Mapping[str, LostNeurons], lost_b: Mapping[str, LostNeurons]
) -> Iterator[tuple[str, Values, Values]]:
    """Yield each parameter's name and its values in both checkpoints, with equal shapes."""
    seen: set[tuple[str, str]] = set()
    for name in _list_names(a, b):
        # At least one of them must store values under this name, not share those of another.
        if not any(name in side.own and side.supply[name] is side.own[name] for side in (a, b)):
            continue
        values_a, values_b = a.values(name), b.values(name)
        if values_a is None or values_b is None:
            continue
        stored = (values_a.tensor.name, values_b.tensor.name)
        aligned = align(values_a, values_b, lost_a.get(stored[0]), lost_b.get(stored[1]))
        # Two names of a tie: one checkpoint stores the first, the other the second.
        if aligned and stored not in seen:
            seen.add(stored)
            yield name, *aligned


def _diff_tensor(
    reader: Reader, a: StoredWeights, b: StoredWeights, name: str, values_a: Values, values_b: Values
) -> TensorDiff:
    sums, same = diff_values(reader, values_a, values_b)
    linear = a.linear(name) or b.linear(name)
    in_block = linear is not None and linear.layer is not None
    return TensorDiff(
        name=name,
        group=NOT_LINEAR if linear is None else linear.group or "other",
        stack=linear.stack if linear and in_block else None,
        layer=linear.layer if linear and in_block else None,
        module=name_in_block(name) if in_block else None,
        shape=values_a.shape,
        dtype_a=values_a.tensor.dtype,
        dtype_b=values_b.tensor.dtype,
        bytes_a=values_a.nbytes,
        bytes_b=values_b.nbytes,
        same_bytes=same,
        sums=sums,
    )


def name_in_block(name: str) -> str:
    """Return the name of a weight inside its block, the same for all blocks, stacks and experts.

    >>> name_in_block("decoder.block.3.layer.1.EncDecAttention.q.weight")
    'layer.EncDecAttention.q'
    >>> name_in_block("model.layers.0.block_sparse_moe.experts.7.w1.weight")
    'block_sparse_moe.experts.w1'
    """
    inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1].removesuffix(".weight")
    return ".".join(part for part in inside.split(".") if not part.isdigit())


def _diff_structure(a: StoredWeights, b: StoredWeights) -> Iterator[StructureChange]:
    for name in _list_names(a, b):
        in_a, in_b = a.supply.get(name), b.supply.get(name)
        if a.packed(name) or b.packed(name):
            forms = (side.packed(name) or _describe(side.supply.get(name)) for side in (a, b))
            yield StructureChange(name, "packed", *forms)
        elif in_a is None or in_b is None:
            yield StructureChange(name, "missing" if in_a else "added", _describe(in_a), _describe(in_b))
        elif in_a.shape != in_b.shape:
            yield StructureChange(name, "reshaped", _describe(in_a), _describe(in_b))
        else:
            # The tensor is tied in one checkpoint, and has its own values in the other.
            if (shared := _find_tie(a, b, name)) is not None:
                yield StructureChange(name, "untied", f"tied to {shared}", _describe(in_b))
            elif (shared := _find_tie(b, a, name)) is not None:
                yield StructureChange(name, "tied", _describe(in_a), f"tied to {shared}")
            if in_a.dtype != in_b.dtype:
                yield StructureChange(name, "retyped", _describe(in_a), _describe(in_b))


def _find_tie(tied: StoredWeights, untied: StoredWeights, name: str) -> str | None:
    if name in tied.own and tied.supply[name] is tied.own[name]:
        return None
    others = (other for other, tensor in tied.own.items() if tensor is tied.supply[name] and other != name)
    return next((other for other in others if untied.supply.get(other) not in (None, untied.supply[name])), None)


def _describe(tensor: StoredTensor | None) -> str:
    return "-" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _diff_settings(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[ConfigChange, ...]:
    keys = sorted(a.keys() | b.keys())
    return tuple(ConfigChange(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key))


def _list_settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings of a config by their dotted names, as JSON, without null.

    >>> list(_list_settings({"vocab_size": 9, "_name_or_path": "x", "rope": {"theta": 1}, "top_k": None}))
    [('vocab_size', '9'), ('rope.theta', '1')]
    """
    for name, value in config.items():
        if str(name).startswith("_") or name in _NOISE or value is None:
            continue
        if name == _QUANTIZATION and isinstance(value, Mapping):
            layers = sum(count_targets(map(str, group.get("targets") or ())) for group in list_config_groups(value))
            parts = [value.get("quant_method", "unknown"), value.get("format"), f"{layers} targets" if layers else ""]
            yield prefix + name, json.dumps(", ".join(str(part) for part in parts if part))
        elif isinstance(value, Mapping):
            yield from _list_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def diff_gguf(
    a: Sequence[Path], b: Sequence[Path], *, threads: int | None = None, advance: Advance = ignore_advance
) -> CheckpointDiff:
    """Compare two GGUF files, each in one part or several, as read by llama.cpp's gguf package. Raises CheckpointError
    if one is damaged, CompressknowError if their architectures differ."""
    readers_a, readers_b = ([open_gguf(part) for part in parts] for parts in (a, b))
    architecture, other = (str(read_value(readers[0], "general.architecture")) for readers in (readers_a, readers_b))
    _check_architectures((a[0].name, b[0].name), (architecture, other), "Compare files made from the same original.")
    tensors_a, tensors_b = list_tensors(*readers_a), list_tensors(*readers_b)
    stored = [{each.name: each for reader in readers for each in reader.tensors} for readers in (readers_a, readers_b)]
    names = [name for name, t in tensors_a.items() if name in tensors_b and tensors_b[name].shape == t.shape]
    groups = find_groups(tensors_a)
    add = count_progress(advance, sum(tensors[name].nbytes for tensors in (tensors_a, tensors_b) for name in names))

    def compare(name: str) -> TensorDiff | None:
        tensor_a, tensor_b = tensors_a[name], tensors_b[name]
        try:
            sums, same = _diff_gguf_values(*(each[name] for each in stored))
        except NotImplementedError:
            # A type that the gguf package cannot unpack.
            return None
        finally:
            add(tensor_a.nbytes + tensor_b.nbytes)
        return _diff_gguf_tensor(groups[name], tensor_a, tensor_b, sums, same)

    with Pool(threads) as pool:
        diffs = dict(zip(names, pool.map(compare, names), strict=True))
    packed = {name for name, diff in diffs.items() if diff is None}
    return CheckpointDiff(
        architecture=architecture,
        config=_diff_settings(*(dict(_list_gguf_settings(readers[0])) for readers in (readers_a, readers_b))),
        structure=tuple(_diff_gguf_structure(tensors_a, tensors_b, packed)),
        tensors=tuple(diff for diff in diffs.values() if diff is not None),
    )


_STACKS = {"enc": "encoder", "dec": "decoder"}


def _diff_gguf_tensor(group: str, a: Tensor, b: Tensor, sums: DiffSums, same: bool) -> TensorDiff:
    # As in a checkpoint, embeddings and vectors are not Linear weights.
    is_linear = group not in (EMBEDDING, NOT_LINEAR)
    in_block = is_linear and a.layer is not None
    return TensorDiff(
        name=a.name,
        group=group if is_linear else NOT_LINEAR,
        stack=_STACKS.get(a.name.partition(".")[0]) if in_block else None,
        layer=a.layer if in_block else None,
        module=a.name.partition("blk.")[2].partition(".")[2].removesuffix(".weight") if in_block else None,
        shape=a.shape[::-1],
        dtype_a=a.type,
        dtype_b=b.type,
        bytes_a=a.nbytes,
        bytes_b=b.nbytes,
        same_bytes=same,
        sums=sums,
    )


def _diff_gguf_values(a: Any, b: Any) -> tuple[DiffSums, bool]:
    """Return the sums of two tensors of one shape, unpacked piece by piece, and whether they are identical."""
    rows_a, rows_b = (each.data.reshape(-1, each.data.shape[-1]) for each in (a, b))
    same = a.tensor_type == b.tensor_type and np.array_equal(rows_a.view(np.uint8), rows_b.view(np.uint8))
    sums, step = DiffSums(), max(_VALUES // int(a.shape[0]), 1)
    for start in range(0, len(rows_a), step):
        x = _unpack(rows_a[start : start + step], a.tensor_type)
        sums += sum_values(x, x if same else _unpack(rows_b[start : start + step], b.tensor_type))
    return sums, same


def _unpack(rows: Any, kind: Any) -> torch.Tensor:
    """Return rows as float64."""
    import gguf

    return torch.from_numpy(np.ascontiguousarray(gguf.dequantize(rows, kind)).astype(np.float64))


def _diff_gguf_structure(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], packed: set[str]
) -> Iterator[StructureChange]:
    for name in dict.fromkeys([*a, *b]):
        form_a, form_b = _describe_gguf(a.get(name)), _describe_gguf(b.get(name))
        if name not in b or name not in a:
            yield StructureChange(name, "missing" if name in a else "added", form_a, form_b)
        elif a[name].shape != b[name].shape:
            yield StructureChange(name, "reshaped", form_a, form_b)
        elif name in packed:
            yield StructureChange(name, "packed", form_a, form_b)
        elif a[name].type != b[name].type:
            yield StructureChange(name, "retyped", form_a, form_b)


def _describe_gguf(tensor: Tensor | None) -> str:
    return "-" if tensor is None else f"{tensor.type} {list(tensor.shape[::-1])}"


def _list_gguf_settings(reader: Any) -> Iterator[tuple[str, str]]:
    for key, field in reader.fields.items():
        if not key.startswith(_GGUF_NOISE):
            text = json.dumps(field.contents(), ensure_ascii=False, default=str)
            short = f"{len(text):,} characters, {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"
            yield key, text if len(text) <= _LONGEST else short
