"""What a study's page says, as text and tables in order: the one source of the HTML page and the Markdown.

The tables are the paper's (3, 4 and 5) in its layout, all cells, the findings' comparisons, and failed cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from markupsafe import Markup

from compressknow.base.format import NONE, count, estimate, number, p_value, plain, share, size
from compressknow.comparison.records import Estimate, Measured
from compressknow.pages.card.warnings import warn_of_known
from compressknow.pages.parts import (
    BAR,
    Charts,
    Claim,
    Claims,
    Code,
    Drawn,
    Entries,
    Entry,
    Findings,
    Folded,
    Note,
    Page,
    Part,
    Sentences,
    Shown,
    Table,
    Terms,
    Text,
    get_headline_accuracy,
    list_identity,
)
from compressknow.pages.parts import Finding as Line
from compressknow.pages.study import summary
from compressknow.pages.study.charts import Chart
from compressknow.pages.study.findings import (
    FAMILIES,
    MINIMAL,
    NEAR,
    NOT_EVALUATED,
    PRUNING,
    QUANTIZATION,
    Finding,
    MethodFindings,
    by_method,
    findings,
)
from compressknow.pages.study.records import (
    MODULES,
    FailedCell,
    Study,
    StudyCell,
    StudyProbe,
    names,
    pruned_and_quantized,
    quantized,
    schemes,
    setting,
    varying,
)
from compressknow.pages.study.summary import CLIFF, Found, changes, ids, listed, what_was_found
from compressknow.pages.texts import write_measured

_DEFINITIONS = (
    "Two cells are compared fact by fact, over all probes together, by the two-sided test of how a relation's net "
    "change falls out (sign flips; exact McNemar where a probe has one relation). All that the findings claim, by "
    "method too, is adjusted together (Holm): the chance that any of it is not so is 5 % at most. A finding holds if "
    "all significant comparisons (p < 0.05) agree with the claim, with at least one for each part of it. It does not "
    "hold if one contradicts the claim. Otherwise, the study cannot tell.",
    "A comparison does not count where neither cell is clearly above the baseline (95 % interval), over the probes "
    "of which the original knows more than that: right answers there may be mere luck. The baseline is that of "
    "always the same answer where there are at most five to choose from, of guessing among more, and zero where the "
    "answer is free text.",
    f"F1 calls a decline minimal where accuracy falls by less than {100 * MINIMAL:g} % of what it was. F5 requires "
    "that what is left beyond the baseline, on average over the amounts above 50 %, is less than the share of weights "
    f"left, and at the largest amount less than {100 * NEAR:g} %, as F10 does. Each figure must lie clearly below its "
    "limit; for a finding to fail, one must lie clearly above it (Bonferroni over its figures).",
    "Per million parameters, each form's loss of accuracy is divided by the number of parameters that it changed: "
    "those quantized, or those pruned where none were. p is of the mean paired difference over relations (Student's "
    "t), adjusted over all findings (Holm).",
    f"The cliff is the first amount in the grid at which less than {100 * CLIFF:g} % of the knowledge is kept. That "
    "holds where the whole interval there lies below (95 % over all cliffs), else the study cannot tell. A module "
    "hurts least, or a method of those that prune one, where it is significantly better than each other at one "
    "amount at least, and nowhere worse (by relation; Holm over all of these claims); likewise, a method hurts most. "
    "30 % counts as low, 50 % as medium. Charts show means over probes, then each probe, averaged as its protocol "
    "does. The line called rounding alone is at what the original keeps of its own knowledge in another precision.",
    "The sparse size is what a store would take that keeps only weights that are not zero, plus one bit per weight "
    "to mark them; no current runtime reads one, and on disk pruned weights are dense.",
)
_CELLS = "Pruned and quantized are in millions of parameters; p is of the net change against the original, by relation."
_FINDINGS = "The paper's findings"
_BARS = "The lines across the bars show 95 % intervals."
_LAYOUT = "The layout is the paper's. Baseline is the original; a dash marks a cell that the study does not have."
_SHORT = {"overall": "Overall", "attention": "Att", "feed-forward": "FF"}
_AMOUNTS = (20, 40)
_KINDS = {PRUNING: "prunes", QUANTIZATION: "quantizes"}
PAPER_COLUMNS = (
    "Model",
    "Dataset",
    "Baseline",
    *(f"{_SHORT[module]}_GQ" for module in MODULES),
    *(f"{_SHORT[module]}_GPQ {amount}%" for module in MODULES for amount in _AMOUNTS),
)
# Number of the paper's table, its words for the family, and whether it gives accuracies in percent.
_OF_FAMILY = {
    "masked": (3, "encoder-only", True),
    "causal": (4, "decoder-only", False),
    "seq2seq": (5, "encoder-decoder", False),
}


def study_page(study: Study, charts: Sequence[Chart] = ()) -> Page:
    """The study as text, with its charts where they are given; no fact's text is in it."""
    found, headline = findings(study), summary.headline(study)
    return Page(
        kind="study",
        title=f"{headline}: {plain(study.original.name, 60)}",
        models=f"{plain(study.original.name, 80)} and {count(len(study.cells))} compressed forms of it",
        headline=headline,
        verdict=summary.verdict(study),
        warnings=_warnings(study),
        sections=tuple(section for section in _sections(study, found, charts) if section.parts),
        unlisted=1,
    )


