"""Outputs of a conversion: a folder of safetensors files that appears whole or not at all, or tensors in memory."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import torch

from compressknow.base.errors import CheckpointError
from compressknow.base.files import walk_visible
from compressknow.base.format import dump_json
from compressknow.base.progress import RepeatingThread
from compressknow.base.reading import compute_sha256
from compressknow.base.system import create_file, write_at
from compressknow.compress.blocks import Pool
from compressknow.compress.manifest import Manifest
from compressknow.compress.output_config import build_config
from compressknow.compress.plan import Plan, PlannedTensor
from compressknow.compress.process import TensorStats, TensorWriter
from compressknow.compress.staging import Staging
from compressknow.model.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TORCH_INDEX,
    Checkpoint,
    build_loading_settings,
    check_inside,
    list_module_folders,
)
from compressknow.model.manifest import CARD_NAME, MANIFEST_NAME
from compressknow.model.tensors import DTYPE_SIZES, PT_FORMAT, get_torch_dtype, view_bytes

FLUSH_SECONDS = 0.1
# Weights in any format, and what only training needs, are not copied.
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data"),
    *(".data", ".tflite", ".mlmodel", ".npz", ".pkl", ".pickle", ".distcp"),
}
# The folders in which transformers' Trainer keeps its steps, and the files of its curves.
_TRAINING = re.compile(r"checkpoint-\d+/.*|(.*/)?(trainer_state\.json|events\.out\.tfevents[^/]*)")
# Rewritten, since they depend on the converted weights.
REPLACED = {"config.json", CARD_NAME, MANIFEST_NAME, SAFETENSORS_INDEX, TORCH_INDEX}

RenderCard = Callable[[Mapping[str, Any], Path], str]


class NewFolder(Staging):
    """Output folder of a conversion, which appears whole, by one rename, or not at all. `render_card` returns the model
    card's text for a manifest and the source folder; without it, no card is written.

    Raises the errors of `list_carried_files` and `Staging`.
    """

    def __init__(
        self, output: str | Path, source: Checkpoint, *, overwrite: bool = False, render_card: RenderCard | None = None
    ) -> None:
        self._source, self._render_card = source, render_card
        self._carried = list(list_carried_files(source.folder))
        super().__init__(Path(output), overwrite=overwrite, source=source.folder)

    def open(self, plan: Plan) -> OutputFiles:
        return OutputFiles(self.folder, lay_out(plan.tensors, plan.checkpoint.shards))

    def write_other_files(self, plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
        """Write config.json and copy unchanged files. Return hashes of the files read, and of the files written."""
        source = self._source.folder
        written = {name: self.write(name, content) for name, content in _serialize_configs(plan).items()}
        copied = {name: self.copy(source / name, name) for name in self._carried if name not in written}
        replaced = {name for name in (*written, plan.checkpoint.index) if name and (source / name).is_file()}
        return {**copied, **{name: compute_sha256(source / name) for name in replaced}}, {**written, **copied}

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and the card, and rename the folder. Raises CheckpointError if a file of the checkpoint
        changed since it was opened."""
        self.write(MANIFEST_NAME, dump_json(manifest).encode())
        if self._render_card:
            card = self._render_card(manifest, self._source.folder)
            self.write(CARD_NAME, card.encode("utf-8", "backslashreplace"))
        self._source.check_unchanged()
        self.commit()


