"""A study as JSON: every figure of the page. Keys are stable within a schema version."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from compressknow.report.records import Estimate
from compressknow.report.study import summary
from compressknow.report.study.cell_contrasts import Contrast
from compressknow.report.study.findings import Finding, findings
from compressknow.report.study.levels import cliffs, module_that_hurts_least
from compressknow.report.study.limits import Bound
from compressknow.report.study.records import Study, StudyProbe
from compressknow.report.study.tidy import tidy_rows

SCHEMA = 1


def study_to_json(study: Study) -> dict[str, Any]:
    """Plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order.

    Shares and accuracies lie between 0 and 1, sizes are bytes; what cannot be told is None; intervals are [low, high],
    95 %. ``cells`` are the rows of the tidy table, one a cell and probe. No fact's text is in it.
    """
    found = findings(study)
    return {
        "schema": SCHEMA,
        "verdict": summary.verdict(study),
        "paragraph": list(summary.paragraph(study, found)),
        "original": asdict(study.original),
        "probes": {probe.name: _probe(probe) for probe in study.probes},
        "findings": {finding.id: _finding(finding) for finding in found},
        "hurts_least": [asdict(least) for least in module_that_hurts_least(study)],
        "cliffs": [asdict(cliff) for cliff in cliffs(study)],
        "kept": {cell.key: _kept(cell.comparison.kept, cell.comparison.p) for cell in study.cells},
        "cells": tidy_rows(study),
        "method": list(study.method),
        "versions": dict(study.versions),
        "command": study.command,
    }


def _probe(probe: StudyProbe) -> dict[str, Any]:
    keys = ("n", "average", "accuracy", "majority", "chance")
    return {key: getattr(probe, key) for key in keys}


def _kept(kept: Estimate, p: float | None) -> dict[str, Any]:
    """Of one cell, over all probes' facts."""
    return {"kept": kept.value, "kept_interval": _interval(kept), "mcnemar_p": p}


def _finding(finding: Finding) -> dict[str, Any]:
    keys = ("claim", "families", "answer", "statistic", "why", "per_million")
    return {
        **{key: getattr(finding, key) for key in keys},
        "comparisons": [_contrast(pair) for pair in finding.contrasts],
        "limits": [_bound(bound) for bound in finding.bounds],
    }


def _contrast(pair: Contrast) -> dict[str, Any]:
    return {
        "less": pair.less,
        "more": pair.more,
        "part": pair.part,
        "n": pair.counts.n,
        "both": pair.counts.both,
        "only_less": pair.counts.lost,
        "only_more": pair.counts.gained,
        "neither": pair.counts.neither,
        "mcnemar_p": pair.p,
        "mcnemar_p_holm": pair.p_holm,
        "at_floor": pair.at_floor,
        "per_million": pair.rate.value,
        "per_million_interval": _interval(pair.rate),
        "per_million_p": pair.rate_p,
        "per_million_p_holm": pair.rate_p_holm,
    }


def _bound(bound: Bound) -> dict[str, Any]:
    return {
        "of": bound.of,
        "value": bound.value.value,
        "interval": _interval(bound.value),
        "adjusted_interval": _interval(bound.strict),
        "limit": bound.limit,
    }


def _interval(estimate: Estimate) -> list[float] | None:
    return None if estimate.low is None or estimate.high is None else [estimate.low, estimate.high]
