"""Page of a study, for HTML and Markdown, and the files of a study: pages, JSON, rows, figures.

Its tables are the paper's (3, 4 and 5) in its layout, all cells, the comparisons behind findings, and failed cells.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from compressknow.base.files import write_whole
from compressknow.base.format import NONE, clean, count, dump_json, number, share, write_size
from compressknow.base.reading import group_by
from compressknow.comparison.intervals import run_mcnemar
from compressknow.compress.steps import PAPER_SCOPES
from compressknow.pages import parts
from compressknow.pages.as_json import dump_interval, dump_kept, dump_model, estimate_to_json
from compressknow.pages.card.verdict import count_facts, join_words
from compressknow.pages.card.warnings import warn_of_facts_in_text, warn_of_grades, warn_of_known
from compressknow.pages.pages import read_source, render_html, render_markdown, write_files
from compressknow.pages.records import Comparison, write_estimate
from compressknow.pages.study import summary
from compressknow.pages.study.charts import Chart, draw_charts, is_chart
from compressknow.pages.study.claims import CellComparison
from compressknow.pages.study.findings import (
    FAMILIES,
    LOW,
    MINIMAL,
    MOST,
    NEAR,
    NOT_EVALUATED,
    PRUNING,
    QUANTIZATION,
    Finding,
    FindingsByMethod,
    describe_changes,
    evaluate_findings,
    list_ids,
)
from compressknow.pages.study.records import (
    COLUMNS,
    GPQ_AMOUNTS,
    MAIN_SETTINGS,
    MODULES,
    FailedCell,
    Study,
    StudyCell,
    format_setting,
    infer_type,
    tidy_rows,
)
from compressknow.pages.svg import make_standalone
from compressknow.pages.texts import write_measurement

_DEFINITIONS = (
    "Two cells are compared fact by fact, by the paired test described above, over the relations of all probes "
    "together. All claims of findings, by method too, are adjusted together (Holm): the chance that any is false is at "
    "most 5 %. A finding holds if all significant comparisons (p < 0.05) agree with the claim, with at least one "
    "for each part of it. It does not hold if one contradicts the claim. Otherwise, the study cannot tell.",
    "A comparison does not count if neither cell is clearly above the baseline (95 % interval), over the probes where "
    "the original is: right answers may then be mere luck. The baseline is the accuracy of always giving the same "
    "answer if there are at most five to choose from, that of guessing if there are more, and zero if the answer is "
    "free text.",
    f"F1 calls a decline minimal if accuracy over all facts falls by less than {100 * MINIMAL:g} % of what it was, "
    f"even with overall pruned by {LOW[1]} %; without that cell, it cannot hold. F5 requires "
    "that the knowledge left beyond the baseline, on average over the amounts above 50 %, is less than the share of "
    f"weights left, and less than {100 * NEAR:g} % at {MOST} %, a limit that F10 uses too; without a cell of {MOST} %, "
    "the study cannot tell. Each figure must be clearly below its limit; for a finding to fail, one must be clearly "
    "above it (Bonferroni over its figures).",
    "Per million parameters, each form's loss of accuracy is divided by the number of parameters that it changed: "
    "those quantized or, if there are none, those pruned. p is for the mean paired difference over relations "
    "(Student's t; if a form changed fewer facts than the rate of both suggests, its variance is that of the rate), "
    "adjusted over all findings (Holm).",
    f"The cliff is the first amount in the grid at which less than {100 * summary.CLIFF:g} % of the knowledge is kept. "
    "That holds if the whole interval there lies below (95 % over all cliffs); otherwise, the study cannot tell. A "
    "module, or a method that prunes a module, hurts least if it is significantly better than each of the others at "
    "one amount or more, and never worse (by relation; Holm over all of these claims); likewise, a method hurts most. "
    "30 % counts as low, 50 % as medium. Charts show means over probes, then each probe, averaged by its protocol. "
    "The line called rounding alone shows what the original keeps of its own knowledge in another precision.",
    "The sparse size is that of all non-zero weights, plus one bit per weight to mark them. No current runtime reads "
    "such files; on disk, pruned weights are dense.",
)
_CELLS = "Pruned and quantized are millions of parameters; p is for the net change against the original, by relation."
_BARS = "The lines across the bars show 95 % intervals."
PAPER_COLUMNS = (
    "Model",
    "Dataset",
    "Baseline",
    *(f"{PAPER_SCOPES[module]}_GQ" for module in MODULES),
    *(f"{PAPER_SCOPES[module]}_GPQ {amount}%" for module in MODULES for amount in GPQ_AMOUNTS),
)
# Numbers of the paper's tables. The one on encoder-only models has accuracies in percent.
_TABLES = {"masked": 3, "causal": 4, "seq2seq": 5}


def make_study_page(study: Study, charts: Sequence[Chart] = ()) -> parts.Page:
    """Return the study as a page, with the given charts; it contains no text of facts."""
    forms = "form" if len(study.cells) == 1 else "forms"
    return parts.Page(
        what="study",
        models=f"{clean(study.original.name, 80)} and {count(len(study.cells))} compressed {forms} of it",
        headline=summary.write_headline(study),
        verdict=summary.write_verdict(study),
        warnings=_write_warnings(study),
        sections=tuple(section for section in _make_sections(study, charts) if section.parts),
        unlisted=1,
    )


def _make_sections(study: Study, charts: Sequence[Chart]) -> Iterator[parts.PageSection]:
    findings, by_method = evaluate_findings(study)
    conclusions = summary.draw_conclusions(study, findings)
    method = tuple(clean(sentence, 2000) for sentence in study.method)
    run = parts.show_run(study.command, study.versions, (*parts.list_identity(study.original), *_describe_run(study)))
    yield parts.PageSection("found", "What was found", tuple(_show_conclusions(study, conclusions, charts)))
    shown = {each.chart for each in conclusions}
    others = [chart for chart in charts if chart.name not in shown]
    yield parts.PageSection("charts", "Charts", tuple(_show_charts(others)))
    title = "The paper's ten findings, tested on this model"
    yield parts.PageSection("findings", title, tuple(_show_findings(study, findings)))
    yield parts.PageSection("methods", "The findings by method", tuple(_show_methods(by_method)))
    yield parts.PageSection("tables", "The paper's tables", tuple(_show_paper_tables(study)), look="wide")
    yield parts.PageSection("cells", "All cells", tuple(_show_cells(study)), look="wide")
    yield parts.PageSection("failed", "Cells that failed", _show_failed(study.failed))
    yield parts.PageSection("refused", "Cells that this model cannot have", _show_failed(study.refused))
    yield parts.PageSection("method", "Method and limits", (parts.Sentences((*method, *_DEFINITIONS)),), look="text")
    yield parts.PageSection("run", "The run", run, look="text")


def _show_conclusions(
    study: Study, conclusions: Sequence[summary.Conclusion], charts: Sequence[Chart]
) -> Iterator[parts.Part]:
    """Yield the conclusions, grouped by the chart that shows them."""
    drawn = {chart.name: _show_chart(chart) for chart in charts if not chart.by_probe}
    for name, group in groupby(conclusions, key=lambda each: each.chart):
        yield parts.Findings(tuple((each.id, each.claim, each.answer, each.numbers) for each in group), drawn.get(name))
    if conclusions:
        counted = " They count the facts of all probes together; charts show means over the probes."
        decided = "The section on method and limits explains how findings are decided."
        yield parts.Note(decided + counted * (len(study.probes) > 1), _BARS)
    else:
        yield parts.Text("The study has no cells to compare." if study.cells else "The study has no cells.")


def _show_charts(charts: Sequence[Chart]) -> Iterator[parts.Part]:
    if means := [chart for chart in charts if not chart.by_probe]:
        for scale in dict.fromkeys(chart.scale for chart in means):
            yield parts.Charts(tuple(_show_chart(chart) for chart in means if chart.scale == scale))
        yield parts.Note(_BARS)
    if by_probe := [chart for chart in charts if chart.by_probe]:
        drawn = [(tuple(parts.Drawn(svg, probe) for probe, svg in chart.panels), chart.title) for chart in by_probe]
        note = parts.Note("The plots of a figure have one scale.")
        yield parts.Folded("The same for each probe", (note, *(parts.Charts(*each) for each in drawn)))


def _show_chart(chart: Chart) -> parts.Drawn:
    return parts.Drawn(chart.panels[0][1], chart.title)


def _show_findings(study: Study, findings: Sequence[Finding]) -> Iterator[parts.Part]:
    if not any(each.has_cells for each in findings):
        yield parts.Text("The study has no cells for the paper's findings.")
        return
    without = [each for each in findings if each.answer != NOT_EVALUATED and not each.has_cells]
    shown = tuple(_show_finding(each) for each in findings if each not in without)
    yield parts.Claims(shown)
    if without:
        yield parts.Text(f"The study has no cells for {join_words([each.id for each in without])}.")
    tables = (build_comparisons_table(study, findings), build_bounds_table(study, findings))
    if any(tables):
        title = "All comparisons and figures behind the findings"
        yield parts.Folded(title, tuple(table for table in tables if table), in_text=False)


def _show_finding(finding: Finding) -> tuple[str, ...]:
    families = ", ".join(FAMILIES[family] for family in finding.families)
    families = "all families" if set(finding.families) == set(FAMILIES) else families
    statistic = "" if finding.statistic == NONE else finding.statistic
    return finding.id, finding.claim, families, finding.answer, finding.why, statistic, finding.per_million


def _show_methods(by_method: FindingsByMethod) -> Iterator[parts.Part]:
    if not by_method:
        return
    kinds, ids = {PRUNING: "prunes", QUANTIZATION: "quantizes"}, list_ids(by_method.values())
    rows = tuple(
        (clean(name, 60), kinds[kind], *(findings[id].answer if id in findings else NONE for id in ids))
        for (kind, name), findings in by_method.items()
    )
    yield parts.Text(" ".join(describe_changes(by_method)))
    yield parts.Table("Findings by method", ("Method", "It", *ids), rows, prose=True)
    yield parts.Note(
        "Each row tests the findings on the cells of one method only. A dash means that the study has no cells for it."
    )


def _show_paper_tables(study: Study) -> Iterator[parts.Part]:
    if tables := build_paper_tables(study):
        note = "The layout is the paper's. Baseline is the original; a dash marks a cell that the study does not have."
        if any(cell.settings["module_map"] != "paper" for cell in study.cells):
            note += (
                " Attention and feed-forward are those of the structural module map; the paper's map differs from it "
                "for BERT and RoBERTa."
            )
        if known := [p for p in study.probes if p.majority is not None]:
            # Shown as above the paper's tables 4 and 5, in the unit of the table.
            in_percent = study.original.family == "masked"
            majorities = ", ".join(f"{clean(p.name, 60)} {_write_accuracy(p.majority, in_percent)}" for p in known)
            note += f" Majority baselines{' in %' * in_percent}: {majorities}."
        if means := [clean(p.name, 60) for p in study.probes if p.average == "macro"]:
            note += f" The accuracy on {join_words(means)} is the mean over relations."
        yield parts.Note(note)
        yield from tables


def _show_cells(study: Study) -> Iterator[parts.Part]:
    yield build_cells_table(study)
    yield parts.Note(_CELLS, drawn=parts.BAR)
    common, names = _find_common_warnings(study), study.name_cells()
    warnings = [(names[cell.key], warning) for cell in study.cells for warning in _list_warnings(study, cell)]
    single = group_by(warnings, lambda each: None if each[1] in common else clean(each[1], 1000))
    if single:
        terms = tuple((", ".join(name for name, _ in of), "", warning) for warning, of in single.items())
        yield parts.Folded("Warnings about single cells", (parts.Terms(terms),))


def _show_failed(cells: Sequence[FailedCell]) -> tuple[parts.Part, ...]:
    terms = tuple((clean(cell.setup, 80), clean(cell.key, 80), clean(cell.why, 1000)) for cell in cells)
    return (parts.Terms(terms),) if terms else ()


def _write_warnings(study: Study) -> tuple[str, ...]:
    warnings = [*warn_of_known(study.known)]
    if study.failed:
        total = len(study.cells) + len(study.failed) + len(study.refused)
        warnings.append(f"{count(len(study.failed))} of {count(total)} cells failed; the reasons are below.")
    for cell in study.cells:
        warnings += _warn_of_text(study, cell)
    warnings += _find_common_warnings(study)
    return tuple(dict.fromkeys(clean(warning, 1000) for warning in warnings))


def _find_common_warnings(study: Study) -> list[str]:
    of_cells = [_list_warnings(study, cell) for cell in study.cells]
    return [w for w in of_cells[0] if all(w in others for others in of_cells)] if of_cells else []


def _list_warnings(study: Study, cell: StudyCell) -> list[str]:
    """Return a cell's warnings, except those on grades, which a study does not show, and on its text, shown above."""
    elsewhere = {*warn_of_grades(cell.comparison.grades), *_warn_of_text(study, cell)}
    return [warning for warning in cell.comparison.warnings if warning not in elsewhere]


