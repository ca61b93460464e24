"""Read a manifest: its form, its hash of itself, and its records of removal and calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from compressknow.base.errors import CheckpointError, UsageError
from compressknow.base.format import count, write_size
from compressknow.base.reading import MANIFEST, find_mismatch
from compressknow.model.checkpoint import SHOWN, is_outside, read_json
from compressknow.model.structure import MOST_BLOCKS, parse_layers

SCHEMA = 1
MANIFEST_NAME, CARD_NAME = "compressknow.json", "README.md"
# The entry with the SHA-256 of all others.
SEAL = "sha256"
COUNTS = ("parameters", "in_scope", "pruned", "zeros_before", "zeros_after", "quantized", "bytes_before", "bytes_after")
_SUMS = {**dict.fromkeys(COUNTS, int), "relative_error?": float}
_PART = {"name": str, "shape": [int], "dtype": str, "sha256": str, "also?": [str]}
_ROW = {
    **{"name": str, "group": str, "shape": [int], "dtype_after": str, "in_scope": bool, "scheme": (str, None)},
    **dict.fromkeys(("numel", "pruned", "zeros", "zeros_before", "bytes_before", "bytes_after"), int),
    **{"norm?": float, "relative_error": float, "sha256": str, "scale?": _PART},
    **{"refilled?": int, "stored?": [_PART], "bits?": int, "name_before?": str, "shape_before?": [int]},
}
_BLOCKS = {"stack": str, "key": str, "before": int, "after": int, "dropped": [int], "similarities?": [float]}
_NEURONS = {"key": str, "before": int, "after": int, "modules": [str], "dropped?": [str]}
_LEFT_OUT = {"name": str, "group": str, "shape": [int], "dtype": str, "numel": int, "bytes_before": int}
REMOVED: dict[str, Any] = {
    "parameters": int,
    "bytes": int,
    "blocks": [_BLOCKS],
    "neurons": [_NEURONS],
    "tensors": [_LEFT_OUT],
}
_TEXT = {"kind": str, "source": str, "sha256": str, "tokens": int, "seed": int, "blocks_apart": bool}
_CALIBRATION = {**_TEXT, "unseen": [str], "smoothed?": {str: [str]}}
FORM = {
    **{"versions": {str: str}, "setup": str, "recipe": {"steps": [dict]}, "totals": _SUMS, "groups": {str: _SUMS}},
    "source": {"name": str, "revision?": (str, None), "files": {str: str}},
    **{"files": {str: str}, "tensors": [_ROW], "runtimes?": [str], f"{SEAL}?": str},
    "calibration?": _CALIBRATION,
    "removed?": REMOVED,
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a converted folder. Raises CheckpointError if there is none, or it has another schema or
    form."""
    check_converted(folder)
    path, hint = folder / MANIFEST_NAME, "Copy or download it again, or convert the model again."
    manifest = read_record(path, SCHEMA, FORM, hint)
    if fault := next(_find_faults(manifest), None):
        raise CheckpointError(f"{path} is damaged: {fault}.", hint=hint)
    return manifest


def read_record(path: Path, schema: int, form: Mapping[str, Any], hint: str) -> dict[str, Any]:
    """Read a JSON file. Raises CheckpointError if it has another schema, or another form, with this `hint`."""
    record = read_json(path, MANIFEST)
    if record.get("schema") != schema:
        raise CheckpointError(
            f"{path} has schema {record.get('schema')!r}, but this version reads schema {schema}.",
            hint="Read it with the version that wrote it (see `versions` in it).",
        )
    if mismatch := find_mismatch(record, form):
        raise CheckpointError(f"{path} is damaged: {mismatch}.", hint=hint)
    return record


def _find_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    removed = manifest.get("removed", {})
    yield from (f"it names {name!r}, outside the folder" for name in manifest["files"] if is_outside(name))
    for i, entry in enumerate(removed.get("blocks", [])):
        if not 0 <= entry["before"] <= MOST_BLOCKS:
            yield f"removed.blocks[{i}].before is not a number of blocks"
    for i, entry in enumerate(removed.get("neurons", [])):
        if "dropped" in entry and not _is_consistent(entry):
            yield f"removed.neurons[{i}].dropped does not list {entry['before'] - entry['after']} neurons per module"


