"""The card as JSON: every figure of the page, and all changed facts. Keys are stable within a schema version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from compressknow.report.records import Card, Comparison, Grade
from compressknow.stats.records import ChangedFact, Counts, Estimate, Group, ProbeFigures

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
    facts = {"lost_facts": _facts(comparison.lost), "gained_facts": _facts(comparison.gained)} if show_facts else {}
    return {
        "setup": comparison.model.setup,
        "source": comparison.model.source,
        "model": asdict(comparison.model),
        "verdict": comparison.verdict,
        **_counts(comparison.counts),
        **_estimate("kept", comparison.kept),
        "mcnemar_p": comparison.p,
        "grades": {grade.subject: grade.grade for grade in comparison.grades},
        "grade_details": {grade.subject: _grade(grade) for grade in comparison.grades},
        "probes": {probe.probe: _probe(probe) for probe in comparison.probes},
        "warnings": list(comparison.warnings),
        **facts,
    }


def _probe(probe: ProbeFigures) -> dict[str, Any]:
    return {
        "protocol": probe.protocol,
        "average": probe.average,
        **_counts(probe.counts),
        **_estimate("accuracy_original", probe.accuracy_original),
        **_estimate("accuracy_compressed", probe.accuracy_compressed),
        **_estimate("difference", probe.difference),
        **_estimate("kept", probe.kept),
        **_estimate("kept_above_chance", probe.kept_above_chance),
        **_estimate("macro_original", probe.macro_original),
        **_estimate("macro_compressed", probe.macro_compressed),
        **_estimate("macro_difference", probe.macro_difference),
        "mcnemar_p": probe.p,
        "flips": probe.counts.flips,
        "answer_changed": probe.answer_changed,
        **_movement(probe),
        "logp_change": dict(probe.logp_change) if probe.logp_change else None,
        **_before_after("mrr", probe.mrr),
        **_before_after("p_at_5", probe.p_at_5),
        "lost_still_in_top5": probe.lost_still_in_top5,
        **_before_after("ece", probe.ece),
        **_before_after("brier", probe.brier),
        "chance": probe.chance,
        "majority": probe.majority,
        "drop_absolute": probe.drop_absolute,
        "drop_relative": probe.drop_relative,
        "by_relation": _groups(probe.by_relation),
        "by_subject": _groups(probe.by_subject),
        "by_popularity": _groups(probe.by_popularity),
        "facts_read": probe.facts_read,
        "dropped": dict(probe.dropped),
        "limit": probe.limit,
        "seed": probe.seed,
    }


def _counts(counts: Counts) -> dict[str, int]:
    return {"n": counts.n, **asdict(counts)}


def _estimate(name: str, estimate: Estimate) -> dict[str, Any]:
    interval = None if estimate.low is None or estimate.high is None else [estimate.low, estimate.high]
    return {name: estimate.value, f"{name}_interval": interval}


def _movement(probe: ProbeFigures) -> dict[str, Any]:
    moved: Mapping[str, Any] = asdict(probe.movement) if probe.movement else {}
    keys = ("kl_mean", "kl_median", "kl_p99", "kl_max")
    rest = moved.get("rest")
    return {
        "kl_facts": moved.get("n", 0),
        **{key: moved.get(key) for key in keys},
        "kl_is_lower_bound": probe.movement.is_lower_bound if probe.movement else None,
        **_before_after("kl_rest", rest),
    }


def _before_after(name: str, pair: tuple[float, float] | None) -> dict[str, float | None]:
    before, after = pair or (None, None)
    return {f"{name}_original": before, f"{name}_compressed": after}


def _groups(groups: tuple[Group, ...]) -> dict[str, dict[str, Any]]:
    return {
        group.name: {
            **_counts(group.counts),
            **_estimate("kept", group.kept),
            "mcnemar_p": group.p,
            "mcnemar_p_holm": group.p_holm,
            "flips": group.counts.flips,
            "answer_changed": group.answer_changed,
            "chance": group.chance,
        }
        for group in groups
    }


def _grade(grade: Grade) -> dict[str, Any]:
    return {
        "grade": grade.grade,
        "range": grade.range,
        **_counts(grade.counts),
        **_estimate("kept", grade.kept),
    }


def _facts(facts: tuple[ChangedFact, ...]) -> list[dict[str, Any]]:
    return [asdict(fact) for fact in facts]
