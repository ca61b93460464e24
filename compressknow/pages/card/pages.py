"""A report card as a file: HTML that requests nothing and is whole without JavaScript, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compressknow.base.format import json_text
from compressknow.comparison.clusters import kept_by_cluster
from compressknow.pages.card import assembly, ci, decision, view
from compressknow.pages.card.costs import costs
from compressknow.pages.card.gate import Gate
from compressknow.pages.card.method import LEGEND, SHORT_LEGEND
from compressknow.pages.card.sections import Limits
from compressknow.pages.card.view import section_names, setups
from compressknow.pages.pages import html_page, markdown_page, write_formats
from compressknow.pages.records import (
    Card,
    Comparison,
    Grade,
    ModelFacts,
    certainty_to_json,
    counts_to_json,
    early_to_json,
    interval_to_json,
    kept_to_json,
)
from compressknow.pages.tradeoff import tradeoff

# What the page holds of one comparison, and of several together: a page of 20 models and one probe stays below
# 400 KB.
_LOST, _GAINED, _LOST_IN_ALL, _GAINED_IN_ALL = 500, 200, 100, 50
_FEW, _RELATIONS_IN_ALL, _LEAST_RELATIONS = 5, 100, 3
# Facts that the Markdown holds of one comparison, and of all together.
_FACTS, _FACTS_IN_ALL = 50, 300
_WORDS: Any = {"legend": LEGEND, "short_legend": SHORT_LEGEND}
SCHEMA = 1


def write_reports(
    card: Card, paths: Sequence[Path], *, overwrite: bool, gates: Sequence[Gate] = (), strict: bool = False
) -> None:
    """Write the card in the formats that the names ask for: all files appear, each of them whole, or none."""

    def rendered(path: Path) -> str:
        if path.name == ci.SUMMARY:
            return ci.job_summary(card, gates, strict=strict)
        if path.suffix.lower() == ".xml":
            return ci.junit(card, gates, strict=strict)
        if path.suffix.lower() == ".html":
            return render_html(card)
        return render_markdown(card) if path.suffix.lower() == ".md" else json_text(to_json(card))

    write_formats(rendered, paths, overwrite=overwrite)


def render_html(card: Card) -> str:
    """The page: the same card gives the same bytes."""
    page = view.page(card, _limits(len(card.comparisons)))
    names = [compared.name for compared in page.compared]
    charts = setups(card.comparisons, names, "overview-chart") if page.overview else ()
    # Drawn twice: for a narrow screen, and for the width of the page.
    drawn = [
        (look, chart.title, Markup(tradeoff(chart, f"{look}-cost-{i}", broad=look == "broad")))
        for i, chart in enumerate(costs(card, names) if page.overview else (), start=1)
        for look in ("narrow", "broad")
    ]
    return html_page("report.html.j2", page=page, charts=tuple(map(Markup, charts)), costs=drawn, **_WORDS)


def render_markdown(card: Card) -> str:
    """What the page says, without its charts and with fewer facts, as GitHub-flavoured Markdown."""
    facts = min(_FACTS, _FACTS_IN_ALL // max(1, len(card.comparisons)))
    page = view.page(card, Limits(lost=facts, gained=facts, shown=facts))
    return markdown_page("report.md.j2", page=page, **_WORDS)


def _limits(models: int) -> Limits:
    return Limits(
        lost=_LOST if models <= 1 else _LOST_IN_ALL // models,
        gained=min(_GAINED, _GAINED_IN_ALL // max(1, models)),
        relations=None if models <= _FEW else max(_LEAST_RELATIONS, _RELATIONS_IN_ALL // models),
        # Of several models, a chart for each would take seconds.
        charts=models == 1,
    )


def to_json(card: Card) -> dict[str, Any]:
    """Plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order.

    Shares and accuracies lie between 0 and 1; what cannot be told is None; intervals are [low, high], 95 %. Without
    ``card.show_facts`` no text of a fact is in it.
    """
    return {
        "schema": SCHEMA,
        "verdict": card.verdict,
        "known": card.known,
        "recommended": decision.to_json(card.decision, section_names(card)) if card.decision else None,
        "original": _model(card.original),
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
        "source_matches": comparison.source_matches,
        "model": _model(comparison.model),
        "verdict": comparison.verdict,
        **counts_to_json(comparison.counts),
        **kept_to_json(comparison.counts),
        **certainty_to_json(comparison.certainty),
        "early": early_to_json(comparison.early),
        "next": comparison.next or None,
        "grades": {grade.subject: grade.grade for grade in comparison.grades},
        "grade_details": {grade.subject: _grade(grade) for grade in comparison.grades},
        "probes": {
            probe.probe: assembly.probe_to_json(comparison, probe, show_facts=show_facts) for probe in comparison.probes
        },
        "warnings": list(comparison.warnings),
        **assembly.to_json(comparison, show_facts=show_facts),
    }


def _model(model: ModelFacts) -> dict[str, Any]:
    """All that is known of it; what ran it is named where that was not transformers."""
    known = asdict(model)
    return known if model.runtime else {key: value for key, value in known.items() if key != "runtime"}


def _grade(grade: Grade) -> dict[str, Any]:
    return {
        "grade": grade.grade,
        "range": grade.range,
        **counts_to_json(grade.counts),
        **kept_to_json(grade.counts),
        "kept_cluster_interval": interval_to_json(kept_by_cluster(grade.relations)),
    }
