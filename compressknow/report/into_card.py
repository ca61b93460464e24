"""The verdict and the report card in a converted checkpoint's own README.md, with the Hub's evaluation metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compressknow.errors import OutputError
from compressknow.report.figures import count, estimate, size
from compressknow.report.model_card import FRONT_MATTER
from compressknow.report.records import Card, Comparison, Estimate, ModelFacts
from compressknow.report.templates import front_matter, render

CARD = "README.md"
# What stands between these lines is written anew each time; the rest of the card is the user's.
BEGIN, END = "<!-- compressknow report: begin -->", "<!-- compressknow report: end -->"
_SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
_NOT_MEASURED = "What the model forgot by this has not been measured here.\n"


def check_model_cards(models: Sequence[str | Path]) -> None:
    """Raise, before any work is done, where a model is no folder whose card could be written."""
    for model in models:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise OutputError(
                f"{model} is no checkpoint folder: there is no model card to write into.",
                hint="--into-model-card wants each COMPRESSED to be a local checkpoint folder.",
            )


def write_into_model_cards(card: Card, models: Sequence[str | Path]) -> None:
    """Write each comparison of `card` into the README.md of its model's folder, in the order of `models`."""
    for comparison, model in zip(card.comparisons, models, strict=True):
        path = Path(model) / CARD
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        _write(path, with_report(text, card.original, comparison))


def with_report(text: str, original: ModelFacts, comparison: Comparison) -> str:
    """A model card with the report in it: its section replaced or added, its metadata joined by ``model-index``."""
    section = f"{BEGIN}\n{_section(original, comparison)}{END}"
    body = FRONT_MATTER.sub("", text, count=1).lstrip("\n").replace(_NOT_MEASURED, "")
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: section, body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{section}\n" if body.strip() else f"{section}\n"
    metadata = _metadata_of(text) | {"model-index": _model_index(comparison)}
    return f"{front_matter(metadata)}\n\n{body}"


def _section(original: ModelFacts, comparison: Comparison) -> str:
    return render(
        "model_card_report.md.j2",
        verdict=comparison.verdict,
        grades=[
            {
                "subject": grade.subject,
                "known": count(grade.counts.known_before),
                "kept": _written(grade.kept),
                "grade": grade.range or grade.grade,
            }
            for grade in comparison.grades
        ],
        probes=[
            {
                "name": probe.probe,
                "facts": count(probe.counts.n),
                "before": _written(probe.accuracy_original),
                "after": _written(probe.accuracy_compressed),
            }
            for probe in comparison.probes
        ],
        original=original.name,
        sha256=original.sha256[:16],
        size_before=size(original.bytes),
        size_after=size(comparison.model.bytes),
        warnings=comparison.warnings,
    )


def _written(figure: Estimate) -> str:
    return estimate(figure.value, figure.low, figure.high)


def _model_index(comparison: Comparison) -> list[dict[str, Any]]:
    """The Hub's evaluation results: of each probe the accuracy and the knowledge kept."""
    results = []
    for probe in comparison.probes:
        metrics = [
            {"type": "accuracy", "value": probe.accuracy_compressed.value, "name": "accuracy"},
            {"type": "knowledge-kept", "value": probe.kept.value, "name": "knowledge kept"},
        ]
        results.append(
            {
                "task": {"type": "text-generation" if comparison.model.family != "masked" else "fill-mask"},
                "dataset": {"name": probe.probe, "type": probe.probe.partition(":")[0]},
                "metrics": [metric for metric in metrics if metric["value"] is not None],
            }
        )
    return [{"name": comparison.model.name, "results": [result for result in results if result["metrics"]]}]


def _metadata_of(text: str) -> dict[str, Any]:
    """The card's own metadata; an unreadable one is an error, for writing would lose it."""
    match = FRONT_MATTER.match(text)
    if not match:
        return {}
    try:
        metadata = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        raise OutputError(
            "The model card's metadata is no valid YAML, and would be lost.", why=str(error).splitlines()[0]
        ) from error
    return metadata if isinstance(metadata, dict) else {}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
