"""Figures as values for JSON, under stable names: unknown values are None, intervals [low, high]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compressknow.comparison import records
from compressknow.comparison.intervals import adjust_holm, estimate_kept_by_cluster, estimate_proportion, run_mcnemar
from compressknow.evaluate.records import ModelRecord, NoiseFloor

# Fields of a model in a page's JSON, in order.
_MODEL = (
    "name revision sha256 architecture family parameters bytes dtype setup quantization runtime recipe source zeros "
    "groups removed calibration speed in_calibration guides changed grid"
).split()


def dump_model(model: ModelRecord) -> dict[str, Any]:
    """Return a model's identity, its size, and what was done to it."""
    values = asdict(model)
    return {key: values[key] for key in _MODEL}


def dump_counts(counts: records.Counts) -> dict[str, int]:
    """Return the number of facts, and the counts by what the two models know."""
    return {"n": counts.n, **asdict(counts)}


def estimate_to_json(name: str, estimate: records.Estimate) -> dict[str, Any]:
    """Return a figure under its name, and its interval."""
    return {name: estimate.value, f"{name}_interval": dump_interval(estimate)}


def dump_interval(estimate: records.Estimate) -> list[float] | None:
    """Return [low, high], or None."""
    return None if estimate.low is None or estimate.high is None else [estimate.low, estimate.high]


def dump_kept(counts: records.Counts) -> dict[str, Any]:
    """Return knowledge kept with its simple interval, and the exact McNemar test, both for independent facts."""
    return {
        **estimate_to_json("kept", estimate_proportion(counts.both, counts.known_before)),
        "mcnemar_p": run_mcnemar(counts),
    }


def dump_clusters(counts: records.Counts, relations: Sequence[records.Counts]) -> dict[str, Any]:
    """Return counts and knowledge kept, with its interval over the relations too."""
    by_cluster = dump_interval(estimate_kept_by_cluster(relations))
    return {**dump_counts(counts), **dump_kept(counts), "kept_cluster_interval": by_cluster}


def dump_certainty(certainty: records.Certainty) -> dict[str, Any]:
    """Return the certainty of the figures next to it."""
    return {
        "p": certainty.p,
        "p_by": certainty.unit,
        "clusters": certainty.relations,
        "kept_cluster_interval": dump_interval(certainty.kept),
        "difference_cluster_interval": dump_interval(certainty.difference),
        "smallest_detectable_loss": certainty.smallest_loss,
        "known_facts_for_2_points": certainty.facts_for_two,
    }


def dump_early(early: records.EarlyStop | None) -> dict[str, Any] | None:
    """Return how a gate was decided early; None if it was not."""
    if early is None:
        return None
    values = {name: getattr(early, name) for name in ("gate", "met", "level", "facts", "known", "of")}
    return values | estimate_to_json("kept", early.kept)


def dump_groups(groups: tuple[records.Group, ...]) -> dict[str, dict[str, Any]]:
    """Return the figures of each group by its name."""
    exact = adjust_holm([run_mcnemar(group.counts) for group in groups])
    return {
        group.name: {
            **dump_clusters(group.counts, group.relations),
            "mcnemar_p_holm": adjusted,
            "p": group.p,
            "p_holm": group.p_holm,
            "flips": group.counts.flips,
            "answer_changed": group.answer_changed,
            "chance": group.chance,
        }
        for group, adjusted in zip(groups, exact, strict=True)
    }


def probe_to_json(probe: records.ProbeFigures) -> dict[str, Any]:
    """Return all figures of a probe, scalars before tables."""
    confidence = probe.confidence
    values = {
        "knowing": _dump_knowing(probe.knowing),
        "by_relation": dump_groups(probe.by_relation),
        "by_popularity": dump_groups(probe.by_popularity),
        "by_template": {
            str(number): {**dump_counts(counts), **estimate_to_json("kept", kept)}
            for number, (counts, kept) in probe.by_template.items()
        },
        **_dump_pair("consistency", probe.consistency),
        **_dump_confidence(confidence),
        **dump_certainty(probe.certainty),
        "protocol": probe.protocol,
        "average": probe.average,
        **dump_counts(probe.counts),
        **estimate_to_json("accuracy_original", probe.accuracy_original),
        **estimate_to_json("accuracy_compressed", probe.accuracy_compressed),
        **estimate_to_json("difference", probe.difference),
        **dump_kept(probe.counts),
        **estimate_to_json("kept_above_chance", probe.kept_above_chance),
        **estimate_to_json("macro_original", probe.macro_original),
        **estimate_to_json("macro_compressed", probe.macro_compressed),
        **estimate_to_json("macro_difference", probe.macro_difference),
        "flips": probe.counts.flips,
        "answer_changed": probe.answer_changed,
        "noise_floor": _dump_noise(probe.noise_floor),
        "runtime_noise_floor": _dump_noise(probe.runtime_noise_floor),
        **_dump_movement(probe),
        "logp_change": dict(probe.logp_change) if probe.logp_change else None,
        **_dump_pair("mrr", probe.mrr),
        **_dump_pair("p_at_5", probe.p_at_5),
        "lost_still_in_top5": probe.lost_still_in_top5,
        **_dump_pair("ece", confidence.ece if confidence else None),
        **_dump_pair("brier", confidence.brier if confidence else None),
        "chance": probe.chance,
        "majority": probe.majority,
        "drop_absolute": probe.drop_absolute,
        "drop_relative": probe.drop_relative,
        "by_subject": dump_groups(probe.by_subject),
        "facts_read": probe.facts_read,
        "dropped": dict(probe.dropped),
        "limit": probe.limit,
        "seed": probe.seed,
    }
    return dict(sorted(values.items(), key=lambda item: isinstance(item[1], Mapping)))


