"""Manifest of a conversion, compressknow.json: its source, its recipe, and its effect on each tensor."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compressknow._version import __version__
from compressknow.base.format import NONE, clean, count, write_percent, write_size
from compressknow.base.notebook import Summary, SummaryRepr
from compressknow.compress.recipe import Recipe
from compressknow.compress.schemes import SCALE, list_runtimes
from compressknow.model.manifest import COUNTS, SCHEMA, format_ranges, seal_manifest
from compressknow.model.structure import GROUPS, NOT_LINEAR

if TYPE_CHECKING:
    from compressknow.compress.calibrate.compression import CalibrationResult
    from compressknow.compress.calibrate.text import CalibrationText
    from compressknow.compress.plan import Plan, PlannedTensor
    from compressknow.compress.process import TensorStats
    from compressknow.compress.removal.smaller import Removal

LIBRARIES = ("torch", "transformers", "safetensors", "compressed-tensors", "numpy")


class Manifest(SummaryRepr, dict[str, Any]):
    """Content of ``compressknow.json``, or of a dry run: a dict, with properties for its entries. A dry run has no
    zeros, errors or hashes, and `pruned` only as far as headers tell."""

    @property
    def setup(self) -> str:
        """Name the recipe as the paper does, such as ``Att_GPQ 20%``."""
        return str(self["setup"])

    @property
    def recipe(self) -> Recipe:
        """Return the recipe, with which `convert` gives the same bytes again."""
        return Recipe.from_dict(self["recipe"])

    @property
    def source(self) -> dict[str, Any]:
        """Describe the checkpoint that was converted: name, revision, architecture, hashes of its files."""
        return dict(self["source"])

    @property
    def totals(self) -> dict[str, Any]:
        """Return counts of weights (``parameters``, ``in_scope``, ``pruned``, ``zeros_before``, ``zeros_after``,
        ``quantized``), sizes (``bytes_before``, ``bytes_after``) and ``relative_error``."""
        return dict(self["totals"])

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Return the totals by group of layers."""
        return dict(self["groups"])

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """Return an entry per tensor: name, group, shape, dtypes, how it was changed, its error and its hash."""
        return list(self["tensors"])

    @property
    def runtimes(self) -> list[str]:
        """List the runtimes that run the output."""
        return list(self["runtimes"])

    def _summary(self) -> Summary:
        totals = self.totals
        weights = totals["parameters"]
        pruned = "an unknown number" if totals["pruned"] is None else write_percent(totals["pruned"], weights)
        changed = (
            f"of {count(weights)} weights {pruned} pruned, {write_percent(totals['quantized'], weights)} quantized"
        )
        return Summary(
            f"Manifest: {clean(self.setup, 60)} of {clean(self.source['name'], 60)}",
            f"{write_size(totals['bytes_before'])} before, {write_size(totals['bytes_after'])} after; {changed}.",
            ("Group", "Parameters", "Pruned", "Quantized", "Before", "After"),
            tuple(
                (
                    name,
                    count(counts["parameters"]),
                    NONE if counts["pruned"] is None else count(counts["pruned"]),
                    count(counts["quantized"]),
                    write_size(counts["bytes_before"]),
                    write_size(counts["bytes_after"]),
                )
                for name, counts in self.groups.items()
            ),
        )