class InMemory:
    """Output of a conversion in memory. Unchanged tensors and their statistics are cached in `shared`, for all plans of
    one checkpoint."""

    # Temporary files go to the system's own folder.
    folder: Path | None = None

    def __init__(self, shared: dict[str, tuple[torch.Tensor, TensorStats]]) -> None:
        self._shared = shared
        self.known: dict[str, TensorStats] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def open(self, plan: Plan) -> Self:
        """Take the tensors that are shared, and allocate the others."""
        # A smaller model's names belong to other tensors; smoothing divides norms, which are in no scope.
        if plan.removal is not None or plan.recipe.smooths:
            self._shared = {}
        self.plan = plan
        for tensor in plan.tensors:
            if not tensor.in_scope and tensor.name in self._shared:
                self.tensors[tensor.name], self.known[tensor.name] = self._shared[tensor.name]
                continue
            for name, part in tensor.written:
                self.tensors[name] = torch.empty(part.shape, dtype=get_torch_dtype(part.dtype))
        return self

    def writer(self, tensor_name: str) -> TensorWriter:
        memory = view_bytes(self.tensors[tensor_name])

        def put(data: memoryview, position: int) -> None:
            memory[position : position + len(data)] = data

        return TensorWriter(put, 0)

    def complete(self, pool: Pool, measured: Mapping[str, TensorStats]) -> None:  # noqa: ARG002
        for tensor in self.plan.tensors:
            if not tensor.in_scope:
                self._shared[tensor.name] = self.tensors[tensor.name], measured[tensor.name]

    def write_other_files(self, plan: Plan) -> tuple[dict[str, str], dict[str, str]]:  # noqa: ARG002
        """Return no files."""
        return {}, {}

    def publish(self, manifest: Manifest) -> None: ...


@dataclass(frozen=True)
class FileLayout:
    """Header (first bytes) and total size of each weight file, each tensor's file and offset, and the index, if any."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, tuple[str, int]]
    index: dict[str, Any] | None


def lay_out(tensors: Sequence[PlannedTensor], shards: Sequence[str]) -> FileLayout:
    """Lay out a safetensors file for each file of the source that still has tensors, and an index if there are several.

    Within a file, tensors are sorted by the width of their dtype, widest first, as the safetensors library does: so all
    are aligned without holes, which the format forbids.
    """
    ends = {shard: PurePath(shard).parts for shard in shards}
    shard_of: dict[Path, str] = {}
    for path in {tensor.source.file for tensor in tensors}:
        # A shard may be in a subfolder: the index gives its path from the checkpoint's folder on.
        matching = [shard for shard in shards if path.parts[-len(ends[shard]) :] == ends[shard]]
        shard_of[path] = max(matching, key=lambda shard: len(ends[shard]))
    used = [shard for shard in shards if shard in shard_of.values()]
    names = {shard: f"model-{i + 1:05d}-of-{len(used):05d}.safetensors" for i, shard in enumerate(used)}
    if len(used) == 1:
        names = {used[0]: SAFETENSORS}
    by_file: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {name: [] for name in names.values()}
    for tensor in tensors:
        file = names[shard_of[tensor.source.file]]
        by_file[file] += [(name, part.dtype, part.shape) for name, part in tensor.written]
    layout = FileLayout({}, {}, {}, None)
    for file, entries in by_file.items():
        entries.sort(key=lambda entry: -DTYPE_SIZES[entry[1]])
        layout.headers[file], layout.sizes[file], offsets = lay_out_file(entries)
        layout.places.update({name: (file, offset) for name, offset in offsets.items()})
    if len(by_file) < 2:
        return layout
    total = sum(layout.sizes.values()) - sum(map(len, layout.headers.values()))
    weight_map = {name: file for name, (file, _) in sorted(layout.places.items())}
    return replace(layout, index={"metadata": {"total_size": total}, "weight_map": weight_map})


def lay_out_file(entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int, dict[str, int]]:
    """Return a file's first bytes, its size, and the offset of each tensor (name, dtype, shape) in the given order."""
    header: dict[str, Any] = {"__metadata__": PT_FORMAT}
    position = 0
    for name, dtype, shape in entries:
        end = position + DTYPE_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name, _, _ in entries}
    return len(text).to_bytes(8, "little") + text, start + position, offsets


