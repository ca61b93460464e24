"""The tables of a study: the paper's (3, 4 and 5) in its layout, all cells, the findings' comparisons, failed cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from compressknow.format import NONE, count, estimate, number, p_value, plain, share, size
from compressknow.report.study.findings import Finding
from compressknow.report.study.records import (
    MODULES,
    Study,
    StudyCell,
    StudyProbe,
    names,
    pruned_and_quantized,
    quantized,
    schemes,
)
from compressknow.report.tables import Table, headline_accuracy
from compressknow.stats.records import Estimate

_SHORT = {"overall": "Overall", "attention": "Att", "feed-forward": "FF"}
_AMOUNTS = (20, 40)
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
    caption = f"Table {place} ({family}), {plain(scheme, 20)}, {unit}"
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
    return next((headline_accuracy(p)[1].value for p in cell.comparison.probes if p.probe == probe), None)


def cells_table(study: Study) -> Table:
    """Every cell: what it keeps, its accuracy by probe, and what it changes and weighs; the original on top."""
    called = names(study)
    columns = (
        "Setup",
        "Kept",
        *(f"Accuracy, {plain(probe.name, 40)}" for probe in study.probes),
        "p",
        "Pruned",
        "Quantized",
        "Size",
        "Sparse size",
    )
    original = (
        "original",
        "",
        *(share(probe.accuracy) for probe in study.probes),
        "",
        "",
        "",
        size(study.original.bytes),
        "",
    )
    return Table(
        "Every cell, and what it keeps",
        columns,
        (original, *(_cell_row(study, cell, called) for cell in study.cells)),
        bars=(None, *(cell.comparison.kept for cell in study.cells)),
        bars_after=1,
        pinned=1,
        sortable=len(study.cells) > 1,
        captioned=False,
    )


def _cell_row(study: Study, cell: StudyCell, called: Mapping[str, str]) -> tuple[str, ...]:
    kept = cell.comparison.kept
    return (
        called[cell.key],
        estimate(kept.value, kept.low, kept.high),
        *(share(accuracy(cell, probe.name)) for probe in study.probes),
        _bare(cell.comparison.p),
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
            estimate(bound.strict.value, bound.strict.low, bound.strict.high),
            share(bound.limit),
        )
        for finding in found
        for bound in finding.bounds
    )
    columns = ("Finding", "Figure (95 %)", "With the interval adjusted", "Limit")
    return Table("Figures held against a limit", columns, rows) if rows else None


def failed_cells(study: Study) -> tuple[tuple[str, str, str], ...]:
    """Cells that could not be made or evaluated: setup, key, and why."""
    return tuple((plain(cell.setup, 80), plain(cell.key, 80), plain(cell.why, 1000)) for cell in study.failed)