def _dump_pair(name: str, pair: tuple[float | None, float | None] | None) -> dict[str, float | None]:
    before, after = pair or (None, None)
    return {f"{name}_original": before, f"{name}_compressed": after}


def _dump_noise(floor: NoiseFloor | None) -> dict[str, Any] | None:
    if floor is None:
        return None
    # The card has applied `produced` already; only a runtime tokenizes prompts differently.
    left_out = {"produced"} | ({"read_otherwise"} if floor.read_otherwise is None else set())
    return {key: value for key, value in asdict(floor).items() if key not in left_out}


def _dump_movement(probe: records.ProbeFigures) -> dict[str, Any]:
    moved: Mapping[str, Any] = asdict(probe.movement) if probe.movement else {}
    return {
        "kl_facts": moved.get("n", 0),
        **{key: moved.get(key) for key in ("kl_mean", "kl_median", "kl_p99", "kl_max")},
        "kl_is_lower_bound": probe.movement.is_lower_bound if probe.movement else None,
        **_dump_pair("kl_rest", moved.get("rest")),
    }


def _dump_knowing(knowing: records.GradeCounts | None) -> dict[str, Any] | None:
    if knowing is None:
        return None
    return {
        "original": dict(knowing.original),
        "compressed": dict(knowing.compressed),
        "moved": {f"{before}>{after}": facts for (before, after), facts in knowing.moved.items()},
        "with_example": {"n": knowing.shown, "produced": knowing.back},
    }


def _dump_confidence(confidence: records.Confidence | None) -> dict[str, Any]:
    values = asdict(confidence) if confidence else {}
    wrong = ("wrong_original", "wrong_compressed", "confidently_wrong_original", "confidently_wrong_compressed")
    return {
        "confidence_median": values.get("median"),
        **{key: values.get(key) for key in wrong},
        "by_confidence": {
            third.name: {
                "confidence": [third.low, third.high],
                **{"n": third.counts.n, "both": third.counts.both, "lost": third.counts.lost},
                **estimate_to_json("kept", third.kept),
            }
            for third in (confidence.thirds if confidence else ())
        },
        **{key: list(values.get(key, ())) for key in ("reliability_original", "reliability_compressed")},
    }


def dump_texts(texts: Sequence[records.TextFigures]) -> dict[str, Any]:
    """Return the figures of each text by its name; standard errors are under ``NAME_error``."""
    return {
        figures.text: replace_not_finite(
            {
                "context": figures.context,
                "chunks": figures.chunks,
                "divergence": figures.divergence,
                **dump_perplexity(figures.original, "_original"),
                **dump_perplexity(figures.compressed, "_compressed"),
                **(_dump_moved(figures.moved) if figures.moved else {}),
            }
        )
        for figures in texts
    }


def dump_perplexity(perplexity: records.Perplexity, suffix: str = "") -> dict[str, Any]:
    """Return the figures of one model, under names that end with `suffix`."""
    return replace_not_finite(
        {
            **_dump_measurement(f"perplexity{suffix}", perplexity.value),
            **_dump_measurement(f"bits_per_byte{suffix}", perplexity.bits_per_byte),
            f"tokens{suffix}": perplexity.tokens,
        }
    )


def _dump_moved(moved: records.TextChange) -> dict[str, Any]:
    divergent = moved.divergent
    return {
        **_dump_measurement("perplexity_ratio", moved.ratio),
        **_dump_measurement("log_perplexity_ratio", moved.log_ratio),
        **_dump_measurement("perplexity_difference", moved.difference),
        "correlation": moved.correlation,
        **_dump_measurement("kl_mean", moved.kl),
        "kl_percentiles": dict(moved.kl_percentiles) if moved.kl_percentiles else None,
        **_dump_measurement("same_top", moved.same_top),
        **_dump_measurement("probability_change", moved.change),
        **_dump_measurement("probability_change_rms", moved.change_rms),
        "probability_change_percentiles": dict(moved.change_percentiles),
        "greedy": asdict(divergent) | {"median": divergent.middle} if divergent else None,
    }


def _dump_measurement(name: str, figure: records.Measurement | None) -> dict[str, float | None]:
    return {name: figure.value if figure else None, f"{name}_error": figure.error if figure else None}


def replace_not_finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with None for NaN and infinity.

    >>> replace_not_finite({"kl": float("nan"), "text": {"tokens": 3}})
    {'kl': None, 'text': {'tokens': 3}}
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return replace_not_finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in values.items()}
