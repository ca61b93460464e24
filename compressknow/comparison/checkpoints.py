"""compare: how two checkpoints of one architecture differ, in settings, in what they store, and weight by weight."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressknow.base.errors import CompressknowError
from compressknow.base.progress import Advance, Listener, Stage, count_progress, report_progress
from compressknow.base.reading import sha256_of
from compressknow.comparison.differences import ConfigChange, Difference, StructureChange, TensorDifference
from compressknow.comparison.gguf import gguf_difference
from compressknow.comparison.weights import Lost, aligned, deviation, dropped_blocks, lost_neurons, numbered_alike
from compressknow.compress.blocks import Reader
from compressknow.compress.pool import Pool
from compressknow.compress.sources import target_count
from compressknow.compress.weights import Side, Values, side_of
from compressknow.engine.identity import Located
from compressknow.model.checkpoint import Checkpoint, open_checkpoint, weight_files
from compressknow.model.manifest import MANIFEST_NAME, read_manifest
from compressknow.model.naming import config_groups
from compressknow.model.tensors import OpenFiles, StoredTensor

NOT_LINEAR = "not-linear"
ABSENT = "-"
# Who wrote the file, with what, and how a caller likes its results. The dtype is told by the tensors themselves.
NOISE = {
    *("transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "torchscript", "id2label", "label2id", "problem_type"),
}
# Its list of layers and its settings of each group would bury everything else.
QUANTIZATION = "quantization_config"


@dataclass(frozen=True)
class Pair:
    """One parameter's values on both sides; what is compared of them is of one shape."""

    name: str
    a: Values
    b: Values


def difference(
    a: Checkpoint,
    b: Checkpoint,
    *,
    trust_remote_code: bool = False,
    threads: int | None = None,
    advance: Advance | None = None,
) -> Difference:
    """Compare what two checkpoints hold, in the memory of a block a thread.

    Parameters
    ----------
    threads : tensors worked on at a time, by default one a core; the figures do not depend on it.
    advance : told the bytes read so far, and in all.

    Raises
    ------
    CheckpointError : one of them has no weights, or its config describes no model that can be built.
    CompressknowError : they are of different architectures.
    """
    side_a, side_b = (side_of(checkpoint, trust_remote_code=trust_remote_code) for checkpoint in (a, b))
    _refuse_other_architecture(side_a, side_b)
    manifests = [_manifest(checkpoint.folder) for checkpoint in (a, b)]
    lost = [lost_neurons(manifest, side) for manifest, side in zip(manifests, (side_a, side_b), strict=True)]
    side_a, side_b = numbered_alike(side_a, side_b, *map(dropped_blocks, manifests))
    pairs = list(_pairs(side_a, side_b, *lost))
    return Difference(
        architecture=side_a.structure.architecture,
        config=config_changes(side_a.config, side_b.config),
        structure=tuple(_structure(side_a, side_b)),
        tensors=tuple(_measure(side_a, side_b, pairs, threads, advance)),
    )


def difference_of(
    a: Located,
    b: Located,
    *,
    trust_remote_code: bool = False,
    threads: int | None = None,
    on_progress: Listener | None = None,
) -> Difference | None:
    """As `difference`, of models that are found, which may be two GGUF files; None where one alone is, whose weights
    have other names and another order."""
    are_gguf = [located.path.suffix == ".gguf" for located in (a, b)]
    if any(are_gguf) and not all(are_gguf):
        return None
    with report_progress(on_progress, Stage("compare", f"{a.name} and {b.name}")) as advance:
        if all(are_gguf):
            return gguf_difference(a.files, b.files, threads=threads, advance=advance)
        opened = [open_checkpoint(located.path) for located in (a, b)]
        return difference(*opened, trust_remote_code=trust_remote_code, threads=threads, advance=advance)


def other_files(a: Located, b: Located) -> Iterator[str]:
    """Small files that decide answers too and are not alike: of the tokenizer, and modelling code."""
    if ".gguf" in (a.path.suffix, b.path.suffix):
        return
    left_out = {"config.json", *weight_files(a.path), *weight_files(b.path)}
    for name in sorted({path.name for located in (a, b) for path in located.files} - left_out):
        hashes = [sha256_of(located.path / name) if (located.path / name).is_file() else None for located in (a, b)]
        if hashes[0] != hashes[1]:
            yield name


def _manifest(folder: Path) -> dict[str, Any]:
    """Nothing of a folder that `convert` did not write."""
    return read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else {}


def _refuse_other_architecture(a: Side, b: Side) -> None:
    if a.structure.architecture != b.structure.architecture:
        raise CompressknowError(
            f"{a.name} and {b.name} cannot be compared: they are of different architectures.",
            why=f"{a.name} is {a.structure.architecture}, {b.name} is {b.structure.architecture}: their weights "
            "cannot be matched.",
            hint="Compare an original with its conversion, or two checkpoints made from the same original.",
        )


def _names(a: Side, b: Side) -> list[str]:
    """All that either side stores, in the order of the module tree; what the tree does not have comes last."""
    place: dict[str, int] = {name: i for i, name in enumerate(a.structure.parameters | b.structure.parameters)}
    names = dict.fromkeys([*a.own, *b.own, *a.packed_weights(), *b.packed_weights()])

    def order(name: str) -> int:
        return place.get(a.loaded_to.get(name, name), len(place))

    return sorted(names, key=order)


