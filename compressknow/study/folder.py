"""Folder of a study, of one model and one version, in use by one run; and what its cells came to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from compressknow._version import __version__
from compressknow.base import reading
from compressknow.base.errors import OutputError
from compressknow.base.files import LOCK, claim_folder, is_no_folder, write_whole
from compressknow.base.format import count
from compressknow.base.reading import find_mismatch
from compressknow.comparison.intervals import proportion
from compressknow.comparison.records import Estimate, ProbeFigures
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.grades import RECOGNIZED, apply_reading, merge_wordings
from compressknow.evaluate.handle import ModelHandle
from compressknow.pages.card.make import compare, read_model_facts
from compressknow.pages.card.method import describe_method
from compressknow.pages.study.records import FailedCell, Study, StudyCell, StudyProbe
from compressknow.study.grid import Cell


def grade(answers: Answers, known: str) -> Answers:
    """Return one answer per fact, right where the fact is known in this reading; of several wordings by majority.

    Raises CompressknowError where the answers do not tell what is ``produced``.
    """
    return merge_wordings(apply_reading(answers, known))


@dataclass(frozen=True)
class CellResult:
    """Result of a cell: its answers beside the original's, or why there are none; `refused` where the model cannot have
    it, and trying again changes nothing."""

    cell: Cell
    original: Answers = field(repr=False)
    answers: Answers | None = field(default=None, repr=False)
    why: str | None = None
    refused: bool = False

    @property
    def setup(self) -> str:
        """Return the paper's name of what was done, such as ``Att_GPQ 20%``."""
        return self.cell.recipe.setup

    def grade(self, original: Answers, known: str) -> CellResult:
        """Return the same by fact, in this reading of known, beside the original's answers so graded."""
        return replace(self, original=original, answers=None if self.answers is None else grade(self.answers, known))

    @property
    def kept(self) -> Estimate:
        """Return the share of the original's knowledge that is kept; without a value where there are no answers."""
        if self.answers is None:
            return Estimate(None)
        knew = {(answer.probe, answer.fact_id) for answer in self.original.answers if answer.correct}
        right = [answer for answer in self.answers.answers if answer.correct]
        return proportion(sum((answer.probe, answer.fact_id) in knew for answer in right), len(knew))


def build_study(
    original: Answers, results: Sequence[CellResult], *, known: str = RECOGNIZED, command: str | None = None
) -> Study:
    """Return the records of a study, in the order of its grid, of answers that are graded so."""
    answered = [(result.cell, result.answers) for result in results if result.answers is not None]
    has_texts = len({cell.recipe.calibration for cell, _ in answered} - {None}) > 1
    cells = tuple(_build_cell(original, cell, answers, has_texts=has_texts) for cell, answers in answered)
    lacking: dict[bool, list[FailedCell]] = {True: [], False: []}
    for result in results:
        if result.answers is None:
            lacking[result.refused].append(FailedCell(result.cell.key, result.setup, result.why or "unknown"))
    comparisons = [cell.comparison for cell in cells]
    figures = {probe.probe: probe for each in reversed(comparisons) for probe in each.probes}
    return Study(
        original=read_model_facts(original.record.model),
        probes=tuple(_build_probe(original, figures[name]) for name in original.probes if name in figures),
        cells=cells,
        failed=tuple(lacking[False]),
        refused=tuple(lacking[True]),
        versions=dict(original.record.versions),
        command=command,
        method=describe_method(original, comparisons),
        known=known,
    )


def _build_cell(original: Answers, cell: Cell, answers: Answers, *, has_texts: bool) -> StudyCell:
    """Return a cell's record, all figures included; with its calibration text where cells have several."""
    totals, prune, quantize = answers.record.model.totals, cell.prune, cell.quantize
    on = ""
    if has_texts and (text := cell.recipe.calibration):
        seed = f", seed {text.seed}" if text.seed else ""
        on = f" on {text.text}, {count(text.tokens)} tokens{seed}"
    return StudyCell(
        key=cell.key,
        setup=cell.recipe.setup,
        scope="+".join(dict.fromkeys(scope for step in cell.recipe.steps for scope in step.where.scope)),
        method=prune.method if prune else None,
        amount=prune.amount if prune else None,
        scheme=quantize.scheme if quantize else None,
        pruning=f"{cell.pruning}{on if prune and prune.calibrated else ''}" if prune else None,
        quantization=f"{cell.quantization}{on if quantize and quantize.calibrated else ''}" if quantize else None,
        settings=cell.settings,
        plain=cell.plain,
        in_scope=totals["in_scope"],
        pruned=totals["pruned"],
        quantized=totals["quantized"],
        nonzero=totals["nonzero"],
        bytes=answers.record.model.bytes or 0,
        sparse_bytes=totals["sparse_bytes"],
        comparison=compare(original, answers, show_facts=False),
        correct={p: _list_correct(answers, original, p) for p in answers.probes if p not in answers.texts},
    )


