"""What a study's page says, as text in order: the one source of the HTML page and the Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from compressknow.report.format import NONE, count, plain
from compressknow.report.study import summary, tables
from compressknow.report.study.findings import FAMILIES, Finding, findings
from compressknow.report.study.records import Study, names
from compressknow.report.tables import Entry, Table, identity


@dataclass(frozen=True, slots=True)
class FindingRow:
    """One of the paper's findings; `kind` is its answer as a word for a style sheet."""

    id: str
    claim: str
    families: str
    answer: str
    kind: str
    statistic: str
    why: str
    per_million: str


@dataclass(frozen=True, slots=True)
class StudyPage:
    """A whole study as text."""

    title: str
    models: str
    headline: str
    verdict: str
    warnings: tuple[str, ...]
    paragraph: tuple[str, ...]
    findings: tuple[FindingRow, ...]
    behind: tuple[Table, ...]
    paper_tables: tuple[Table, ...]
    majorities: str
    cells: Table
    failed: Table | None
    single_warnings: tuple[tuple[str, str], ...]
    run: tuple[Entry, ...]
    command: str | None
    method: tuple[str, ...]


def study_page(study: Study) -> StudyPage:
    """The study as text; no fact's text is in it."""
    found, headline = findings(study), summary.headline(study)
    behind = (tables.contrasts_table(study, found), tables.bounds_table(study, found))
    return StudyPage(
        title=f"{headline}: {plain(study.original.name, 60)}",
        models=f"{plain(study.original.name, 80)} and {count(len(study.cells))} compressed forms of it",
        headline=headline,
        verdict=summary.verdict(study),
        warnings=_warnings(study),
        paragraph=summary.paragraph(study, found),
        findings=tuple(map(_finding_row, found)),
        behind=tuple(table for table in behind if table),
        paper_tables=tables.paper_tables(study),
        majorities=tables.majorities(study),
        cells=tables.cells_table(study),
        failed=tables.failed_table(study),
        single_warnings=_single_warnings(study),
        run=(*identity(study.original), *_run(study)),
        command=plain(study.command, 2000) if study.command else None,
        method=tuple(plain(sentence, 2000) for sentence in study.method),
    )


def _warnings(study: Study) -> tuple[str, ...]:
    """Those that hold for every cell, said once, and that some failed."""
    total = len(study.cells) + len(study.failed)
    failed = (
        [f"{count(len(study.failed))} of {count(total)} cells failed; their reasons are below."] if study.failed else []
    )
    return tuple(dict.fromkeys(plain(warning, 1000) for warning in (*failed, *_common(study))))


def _common(study: Study) -> list[str]:
    of_cells = [cell.comparison.warnings for cell in study.cells]
    return [w for w in of_cells[0] if all(w in others for others in of_cells)] if of_cells else []


def _single_warnings(study: Study) -> tuple[tuple[str, str], ...]:
    """Each warning that only some cells have, and their names."""
    common, called = _common(study), names(study)
    cells: dict[str, list[str]] = {}
    for cell in study.cells:
        for warning in cell.comparison.warnings:
            if warning not in common:
                cells.setdefault(plain(warning, 1000), []).append(called[cell.key])
    return tuple((warning, ", ".join(named)) for warning, named in cells.items())


def _finding_row(finding: Finding) -> FindingRow:
    families = ", ".join(FAMILIES[family] for family in finding.families)
    return FindingRow(
        finding.id,
        finding.claim,
        "all families" if set(finding.families) == set(FAMILIES) else families,
        finding.answer,
        finding.answer.replace(" ", "-"),
        "" if finding.statistic == NONE else finding.statistic,
        finding.why,
        finding.per_million,
    )


def _run(study: Study) -> tuple[Entry, ...]:
    versions = ", ".join(f"{plain(name, 40)} {plain(version, 40)}" for name, version in study.versions.items())
    probes = ", ".join(f"{plain(probe.name, 60)} ({count(probe.n)} facts)" for probe in study.probes)
    return (
        Entry("Probes", probes or NONE),
        Entry("Cells", f"{count(len(study.cells))} made, {count(len(study.failed))} failed"),
        Entry("Versions", versions or NONE),
    )
