"""From the answers of a study to the records that its page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressknow.compress.recipe import Prune, Quantize
from compressknow.probe.answers import Answer, Answers
from compressknow.report.card.make import compare, method_of, model_facts
from compressknow.report.records import Comparison, ProbeFigures
from compressknow.report.study.records import FailedCell, Study, StudyCell, StudyProbe
from compressknow.study.grid import Cell


@dataclass(frozen=True)
class CellResult:
    """What came of a cell: its answers, or why there are none."""

    cell: Cell
    answers: Answers | None = None
    why: str | None = None


def study_of(original: Answers, results: Sequence[CellResult], *, command: str | None = None) -> Study:
    """The records of a study, in the order of its grid."""
    cells = tuple(study_cell(original, r.cell, r.answers) for r in results if r.answers is not None)
    failed = tuple(
        FailedCell(r.cell.key, r.cell.recipe.setup, r.why or "unknown") for r in results if r.answers is None
    )
    comparisons = [cell.comparison for cell in cells]
    return Study(
        original=model_facts(original.record["model"]),
        probes=_probes(original, comparisons),
        cells=cells,
        failed=failed,
        versions=dict(original.record["versions"]),
        command=command,
        method=method_of(original, comparisons),
    )


def study_cell(original: Answers, cell: Cell, answers: Answers) -> StudyCell:
    """A cell's record, all figures included."""
    totals, steps = answers.record["model"]["totals"], cell.recipe.steps
    prune = next((step for step in steps if isinstance(step, Prune)), None)
    quantize = next((step for step in steps if isinstance(step, Quantize)), None)
    return StudyCell(
        key=cell.key,
        setup=cell.recipe.setup,
        scope="+".join(dict.fromkeys(scope for step in steps for scope in step.where.scope)),
        method=prune.method if prune else None,
        amount=prune.amount if prune else None,
        scheme=quantize.scheme if quantize else None,
        plain=cell.plain,
        in_scope=totals["in_scope"],
        pruned=totals["pruned"],
        quantized=totals["quantized"],
        nonzero=totals["nonzero"],
        bytes=answers.record["model"]["bytes"],
        sparse_bytes=totals["sparse_bytes"],
        comparison=compare(original, answers, show_facts=False),
        correct={probe: _correct(answers, probe, original.of(probe)) for probe in answers.probes},
    )


def _correct(answers: Answers, probe: str, order: Sequence[Answer]) -> tuple[bool, ...]:
    """By fact, in the order of the original's answers."""
    right = {answer.fact_id: answer.correct for answer in answers.of(probe)}
    return tuple(right[answer.fact_id] for answer in order)


def _probes(original: Answers, comparisons: Sequence[Comparison]) -> tuple[StudyProbe, ...]:
    figures: dict[str, ProbeFigures] = {p.probe: p for c in reversed(comparisons) for p in c.probes}
    return tuple(_probe(original, figures[name]) for name in original.probes if name in figures)


def _probe(original: Answers, figures: ProbeFigures) -> StudyProbe:
    accuracy = figures.macro_original if figures.average == "macro" else figures.accuracy_original
    return StudyProbe(
        name=figures.probe,
        n=figures.counts.n,
        average=figures.average,
        accuracy=accuracy.value or 0.0,
        majority=figures.majority,
        chance=figures.chance,
        correct=tuple(answer.correct for answer in original.of(figures.probe)),
    )