def list_expected_tensors(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the tensors that the weight files must hold, by name: ``dtype``, ``shape``, ``sha256``, and ``zeros`` for
    weights."""
    expected: dict[str, Mapping[str, Any]] = {}
    for row in manifest["tensors"]:
        # Everything that its scheme stores for it; or the tensor, and its scale if it has one.
        parts = row.get("stored", [row["scale"]] if "scale" in row else [])
        if "stored" not in row:
            expected[row["name"]] = {**row, "dtype": row["dtype_after"]}
        for part in parts:
            values = {key: part[key] for key in ("shape", "dtype", "sha256")}
            expected |= dict.fromkeys((part["name"], *part.get("also", ())), values)
    return expected


def summarize_calibration(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a manifest's record of calibration, summarized; None if nothing was calibrated.

    Besides ``kind``, ``source``, ``sha256``, ``tokens``, ``seed`` and ``blocks_apart``, it has ``smoothed``, the number
    of divided norms; ``unseen``, the number of weights compressed without knowledge of their inputs, ``examples`` of
    their names, and ``unseen_share``, their share of the parameters in scope.
    """
    if (calibration := manifest.get("calibration")) is None:
        return None
    unseen, rows = sorted(calibration["unseen"]), {row["name"]: row for row in manifest["tensors"]}
    numel = sum(_count_parameters(name, rows) for name in unseen)
    return {key: calibration[key] for key in _TEXT} | {
        "smoothed": len(calibration.get("smoothed", {})),
        "unseen": len(unseen),
        "unseen_share": numel / max(manifest["totals"]["in_scope"], 1),
        "examples": unseen[:SHOWN],
    }


def _count_parameters(name: str, rows: Mapping[str, Mapping[str, Any]]) -> int:
    """Count the parameters of a weight, or of one matrix ``NAME[3]`` of a stack."""
    tensor, bracket, _ = name.partition("[")
    row = rows.get(tensor, {"numel": 0, "shape": []})
    return int(row["numel"]) // max(row["shape"][0], 1) if bracket and row["shape"] else int(row["numel"])


def list_dropped_neurons(entry: Mapping[str, Any]) -> dict[str, tuple[range, ...]]:
    """Return the neurons dropped from each network, by the module that read them, from an entry of `removed`; empty if
    an older manifest does not list them.

    >>> list_dropped_neurons({"modules": ["layers.0.down_proj"], "dropped": ["0, 2-4"]})
    {'layers.0.down_proj': (range(0, 1), range(2, 5))}
    """
    pairs = zip(entry["modules"], entry.get("dropped", []), strict=False)
    return {module: tuple(parse_layers(numbers).values()) for module, numbers in pairs}


def _is_consistent(entry: Mapping[str, Any]) -> bool:
    """Return whether the entry lists as many dropped neurons for each module as it counts, in ascending order."""
    try:
        dropped = list(list_dropped_neurons(entry).values())
    except UsageError:
        return False
    for spans in dropped:
        stops = [0, *(each.stop for each in spans)]
        ascending = all(each.start >= stop for each, stop in zip(spans, stops, strict=False))
        if not ascending or stops[-1] > entry["before"] or sum(map(len, spans)) != entry["before"] - entry["after"]:
            return False
    return len(entry["dropped"]) == len(entry["modules"]) == len(dropped)


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add the hash of its content to a manifest, so that recipe, source and versions cannot change unnoticed."""
    return {**manifest, SEAL: hash_manifest(manifest)}


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the manifest's other entries, as JSON with sorted keys, without spaces, in ASCII."""
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_converted(folder: Path) -> None:
    """Raise CheckpointError if a folder has no manifest."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, not a folder.", hint=f"Give its folder, {folder.parent}.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.", hint="Give one that `compressknow convert` wrote.")
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}.", hint="verify takes a folder that `compressknow convert` wrote."
        )


def describe_removed(removed: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield sentences on the entry ``removed`` of a manifest, if it has one.

    >>> blocks = {"stack": "model.layers", "key": "num_hidden_layers", "before": 8, "after": 5, "dropped": [2, 3, 6]}
    >>> *_, last = describe_removed({"blocks": [blocks], "neurons": [], "parameters": 1200, "bytes": 2400})
    >>> next(describe_removed({"blocks": [blocks], "neurons": [], "parameters": 1200, "bytes": 2400}))
    '3 of the 8 blocks of model.layers were dropped: 2-3, 6.'
    >>> one = {**blocks, "after": 7, "dropped": [6], "similarities": [0.5] * 8}
    >>> next(describe_removed({"blocks": [one], "neurons": [], "parameters": 400, "bytes": 800}))
    '1 of the 8 blocks of model.layers was dropped: 6, the one that changes its input least.'
    >>> undecided = {**blocks, "dropped": []}
    >>> next(describe_removed({"blocks": [undecided], "neurons": [], "parameters": 1200, "bytes": 2400}))
    '3 of the 8 blocks of model.layers were dropped: those that change their input least.'
    >>> one = {"key": "intermediate_size", "before": 4096, "after": 3072, "modules": ["layers.0.down_proj"]}
    >>> next(describe_removed({"blocks": [], "neurons": [one], "parameters": 1200, "bytes": 2400}))
    'The feed-forward block has 3,072 neurons instead of 4,096 (intermediate_size).'
    >>> last
    'The model has 1,200 parameters fewer (2.4 kB).'
    """
    if not removed:
        return
    for one in removed["blocks"]:
        number = one["before"] - one["after"]
        were, change = ("was", "the one that changes its") if number == 1 else ("were", "those that change their")
        details = [format_ranges(one["dropped"])] if one["dropped"] else []
        if one.get("similarities") or not details:
            details.append(f"{change} input least")
        yield f"{number} of the {one['before']} blocks of {one['stack']} {were} dropped: {', '.join(details)}."
    for one in removed["neurons"]:
        networks = len(one["modules"])
        where = "The feed-forward block has" if networks == 1 else f"Each of the {networks} feed-forward blocks has"
        yield f"{where} {count(one['after'])} neurons instead of {count(one['before'])} ({one['key']})."
    yield f"The model has {count(removed['parameters'])} parameters fewer ({write_size(removed['bytes'])})."


def format_ranges(numbers: Iterable[int]) -> str:
    """Format ascending numbers in the form of `--drop-blocks` and `--layers`.

    >>> format_ranges([0, 2, 3, 4, 7])
    '0, 2-4, 7'
    """
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def describe_calibration(calibration: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield sentences on the result of `summarize_calibration`, if it is not None.

    >>> text = {"kind": "file", "source": "wiki.txt", "tokens": 8192, "seed": 0, "blocks_apart": True, "smoothed": 0}
    >>> list(describe_calibration({**text, "unseen": 4, "examples": ["a", "b", "c"]}))[1]
    '4 weights were compressed without knowledge of their inputs, as too few tokens reach them: a, b, c and 1 more.'
    """
    if not calibration:
        return
    yield f"Calibrated on {describe_text(calibration)}, with seed {calibration['seed']}."
    if smoothed := calibration["smoothed"]:
        norms = "one norm" if smoothed == 1 else f"{count(smoothed)} norms"
        yield f"Outliers of activations were moved from {norms} into the weights that follow (SmoothQuant)."
    if not calibration["blocks_apart"]:
        yield "Its blocks cannot be run one by one, so each layer was fitted to its inputs in the original model."
    if unseen := calibration["unseen"]:
        weights, them = ("One weight was", "it") if unseen == 1 else (f"{count(unseen)} weights were", "them")
        more = unseen - len(calibration["examples"])
        names = ", ".join(calibration["examples"]) + (f" and {count(more)} more" if more > 0 else "")
        yield f"{weights} compressed without knowledge of their inputs, as too few tokens reach {them}: {names}."


def describe_text(calibration: Mapping[str, Any]) -> str:
    """Describe a calibration text: how many tokens, and from which source."""
    source = "the model's own text" if calibration["kind"] == "self" else calibration["source"]
    return f"{count(calibration['tokens'])} tokens of {source}"
