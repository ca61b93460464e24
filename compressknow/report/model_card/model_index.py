"""Evaluation results in the front matter of a model card, as the Hub reads them; all else in it stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from compressknow.errors import OutputError
from compressknow.report.records import Comparison
from compressknow.report.templates import yaml_text

KEY = "model-index"
# The metric by which results of an earlier report are told from the user's own.
_OURS = "knowledge-kept"


def check_metadata(front_matter: str) -> dict[str, Any]:
    """The metadata. Raises OutputError where it cannot be read."""
    try:
        metadata = yaml.safe_load(front_matter)
    except (yaml.YAMLError, ValueError) as error:
        raise OutputError(
            "the model card's metadata is no valid YAML, and would be lost.",
            why=str(error).splitlines()[0],
            hint="Mend what stands between the --- lines.",
        ) from error
    if metadata is None:
        return {}
    index = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not (index is None or _is_index(index)):
        raise OutputError(
            "the model card's metadata is not of the form that the Hub reads, and would be lost.",
            hint="Mend what stands between the --- lines: keys and values; `model-index` is a list of models.",
        )
    return metadata


def with_results(front_matter: str, comparison: Comparison) -> str:
    """The front matter with the comparison's results in it, in place of those of an earlier report."""
    metadata = check_metadata(front_matter)
    results = {KEY: _merged(metadata.get(KEY) or [], comparison)}
    added = yaml_text(results)
    kept = _without_index(front_matter)
    if kept is None:
        rest = {key: value for key, value in metadata.items() if key != KEY}
        kept = yaml_text(rest)
    return f"{kept.rstrip()}\n{added}" if kept.strip() else added


def _without_index(front_matter: str) -> str | None:
    """The text less its results: what the user wrote stays as written, comments too. None where it is in braces."""
    node = yaml.compose(front_matter, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return front_matter
    if node.flow_style:
        return None
    keys = [key for key, _ in node.value]
    at = next((number for number, key in enumerate(keys) if key.value == KEY), None)
    if at is None:
        return front_matter
    lines = front_matter.splitlines(keepends=True)
    start = keys[at].start_mark.line
    end = keys[at + 1].start_mark.line if at + 1 < len(keys) else len(lines)
    # Comments that stand before the next key belong to that.
    while end > start + 1 and (lines[end - 1].startswith("#") or not lines[end - 1].strip()):
        end -= 1
    return "".join(lines[:start] + lines[end:])


def _merged(index: list[dict[str, Any]], comparison: Comparison) -> list[dict[str, Any]]:
    """The user's own results, and beside them the comparison's."""
    kept = [model | {"results": [r for r in model["results"] if not _is_ours(r)]} for model in index]
    kept = [model for model in kept if model["results"]]
    ours, name = _results(comparison), comparison.model.name
    if kept:
        # The Hub knows one model a card: its name is the user's.
        kept[0]["results"] += ours
        return kept
    return [{"name": name, "results": ours}]


def _results(comparison: Comparison) -> list[dict[str, Any]]:
    """Of each probe the accuracy and the knowledge kept."""
    results = []
    for probe in comparison.probes:
        metrics = [
            {"type": "accuracy", "value": probe.accuracy_compressed.value, "name": "accuracy"},
            {"type": _OURS, "value": probe.kept.value, "name": "knowledge kept"},
        ]
        results.append(
            {
                "task": {"type": "text-generation" if comparison.model.family != "masked" else "fill-mask"},
                "dataset": {"name": probe.probe, "type": probe.probe.partition(":")[0]},
                "metrics": [metric for metric in metrics if metric["value"] is not None],
            }
        )
    return [result for result in results if result["metrics"]]


def _is_ours(result: Mapping[str, Any]) -> bool:
    return any(metric.get("type") == _OURS for metric in result["metrics"])


def _is_index(value: Any) -> bool:
    """Whether it is a list of models with results with metrics."""
    try:
        return all(isinstance(m, dict) for model in value for r in model["results"] for m in r["metrics"])
    except (TypeError, KeyError):
        return False
