"""What a report card says, as text in order: the one source of the HTML page and the Markdown.

All texts of models and facts go through `plain` here; the templates escape for their own syntax.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compressknow.compress.recipe import to_toml
from compressknow.report import probe_tables
from compressknow.report.card.verdict import labels_of
from compressknow.report.format import NONE, count, estimate, plain, plain_lines, share, size, smaller
from compressknow.report.probe_tables import ProbeTables
from compressknow.report.records import Card, Comparison, Grade
from compressknow.report.tables import Entry, FactList, Table, fact_list, hashes, identity, layers, run_entries, speed
from compressknow.stats.records import ChangedFact, Counts, Estimate


@dataclass(frozen=True, slots=True)
class Limits:
    """How many facts, and relations of a probe, a format shows of one comparison; the JSON has them all."""

    lost: int
    gained: int
    open: int = 20
    relations: int | None = None


@dataclass(frozen=True, slots=True)
class GradeRow:
    """A line of the report card."""

    subject: str
    known: str
    kept: str
    interval: str
    grade: str
    range: str
    bar: Estimate


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes before and after."""

    before: str
    after: str
    change: str
    share: float  # of the larger of the two, for the bars
    share_before: float


@dataclass(frozen=True, slots=True)
class Section:
    """One compressed model against the original."""

    id: str
    name: str
    headline: str
    summary: str
    verdict: str
    warnings: tuple[str, ...]
    grades: tuple[GradeRow, ...]
    total: GradeRow
    counts: Counts
    size: Size
    identity: tuple[Entry, ...]
    lost: FactList
    gained: FactList
    probes: tuple[ProbeTables, ...]
    figures: Table
    missing: tuple[str, ...]
    layers: Table | None
    speed: Table | None
    dropped: Table | None
    recipe: str | None

    @property
    def has_relations(self) -> bool:
        return any(probe.relations for probe in self.probes)

    @property
    def has_popularity(self) -> bool:
        return any(probe.popularity for probe in self.probes)

    @property
    def has_subjects(self) -> bool:
        return any(probe.subjects for probe in self.probes)

    @property
    def contents(self) -> tuple[tuple[str, str], ...]:
        """The parts after the report card: id and name."""
        parts = (
            ("lost", "Facts lost", True),
            ("gained", "Facts gained", True),
            ("relations", "By relation", self.has_relations),
            ("popularity", "By popularity", self.has_popularity),
            ("layers", "By group of layers", self.layers),
            ("figures", "All figures", True),
            ("speed", "Speed and memory", self.speed),
            ("dropped", "Facts not asked", self.dropped),
        )
        return tuple((f"{self.id}-{part}", name) for part, name, there in parts if there)


@dataclass(frozen=True, slots=True)
class Page:
    """A whole card. With one compressed model, `sections` has one and there is no overview."""

    title: str
    headline: str
    verdict: str
    models: str
    warnings: tuple[str, ...]
    identity: tuple[Entry, ...]
    overview: Table | None
    sections: tuple[Section, ...]
    show_facts: bool
    method: tuple[str, ...]
    run: tuple[Entry, ...]
    hashes: tuple[Entry, ...]
    command: str | None


