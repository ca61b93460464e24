"""What a report card says, as text in order: the one source of the HTML page and the Markdown.

All texts of models and facts go through `plain` here; the templates escape for their own syntax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from compressknow.base.format import NONE, count, estimate, plain, plain_lines, share, size, smaller
from compressknow.comparison.records import Counts, Estimate
from compressknow.compress.recipe import to_toml
from compressknow.pages import drawing
from compressknow.pages.card import assembly, method
from compressknow.pages.card.costs import deployed_in, runtime_of
from compressknow.pages.card.decision import marks
from compressknow.pages.card.sections import Limits
from compressknow.pages.card.verdict import labels_of
from compressknow.pages.drawing import Line
from compressknow.pages.parts import Entry, Shown, Table, hashes, headline_accuracy, identity, run_entries
from compressknow.pages.records import Card, Comparison, Grade, ModelFacts
from compressknow.pages.texts import text_headline, written_perplexity

_MOST_BARS = 15
_AMOUNT = re.compile(r"(?P<scope>.*\S)\s+(?P<amount>\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True, slots=True)
class GradeRow:
    """A line of the report card; `rounding` is the mark on its bar, of what rounding alone keeps, where it has one."""

    subject: str
    known: str
    kept: str
    interval: str
    grade: str
    range: str
    bar: Estimate
    rounding: float | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes before and after."""

    before: str
    after: str
    change: str
    share: float  # of the larger of the two, for the bars
    share_before: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One compressed model against the original: the report card itself, and the sections below it.

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
class Page:
    """A whole card. With one compressed model, `compared` has one and there is no overview.

    `marked` is what the line across the overview's charts shows; empty where there is none.
    """

    title: str
    headline: str
    verdict: str
    decision: str
    models: str
    warnings: tuple[str, ...]
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
        """The parts below the report card: id and name."""
        ends = (("method", "Method and limits"), ("run", "The run"))
        if len(self.compared) > 1:
            return ("models", "Each compressed model"), *ends
        return (*((sections.id, sections.title) for sections in self.compared[0].sections), *ends)


def page(card: Card, limits: Limits) -> Page:
    """The card as text."""
    names = section_names(card)
    compared = tuple(
        _compared(card, comparison, f"m{i}", name, limits)
        for i, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1)
    )
    single = compared[0] if len(compared) == 1 else None
    warnings = [*card.warnings, *(card.comparisons[0].warnings if single else ())]
    headline = single.headline if single else _headline_of_several(card.comparisons)
    return Page(
        title=f"{headline}: {plain(card.original.name, 60)}",
        headline=headline,
        verdict=plain(card.verdict, 1000),
        decision=plain(card.decision.reason, 1000) if card.decision else "",
        models=_models(card),
        warnings=tuple(dict.fromkeys(plain(warning, 1000) for warning in warnings)),
        identity=identity(card.original),
        overview=None if single else _overview(card, names),
        marked=method.mark_in_words(method.probes_of(card.comparisons), "The line across the charts"),
        compared=compared,
        method=tuple(plain(sentence, 2000) for sentence in card.method),
        glossary=assembly.glossary(card.comparisons),
        run=run_entries(card),
        hashes=hashes(card),
        command=plain(card.command, 2000) if card.command else None,
    )


def _models(card: Card) -> str:
    if len(card.comparisons) == 1:
        return f"{plain(card.original.name, 80)} → {plain(card.comparisons[0].model.name, 80)}"
    return f"{plain(card.original.name, 80)} and {len(card.comparisons)} compressed models"


def section_names(card: Card) -> tuple[str, ...]:
    """A name for each compressed model: its setup where it has one, numbered where there are several."""
    names = labels_of([c.model for c in card.comparisons])
    return tuple(names if len(names) == 1 else (f"{i}. {name}" for i, name in enumerate(names, start=1)))


def kept_headline(kept: Estimate) -> str:
    """The figure that everything else explains."""
    if kept.value is None:
        return "There was no knowledge to keep"
    return f"{share(kept.value)} of its knowledge kept"


def headline_of(comparison: Comparison) -> str:
    """The figure that everything else explains: knowledge kept or, of models that read a text alone, perplexity."""
    return text_headline(comparison.texts[0]) if comparison.only_texts else kept_headline(comparison.kept)