def _sections(study: Study, found: Sequence[Finding], charts: Sequence[Chart]) -> Iterator[Shown]:
    said = what_was_found(study, found)
    method = tuple(plain(sentence, 2000) for sentence in study.method)
    command = plain(study.command, 2000) if study.command else None
    run = (*list_identity(study.original), *_run(study))
    yield Shown("found", "What was found", tuple(_found(study, said, charts)))
    beside = {each.chart for each in said}
    yield Shown("charts", "Charts", tuple(_charts([chart for chart in charts if chart.name not in beside])))
    yield Shown(
        "findings", "The paper's ten findings, tested on this model", tuple(_findings(study, found)), short=_FINDINGS
    )
    yield Shown("methods", "The findings by method", tuple(_methods(study)), short="By method")
    yield Shown("tables", "The paper's tables", tuple(_paper_tables(study)), look="wide")
    yield Shown("cells", "All cells", tuple(_cells(study)), look="wide")
    yield Shown("failed", "Cells that failed", tuple(_failed(study.failed)))
    yield Shown("refused", "Cells that this model cannot have", tuple(_failed(study.refused)))
    yield Shown("method", "Method and limits", (Sentences((*method, *_DEFINITIONS)),), look="text")
    yield Shown("run", "The run", (Code(command, "sh", look="command"), Entries(run)), look="text")


def _found(study: Study, said: Sequence[Found], charts: Sequence[Chart]) -> Iterator[Part]:
    """The findings, each with those that the same chart shows."""
    drawn = {chart.name: _drawn(chart) for chart in charts if not chart.by_probe}
    for name, group in groupby(said, key=lambda each: each.chart):
        lines = (Line(each.id, each.claim, each.answer, _look(each.answer), each.numbers) for each in group)
        yield Findings(tuple(lines), drawn.get(name))
    if said:
        yield Note("The section on method and limits says how each is decided.", _BARS)
    else:
        yield Text("The study has no cells to compare." if study.cells else "The study has no cells.")


def _look(answer: str) -> str:
    return answer.replace(" ", "-")


def _charts(charts: Sequence[Chart]) -> Iterator[Part]:
    if means := [chart for chart in charts if not chart.by_probe]:
        for scale in dict.fromkeys(chart.scale for chart in means):
            yield Charts(tuple(_drawn(chart) for chart in means if chart.scale == scale))
        yield Note(_BARS)
    if by_probe := [chart for chart in charts if chart.by_probe]:
        panels = [
            Charts(tuple(Drawn(Markup(panel.svg), panel.probe) for panel in chart.panels), chart.title)
            for chart in by_probe
        ]
        yield Folded("The same for each probe", (Note("The plots of a figure have one scale."), *panels))


def _drawn(chart: Chart) -> Drawn:
    return Drawn(Markup(chart.panels[0].svg), chart.title)


def _findings(study: Study, found: Sequence[Finding]) -> Iterator[Part]:
    without = [each for each in found if each.answer != NOT_EVALUATED and not _has_cells(each)]
    if not any(map(_has_cells, found)):
        yield Text("The study has no cells for the paper's findings.")
        return
    there = tuple(_claim(each) for each in found if each not in without)
    yield Claims("Each finding, whether it holds for this model, and why", there)
    if without:
        yield Text(f"The study has no cells for {listed([each.id for each in without])}.")
    behind = (paired_tests_table(study, found), bounds_table(study, found))
    if any(behind):
        title = "All comparisons and figures behind the findings"
        yield Folded(title, tuple(table for table in behind if table), in_text=False)


def _has_cells(finding: Finding) -> bool:
    return bool(finding.paired_tests or finding.bounds)


def _methods(study: Study) -> Iterator[Part]:
    found = by_method(study)
    if told := changes(found):
        yield Sentences(told, joined=True)
        yield methods_table(found)
        yield Note(
            "Each row tests the findings on the cells of one method alone. A dash: the study has no cells for it."
        )


