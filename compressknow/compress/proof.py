"""Proof that an output loads: what its config and its headers say, put through transformers on the meta device.

Nothing here knows of a scheme: whatever the quantizer that the config names does with the tensors, it does here too.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressknow.base.errors import UnsupportedError
from compressknow.base.libraries import require
from compressknow.compress.plan import Plan
from compressknow.compress.sources import build_quantization_config
from compressknow.model.checkpoint import open_checkpoint, some_of
from compressknow.model.loading import Header, LoadReport, headers_of, load_report
from compressknow.model.meta import config_from_dict


def build_config(plan: Plan) -> dict[str, Any]:
    """Return the output's config.json."""
    if not plan.targets:
        return plan.config
    require("compressed_tensors")
    version = importlib.metadata.version("compressed-tensors")
    settings = build_quantization_config(plan.targets, plan.ignore, version, plan.structure.prefix)
    if plan.unpacked:
        settings["dequantize"] = True
    return plan.config | {"quantization_config": settings}


def prove(plan: Plan) -> Plan:
    """Return the plan of an output that transformers loads.

    Some families (T5) initialize layers by their weight, which packed layers do not have. Transformers unpacks these
    while it loads them, if their config says so: by the scheme of all weights, and without rounding activations.

    Raises UnsupportedError where it loads neither form.
    """
    headers = {name: (part.dtype, part.shape) for tensor in plan.tensors for name, part in tensor.written}
    try:
        _load(plan, build_config(plan), headers)
    except UnsupportedError:
        if len(plan.targets) != 1 or any(scheme.rounds for scheme in plan.targets):
            raise
        plan = replace(plan, unpacked=True)
        _load(plan, build_config(plan), headers)
    return plan


def prove_written(plan: Plan, folder: Path) -> None:
    """Raise UnsupportedError where transformers would not load every weight of a folder that was written."""
    written = open_checkpoint(folder)
    _load(plan, written.config, headers_of(written))


def _load(plan: Plan, config: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Load an output as plain transformers would, without its values.

    Raises UnsupportedError where it would not load every weight. Tensors that no weight takes, and weights that none
    gives, are no fault of the output where the source has them too.
    """
    tree = plan.tree
    report = load_report(type(tree), config_from_dict(tree, copy.deepcopy(dict(config))), headers)
    if fault := _find_fault(report, plan):
        raise UnsupportedError(
            f"{type(tree).__name__} cannot be compressed in this way: transformers could not load the output.",
            why=fault,
            hint="Prune only, or narrow --scope (or --exclude) to other layers.",
        )


def _find_fault(report: LoadReport, plan: Plan) -> str | None:
    if report == LoadReport():
        return None
    if report.conversion_failed:
        return "It fuses or splits weights of this model on loading, and fails if only some of them are quantized."
    if report.failure:
        return f"Loading stops: {report.failure}"
    before = load_report(type(plan.tree), plan.tree.config, headers_of(plan.checkpoint))
    kinds = {
        "It finds no values for": (report.missing, before.missing),
        "It finds no place for": (report.unexpected, before.unexpected),
        "It finds another shape in": (report.mismatched, before.mismatched),
        "It would take floats for integers, or the reverse, in": (report.retyped, before.retyped),
    }
    faults = {what: set(now) - set(then) for what, (now, then) in kinds.items()}
    return next((f"{what} {some_of(names)}." for what, names in faults.items() if names), None)
