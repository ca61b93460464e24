"""Verification of a converted checkpoint against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressknow.base.errors import CheckpointError, VerificationError
from compressknow.base.files import walk_visible
from compressknow.base.format import count, write_size
from compressknow.base.notebook import Summary, SummaryRepr
from compressknow.base.progress import Advance, count_progress, ignore_advance
from compressknow.base.reading import COPY_BYTES, INDEX, compute_sha256
from compressknow.compress.blocks import Pool, Reader, make_raw_keys
from compressknow.compress.manifest import count_weights
from compressknow.model.checkpoint import SAFETENSORS, SAFETENSORS_INDEX, is_outside, read_json
from compressknow.model.manifest import (
    CARD_NAME,
    MANIFEST_NAME,
    SEAL,
    hash_manifest,
    list_expected_tensors,
    read_manifest,
)
from compressknow.model.tensors import PT_FORMAT, OpenFiles, StoredTensor, read_header, read_metadata

SHOWN = 20
ADDED, CHANGED = "not in the manifest", "its bytes differ (sha256)"
UNSEALED = "The manifest has no hash of itself: its recipe, source and versions could not be checked."


@dataclass(frozen=True)
class Difference:
    """Difference from the manifest, in a file or in one of its tensors."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor + ': ' if self.tensor else ''}{self.what}"


@dataclass(frozen=True, repr=False)
class Verification(SummaryRepr):
    """Result of a verification: how much was compared, every difference, and what could not be checked (`notes`)."""

    tensors: int
    files: int
    bytes: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def _summary(self) -> Summary:
        compared = f"{count(self.tensors)} tensors and {count(self.files)} files ({write_size(self.bytes)})"
        result = f"differ in {_count_places(self.differences)}" if self.differences else "are as in the manifest"
        rows = tuple((d.file, d.tensor or "-", d.what) for d in self.differences)
        return Summary("Verification", f"{compared} {result}.", ("File", "Tensor", "Difference"), rows)


def raise_if_different(folder: str | Path, result: Verification) -> None:
    """Raise VerificationError, which lists the differences, if there are any."""
    if result.differences:
        lines = [str(difference) for difference in result.differences[:SHOWN]]
        more = len(result.differences) - len(lines)
        hint = "Copy or download it again, or convert the model again: the manifest holds the recipe (--recipe)."
        if any(each.file == MANIFEST_NAME for each in result.differences):
            hint = f"Copy or download it again: the recipe in this {MANIFEST_NAME} cannot be trusted."
        elif all((each.tensor, each.what) == (None, ADDED) for each in result.differences):
            hint = "Move the files that convert did not write to another folder."
        what = f"{folder} differs from its manifest in {_count_places(result.differences)}."
        raise VerificationError(what, "\n".join(lines + ([f"and {more} more: see --json"] if more else [])), hint)


def _count_places(differences: Sequence[Difference]) -> str:
    return "1 place" if len(differences) == 1 else f"{count(len(differences))} places"


def compare_to_manifest(
    folder: str | Path, *, threads: int | None = None, advance: Advance = ignore_advance
) -> Verification:
    """Rehash and recount everything that convert wrote to a folder, except hidden files and the model card, which users
    may edit. A file that is not in the manifest counts as a difference. Raises the errors of `read_manifest`."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    weight_map = _read_index(folder)
    stored, differences = _read_stored(folder, weight_map)
    rows = list_expected_tensors(manifest)
    total = sum(tensor.nbytes for tensor in stored.values())
    with Pool(threads) as pool, OpenFiles() as files:
        reader = Reader(pool, files, count_progress(advance, total))

        def compare(name: str) -> list[Difference]:
            return _compare_tensor(reader, stored.get(name), name, weight_map.get(name, SAFETENSORS), rows.get(name))

        checks = pool.map(compare, rows | stored)
        copied = pool.map(lambda name: _compare_file(pool, folder, name, manifest["files"][name]), manifest["files"])
    # Tensors come last, since one missing file makes all its tensors missing.
    differences += [difference for check in copied for difference in check]
    differences += _compare_counts(manifest)
    known = {*manifest["files"], *(set(weight_map.values()) or {SAFETENSORS}), MANIFEST_NAME, CARD_NAME}
    names = [name.as_posix() for name in walk_visible(folder) if not (folder / name).is_dir()]
    differences += [Difference(name, None, ADDED) for name in names if name not in known]
    if SEAL in manifest and manifest[SEAL] != hash_manifest(manifest):
        what = "it was edited: its sha256 does not match its contents"
        differences.append(Difference(MANIFEST_NAME, None, what))
    differences += [difference for check in checks for difference in check]
    notes = () if SEAL in manifest else (UNSEALED,)
    return Verification(len(rows), len(manifest["files"]), total, tuple(differences), notes)


def _read_index(folder: Path) -> dict[str, str]:
    """Return the weight file of each tensor from the folder's index; empty if one file holds them all."""
    if (folder / SAFETENSORS).is_file() or not (folder / SAFETENSORS_INDEX).is_file():
        return {}
    weight_map = read_json(folder / SAFETENSORS_INDEX, INDEX).get("weight_map")
    entries = weight_map.items() if isinstance(weight_map, dict) else ()
    return {name: file for name, file in entries if isinstance(file, str) and not is_outside(file)}