def _warn_of_text(study: Study, cell: StudyCell) -> Iterator[str]:
    model = cell.comparison.model
    return warn_of_facts_in_text(study.original, model.in_calibration, (model.calibration or {}).get("source", ""))


def _describe_run(study: Study) -> tuple[parts.Entry, ...]:
    refused = f", {count(len(study.refused))} refused" if study.refused else ""
    probes = []
    for probe in study.probes:
        each = f", each in {count(probe.templates)} wordings" if probe.templates > 1 else ""
        probes.append(f"{clean(probe.name, 60)} ({count_facts(probe.n)}{each})")
    return (
        parts.Entry("Probes", ", ".join(probes) or NONE),
        parts.Entry("Cells", f"{count(len(study.cells))} made, {count(len(study.failed))} failed{refused}"),
    )


def build_paper_tables(study: Study) -> tuple[parts.Table, ...]:
    """Return table 3 (encoder-only, in %), 4 (decoder-only) or 5 (encoder-decoder, shares of 1), for each scheme that
    has cells. "Baseline" is the original; accuracies are averaged by each probe's protocol; missing cells are "-"."""
    family = study.original.family or ""
    in_percent = family == "masked"
    unit = "accuracy in %" if in_percent else "accuracy"
    tables = []
    for scheme in study.list_schemes():
        cells = [study.select_quantized(module).get(scheme) for module in MODULES]
        for module in MODULES:
            by_amount = study.select_pruned(module, scheme=scheme)
            cells += [by_amount.get(amount) for amount in GPQ_AMOUNTS]
        if not any(cells):
            continue
        rows = []
        for probe in study.probes:
            after = [average_accuracy(cell, probe.name) if cell else None for cell in cells]
            written = [_write_accuracy(value, in_percent) for value in (probe.accuracy, *after)]
            rows.append((clean(study.original.name, 60), clean(probe.name, 60), *written))
        caption = f"Table {_TABLES[family]} ({FAMILIES[family]}), {clean(scheme, 60)}, {unit}"
        tables.append(parts.Table(caption, PAPER_COLUMNS, tuple(rows)))
    return tuple(tables)