def read_versions() -> dict[str, str]:
    """Return the versions of compressknow and of the libraries whose arithmetic and formats it relies on."""
    return {"compressknow": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def predict_manifest(plan: Plan) -> Manifest:
    """Return the manifest of a plan as far as headers tell: no zeros, errors or hashes, and `pruned` by tensor only
    without a threshold over several. If it is calibrated, `estimate` has the blocks, bytes and seconds that takes."""
    known, total = plan.count_pruned()
    rows = [{**_describe_planned(tensor, plan.removal), "pruned": known.get(tensor.name, 0)} for tensor in plan.tensors]
    summary = _summarize_plan(plan, rows, {})
    unknown = {tensor.name for tensor in plan.tensors if tensor.prune and tensor.name not in known}
    for counts in (summary["totals"], *summary["groups"].values()):
        del counts["zeros_before"], counts["zeros_after"]
    for row in rows:
        if row["name"] in unknown:
            row["pruned"] = summary["groups"][row["group"]]["pruned"] = None
    summary["totals"]["pruned"] = total
    if plan.recipe.calibration is not None:
        from compressknow.compress.calibrate.compression import estimate

        summary["estimate"] = estimate(plan)
    return Manifest({**summary, "tensors": rows})


def build_manifest(
    plan: Plan,
    measured: Mapping[str, TensorStats],
    source_files: Mapping[str, str],
    files: Mapping[str, str],
    text: CalibrationText | None,
    calibrated: CalibrationResult | None,
) -> Manifest:
    """Return the manifest of a conversion: `measured` has every tensor of the plan by name, `source_files` and `files`
    the SHA-256 of the files that were read and written."""
    rows = [_describe(tensor, measured[tensor.name], plan.removal) for tensor in plan.tensors]
    summary = _summarize_plan(plan, rows, source_files)
    summary["totals"]["relative_error"] = pool_errors(rows)
    for group, counts in summary["groups"].items():
        counts["relative_error"] = pool_errors(row for row in rows if row["group"] == group)
    if text:
        summary["calibration"] = {
            **{"kind": text.kind, "source": text.source, "sha256": text.sha256},
            **{"tokens": text.tokens, "seed": text.seed},
            "blocks_apart": all(done.is_blockwise for done in (calibrated, plan.removal) if done),
            "unseen": sorted(calibrated.unseen) if calibrated else [],
            **({"smoothed": calibrated.smoothed} if calibrated and calibrated.smoothed else {}),
        }
    return Manifest(seal_manifest({**summary, "files": dict(sorted(files.items())), "tensors": rows}))


def _summarize_plan(plan: Plan, rows: list[dict[str, Any]], source_files: Mapping[str, str]) -> dict[str, Any]:
    removed = _describe_removal(plan.removal, rows) if plan.removal else None
    left_out = removed["tensors"] if removed else []
    summary = {
        "schema": SCHEMA,
        "versions": read_versions(),
        "source": {
            "name": plan.checkpoint.name,
            "revision": plan.checkpoint.revision,
            "architecture": plan.structure.architecture,
            "model_type": plan.structure.model_type,
            "files": dict(sorted(source_files.items())),
        },
        "recipe": plan.recipe.to_dict(),
        "setup": plan.recipe.setup,
        "totals": count_weights(rows, left_out),
        "groups": {
            group: count_weights(
                (row for row in rows if row["group"] == group), (row for row in left_out if row["group"] == group)
            )
            for group in (*GROUPS, NOT_LINEAR)
            if any(row["group"] == group for row in (*rows, *left_out))
        },
        "untied": list(plan.untied),
        **({"unused": list(plan.unused)} if plan.unused else {}),
        **({"removed": removed} if removed else {}),
        **({"unpacked": True} if plan.unpacked else {}),
    }
    return summary | {"runtimes": list(list_runtimes(summary | {"tensors": rows}))}


def _describe_removal(removal: Removal, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe what was dropped: blocks and neurons by config setting, total parameters and bytes, and tensors."""
    left_out: list[dict[str, Any]] = [
        {
            **{"name": tensor.name, "group": group, "shape": list(tensor.shape), "dtype": tensor.dtype},
            **{"numel": tensor.numel, "bytes_before": tensor.nbytes},
        }
        for tensor, group in removal.left_out
    ]
    dropped = {
        drop.keys: [
            format_ranges(sorted(set(range(drop.before)).difference(removal.selected[down.parameter])))
            for down in drop.networks
        ]
        for drop in (removal.neurons if removal.selected else ())
    }
    cut = sum(math.prod(row["shape_before"]) - row["numel"] for row in rows if "shape_before" in row)
    cut_bytes = sum(one.source.nbytes - removal.checkpoint.tensors[name].nbytes for name, one in removal.cuts.items())
    return {
        "parameters": sum(row["numel"] for row in left_out) + cut,
        "bytes": sum(row["bytes_before"] for row in left_out) + cut_bytes,
        "blocks": [
            {
                **{"stack": stack.name, "key": ".".join(stack.keys), "before": stack.count},
                **{"after": len(stack.remaining), "dropped": list(stack.dropped) if stack.is_decided else []},
                **({"similarities": list(map(_round, stack.similarities))} if stack.similarities else {}),
            }
            for stack in removal.blocks
        ],
        "neurons": [
            {
                **{"key": ".".join(drop.keys), "before": drop.before, "after": drop.after},
                "modules": [down.module for down in drop.networks],
                # Not known before the calibration text was evaluated.
                **({"dropped": dropped[drop.keys]} if dropped else {}),
            }
            for drop in removal.neurons
        ],
        "tensors": left_out,
    }


def count_weights(rows: Iterable[dict[str, Any]], left_out: Iterable[dict[str, Any]] = ()) -> dict[str, int]:
    """Add up manifest rows; tensors that were left out count only in ``bytes_before``."""
    total = dict.fromkeys(COUNTS, 0)
    for row in rows:
        total["parameters"] += row["numel"]
        total["in_scope"] += row["numel"] if row["in_scope"] else 0
        total["pruned"] += row["pruned"]
        total["zeros_before"] += row.get("zeros_before", 0)
        total["zeros_after"] += row.get("zeros", 0)
        total["quantized"] += row["numel"] if row["scheme"] else 0
        total["bytes_before"] += row["bytes_before"]
        total["bytes_after"] += row["bytes_after"]
    total["bytes_before"] += sum(row["bytes_before"] for row in left_out)
    return total


def pool_errors(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Return ||written - original|| / ||original|| over the weights of all rows; None if a row lacks its norm.

    >>> pool_errors([{"norm": 3.0, "relative_error": 0.5}, {"norm": 4.0, "relative_error": 0.0}])
    0.3
    """
    change = energy = 0.0
    for row in rows:
        if "norm" not in row:
            return None
        energy += row["norm"] ** 2
        change += (row["norm"] * row["relative_error"]) ** 2
    return _round(math.sqrt(change / energy)) if energy else 0.0


def _round(value: float) -> float:
    # The digits that float32 sums can have; more would pretend precision.
    return float(f"{value:.9g}")


def _describe_planned(tensor: PlannedTensor, removal: Removal | None) -> dict[str, Any]:
    cut = removal.cuts.get(tensor.source.name) if removal else None
    name_before = tensor.name
    # Its block may have been renumbered, once it is decided which blocks are dropped.
    if removal and tensor.name == tensor.source.name and all(drop.is_decided for drop in removal.blocks):
        name_before = removal.names.get(tensor.name, tensor.name)
    return {
        "name": tensor.name,
        **({"name_before": name_before} if name_before != tensor.name else {}),
        "group": tensor.group,
        "shape": list(tensor.source.shape),
        **({"shape_before": list(cut.source.shape)} if cut else {}),
        "dtype_before": tensor.source.dtype,
        "dtype_after": tensor.stored[0].dtype,
        "numel": tensor.source.numel,
        "in_scope": tensor.in_scope,
        "scheme": tensor.scheme.name if tensor.scheme else None,
        **({"parameters": values} if tensor.scheme and (values := tensor.scheme.values()) else {}),
        "bytes_before": cut.source.nbytes if cut else (0 if tensor.created else tensor.source.nbytes),
        "bytes_after": tensor.bytes_after,
    }


def _describe(tensor: PlannedTensor, measured: TensorStats, removal: Removal | None) -> dict[str, Any]:
    row = _describe_planned(tensor, removal) | {
        "pruned": measured.pruned,
        # An untied weight was not stored before.
        "zeros_before": 0 if tensor.created else measured.zeros_before,
        "zeros": measured.zeros,
        **({"refilled": measured.refilled} if measured.refilled else {}),
        "norm": _round(measured.norm),
        "relative_error": _round(measured.relative_error),
        "sha256": measured.sha256,
    }
    hashes = {tensor.stored[0].suffix: measured.sha256, **measured.other_sha256}
    parts = [
        {"name": name, "shape": list(part.shape), "dtype": part.dtype, "sha256": hashes[part.suffix]}
        for name, part in tensor.written
    ]
    if [part.suffix for part in tensor.stored] == ["", SCALE]:
        _, scale, *also = parts
        # Each module that shares the weight gets the same scale.
        row["scale"] = scale | ({"also": [part["name"] for part in also]} if also else {})
    elif tensor.scheme:
        row |= {"bits": tensor.scheme.bits, "stored": parts}
    return row