def page(card: Card, limits: Limits) -> Page:
    """The card as text."""
    names = section_names(card)
    sections = tuple(
        _section(card, comparison, f"m{i}", name, limits)
        for i, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1)
    )
    single = sections[0] if len(sections) == 1 else None
    warnings = [*card.warnings, *(card.comparisons[0].warnings if single else ())]
    headline = single.headline if single else _headline_of_several(card.comparisons)
    return Page(
        title=f"{headline}: {plain(card.original.name, 60)}",
        headline=headline,
        verdict=plain(card.verdict, 1000),
        models=_models(card),
        warnings=tuple(dict.fromkeys(plain(warning, 1000) for warning in warnings)),
        identity=identity(card.original),
        overview=None if single else _overview(card, names),
        sections=sections,
        show_facts=card.show_facts,
        method=tuple(plain(sentence, 2000) for sentence in card.method),
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


def _headline_of_several(comparisons: Iterable[Comparison]) -> str:
    comparisons = tuple(comparisons)
    kept = [c.kept.value for c in comparisons if c.kept.value is not None]
    if not kept:
        return "There was no knowledge to keep"
    if share(min(kept)) == share(max(kept)):
        return f"{len(comparisons)} compressed models keep {share(max(kept))} of the knowledge"
    low = share(min(kept)).removesuffix(" %")
    return f"{len(comparisons)} compressed models keep {low} to {share(max(kept))} of the knowledge"


def _section(card: Card, comparison: Comparison, id: str, name: str, limits: Limits) -> Section:
    model, counts = comparison.model, comparison.counts
    figures, missing = probe_tables.figures(comparison.probes)
    before, after = card.original.bytes, model.bytes
    return Section(
        id=id,
        name=name,
        headline=kept_headline(comparison.kept),
        summary=f"{share(comparison.kept.value)} kept, {size(after)}",
        verdict=plain(comparison.verdict, 1000),
        warnings=tuple(plain(warning, 1000) for warning in comparison.warnings),
        grades=tuple(_grade_row(grade) for grade in comparison.grades),
        total=GradeRow("All subjects", _of(counts), *_kept_and_interval(comparison.kept), "", "", comparison.kept),
        counts=counts,
        size=Size(size(before), size(after), smaller(before, after), *_shares(after, before)),
        identity=identity(model),
        lost=_facts(card, comparison.lost, limits.lost, limits),
        gained=_facts(card, comparison.gained, limits.gained, limits),
        probes=tuple(
            probe_tables.tables(probe, f"{id}-p{i}", limits.relations)
            for i, probe in enumerate(comparison.probes, start=1)
        ),
        figures=figures,
        missing=missing,
        layers=layers(model),
        speed=speed(card.original, model),
        dropped=probe_tables.dropped(comparison.probes),
        recipe=plain_lines(to_toml(dict(model.recipe))) if model.recipe else None,
    )


def _facts(card: Card, facts: tuple[ChangedFact, ...], limit: int, limits: Limits) -> FactList:
    # Left out here, no text of a fact can reach any format.
    return fact_list(facts if card.show_facts else (), limit, limits.open)


def _grade_row(grade: Grade) -> GradeRow:
    return GradeRow(
        plain(grade.subject, 80),
        _of(grade.counts),
        *_kept_and_interval(grade.kept),
        plain(grade.grade, 4),
        plain(grade.range, 20) if grade.unsure and grade.range else "",
        grade.kept,
    )


def _of(counts: Counts) -> str:
    return f"{count(counts.known_before)} of {count(counts.n)}"


def _kept(kept: Estimate) -> str:
    return estimate(kept.value, kept.low, kept.high)


def _kept_and_interval(kept: Estimate) -> tuple[str, str]:
    """Apart, so that a narrow screen breaks the line between them."""
    value, opening, interval = _kept(kept).partition("(")
    return value.rstrip(), opening + interval


def _shares(after: int, before: int) -> tuple[float, float]:
    largest = max(after, before, 1)
    return after / largest, before / largest


def _overview(card: Card, names: tuple[str, ...]) -> Table:
    probes = list(dict.fromkeys(probe.probe for c in card.comparisons for probe in c.probes))
    subjects = list(dict.fromkeys(grade.subject for c in card.comparisons for grade in c.grades))
    rows = [_overview_row(c, name, probes, subjects) for c, name in zip(card.comparisons, names, strict=True)]
    return Table(
        caption="Every compressed model at a glance",
        columns=(
            "Model",
            "Size",
            "Kept",
            *(f"Accuracy, {plain(p, 40)}" for p in probes),
            *(plain(s, 40) for s in subjects),
        ),
        rows=(_original_row(card, probes, subjects), *rows),
        bars=(None, *(c.kept for c in card.comparisons)),
        bars_after=2,
        links=("", *(f"m{i}-top" for i in range(1, len(names) + 1))),
        pinned=1,
        sortable=True,
    )


def _original_row(card: Card, probes: list[str], subjects: list[str]) -> tuple[str, ...]:
    accuracy = {p.probe: probe_tables.headline_accuracy(p)[0].value for c in card.comparisons for p in c.probes}
    return (
        "original",
        size(card.original.bytes),
        "",
        *(share(accuracy[probe]) for probe in probes),
        *("" for _ in subjects),
    )


def _overview_row(comparison: Comparison, name: str, probes: list[str], subjects: list[str]) -> tuple[str, ...]:
    accuracy = {probe.probe: probe_tables.headline_accuracy(probe)[1].value for probe in comparison.probes}
    grades = {grade.subject: grade for grade in comparison.grades}
    return (
        name,
        size(comparison.model.bytes),
        _kept(comparison.kept),
        *(share(accuracy.get(probe)) for probe in probes),
        *(_short_grade(grades.get(subject)) for subject in subjects),
    )


def _short_grade(grade: Grade | None) -> str:
    if grade is None:
        return NONE
    return plain(grade.grade, 4) + ("?" if grade.unsure else "")
