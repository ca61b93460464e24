"""Records as values for JSON, under the names that others rely on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from compressknow.stats.records import Counts, Estimate, Group


def counts_to_json(counts: Counts) -> dict[str, int]:
    """Facts in all, and by what the two models know."""
    return {"n": counts.n, **asdict(counts)}


def estimate_to_json(name: str, estimate: Estimate) -> dict[str, Any]:
    """A figure under its name, and its interval: [low, high], or None."""
    interval = None if estimate.low is None or estimate.high is None else [estimate.low, estimate.high]
    return {name: estimate.value, f"{name}_interval": interval}


def pair_to_json(name: str, pair: tuple[float, float] | None) -> dict[str, float | None]:
    """A figure of the original and of the compressed model."""
    before, after = pair or (None, None)
    return {f"{name}_original": before, f"{name}_compressed": after}


def groups_to_json(groups: tuple[Group, ...]) -> dict[str, dict[str, Any]]:
    """By name of the group."""
    return {
        group.name: {
            **counts_to_json(group.counts),
            **estimate_to_json("kept", group.kept),
            "mcnemar_p": group.p,
            "mcnemar_p_holm": group.p_holm,
            "flips": group.counts.flips,
            "answer_changed": group.answer_changed,
            "chance": group.chance,
        }
        for group in groups
    }