class OutputFiles:
    """Weight files of an output, created at their full size first, so that a full disk is noticed at once."""

    # No tensors are known in advance.
    known: ClassVar[Mapping[str, TensorStats]] = {}

    def __init__(self, folder: Path, layout: FileLayout) -> None:
        self._layout = layout
        self._descriptors: dict[str, int] = {}
        self._failure: OSError | None = None
        self._flushing: RepeatingThread | None = None
        try:
            for name, size in layout.sizes.items():
                descriptor = self._descriptors[name] = create_file(folder / name, size)
                write_at(descriptor, memoryview(layout.headers[name]), 0)
        except BaseException:
            self.close()
            raise
        self._flushing = RepeatingThread(self._flush, repeat(FLUSH_SECONDS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def writer(self, tensor_name: str) -> TensorWriter:
        file, offset = self._layout.places[tensor_name]
        return TensorWriter(partial(write_at, self._descriptors[file]), offset)

    def complete(self, pool: Pool, measured: Mapping[str, TensorStats]) -> None:  # noqa: ARG002
        """Wait until everything written would survive a power cut."""
        self._end_flushing()
        if self._failure is not None:
            raise self._failure
        pool.map(os.fsync, self._descriptors.values())

    def _flush(self) -> None:
        """Flush written data to the disk during the computation, instead of all at the end."""
        try:
            # Stop after a failure: Linux reports a failed write to a descriptor once, and a later fsync would succeed.
            for descriptor in () if self._failure else self._descriptors.values():
                os.fsync(descriptor)
        except OSError as error:
            self._failure = error

    def _end_flushing(self) -> None:
        if self._flushing:
            self._flushing.end()
            self._flushing.wait()

    def close(self) -> None:
        self._end_flushing()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def list_files(plan: Plan) -> dict[str, int | None]:
    """Return the sizes of the files that an output will hold, in bytes; None if a size depends on the weights."""
    source = plan.checkpoint.folder
    return {
        **lay_out(plan.tensors, plan.checkpoint.shards).sizes,
        **{name: (source / name).stat().st_size for name in list_carried_files(source)},
        **{name: len(content) for name, content in _serialize_configs(plan).items()},
        **dict.fromkeys((CARD_NAME, MANIFEST_NAME)),
    }


def _serialize_configs(plan: Plan) -> dict[str, bytes]:
    """Return config.json, the index of several weight files, and how sentence-transformers loads quantized ones."""
    config = build_config(plan)
    quantization = config.get("quantization_config")
    loading = build_loading_settings(plan.checkpoint.folder, quantization) if quantization else {}
    layout = lay_out(plan.tensors, plan.checkpoint.shards)
    contents = {"config.json": config, **({SAFETENSORS_INDEX: layout.index} if layout.index else {}), **loading}
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in contents.items()}
    return {name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()}


def list_carried_files(folder: Path) -> Iterator[str]:
    """Yield the files of a checkpoint that are copied: tokenizer, generation config, licence, code, and, including
    their weights, further modules of sentence-transformers and adapters (LoRA).

    Raises CheckpointError if one of them is a broken link, or a link to a folder or a path outside the checkpoint.
    """
    modules = list_module_folders(folder)
    for name in walk_visible(folder):
        path = folder / name
        is_adapter = path.stem == ADAPTER and path.with_name(ADAPTER_CONFIG).is_file()
        belongs = is_adapter or any(name.is_relative_to(module) for module in modules)
        weights = path.suffix in WEIGHT_SUFFIXES and not belongs
        if weights or str(name) in REPLACED or _TRAINING.fullmatch(name.as_posix()):
            continue
        if path.is_symlink() and path.is_dir():
            # What it holds would be left out, since linked folders are not entered.
            raise CheckpointError(f"{path} is a link to a folder.", hint="Replace it with the folder, or remove it.")
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link that leads nowhere.", hint="Fetch the checkpoint again.")
        if path.is_file():
            check_inside(folder, path)
            yield name.as_posix()