def _summary(comparison: Comparison) -> str:
    if comparison.only_texts:
        return f"perplexity {written_perplexity(comparison.texts[0].compressed)}"
    return f"{share(comparison.kept.value)} kept"


def _headline_of_several(comparisons: Iterable[Comparison]) -> str:
    comparisons = tuple(comparisons)
    kept = [c.kept.value for c in comparisons if c.kept.value is not None]
    if not kept and all(c.only_texts for c in comparisons):
        return f"Perplexity of {len(comparisons)} compressed models"
    if not kept:
        return "There was no knowledge to keep"
    if share(min(kept)) == share(max(kept)):
        return f"{len(comparisons)} compressed models keep {share(max(kept))} of the knowledge"
    low = share(min(kept)).removesuffix(" %")
    return f"{len(comparisons)} compressed models keep {low} to {share(max(kept))} of the knowledge"


def _compared(card: Card, comparison: Comparison, id: str, name: str, limits: Limits) -> Compared:
    model, counts = comparison.model, comparison.counts
    before, after = card.original.bytes, model.bytes
    return Compared(
        id=id,
        name=name,
        headline=headline_of(comparison),
        summary=f"{_summary(comparison)}, {size(after)}",
        verdict=plain(comparison.verdict, 1000),
        next=plain(comparison.next, 1000),
        warnings=tuple(plain(warning, 1000) for warning in comparison.warnings),
        grades=tuple(_grade_row(grade) for grade in comparison.grades),
        total=_total_row(comparison),
        marked=method.mark_in_words(comparison.probes, "The long line on the bar of all domains"),
        counts=counts,
        graded=not comparison.only_texts,
        size=Size(size(before), size(after), smaller(before, after), *_shares(after, before)),
        identity=identity(model),
        recipe=plain_lines(to_toml(dict(model.recipe))) if model.recipe else None,
        sections=assembly.shown(card.original, comparison, id, limits, show_facts=card.show_facts),
    )


def _grade_row(grade: Grade) -> GradeRow:
    return GradeRow(
        plain(grade.subject, 80),
        _of(grade.counts),
        *_kept_and_interval(grade.kept),
        plain(grade.grade, 4),
        plain(grade.range, 20) if grade.unsure and grade.range else "",
        grade.kept,
    )


def _total_row(comparison: Comparison) -> GradeRow:
    of, kept = _of(comparison.counts), comparison.kept
    marked = method.kept_by_rounding(comparison.probes)
    return GradeRow("All domains", of, *_kept_and_interval(kept), "", "", kept, marked)


def _of(counts: Counts) -> str:
    return f"{count(counts.known_before)} of {count(counts.n)}"


def _kept(kept: Estimate) -> str:
    return estimate(kept.value, kept.low, kept.high)


def _kept_and_interval(kept: Estimate) -> tuple[str, str]:
    """Apart, so that a narrow screen breaks the line between them."""
    value, opening, interval = _kept(kept).partition("(")
    return value.rstrip(), opening + interval


def _shares(after: int | None, before: int | None) -> tuple[float, float]:
    after, before = after or 0, before or 0
    largest = max(after, before, 1)
    return after / largest, before / largest


def _overview(card: Card, names: tuple[str, ...]) -> Table:
    probes = list(dict.fromkeys(probe.probe for c in card.comparisons for probe in c.probes))
    subjects = list(dict.fromkeys(grade.subject for c in card.comparisons for grade in c.grades))
    texts = list(dict.fromkeys(figures.text for c in card.comparisons for figures in c.texts))
    run = _how_run([card.original, *(c.model for c in card.comparisons)])
    standing = marks(card.decision, names) if card.decision else [NONE] * len(names)
    rows = [
        _overview_row(c, name, (mark, *own), probes, subjects, texts)
        for c, name, mark, own in zip(card.comparisons, names, standing, run.cells[1:], strict=True)
    ]
    return Table(
        caption="Every compressed model at a glance",
        columns=(
            "Model",
            "Size",
            "Kept",
            "Among these",
            *run.columns,
            *(f"Accuracy, {plain(p, 40)}" for p in probes),
            *(plain(s, 40) for s in subjects),
            *(f"Perplexity, {plain(t, 40)}" for t in texts),
        ),
        rows=(_original_row(card, ("", *run.cells[0]), probes, subjects, texts), *rows),
        bars=(None, *(c.kept for c in card.comparisons)),
        bars_after=2,
        links=("", *(f"m{i}-top" for i in range(1, len(names) + 1))),
        pinned=1,
        sortable=True,
    )