def _pairs(a: Side, b: Side, lost_a: Mapping[str, Lost], lost_b: Mapping[str, Lost]) -> Iterator[Pair]:
    seen: set[tuple[str, str]] = set()
    for name in _stored_apart(a, b):
        values_a, values_b = a.values(name), b.values(name)
        if values_a is None or values_b is None:
            continue
        stored = (values_a.tensor.name, values_b.tensor.name)
        alike = aligned(values_a, values_b, lost_a.get(stored[0]), lost_b.get(stored[1]))
        # Two names of a tie, of which the one side stores the first and the other the second.
        if alike and stored not in seen:
            seen.add(stored)
            yield Pair(name, *alike)


def _stored_apart(a: Side, b: Side) -> Iterator[str]:
    """The names under which at least one side stores values that no other name of it has."""
    for name in _names(a, b):
        if any(name in side.own and side.supply[name] is side.own[name] for side in (a, b)):
            yield name


def _structure(a: Side, b: Side) -> Iterator[StructureChange]:
    for name in _names(a, b):
        in_a, in_b = a.supply.get(name), b.supply.get(name)
        if a.packed(name) or b.packed(name):
            told = (side.packed(name) or _told(side.supply.get(name)) for side in (a, b))
            yield StructureChange(name, "packed", *told)
        elif in_a is None or in_b is None:
            yield StructureChange(name, "missing" if in_a else "added", _told(in_a), _told(in_b))
        elif in_a.shape != in_b.shape:
            yield StructureChange(name, "reshaped", _told(in_a), _told(in_b))
        else:
            yield from _tie(a, b, name)
            if in_a.dtype != in_b.dtype:
                yield StructureChange(name, "retyped", _told(in_a), _told(in_b))


def _tie(a: Side, b: Side, name: str) -> Iterator[StructureChange]:
    """A tie of one side that is none on the other: there, both names have values of their own."""
    if (shared := _tied_to(a, b, name)) is not None:
        yield StructureChange(name, "untied", f"tied to {shared}", _told(b.supply[name]))
    elif (shared := _tied_to(b, a, name)) is not None:
        yield StructureChange(name, "tied", _told(a.supply[name]), f"tied to {shared}")


def _tied_to(tied: Side, apart: Side, name: str) -> str | None:
    if name in tied.own and tied.supply[name] is tied.own[name]:
        return None
    others = (other for other, tensor in tied.own.items() if tensor is tied.supply[name] and other != name)
    return next((other for other in others if apart.supply.get(other) not in (None, apart.supply[name])), None)


def _told(tensor: StoredTensor | None) -> str:
    return ABSENT if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _measure(
    a: Side, b: Side, pairs: list[Pair], threads: int | None, advance: Advance | None
) -> Iterable[TensorDifference]:
    total = sum(pair.a.bytes_read + pair.b.bytes_read for pair in pairs)
    with Pool(threads) as pool, OpenFiles() as files:
        reader = Reader(pool, files, count_progress(advance, total))
        return pool.map(lambda pair: _compared(reader, a, b, pair), pairs)


def _compared(reader: Reader, a: Side, b: Side, pair: Pair) -> TensorDifference:
    sums, same = deviation(reader, pair.a, pair.b)
    linear = a.linear(pair.name) or b.linear(pair.name)
    in_block = linear is not None and linear.layer is not None
    return TensorDifference(
        name=pair.name,
        group=NOT_LINEAR if linear is None else linear.group or "other",
        stack=linear.stack if linear and in_block else None,
        layer=linear.layer if linear and in_block else None,
        module=module_in_block(pair.name) if in_block else None,
        shape=pair.a.shape,
        dtype_a=pair.a.tensor.dtype,
        dtype_b=pair.b.tensor.dtype,
        bytes_a=pair.a.nbytes,
        bytes_b=pair.b.nbytes,
        same_bytes=same,
        sums=sums,
    )


def module_in_block(name: str) -> str:
    """What a weight is inside its block: alike for all blocks, all stacks and all experts.

    >>> module_in_block("decoder.block.3.layer.1.EncDecAttention.q.weight")
    'layer.EncDecAttention.q'
    >>> module_in_block("model.layers.0.block_sparse_moe.experts.7.w1.weight")
    'block_sparse_moe.experts.w1'
    """
    inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1].removesuffix(".weight")
    return ".".join(part for part in inside.split(".") if not part.isdigit())


def config_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[ConfigChange, ...]:
    """What differs between two configs, by key; a setting that is null is none.

    >>> config_changes({"vocab_size": 9, "_name_or_path": "x", "rope": {"theta": 1}}, {"vocab_size": 9, "rope": {}})
    (ConfigChange(key='rope.theta', a='1', b=None),)
    """
    before, after = dict(_settings(a)), dict(_settings(b))
    keys = sorted(before.keys() | after.keys())
    return tuple(
        ConfigChange(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    )


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if str(name).startswith("_") or name in NOISE or value is None:
            continue
        if name == QUANTIZATION and isinstance(value, Mapping):
            yield prefix + name, _quantization(value)
        elif isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _quantization(value: Mapping[str, Any]) -> str:
    method, form = value.get("quant_method", "unknown"), value.get("format")
    layers = sum(target_count(map(str, group.get("targets") or ())) for group in config_groups(value))
    return json.dumps(
        ", ".join([str(method), *([str(form)] if form else []), *([f"{layers} targets"] if layers else [])])
    )
