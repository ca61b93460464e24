"""The folder of a study and what its cells came to: of one model and one version, in use by one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from compressknow._version import __version__
from compressknow.base import reading
from compressknow.base.errors import OutputError
from compressknow.base.files import LOCK, is_no_folder, own_folder, write_whole
from compressknow.base.format import count
from compressknow.base.reading import misfit
from compressknow.comparison.intervals import proportion
from compressknow.comparison.records import Estimate, ProbeFigures
from compressknow.compress.steps import Calibration, Prune, Quantize
from compressknow.evaluate.answers import Answer, Answers
from compressknow.evaluate.grades import RECOGNIZED, by_majority, known_as
from compressknow.evaluate.handle import ModelHandle
from compressknow.pages.card.make import compare, read_model_facts
from compressknow.pages.card.method import describe_method
from compressknow.pages.records import Comparison
from compressknow.pages.study.records import FailedCell, Study, StudyCell, StudyProbe
from compressknow.study.grid import Cell


def judged(answers: Answers, known: str) -> Answers:
    """One answer a fact, right where the fact is known in this reading; of several wordings by majority.

    Raises CompressknowError where the answers do not tell what is ``produced``.
    """
    return by_majority(known_as(answers, known))


@dataclass(frozen=True)
class CellResult:
    """What came of a cell: its answers beside the original's, or why there are none; `refused` where the model cannot
    have it, and trying again changes nothing."""

    cell: Cell
    original: Answers = field(repr=False)
    answers: Answers | None = field(default=None, repr=False)
    why: str | None = None
    refused: bool = False

    @property
    def setup(self) -> str:
        """The paper's name of what was done, such as ``Att_GPQ 20%``."""
        return self.cell.recipe.setup

    def judged(self, original: Answers, known: str) -> CellResult:
        """The same by fact, in this reading of known, beside the original's answers so judged."""
        return replace(self, original=original, answers=None if self.answers is None else judged(self.answers, known))

    @property
    def kept(self) -> Estimate:
        """The share of the original's knowledge that is kept; without a value where there are no answers."""
        if self.answers is None:
            return Estimate(None)
        knew = {(answer.probe, answer.fact_id) for answer in self.original.answers if answer.correct}
        right = [answer for answer in self.answers.answers if answer.correct]
        return proportion(sum((answer.probe, answer.fact_id) in knew for answer in right), len(knew))


def study_of(
    original: Answers, results: Sequence[CellResult], *, known: str = RECOGNIZED, command: str | None = None
) -> Study:
    """The records of a study, in the order of its grid, of answers that are `judged` so."""
    made = [result.cell for result in results if result.answers is not None]
    texts = {cell.recipe.calibration for cell in made} - {None}
    cells = tuple(
        study_cell(original, r.cell, r.answers, several_texts=len(texts) > 1) for r in results if r.answers is not None
    )
    without = [result for result in results if result.answers is None]
    lacking = [(r.refused, FailedCell(r.cell.key, r.setup, r.why or "unknown")) for r in without]
    comparisons = [cell.comparison for cell in cells]
    return Study(
        original=read_model_facts(original.record.model),
        probes=_probes(original, comparisons),
        cells=cells,
        failed=tuple(cell for refused, cell in lacking if not refused),
        refused=tuple(cell for refused, cell in lacking if refused),
        versions=dict(original.record.versions),
        command=command,
        method=describe_method(original, comparisons),
        known=known,
    )


def study_cell(original: Answers, cell: Cell, answers: Answers, *, several_texts: bool = False) -> StudyCell:
    """A cell's record, all figures included; with the calibration text told wherever there are several."""
    totals, steps = answers.record.model.totals, cell.recipe.steps
    prune = next((step for step in steps if isinstance(step, Prune)), None)
    quantize = next((step for step in steps if isinstance(step, Quantize)), None)
    text = _in_words(cell.recipe.calibration)
    on = f" on {text}" if text and several_texts else ""
    return StudyCell(
        key=cell.key,
        setup=cell.recipe.setup,
        scope="+".join(dict.fromkeys(scope for step in steps for scope in step.where.scope)),
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
        correct={p: _correct(answers, p, original.of(p)) for p in answers.probes if p not in answers.texts},
    )


def _in_words(calibration: Calibration | None) -> str | None:
    """Text, tokens and, where it is not the usual one, the seed."""
    if calibration is None:
        return None
    seed = f", seed {calibration.seed}" if calibration.seed else ""
    return f"{calibration.text}, {count(calibration.tokens)} tokens{seed}"


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
        relations=tuple(answer.relation for answer in original.of(figures.probe)),
        templates=original.record.probes[figures.probe].templates or 1,
    )


RECORD = "sweep.json"
ORIGINAL, CELLS, MODELS, TEXTS = "original", "cells", "models", "calibration"
SCHEMA_VERSION = 1
# How a search chooses: the first chose among recipes, the second chooses types by size.
SEARCH = 2
RECORD_FORM = {"schema": int, "version": str, "model": str, "sha256": str, "known?": str, "search?": int}


def refuse_foreign(folder: Path) -> None:
    """Raise OutputError where a folder is a file, or holds something that is no study."""
    if is_no_folder(folder):
        raise OutputError(f"{folder} is a file.", hint="A study is kept in a folder; choose another name.")
    if _foreign(folder):
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
    refuse_foreign(folder)
    record = folder / RECORD
    with own_folder(folder, wait=False, worthless=(RECORD,)):
        said = {"schema": SCHEMA_VERSION, "version": __version__, **_identity(original)}
        said |= {"known": known, "search": search} if search else {}
        if record.is_file():
            _refuse_other(record, said)
        else:
            write_whole(record, (json.dumps(said, indent=1) + "\n").encode())
        yield


def _foreign(folder: Path) -> bool:
    """Whether a folder is neither a study nor what is left of a run that was killed before it wrote its record."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return RECORD not in names and any(name != LOCK and not name.startswith(f".{RECORD}.") for name in names)


def _identity(original: ModelHandle) -> dict[str, str]:
    return {"model": original.located.name, "sha256": original.sha256}


def _refuse_other(record: Path, said: Mapping[str, object]) -> None:
    try:
        found = reading.read_json(record, reading.RECORD)
    except (OSError, ValueError) as error:
        raise OutputError(f"{record} cannot be read: {error}.", hint="Choose a new folder for the study.") from None
    if wrong := misfit(found, RECORD_FORM):
        raise OutputError(f"{record} is damaged: {wrong}.", hint="Choose a new folder for the study.")
    if found.get("search") != said.get("search"):
        what = (
            "an older search"
            if "known" in found and "search" in said
            else "a search"
            if "known" in found
            else "a sweep"
        )
        raise OutputError(f"{record.parent} is of {what}: nothing was changed.", hint="Choose a new folder.")
    differs = next((key for key in ("sha256", "version", "schema") if found[key] != said[key]), None)
    if differs == "sha256":
        raise OutputError(
            f"{record.parent} is a study of another model ({found.get('model')}).",
            why="Or the model's files have changed since then.",
            hint="Choose a new folder for the study.",
        )
    if differs:
        raise OutputError(
            f"{record.parent} is a study by another version ({found['version']}, this is {said['version']}).",
            why="Cells of two versions could not be compared.",
            hint="Choose a new folder for the study, or go on with that version.",
        )
    counted = found.get("known", RECOGNIZED)
    if said.get("known", counted) != counted:
        raise OutputError(
            f"{record.parent} is a search by --known {counted}.",
            why="What counts as known decides what a search tries, and which facts it was held to.",
            hint=f"Choose a new folder for the search, or give --known {counted}.",
        )