class _Run(NamedTuple):
    """Columns of how models were run, and their cells by model."""

    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def _how_run(models: Sequence[ModelFacts]) -> _Run:
    """What ran each, where that was not transformers for all; where tokens a second were measured, in what."""
    columns: dict[str, list[str]] = {}
    if any(model.runtime for model in models):
        columns["Runs in"] = [plain(runtime_of(model), 30) for model in models]
    speeds = [model.speed.tokens_per_second if model.speed else None for model in models]
    if any(speed is not None for speed in speeds):
        columns["Timed in"] = [plain(deployed_in(model), 40) if model.speed else NONE for model in models]
        columns["Tokens a second"] = [NONE if speed is None else f"{speed:,.1f}" for speed in speeds]
    return _Run(tuple(columns), tuple(tuple(column[i] for column in columns.values()) for i in range(len(models))))


def _original_row(
    card: Card, run: tuple[str, ...], probes: list[str], subjects: list[str], texts: list[str]
) -> tuple[str, ...]:
    read = {figures.text: figures.original for c in card.comparisons for figures in c.texts}
    accuracy = {p.probe: headline_accuracy(p)[0].value for c in card.comparisons for p in c.probes}
    return (
        "original",
        size(card.original.bytes),
        "",
        *run,
        *(share(accuracy[probe]) for probe in probes),
        *("" for _ in subjects),
        *(written_perplexity(read[text]) for text in texts),
    )


def _overview_row(
    comparison: Comparison,
    name: str,
    run: tuple[str, ...],
    probes: list[str],
    subjects: list[str],
    texts: list[str],
) -> tuple[str, ...]:
    read = {figures.text: figures.compressed for figures in comparison.texts}
    accuracy = {probe.probe: headline_accuracy(probe)[1].value for probe in comparison.probes}
    grades = {grade.subject: grade for grade in comparison.grades}
    return (
        name,
        size(comparison.model.bytes),
        _kept(comparison.kept),
        *run,
        *(share(accuracy.get(probe)) for probe in probes),
        *(_short_grade(grades.get(subject)) for subject in subjects),
        *(written_perplexity(read.get(text)) for text in texts),
    )


def _short_grade(grade: Grade | None) -> str:
    if grade is None:
        return NONE
    return plain(grade.grade, 4) + ("?" if grade.unsure else "")


def setups(comparisons: Sequence[Comparison], names: Sequence[str], id: str) -> tuple[str, ...]:
    """Charts of what several compressed models kept: lines where setups are amounts by scope, bars for the others."""
    lines, others = split(comparisons)
    title = "Knowledge kept by how much was pruned"
    levels = method.mark(method.kept_by_rounding(method.probes_of(comparisons)))
    charts = [drawing.lines(lines, f"{id}-lines", title, start=1, levels=levels)] if lines else []
    # Many bars would repeat the overview's, one below the other.
    bars = (
        []
        if len(others) > _MOST_BARS
        else [drawing.Bar(names[i], comparisons[i].kept) for i in others if comparisons[i].kept.value is not None]
    )
    title = "Knowledge kept by compressed model"
    return (*charts, *([drawing.bars(bars, f"{id}-bars", title, levels=levels)] if bars else []))


def split(comparisons: Sequence[Comparison]) -> tuple[tuple[Line, ...], tuple[int, ...]]:
    """Scopes of which at least two amounts were pruned, and the places of all other comparisons.

    More scopes than there are ways of drawing a line are left to the bars.
    """
    amounts: dict[str, dict[float, int]] = {}
    for place, comparison in enumerate(comparisons):
        match = _AMOUNT.fullmatch(comparison.model.setup or "")
        if match and comparison.kept.value is not None:
            amounts.setdefault(match["scope"], {}).setdefault(float(match["amount"]), place)
    several = [(scope, by_amount) for scope, by_amount in amounts.items() if len(by_amount) > 1][: len(drawing.MARKERS)]
    lines = tuple(
        Line(scope, tuple((amount, comparisons[place].kept) for amount, place in sorted(by_amount.items())))
        for scope, by_amount in several
    )
    drawn = {place for _, by_amount in several for place in by_amount.values()}
    return lines, tuple(place for place in range(len(comparisons)) if place not in drawn)