def _write_accuracy(value: float | None, in_percent: bool) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.3f}" if in_percent else f"{value:.4f}"


def average_accuracy(cell: StudyCell, probe: str) -> float | None:
    """Return the compressed model's accuracy, averaged by the probe's protocol; None if it was not evaluated."""
    return next((parts.get_headline_accuracy(p)[1].value for p in cell.comparison.probes if p.probe == probe), None)


def build_cells_table(study: Study) -> parts.Table:
    """Return every cell, the original on top: settings that vary, what it keeps, accuracies, changes, sizes."""
    settings = [name for name in study.list_varying_settings() if name not in MAIN_SETTINGS]
    columns, kept = _list_columns(study, settings), [cell.comparison.kept for cell in study.cells]
    return parts.make_overview_table("Every cell, and what it keeps", columns, kept, bars_after=1 + len(settings))


def _list_columns(study: Study, settings: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    cells, comparisons = study.cells, [cell.comparison for cell in study.cells]
    yield "Setup", ["original", *study.name_cells().values()]
    for name in settings:
        values = (format_setting(name, cell.settings[name]) if name in cell.settings else "" for cell in cells)
        yield clean(name, 30).replace("_", " ").capitalize(), ["", *values]
    yield "Kept", ["", *(write_estimate(each.kept) for each in comparisons)]
    for probe in study.probes:
        after = (share(average_accuracy(cell, probe.name)) for cell in cells)
        yield parts.name_accuracy(probe.name, probe.average), [share(probe.accuracy), *after]
    original = {f.text: f.original.value for each in comparisons for f in each.texts}
    compressed = [{f.text: f.compressed.value for f in each.texts} for each in comparisons]
    for text in original:
        yield f"Perplexity, {clean(text, 40)}", [write_measurement(e.get(text), 2) for e in (original, *compressed)]
    yield "p", ["", *(parts.write_bare_p(each.certainty.p) for each in comparisons)]
    yield "Pruned", ["", *(_write_millions(cell.totals["pruned"]) for cell in cells)]
    yield "Quantized", ["", *(_write_millions(cell.totals["quantized"]) for cell in cells)]
    yield "Size", [write_size(model.bytes) for model in (study.original, *(each.model for each in comparisons))]
    yield "Sparse size", ["", *(write_size(cell.totals["sparse_bytes"]) for cell in cells)]


def _write_millions(weights: int) -> str:
    """Write a number of weights in millions, always, so that a column can be sorted."""
    return number(weights / 1e6, 1 if weights >= 1e6 else 3) if weights else NONE


def build_comparisons_table(study: Study, findings: Sequence[Finding]) -> parts.Table | None:
    """Return every comparison of two cells behind the findings."""
    names = study.name_cells()
    rows = tuple(
        (
            f"{finding.id} {names[pair.less]} / {names[pair.more]}",
            *map(count, (pair.counts.n, pair.counts.lost, pair.counts.gained)),
            parts.write_bare_p(pair.p),
            "not counted" if pair.at_floor else parts.write_bare_p(pair.p_holm),
            write_estimate(pair.rate, lambda points: number(100 * points)),
            "not counted" if pair.at_floor else parts.write_bare_p(pair.rate_p_holm),
        )
        for finding in findings
        for pair in finding.comparisons
    )
    counts = ("Facts", "Only the first right", "Only the second right", "p", "p (Holm)")
    columns = ("Finding: said to hurt less / more", *counts, "More points lost per million", "p of that (Holm)")
    caption = "Comparisons behind the findings, paired by fact"
    return parts.Table(caption, columns, rows, sortable=True) if rows else None


def build_bounds_table(study: Study, findings: Sequence[Finding]) -> parts.Table | None:
    """Return every figure that a finding compares with a limit."""
    names = study.name_cells()
    rows = []
    for finding in findings:
        for bound in finding.bounds:
            name, p_values = names.get(bound.of, bound.of), map(parts.write_bare_p, (bound.p, finding.p_holm))
            rows.append((f"{finding.id} {name}", write_estimate(bound.value), share(bound.limit), *p_values))
    columns = ("Finding", "Figure (95 %)", "Limit", "p for the limit", "p of the finding (Holm)")
    return parts.Table("Figures compared with a limit", columns, tuple(rows)) if rows else None


SCHEMA = 1


def write_study(study: Study, folder: Path) -> None:
    """Write ``study.html``, ``study.md``, ``study.json``, ``cells.parquet``, ``cells.csv`` and ``figures/*.svg`` into
    an existing folder, each atomically, the page last, in place of those of an earlier state; obsolete figures are
    removed."""
    charts, rows = draw_charts(study), tidy_rows(study)
    write_whole(folder / "cells.csv", to_csv(rows))
    write_whole(folder / "cells.parquet", to_parquet(rows))
    _write_figures(charts, folder / "figures")
    texts = {
        ".json": lambda: dump_json(dump_study(study)),
        ".md": lambda: render_markdown(make_study_page(study)),
        ".html": lambda: render_html(make_study_page(study, charts)),
    }
    write_files(texts, [folder / f"study{suffix}" for suffix in texts], overwrite=True)


def _write_figures(charts: tuple[Chart, ...], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    style = read_source("style.css")
    for chart in charts:
        write_whole(folder / f"{chart.name}.svg", make_standalone(chart.panels, chart.title, style).encode("utf-8"))
    drawn = {chart.name for chart in charts}
    for path in folder.glob("*.svg"):
        if is_chart(path.stem) and path.stem not in drawn:
            path.unlink()


def dump_study(study: Study) -> dict[str, Any]:
    """Return plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order.

    Shares and accuracies lie between 0 and 1, sizes are bytes; unknown values are None; intervals are [low, high],
    95 %. ``cells`` are the rows of the tidy table, one per cell and probe. It contains no text of facts.
    """
    findings, by_method = evaluate_findings(study)
    methods: dict[str, dict[str, Any]] = {}
    for (kind, name), of_method in by_method.items():
        methods.setdefault(kind, {})[name] = {id: _dump_finding(each) for id, each in of_method.items()}
    of_probe = ("n", "average", "accuracy", "majority", "chance", "templates", "protocol", "limit", "seed")
    return {
        "schema": SCHEMA,
        "verdict": summary.write_verdict(study),
        "known": study.known,
        "found": [asdict(each) for each in summary.draw_conclusions(study, findings)],
        "original": dump_model(study.original),
        "probes": {probe.name: {key: getattr(probe, key) for key in of_probe} for probe in study.probes},
        "findings": {finding.id: _dump_finding(finding) for finding in findings},
        "findings_by_method": methods,
        "changes": describe_changes(by_method),
        "hurts_least": [asdict(least) for least in summary.rank_cells(study)["modules"]],
        "cliffs": [asdict(cliff) for cliff in summary.find_cliffs(study)],
        "kept": {cell.key: _dump_kept(cell.comparison) for cell in study.cells},
        "cells": tidy_rows(study),
        "method": list(study.method),
        "versions": dict(study.versions),
        "command": study.command,
    }


def _dump_kept(comparison: Comparison) -> dict[str, Any]:
    sure = comparison.certainty
    return dump_kept(comparison.counts) | {"kept_cluster_interval": dump_interval(sure.kept), "p": sure.p}


def _dump_finding(finding: Finding) -> dict[str, Any]:
    keys = ("claim", "families", "answer", "statistic", "why", "per_million")
    return {
        **{key: getattr(finding, key) for key in keys},
        "comparisons": [_dump_comparison(pair) for pair in finding.comparisons],
        "limits": [
            {"of": b.of, "value": b.value.value, "interval": dump_interval(b.value), "limit": b.limit, "p": b.p}
            for b in finding.bounds
        ],
        "limits_p_holm": finding.p_holm,
    }


def _dump_comparison(pair: CellComparison) -> dict[str, Any]:
    counts = pair.counts
    return {
        "less": pair.less,
        "more": pair.more,
        "part": pair.part,
        "n": counts.n,
        "both": counts.both,
        "only_less": counts.lost,
        "only_more": counts.gained,
        "neither": counts.neither,
        "mcnemar_p": run_mcnemar(counts),
        "p": pair.p,
        "p_holm": pair.p_holm,
        "at_floor": pair.at_floor,
        **estimate_to_json("per_million", pair.rate),
        "per_million_p": pair.rate_p,
        "per_million_p_holm": pair.rate_p_holm,
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as CSV in UTF-8 with a header; None is an empty field, and numbers have all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if rows else COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as a Parquet file; the same rows give the same bytes (by one version of pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else COLUMNS)}
    types = {name: COLUMNS.get(name) or infer_type(values) for name, values in columns.items()}
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])
    written = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), written, compression="zstd")
    return written.getvalue()