def _read_stored(folder: Path, weight_map: Mapping[str, str]) -> tuple[dict[str, StoredTensor], list[Difference]]:
    """Return the tensors in the weight files, and the defects of these files."""
    stored: dict[str, StoredTensor] = {}
    differences = []
    for file in sorted(set(weight_map.values()) or {SAFETENSORS}):
        if not (folder / file).is_file():
            differences.append(Difference(file, None, "missing"))
            continue
        try:
            tensors, metadata = read_header(folder / file), read_metadata(folder / file)
        except CheckpointError as error:
            differences.append(Difference(file, None, error.what))
            continue
        if metadata != PT_FORMAT:
            differences.append(Difference(file, None, f"its metadata is {metadata}, expected {PT_FORMAT}"))
        differences += [Difference(file, name, "stored twice") for name in tensors if name in stored]
        stored |= tensors
    return stored, differences


def _compare_tensor(
    reader: Reader, tensor: StoredTensor | None, name: str, file: str, expected: Mapping[str, Any] | None
) -> list[Difference]:
    if tensor is None:
        return [Difference(file, name, "missing")]
    if expected is None:
        return [Difference(tensor.file.name, name, ADDED)]
    if (tensor.dtype, list(tensor.shape)) != (expected["dtype"], expected["shape"]):
        what = f"{tensor.dtype} {list(tensor.shape)}, expected {expected['dtype']} {expected['shape']}"
        return [Difference(tensor.file.name, name, what)]
    digest, zeros = hashlib.sha256(), 0
    for piece in reader.files.chunks(tensor, COPY_BYTES):
        reader.pool.check()
        digest.update(piece)
        keys = make_raw_keys(piece, tensor.dtype)
        zeros += keys.size - int(np.count_nonzero(keys))
        reader.progress(len(piece))
    differences = []
    if zeros != expected.get("zeros", zeros):
        differences.append(f"{zeros:,} zeros, expected {expected['zeros']:,}")
    if digest.hexdigest() != expected["sha256"]:
        differences.append(CHANGED)
    return [Difference(tensor.file.name, name, what) for what in differences]


def _compare_file(pool: Pool, folder: Path, name: str, sha256: str) -> list[Difference]:
    if not (folder / name).is_file():
        return [Difference(name, None, "missing")]
    return [] if compute_sha256(folder / name, lambda _: pool.check()) == sha256 else [Difference(name, None, CHANGED)]


def _compare_counts(manifest: dict[str, Any]) -> list[Difference]:
    rows, left_out = manifest["tensors"], manifest.get("removed", {}).get("tensors", [])
    sums = {"totals": (manifest["totals"], count_weights(rows, left_out))}
    for group, counts in manifest["groups"].items():
        in_group = ([row for row in all_rows if row["group"] == group] for all_rows in (rows, left_out))
        sums[f"groups.{group}"] = (counts, count_weights(*in_group))
    return [
        Difference(MANIFEST_NAME, None, f"{where}.{key} is {counts.get(key)}, its tensors add up to {count}")
        for where, (counts, sums_of_rows) in sums.items()
        for key, count in sums_of_rows.items()
        if counts.get(key) != count
    ]