def methods_table(found: Sequence[MethodFindings]) -> Table:
    """A row for each method that prunes and each scheme, a column for each finding that any has cells for."""
    columns = ids(found)
    rows = tuple(
        (plain(each.name, 60), _KINDS[each.kind], *(each.answer(id) or NONE for id in columns)) for each in found
    )
    return Table("Findings by method", ("Method", "It", *columns), rows, prose=True)


def _paper_tables(study: Study) -> Iterator[Part]:
    if found := paper_tables(study):
        yield Note(f"{_LAYOUT} {majorities(study)}".rstrip())
        yield from found


def _cells(study: Study) -> Iterator[Part]:
    yield cells_table(study)
    yield Note(_CELLS, drawn=BAR)
    if single := _single_warnings(study):
        yield Folded("Warnings about single cells", (Terms(tuple((cells, "", warning) for warning, cells in single)),))


def _failed(cells: Sequence[FailedCell]) -> Iterator[Part]:
    if failed := failed_cells(cells):
        yield Terms(failed)


def _warnings(study: Study) -> tuple[str, ...]:
    """What counts as known, that some cells failed, and what holds for every cell, said once."""
    total = len(study.cells) + len(study.failed) + len(study.refused)
    failed = (
        [f"{count(len(study.failed))} of {count(total)} cells failed; their reasons are below."] if study.failed else []
    )
    return tuple(
        dict.fromkeys(plain(warning, 1000) for warning in (*warn_of_known(study.known), *failed, *_common(study)))
    )


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
        _look(finding.answer),
        "" if finding.statistic == NONE else finding.statistic,
        finding.why,
        finding.per_million,
    )


def _run(study: Study) -> tuple[Entry, ...]:
    versions = ", ".join(f"{plain(name, 40)} {plain(version, 40)}" for name, version in study.versions.items())
    refused = f", {count(len(study.refused))} refused" if study.refused else ""
    probes = ", ".join(f"{plain(probe.name, 60)} ({_facts(probe)})" for probe in study.probes)
    return (
        Entry("Probes", probes or NONE),
        Entry("Cells", f"{count(len(study.cells))} made, {count(len(study.failed))} failed{refused}"),
        Entry("Versions", versions or NONE),
    )


def _facts(probe: StudyProbe) -> str:
    each = f", each in {count(probe.templates)} wordings" if probe.templates > 1 else ""
    return f"{count(probe.n)} facts{each}"


def paper_tables(study: Study) -> tuple[Table, ...]:
    """Table 3 (encoder-only, in %), 4 (decoder-only) or 5 (encoder-decoder, shares of 1), one for each scheme.

    "Baseline" is the original itself, as in the paper; accuracies are averaged as each probe's protocol does. Cells
    that the study has not are "-"; a scheme without any is left out.
    """
    return tuple(_paper_table(study, scheme) for scheme in schemes(study) if any(_paper_cells(study, scheme)))


def _paper_table(study: Study, scheme: str) -> Table:
    place, family, in_percent = _OF_FAMILY.get(study.original.family, _OF_FAMILY["masked"])
    rows = tuple(_paper_row(study, scheme, probe, in_percent) for probe in study.probes)
    unit = "accuracy in %" if in_percent else "accuracy"
    caption = f"Table {place} ({family}), {plain(scheme, 60)}, {unit}"
    return Table(caption, PAPER_COLUMNS, rows)


def majorities(study: Study) -> str:
    """The line of baselines that the paper sets above its tables 4 and 5; empty where there is none."""
    known = [f"{plain(p.name, 60)} {_accuracy(p.majority, False)}" for p in study.probes if p.majority is not None]
    return f"Majority baselines: {', '.join(known)}." if known else ""


def _paper_cells(study: Study, scheme: str) -> Iterator[StudyCell | None]:
    """In the order of the columns after Baseline."""
    yield from (quantized(study, module).get(scheme) for module in MODULES)
    for module in MODULES:
        by_amount = pruned_and_quantized(study, module, scheme)
        yield from (by_amount.get(amount) for amount in _AMOUNTS)


def _paper_row(study: Study, scheme: str, probe: StudyProbe, in_percent: bool) -> tuple[str, ...]:
    after = [accuracy(cell, probe.name) if cell else None for cell in _paper_cells(study, scheme)]
    written = [_accuracy(value, in_percent) for value in (probe.accuracy, *after)]
    return (plain(study.original.name, 60), plain(probe.name, 60), *written)


def _accuracy(value: float | None, in_percent: bool) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.3f}" if in_percent else f"{value:.4f}"


