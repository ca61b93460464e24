"""Show a report card: what it says, as text in order, and that as HTML, Markdown and JSON.

All texts of models and facts go through `plain` here; the templates escape for their own syntax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compressknow.base.format import NONE, count, json_text, plain, plain_lines, share, size
from compressknow.comparison.records import Counts, Estimate
from compressknow.compress.recipe import to_toml
from compressknow.pages.card.charts import chart_costs, chart_setups, name_deployment, name_runtime
from compressknow.pages.card.decision import mark_models
from compressknow.pages.card.gate import SUMMARY, Gate, render_job_summary, render_junit
from compressknow.pages.card.method import LEGEND, SHORT_LEGEND, describe_mark, find_rounding_kept, list_probes
from compressknow.pages.card.sections import Limits, collect_glossary, show_sections
from compressknow.pages.pages import render_html_page, render_markdown_page, write_formats
from compressknow.pages.parts import (
    Entry,
    Page,
    Shown,
    Size,
    Table,
    compare_sizes,
    get_headline_accuracy,
    list_hashes,
    list_identity,
    list_run,
)
from compressknow.pages.records import Card, Comparison, Grade, ModelFacts, name_models, write_estimate
from compressknow.pages.texts import write_perplexity, write_text_headline
from compressknow.pages.tradeoff import draw_tradeoff

# What the page holds of one comparison, and of several together: a page of 20 models and one probe stays below
# 400 KB.
_LOST, _GAINED, _LOST_IN_ALL, _GAINED_IN_ALL = 500, 200, 100, 50
_FEW, _RELATIONS_IN_ALL, _LEAST_RELATIONS = 5, 100, 3
# Facts that the Markdown holds of one comparison, and of all together.
_FACTS, _FACTS_IN_ALL = 50, 300
_NOTHING_TO_KEEP = "There was no knowledge to keep"
_WORDS: Any = {"legend": LEGEND, "short_legend": SHORT_LEGEND}


@dataclass(frozen=True, slots=True)
class GradeRow:
    """Line of the report card; `rounding` is the mark on its bar, of what rounding alone keeps, where it has one."""

    subject: str
    known: str
    kept: str
    interval: str
    grade: str
    range: str
    bar: Estimate
    rounding: float | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """Compressed model against the original: the report card itself, and the sections below it.

    Attributes
    ----------
    graded : there are facts, or should be; of running texts alone there is nothing to grade.
    marked : what the mark on the bar of all domains shows; empty where there is none.
    """

    id: str
    name: str
    headline: str
    summary: str
    verdict: str
    next: str
    warnings: tuple[str, ...]
    grades: tuple[GradeRow, ...]
    total: GradeRow
    marked: str
    counts: Counts
    graded: bool
    size: Size
    identity: tuple[Entry, ...]
    recipe: str | None
    sections: tuple[Shown, ...]


@dataclass(frozen=True, slots=True)
class CardPage(Page):
    """Page of a whole card. With one compressed model, `compared` has one and there is no overview.

    `marked` is what the line across the overview's charts shows; empty where there is none.
    """

    decision: str
    identity: tuple[Entry, ...]
    overview: Table | None
    marked: str
    compared: tuple[Compared, ...]
    method: tuple[str, ...]
    glossary: tuple[tuple[str, str], ...]
    run: tuple[Entry, ...]
    hashes: tuple[Entry, ...]
    command: str | None

    @property
    def contents(self) -> tuple[tuple[str, str], ...]:
        """Return id and name of the parts below the report card."""
        sections = tuple((section.id, section.title) for section in self.sections)
        parts = sections if self.overview is None else (("models", "Each compressed model"),)
        return (*parts, ("method", "Method and limits"), ("run", "The run"))


def make_page(card: Card, limits: Limits) -> CardPage:
    """Return the card as text."""
    names = name_models(card)
    compared = tuple(
        _compare(card, comparison, f"m{i}", name, limits)
        for i, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1)
    )
    single = compared[0] if len(compared) == 1 else None
    warnings = [*card.warnings, *(card.comparisons[0].warnings if single else ())]
    headline = single.headline if single else _write_joint_headline(card.comparisons)
    others = f"→ {plain(card.comparisons[0].model.name, 80)}" if single else f"and {len(compared)} compressed models"
    return CardPage(
        kind="report",
        title=f"{headline}: {plain(card.original.name, 60)}",
        models=f"{plain(card.original.name, 80)} {others}",
        headline=headline,
        verdict=plain(card.verdict, 1000),
        warnings=tuple(dict.fromkeys(plain(warning, 1000) for warning in warnings)),
        sections=single.sections if single else (),
        unlisted=0,
        decision=plain(card.decision.reason, 1000) if card.decision else "",
        identity=list_identity(card.original),
        overview=None if single else _make_overview(card, names),
        marked=describe_mark(list_probes(card.comparisons), "The line across the charts"),
        compared=compared,
        method=tuple(plain(sentence, 2000) for sentence in card.method),
        glossary=collect_glossary(card.comparisons),
        run=list_run(card),
        hashes=list_hashes(card),
        command=plain(card.command, 2000) if card.command else None,
    )


def _write_headline(comparison: Comparison) -> str:
    """Return the figure that everything else explains: knowledge kept, or perplexity where a text alone was read."""
    if comparison.only_texts:
        return write_text_headline(comparison.texts[0])
    if comparison.kept.value is None:
        return _NOTHING_TO_KEEP
    return f"{share(comparison.kept.value)} of its knowledge kept"


def _write_joint_headline(comparisons: Sequence[Comparison]) -> str:
    kept = [c.kept.value for c in comparisons if c.kept.value is not None]
    if not kept and all(c.only_texts for c in comparisons):
        return f"Perplexity of {len(comparisons)} compressed models"
    if not kept:
        return _NOTHING_TO_KEEP
    least, most = share(min(kept)), share(max(kept))
    shares = most if least == most else f"{least.removesuffix(' %')} to {most}"
    return f"{len(comparisons)} compressed models keep {shares} of the knowledge"


def _compare(card: Card, comparison: Comparison, id: str, name: str, limits: Limits) -> Compared:
    model, kept = comparison.model, comparison.kept
    perplexity = f"perplexity {write_perplexity(comparison.texts[0].compressed)}" if comparison.only_texts else ""
    rounding = find_rounding_kept(comparison.probes)
    return Compared(
        id=id,
        name=name,
        headline=_write_headline(comparison),
        summary=f"{perplexity or f'{share(kept.value)} kept'}, {size(model.bytes)}",
        verdict=plain(comparison.verdict, 1000),
        next=plain(comparison.next, 1000),
        warnings=tuple(plain(warning, 1000) for warning in comparison.warnings),
        grades=tuple(_make_grade_row(grade) for grade in comparison.grades),
        total=GradeRow("All domains", *_write_kept(comparison.counts, kept), "", "", kept, rounding),
        marked=describe_mark(comparison.probes, "The long line on the bar of all domains"),
        counts=comparison.counts,
        graded=not comparison.only_texts,
        size=compare_sizes(card.original.bytes, model.bytes),
        identity=list_identity(model),
        recipe=plain_lines(to_toml(dict(model.recipe))) if model.recipe else None,
        sections=show_sections(card.original, comparison, id, limits, show_facts=card.show_facts),
    )


def _make_grade_row(grade: Grade) -> GradeRow:
    spanned = plain(grade.range, 20) if grade.unsure and grade.range else ""
    letter = plain(grade.grade, 4)
    return GradeRow(plain(grade.subject, 80), *_write_kept(grade.counts, grade.kept), letter, spanned, grade.kept)


def _write_kept(counts: Counts, kept: Estimate) -> tuple[str, str, str]:
    """Return the facts known before, the share kept and, apart so that a narrow screen breaks there, its interval."""
    value, opening, interval = write_estimate(kept).partition("(")
    return f"{count(counts.known_before)} of {count(counts.n)}", value.rstrip(), opening + interval


def _make_overview(card: Card, names: tuple[str, ...]) -> Table:
    probes = list(dict.fromkeys(probe.probe for c in card.comparisons for probe in c.probes))
    subjects = list(dict.fromkeys(grade.subject for c in card.comparisons for grade in c.grades))
    texts = list(dict.fromkeys(figures.text for c in card.comparisons for figures in c.texts))
    models = [card.original, *(comparison.model for comparison in card.comparisons)]
    run = _list_run_columns(models)
    original_run, *compressed_run = [tuple(column[i] for column in run.values()) for i in range(len(models))]
    standing = mark_models(card.decision, names) if card.decision else [NONE] * len(names)
    rows = [
        _make_overview_row(c, name, (mark, *own), probes, subjects, texts)
        for c, name, mark, own in zip(card.comparisons, names, standing, compressed_run, strict=True)
    ]
    return Table(
        caption="Every compressed model at a glance",
        columns=(
            "Model",
            "Size",
            "Kept",
            "Among these",
            *run,
            *(f"Accuracy, {plain(p, 40)}" for p in probes),
            *(plain(s, 40) for s in subjects),
            *(f"Perplexity, {plain(t, 40)}" for t in texts),
        ),
        rows=(_make_original_row(card, ("", *original_run), probes, subjects, texts), *rows),
        bars=(None, *(c.kept for c in card.comparisons)),
        bars_after=2,
        links=("", *(f"m{i}-top" for i in range(1, len(names) + 1))),
        pinned=1,
        sortable=True,
    )


def _list_run_columns(models: Sequence[ModelFacts]) -> dict[str, list[str]]:
    """Return what ran each, where that was not transformers for all; where tokens a second were measured, in what."""
    columns: dict[str, list[str]] = {}
    if any(model.runtime for model in models):
        columns["Runs in"] = [plain(name_runtime(model), 30) for model in models]
    speeds = [model.speed.tokens_per_second if model.speed else None for model in models]
    if any(speed is not None for speed in speeds):
        columns["Timed in"] = [plain(name_deployment(model), 40) if model.speed else NONE for model in models]
        columns["Tokens a second"] = [NONE if speed is None else f"{speed:,.1f}" for speed in speeds]
    return columns


def _make_original_row(
    card: Card, run: tuple[str, ...], probes: list[str], subjects: list[str], texts: list[str]
) -> tuple[str, ...]:
    read = {figures.text: figures.original for c in card.comparisons for figures in c.texts}
    accuracy = {p.probe: get_headline_accuracy(p)[0].value for c in card.comparisons for p in c.probes}
    return (
        "original",
        size(card.original.bytes),
        "",
        *run,
        *(share(accuracy[probe]) for probe in probes),
        *("" for _ in subjects),
        *(write_perplexity(read[text]) for text in texts),
    )


def _make_overview_row(
    comparison: Comparison,
    name: str,
    run: tuple[str, ...],
    probes: list[str],
    subjects: list[str],
    texts: list[str],
) -> tuple[str, ...]:
    kept = comparison.kept
    read = {figures.text: figures.compressed for figures in comparison.texts}
    accuracy = {probe.probe: get_headline_accuracy(probe)[1].value for probe in comparison.probes}
    grades = {grade.subject: plain(grade.grade, 4) + ("?" if grade.unsure else "") for grade in comparison.grades}
    return (
        name,
        size(comparison.model.bytes),
        write_estimate(kept),
        *run,
        *(share(accuracy.get(probe)) for probe in probes),
        *(grades.get(subject, NONE) for subject in subjects),
        *(write_perplexity(read.get(text)) for text in texts),
    )


def write_reports(
    card: Card, paths: Sequence[Path], *, overwrite: bool, gates: Sequence[Gate] = (), strict: bool = False
) -> None:
    """Write the card in the formats that the names ask for: all files appear, each of them whole, or none."""

    def render(path: Path) -> str:
        if path.name == SUMMARY:
            return render_job_summary(card, gates, strict=strict)
        match path.suffix.lower():
            case ".xml":
                return render_junit(card, gates, strict=strict)
            case ".html":
                return render_html(card)
            case ".md":
                return render_markdown(card)
            case _:
                return json_text(card.to_dict())

    write_formats(render, paths, overwrite=overwrite)


def render_html(card: Card) -> str:
    """Return the page: the same card gives the same bytes."""
    page = make_page(card, _limit_html(len(card.comparisons)))
    names = [compared.name for compared in page.compared]
    charts = chart_setups(card.comparisons, names, "overview-chart") if page.overview else ()
    # Drawn twice: for a narrow screen, and for the width of the page.
    costs = [
        (look, chart.title, Markup(draw_tradeoff(chart, f"{look}-cost-{i}", broad=look == "broad")))
        for i, chart in enumerate(chart_costs(card, names) if page.overview else (), start=1)
        for look in ("narrow", "broad")
    ]
    return render_html_page("report.html.j2", page=page, charts=tuple(map(Markup, charts)), costs=costs, **_WORDS)


def render_markdown(card: Card) -> str:
    """Return what the page says, without its charts and with fewer facts, as GitHub-flavoured Markdown."""
    facts = min(_FACTS, _FACTS_IN_ALL // max(1, len(card.comparisons)))
    page = make_page(card, Limits(lost=facts, gained=facts, shown=facts))
    return render_markdown_page("report.md.j2", page=page, **_WORDS)


def _limit_html(models: int) -> Limits:
    return Limits(
        lost=_LOST if models <= 1 else _LOST_IN_ALL // models,
        gained=min(_GAINED, _GAINED_IN_ALL // max(1, models)),
        relations=None if models <= _FEW else max(_LEAST_RELATIONS, _RELATIONS_IN_ALL // models),
        # Of several models, a chart for each would take seconds.
        charts=models == 1,
    )
