"""What a study's page says, as text in order: the one source of the HTML page and the Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from compressknow.format import NONE, count, plain
from compressknow.report.parts import (
    BAR,
    Charts,
    Claim,
    Claims,
    Code,
    Drawn,
    Entries,
    Folded,
    Note,
    Page,
    Part,
    Sentences,
    Shown,
    Terms,
    Text,
)
from compressknow.report.study import summary, tables
from compressknow.report.study.charts import Chart
from compressknow.report.study.findings import FAMILIES, MINIMAL, NEAR, Finding, findings
from compressknow.report.study.records import Study, names
from compressknow.report.study.summary import CLIFF
from compressknow.report.tables import Entry, identity

_DEFINITIONS = (
    "Two cells are compared fact by fact, over all probes together: exact two-sided McNemar tests, adjusted by "
    "Holm's method over the comparisons of a finding. A finding holds if all significant comparisons (p < 0.05) "
    "agree with the claim, with at least one for each part of it. It does not hold if one contradicts the claim. "
    "Otherwise, the study cannot tell.",
    "A comparison does not count where neither cell is clearly above the baseline (95 % interval), over the probes "
    "of which the original knows more than that: right answers there may be mere luck. The baseline is that of "
    "always the same answer where there are at most five to choose from, of guessing among more, and zero where the "
    "answer is free text.",
    f"F1 calls a decline minimal where accuracy falls by less than {100 * MINIMAL:g} % of what it was. F5 requires "
    "that what is left beyond the baseline, on average over the amounts above 50 %, is less than the share of weights "
    f"left, and at the largest amount less than {100 * NEAR:g} %, as F10 does. The whole 95 % interval must lie below "
    "the limit; for a finding to fail, that of one figure, adjusted for their number (Bonferroni), must lie above it.",
    "Per million parameters, each form's loss of accuracy is divided by the number of parameters that it changed: "
    "those quantized, or those pruned where none were. p is of the mean paired difference (normal approximation).",
    f"The cliff is the first amount in the grid at which less than {100 * CLIFF:g} % of the knowledge is kept. 30 % "
    "counts as low, 50 % as medium. Charts show means over probes, then each probe, averaged as its protocol does.",
    "The sparse size is what a store would take that keeps only weights that are not zero, plus one bit per weight "
    "to mark them; no current runtime reads one, and on disk pruned weights are dense.",
)
_CELLS = "Pruned and quantized are in millions of parameters; p is from the exact McNemar test against the original."
_FINDINGS = "The paper's findings"
_LAYOUT = "The layout is the paper's. Baseline is the original; a dash marks a cell that the study does not have."


def study_page(study: Study, charts: Sequence[Chart] = ()) -> Page:
    """The study as text, with its charts where they are given; no fact's text is in it."""
    found, headline = findings(study), summary.headline(study)
    return Page(
        kind="study",
        title=f"{headline}: {plain(study.original.name, 60)}",
        models=f"{plain(study.original.name, 80)} and {count(len(study.cells))} compressed forms of it",
        headline=headline,
        verdict=summary.verdict(study),
        first="Read this first",
        warnings=_warnings(study),
        sections=tuple(section for section in _sections(study, found, charts) if section.parts),
        unlisted=1,
    )


def _sections(study: Study, found: Sequence[Finding], charts: Sequence[Chart]) -> Iterator[Shown]:
    said = summary.paragraph(study, found)
    none = Text("The study has no cells.")
    method = tuple(plain(sentence, 2000) for sentence in study.method)
    command = plain(study.command, 2000) if study.command else None
    run = (*identity(study.original), *_run(study))
    yield Shown("found", "What was found", (Sentences(said, joined=True) if said else none,), look="text")
    yield Shown("charts", "Charts", tuple(_charts(charts)))
    yield Shown(
        "findings", "The paper's ten findings, tested on this model", tuple(_findings(study, found)), short=_FINDINGS
    )
    yield Shown("tables", "The paper's tables", tuple(_paper_tables(study)), look="wide")
    yield Shown("cells", "All cells", tuple(_cells(study)), look="wide")
    yield Shown("failed", "Cells that failed", tuple(_failed(study)))
    yield Shown("method", "Method and limits", (Sentences((*method, *_DEFINITIONS)),), look="text")
    yield Shown("run", "The run", (Code(command, "sh", look="command"), Entries(run)), look="text")


def _charts(charts: Sequence[Chart]) -> Iterator[Part]:
    if means := [chart for chart in charts if not chart.by_probe]:
        yield Charts(tuple(Drawn(Markup(chart.panels[0].svg), chart.title) for chart in means))
        yield Note("The lines across the bars show 95 % intervals.")
    if by_probe := [chart for chart in charts if chart.by_probe]:
        panels = [
            Charts(tuple(Drawn(Markup(panel.svg), panel.probe) for panel in chart.panels), chart.title)
            for chart in by_probe
        ]
        yield Folded("The same for each probe", (Note("Each plot has its own scale."), *panels))


def _findings(study: Study, found: Sequence[Finding]) -> Iterator[Part]:
    yield Claims("Each finding, whether it holds for this model, and why", tuple(map(_claim, found)))
    behind = (tables.paired_tests_table(study, found), tables.bounds_table(study, found))
    if any(behind):
        title = "All comparisons and figures behind the findings"
        yield Folded(title, tuple(table for table in behind if table), in_text=False)


def _paper_tables(study: Study) -> Iterator[Part]:
    if found := tables.paper_tables(study):
        yield Note(f"{_LAYOUT} {tables.majorities(study)}".rstrip())
        yield from found


def _cells(study: Study) -> Iterator[Part]:
    yield tables.cells_table(study)
    yield Note(_CELLS, drawn=BAR)
    if single := _single_warnings(study):
        yield Folded("Warnings about single cells", (Terms(tuple((cells, "", warning) for warning, cells in single)),))


def _failed(study: Study) -> Iterator[Part]:
    if failed := tables.failed_cells(study):
        yield Terms(failed)


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


def _claim(finding: Finding) -> Claim:
    families = ", ".join(FAMILIES[family] for family in finding.families)
    return Claim(
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