def _list_correct(answers: Answers, original: Answers, probe: str) -> tuple[bool, ...]:
    """Return which facts are right, in the order of the original's answers."""
    right = {answer.fact_id: answer.correct for answer in answers.of(probe)}
    return tuple(right[answer.fact_id] for answer in original.of(probe))


def _build_probe(original: Answers, figures: ProbeFigures) -> StudyProbe:
    accuracy = figures.macro_original if figures.average == "macro" else figures.accuracy_original
    return StudyProbe(
        name=figures.probe,
        n=figures.counts.n,
        average=figures.average,
        accuracy=accuracy.value or 0.0,
        majority=figures.majority,
        chance=figures.chance,
        correct=tuple(answer.correct for answer in original.of(figures.probe)),
        relations=tuple(answer.relation for answer in original.of(figures.probe)),
        templates=original.record.probes[figures.probe].templates or 1,
    )


RECORD = "sweep.json"
ORIGINAL, CELLS, MODELS, TEXTS = "original", "cells", "models", "calibration"
SCHEMA_VERSION = 1
# How a search chooses: the first chose among recipes, the second chooses types by size.
SEARCH = 2
RECORD_FORM = {"schema": int, "version": str, "model": str, "sha256": str, "known?": str, "search?": int}


def check_study_folder(folder: Path) -> None:
    """Raise OutputError where a folder is a file, or holds something that is no study."""
    if is_no_folder(folder):
        raise OutputError(f"{folder} is a file.", hint="A study is kept in a folder; choose another name.")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    # A run that was killed before it wrote its record leaves these.
    if RECORD not in names and any(name != LOCK and not name.startswith(f".{RECORD}.") for name in names):
        raise OutputError(f"{folder} exists already, and is no study.", hint="Choose a new folder for the study.")


@contextmanager
def claim(folder: Path, original: ModelHandle, known: str | None = None, search: int | None = None) -> Iterator[None]:
    """Take a folder for a study of this model: a new one, or one that holds such a study already.

    Parameters
    ----------
    known : of a search, what counts as known: that decides what it tries.
    search : of a search, `SEARCH`.

    Raises OutputError where it is a file, holds something else, a study of another model or version, an older search or
    one by another reading of known, or is in use.
    """
    check_study_folder(folder)
    record = folder / RECORD
    with claim_folder(folder, wait=False, worthless=(RECORD,)):
        values = {"schema": SCHEMA_VERSION, "version": __version__}
        values |= {"model": original.located.name, "sha256": original.sha256}
        values |= {"known": known, "search": search} if search else {}
        if record.is_file():
            _check_record(record, values)
        else:
            write_whole(record, (json.dumps(values, indent=1) + "\n").encode())
        yield


def _check_record(record: Path, values: Mapping[str, object]) -> None:
    """Raise OutputError where a record cannot be read, or is of another study than `values`."""
    try:
        stored = reading.read_json(record, reading.RECORD)
    except (OSError, ValueError) as error:
        raise OutputError(f"{record} cannot be read: {error}.", hint="Choose a new folder for the study.") from None
    if wrong := find_mismatch(stored, RECORD_FORM):
        raise OutputError(f"{record} is damaged: {wrong}.", hint="Choose a new folder for the study.")
    if stored.get("search") != values.get("search"):
        kind = "a sweep"
        if "known" in stored:
            kind = "an older search" if "search" in values else "a search"
        raise OutputError(f"{record.parent} is of {kind}: nothing was changed.", hint="Choose a new folder.")
    if stored["sha256"] != values["sha256"]:
        raise OutputError(
            f"{record.parent} is a study of another model ({stored['model']}).",
            why="Or the model's files have changed since then.",
            hint="Choose a new folder for the study.",
        )
    if any(stored[key] != values[key] for key in ("version", "schema")):
        raise OutputError(
            f"{record.parent} is a study by another version ({stored['version']}, this is {values['version']}).",
            why="Cells of two versions could not be compared.",
            hint="Choose a new folder for the study, or go on with that version.",
        )
    known = stored.get("known", RECOGNIZED)
    if values.get("known", known) != known:
        raise OutputError(
            f"{record.parent} is a search by --known {known}.",
            why="What counts as known decides what a search tries, and which facts it was held to.",
            hint=f"Choose a new folder for the search, or give --known {known}.",
        )
