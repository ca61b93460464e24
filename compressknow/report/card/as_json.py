"""The card as JSON: every figure of the page, and all changed facts. Keys are stable within a schema version."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from compressknow.report.card import assembly
from compressknow.report.records import Card, Comparison, Grade
from compressknow.report.values import counts_to_json, estimate_to_json

SCHEMA = 1


def to_json(card: Card) -> dict[str, Any]:
    """Plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order.

    Shares and accuracies lie between 0 and 1; what cannot be told is None; intervals are [low, high], 95 %. Without
    ``card.show_facts`` no text of a fact is in it.
    """
    return {
        "schema": SCHEMA,
        "verdict": card.verdict,
        "original": asdict(card.original),
        "compressed": [comparison_json(comparison, card.show_facts) for comparison in card.comparisons],
        "warnings": list(card.warnings),
        "method": list(card.method),
        "versions": dict(card.versions),
        "command": card.command,
    }


def comparison_json(comparison: Comparison, show_facts: bool) -> dict[str, Any]:
    """One compressed model against the original, as plain values."""
    return {
        "setup": comparison.model.setup,
        "source": comparison.model.source,
        "model": asdict(comparison.model),
        "verdict": comparison.verdict,
        **counts_to_json(comparison.counts),
        **estimate_to_json("kept", comparison.kept),
        "mcnemar_p": comparison.p,
        "grades": {grade.subject: grade.grade for grade in comparison.grades},
        "grade_details": {grade.subject: _grade(grade) for grade in comparison.grades},
        "probes": {
            probe.probe: assembly.probe_to_json(comparison, probe, show_facts=show_facts) for probe in comparison.probes
        },
        "warnings": list(comparison.warnings),
        **assembly.to_json(comparison, show_facts=show_facts),
    }


def _grade(grade: Grade) -> dict[str, Any]:
    return {
        "grade": grade.grade,
        "range": grade.range,
        **counts_to_json(grade.counts),
        **estimate_to_json("kept", grade.kept),
    }
