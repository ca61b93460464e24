"""A comparison of two checkpoints as JSON: every figure of the page. Keys are stable within a schema version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from compressknow.diff.records import Difference, Sums, TensorDifference, summed
from compressknow.report.card.as_json import comparison_json
from compressknow.report.diff.records import Behaviour, CheckpointComparison
from compressknow.report.diff.tables import groups

SCHEMA = 1


def diff_json(comparison: CheckpointComparison) -> dict[str, Any]:
    """Plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order; what cannot be told is None."""
    return {
        "schema": SCHEMA,
        "verdict": comparison.verdict,
        "identical": comparison.identical,
        "a": asdict(comparison.a),
        "b": asdict(comparison.b),
        "files": list(comparison.files),
        **_difference(comparison.difference),
        "behaviour": _behaviour(comparison.behaviour, comparison.show_facts) if comparison.behaviour else None,
        "warnings": list(comparison.warnings),
        "versions": dict(comparison.versions),
        "command": comparison.command,
    }


def _difference(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"architecture": None, "config": [], "structure": [], "weights": None}
    blocks = summed(difference.tensors, lambda t: (t.stack, t.layer) if t.layer is not None else None)
    cells = summed(difference.tensors, lambda t: (t.stack, t.layer, t.module) if t.module else None)
    return {
        "architecture": difference.architecture,
        "config": [asdict(change) for change in difference.config],
        "structure": [asdict(change) for change in difference.structure],
        "weights": {
            "total": _figures(difference.total),
            "groups": {part.name: _figures(part.sums) for part in groups(difference)},
            "layers": [{"stack": stack, "layer": layer, **_of(those)} for (stack, layer), those in blocks.items()],
            "modules": [
                {"stack": stack, "layer": layer, "module": module, **_of(those)}
                for (stack, layer, module), those in cells.items()
            ],
            "tensors": [_tensor(tensor) for tensor in difference.tensors],
        },
    }


def _tensor(tensor: TensorDifference) -> dict[str, Any]:
    described = asdict(tensor)
    del described["sums"]
    return described | {"shape": list(tensor.shape), **_figures(tensor.sums)}


def _of(tensors: Iterable[TensorDifference]) -> dict[str, Any]:
    return _figures(sum((tensor.sums for tensor in tensors), Sums()))


def _figures(sums: Sums) -> dict[str, Any]:
    return {
        "numel": sums.numel,
        "zeros_a": sums.zeros_a,
        "zeros_b": sums.zeros_b,
        "relative_error": sums.relative_error,
        "cosine": sums.cosine,
        "snr_db": sums.snr_db,
        "largest_change": sums.largest_change,
    }


def _behaviour(behaviour: Behaviour, show_facts: bool) -> dict[str, Any]:
    there, back = behaviour.b_against_a, behaviour.a_against_b
    told = {
        "b_against_a": comparison_json(there.comparisons[0], show_facts),
        "a_against_b": comparison_json(back.comparisons[0], show_facts),
        "method": list(there.method),
    }
    return told | ({"answers": [asdict(answer) for answer in behaviour.answers]} if show_facts else {})