def accuracy(cell: StudyCell, probe: str) -> float | None:
    """Of the compressed model, averaged as the probe's protocol does; None where it was not evaluated."""
    return next((get_headline_accuracy(p)[1].value for p in cell.comparison.probes if p.probe == probe), None)


def cells_table(study: Study) -> Table:
    """Every cell: the settings that vary, what it keeps, its accuracy by probe, and what it changes and weighs; the
    original on top.
    """
    called, settings = names(study), varying(study)
    columns = (
        "Setup",
        *(plain(name, 30).replace("_", " ").capitalize() for name in settings),
        "Kept",
        *(f"Accuracy, {plain(probe.name, 40)}" for probe in study.probes),
        *(f"Perplexity, {plain(text, 40)}" for text in perplexities(study)),
        "p",
        "Pruned",
        "Quantized",
        "Size",
        "Sparse size",
    )
    original = (
        "original",
        *("" for _ in settings),
        "",
        *(share(probe.accuracy) for probe in study.probes),
        *(write_measured(value, 2) for value in perplexities(study).values()),
        "",
        "",
        "",
        size(study.original.bytes),
        "",
    )
    return Table(
        "Every cell, and what it keeps",
        columns,
        (original, *(_cell_row(study, cell, called, settings) for cell in study.cells)),
        bars=(None, *(cell.comparison.kept for cell in study.cells)),
        bars_after=1 + len(settings),
        pinned=1,
        sortable=len(study.cells) > 1,
        captioned=False,
    )


def perplexities(study: Study) -> dict[str, Measured]:
    """The original's, by running text."""
    return {f.text: f.original.value for cell in study.cells for f in cell.comparison.texts}


def _cell_row(study: Study, cell: StudyCell, called: Mapping[str, str], settings: Sequence[str]) -> tuple[str, ...]:
    kept = cell.comparison.kept
    return (
        called[cell.key],
        *(setting(name, cell.settings[name]) if name in cell.settings else "" for name in settings),
        estimate(kept.value, kept.low, kept.high),
        *(share(accuracy(cell, probe.name)) for probe in study.probes),
        *(write_measured(figures.compressed.value, 2) for figures in cell.comparison.texts),
        _bare(cell.comparison.certainty.test.p),
        _millions(cell.pruned),
        _millions(cell.quantized),
        size(cell.bytes),
        size(cell.sparse_bytes),
    )


def _bare(p: float | None) -> str:
    """As in other tables, whose column says that it is p."""
    return p_value(p).removeprefix("p = ").removeprefix("p ")


def _millions(parameters: int) -> str:
    # In one unit throughout, so that a column sorts.
    return number(parameters / 1e6, 1) if parameters else NONE


def paired_tests_table(study: Study, found: Sequence[Finding]) -> Table | None:
    """Every comparison of two cells behind the findings."""
    called = names(study)
    rows = tuple(
        (
            f"{finding.id} {called[pair.less]} / {called[pair.more]}",
            count(pair.counts.n),
            count(pair.counts.lost),
            count(pair.counts.gained),
            _bare(pair.p),
            "not counted" if pair.at_floor else _bare(pair.p_holm),
            _points(pair.rate),
            "not counted" if pair.at_floor else _bare(pair.rate_p_holm),
        )
        for finding in found
        for pair in finding.paired_tests
    )
    columns = (
        "Finding: said to hurt less / more",
        "Facts",
        "Only the first right",
        "Only the second right",
        "p",
        "p (Holm)",
        "Points lost more, a million",
        "p of that (Holm)",
    )
    return Table("Comparisons behind the findings, paired by fact", columns, rows, sortable=True) if rows else None


def _points(rate: Estimate) -> str:
    """Of 1 in points of 100."""
    return estimate(rate.value, rate.low, rate.high, lambda value: number(100 * value))


def bounds_table(study: Study, found: Sequence[Finding]) -> Table | None:
    """Every figure that a finding holds against a limit."""
    called = names(study)
    rows = tuple(
        (
            f"{finding.id} {called.get(bound.of, bound.of)}",
            estimate(bound.value.value, bound.value.low, bound.value.high),
            share(bound.limit),
            _bare(bound.p),
        )
        for finding in found
        for bound in finding.bounds
    )
    columns = ("Finding", "Figure (95 %)", "Limit", "p that it lies there")
    return Table("Figures held against a limit", columns, rows) if rows else None


def failed_cells(cells: Sequence[FailedCell]) -> tuple[tuple[str, str, str], ...]:
    """Cells that could not be made or evaluated: setup, key, and why."""
    return tuple((plain(cell.setup, 80), plain(cell.key, 80), plain(cell.why, 1000)) for cell in cells)
