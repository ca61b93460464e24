"""Evaluate the cells of a study, with a folder for each probe's answers, so that a study resumes at the fact."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow._version import __version__
from compressknow.base import reading
from compressknow.base.errors import OutputError, UnsupportedError, UsageError
from compressknow.base.files import LOCK, claim_folder, is_no_folder, write_whole
from compressknow.base.format import count
from compressknow.base.progress import Listener, begin_stages, relabel_progress
from compressknow.base.reading import find_mismatch, hash_json
from compressknow.comparison.records import Estimate, ProbeFigures
from compressknow.compress.steps import Prune, Quantize
from compressknow.engine.identity import describe_variant, locate
from compressknow.engine.language_model import make_language_model
from compressknow.engine.load import load_tokenizer
from compressknow.evaluate.answers import Answers, change_model, is_answers_folder, read_record
from compressknow.evaluate.distributions import Context, Distributions
from compressknow.evaluate.evaluate import Prompts
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.gather import find_facts_in_text
from compressknow.evaluate.grades import RECOGNIZED, apply_reading, merge_wordings
from compressknow.evaluate.handle import ModelHandle, Transformers
from compressknow.evaluate.noise import NoiseFloors
from compressknow.evaluate.records import FactsInText
from compressknow.evaluate.run import count_facts, find_missing, probe_model
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Opened
from compressknow.evaluate.text import RunningText
from compressknow.model.checkpoint import check_is_checkpoint
from compressknow.pages.card.make import compare, describe_method, read_model_facts
from compressknow.pages.parts import get_headline_accuracy
from compressknow.pages.records import Comparison
from compressknow.pages.study.records import FailedCell, Study, StudyCell, StudyProbe
from compressknow.study.grid import Cell

if TYPE_CHECKING:
    from compressknow.compress.convert import VariantMaker


def grade(answers: Answers, known: str) -> Answers:
    """Return one answer per fact, right if the fact is known in this reading, by majority of its wordings. Raises
    CompressknowError if the answers do not record what is ``produced``."""
    return merge_wordings(apply_reading(answers, known))


@dataclass(frozen=True)
class CellResult:
    """Result of a cell: its answers and the original's, or why it has none; `refused` if the model does not support it,
    so that a retry is pointless."""

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
        """Return the result with answers graded in this reading of known; `original` has them graded already."""
        return replace(self, original=original, answers=None if self.answers is None else grade(self.answers, known))

    @cached_property
    def comparison(self) -> Comparison | None:
        """Return the comparison of the answers with the original's, if there are any."""
        return None if self.answers is None else compare(self.original, self.answers, show_facts=False)

    @property
    def kept(self) -> Estimate:
        """Return the share of the original's knowledge that is kept; without a value if there are no answers."""
        return Estimate(None) if self.comparison is None else self.comparison.kept


def build_study(
    original: Answers, results: Sequence[CellResult], *, known: str = RECOGNIZED, command: str | None = None
) -> Study:
    """Return the record of a study, in the order of its grid, from answers that are graded by `known`."""
    has_texts = len({each.cell.recipe.calibration for each in results if each.answers is not None} - {None}) > 1
    cells: list[StudyCell] = []
    failed: list[FailedCell] = []
    refused: list[FailedCell] = []
    for result in results:
        described = _describe_cell(result.cell, has_texts=has_texts)
        if result.answers is None or result.comparison is None:
            (refused if result.refused else failed).append(FailedCell(**described, why=result.why or "unknown"))
            continue
        right = {(answer.probe, answer.fact_id): answer.correct for answer in result.answers.answers}
        correct = {
            probe: tuple(right[probe, answer.fact_id] for answer in original.of(probe))
            for probe in result.answers.probes
            if probe not in result.answers.texts
        }
        plain = result.cell.plain and result.cell.recipe.module_map == results[0].cell.recipe.module_map
        cells.append(StudyCell(**described, plain=plain, comparison=result.comparison, correct=correct))
    comparisons = [cell.comparison for cell in cells]
    figures = {probe.probe: probe for each in reversed(comparisons) for probe in each.probes}
    return Study(
        original=read_model_facts(original.record.model),
        probes=tuple(_build_probe(original, figures[name]) for name in original.probes if name in figures),
        cells=tuple(cells),
        failed=tuple(failed),
        refused=tuple(refused),
        versions=dict(original.record.versions),
        command=command,
        method=describe_method(original, comparisons),
        known=known,
    )


def _describe_cell(cell: Cell, *, has_texts: bool) -> dict[str, Any]:
    """Return the fields on a cell's recipe, with its calibration text if the cells have several."""
    settings, on = cell.settings, ""
    if has_texts and (text := cell.recipe.calibration):
        seed = f", seed {text.seed}" if text.seed else ""
        on = f" on {text.text}, {count(text.tokens)} tokens{seed}"
    calibrated = {type(step) for step in cell.recipe.steps if step.calibrated}
    return {
        "key": cell.key,
        "setup": cell.recipe.setup,
        "settings": settings,
        "scope": "+".join(dict.fromkeys(scope for step in cell.recipe.steps for scope in step.where.scope)),
        "method": settings.get("method"),
        "amount": cell.amount,
        "scheme": settings.get("quantize"),
        "pruning": f"{cell.pruning}{on if Prune in calibrated else ''}" if cell.pruning else None,
        "quantization": f"{cell.quantization}{on if Quantize in calibrated else ''}" if cell.quantization else None,
    }


def _build_probe(original: Answers, figures: ProbeFigures) -> StudyProbe:
    return StudyProbe(
        name=figures.probe,
        n=figures.counts.n,
        average=figures.average,
        accuracy=get_headline_accuracy(figures)[0].value or 0.0,
        majority=figures.majority,
        chance=figures.chance,
        correct=tuple(answer.correct for answer in original.of(figures.probe)),
        relations=tuple(answer.relation for answer in original.of(figures.probe)),
        templates=original.record.probes[figures.probe].templates or 1,
        protocol=figures.protocol,
        limit=figures.limit,
        seed=figures.seed,
    )


RECORD = "sweep.json"
ORIGINAL, CELLS, MODELS, TEXTS = "original", "cells", "models", "calibration"
SCHEMA_VERSION = 1
# Version of the search: the first chose among recipes, the second chooses types by size.
SEARCH = 2
RECORD_FORM = {"schema": int, "version": str, "model": str, "sha256": str, "known?": str, "search?": int}


def check_study_folder(folder: Path) -> None:
    """Raise OutputError if a folder is a file, or holds something that is not a study."""
    if is_no_folder(folder):
        raise OutputError(f"{folder} is a file.", hint="A study is kept in a folder; choose another name.")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    # A run that was killed before it wrote its record leaves only such files.
    if RECORD not in names and any(name != LOCK and not name.startswith(f".{RECORD}.") for name in names):
        raise OutputError(f"{folder} exists already and is not a study.", hint="Choose a new folder for the study.")


@contextmanager
def claim(
    folder: Path, original: ModelHandle, known: str | None = None, probes: Sequence[Opened] = ()
) -> Iterator[None]:
    """Lock a folder for a study of this model: a new one, or one with an earlier run of the study. A search passes what
    counts as `known`, which decides what it tries, and a sweep its probes. Raises OutputError if the folder is a file,
    is in use, or holds something else: a study of another model or version, or on other facts of a probe; an older
    search, or one with another reading of known."""
    check_study_folder(folder)
    record = folder / RECORD
    with claim_folder(folder, wait=False, worthless=(RECORD,)):
        values = {"schema": SCHEMA_VERSION, "version": __version__}
        values |= {"model": original.located.name, "sha256": original.sha256}
        values |= {"known": known, "search": SEARCH} if known else {}
        if record.is_file():
            _check_record(record, values)
            for probe in probes:
                _check_probe(folder, original, probe)
        else:
            write_whole(record, (json.dumps(values, indent=1) + "\n").encode())
        yield


def _check_record(record: Path, values: Mapping[str, object]) -> None:
    """Raise OutputError if a record cannot be read, or is that of another study than `values`."""
    try:
        stored = reading.read_json(record, reading.RECORD)
    except (OSError, ValueError) as error:
        raise OutputError(f"{record} cannot be read: {error}.", hint="Choose a new folder for the study.") from None
    if wrong := find_mismatch(stored, RECORD_FORM):
        raise OutputError(f"{record} is damaged: {wrong}.", hint="Choose a new folder for the study.")
    what, why, hint, known = "", None, "Choose a new folder", stored.get("known", RECOGNIZED)
    version = f"{stored['version']}, this is {values['version']}"
    if stored.get("search") != values.get("search"):
        kind = "an older search" if "search" in values else "a search"
        what = f"of {kind if 'known' in stored else 'a sweep'}: nothing was changed"
    elif stored["sha256"] != values["sha256"]:
        what, why = f"a study of another model ({stored['model']})", "Or the model's files have changed since then."
    elif any(stored[key] != values[key] for key in ("version", "schema")):
        what, why = f"a study by another version ({version})", "Cells of two versions could not be compared."
        hint += ", or continue with that version"
    elif values.get("known", known) != known:
        what, why = f"a search by --known {known}", "What counts as known decides what a search tries."
        hint += f", or pass --known {known}"
    if what:
        raise OutputError(f"{record.parent} is {what}.", why, f"{hint}.")


def _check_probe(folder: Path, original: ModelHandle, probe: Opened) -> None:
    """Raise OutputError if a study has the original's answers to other facts of a probe, or with other settings: all
    its answers would be replaced, one cell after the other."""
    place = folder / ORIGINAL / name_folder(probe.name)
    if not find_missing(original, [probe], place, Context()) or not is_answers_folder(place):
        return
    stored = read_record(place)
    if entry := stored.probes.get(probe.name):
        made = [f"--limit {entry.limit}, --seed {entry.seed}"] if entry.limit else []
        made += [f"--templates {entry.templates}"] if entry.templates else []
        text = entry.text
        made += [f"{text['chunks']} chunks of {text['context']} tokens" if text else f"{count(entry.asked)} prompts"]
        ran = f"on {stored.model.device} in {stored.model.computed_in}, transformers {stored.versions['transformers']}"
        raise OutputError(
            f"{folder} is a study with other facts or settings of {probe.name}: nothing was changed.",
            f"It was made with {', '.join(made)}, {ran}. The facts, or --batch-size, may differ too.",
            "Choose a new folder, or repeat the options that it was made with; another --grid is possible.",
        )


# Adds to the original's answers what another precision or runtime alone changes.
AddNoiseFloor = Callable[[NoiseFloors, Sequence[Opened], Answers], Answers]


class StudyModel:
    """Original of a study, opened once, from which all cells are made and evaluated. The folder `keep_in` keeps its
    distributions for cells that this process evaluates, `texts` the calibration texts for a resumed study, and `models`
    the checkpoints of cells, if they are to be saved."""

    def __init__(
        self,
        model: str | Path,
        settings: Settings,
        *,
        revision: str | None = None,
        keep_in: Path | None = None,
        texts: Path | None = None,
        models: Path | None = None,
    ) -> None:
        located = locate(model, revision)
        check_is_checkpoint(model)
        self.original, self._trusted = ModelHandle(located, settings), settings.trust_remote_code
        # Prompts by the probe's content (a search splits a probe), because all cells read the same tokens.
        self.prompts: dict[str, Prompts] = {}
        self._texts, self._models = texts, models
        self._in_text: dict[str, FactsInText | None] = {}
        self._distributions = Distributions(self.original, keep_in) if keep_in else None
        self.tokenizer = cache(lambda: load_tokenizer(located.path, trust_remote_code=settings.trust_remote_code))

    @property
    def source(self) -> tuple[str | Path, str | None]:
        """Return what reopens the original under its name: its Hub id and commit, or its path and None."""
        located = self.original.located
        return located.name if located.revision else located.path, located.revision

    @cached_property
    def maker(self) -> VariantMaker:
        """Return the maker of cells, opened on first use because it needs torch."""
        from compressknow.compress.convert import VariantMaker

        return VariantMaker(*self.source, trust_remote_code=self._trusted, texts=self._texts)

    def close(self) -> None:
        """Free the disk space of the original's distributions."""
        if self._distributions:
            self._distributions.close()

    def evaluate(
        self,
        handle: ModelHandle,
        probes: Sequence[Opened],
        folder: Path,
        reference: Answers | None,
        on_progress: Listener | None = None,
        *,
        noise_floors: Collection[AddNoiseFloor] = (),
        whole: bool = True,
    ) -> Answers:
        """Return the answers, stored in `folder`, of the original (with these noise floors) or of a model made from it.
        If `whole`, the original's distributions are kept, and those of other models compared with them."""
        distributions = self._distributions if whole else None
        context = Context(reference, distributions=distributions)
        on_progress = relabel_progress(on_progress, facts=count_facts(probes))
        places = {probe.name: folder / name_folder(probe.name) for probe in probes}
        if distributions and reference:
            # Before the cell is loaded, so that the original is not in memory at the same time.
            facts = [probe for probe in probes if isinstance(probe, Probe | RunningText)]
            missing = [probe for probe in facts if find_missing(handle, [probe], places[probe.name], context)]
            distributions.complete(missing, reference, on_progress)
        try:
            parts = [
                probe_model(handle, [each], places[each.name], context, on_progress=on_progress) for each in probes
            ]
            for add in noise_floors:
                for place, each in enumerate(probes):
                    floors = NoiseFloors(handle, places[each.name], on_progress, distributions)
                    parts[place] = add(floors, [each], parts[place])
            entries = {name: entry for part in parts for name, entry in part.record.probes.items()}
            texts = {name: chunks for part in parts for name, chunks in part.texts.items()}
            rows = tuple(answer for part in parts for answer in part.answers)
            return Answers(replace(parts[0].record, probes=entries), rows, texts)
        finally:
            handle.release()

    def evaluate_cell(
        self, cell: Cell, probes: Sequence[Opened], cells: Path, reference: Answers, on_progress: Listener | None = None
    ) -> Answers:
        """Return a cell's answers, stored below `cells`. Raises CompressknowError if it cannot be made or run."""
        handle = CellHandle(self, cell, on_progress)
        return self.evaluate(handle, probes, cells / self.name_folder(cell), reference, on_progress)

    def is_answered(self, cell: Cell, probe: Opened, cells: Path, reference: Answers) -> bool:
        """Return whether `evaluate_cell` would find the answers to this probe below `cells`."""
        folder = cells / self.name_folder(cell) / name_folder(probe.name)
        return not find_missing(CellHandle(self, cell), [probe], folder, Context(reference))

    def add_facts_in_text(self, result: CellResult) -> CellResult:
        """Add to a cell's result the facts that appear in its calibration text, if that is available."""
        answers = result.answers
        if answers is None or (calibration := answers.record.model.calibration) is None:
            return result
        sha256 = calibration["sha256"]
        if sha256 not in self._in_text:
            # Once per text, which may be long; the facts are the same for all cells.
            self._in_text[sha256] = find_facts_in_text(calibration, self.original, result.original)
        return replace(result, answers=change_model(answers, in_calibration=self._in_text[sha256]))

    def save(self, cell: Cell, on_progress: Listener | None) -> Path | None:
        """Write a cell's checkpoint unless it exists, and return its folder; None if checkpoints are not saved."""
        from compressknow.pages.model_card import make_model_card

        folder = self._models and self._models / self.name_folder(cell)
        if folder and not folder.exists():
            self.maker.write(cell.recipe, folder, make_model_card, begin_stages(on_progress, cell.key))
        return folder

    def name_folder(self, cell: Cell) -> str:
        """Return a name for a cell's folder, with a hash: an earlier grid may have used its key for another recipe."""
        return f"{cell.key}-{CellHandle(self, cell).sha256[:8]}"


def name_folder(probe: str) -> str:
    """Return the name of the folder with the answers to a probe: readable and unique.

    >>> name_folder("lama:trex")
    'lama-trex-18e0'
    """
    digest = hashlib.sha256(probe.encode()).hexdigest()[:4]
    # File names have at most 255 bytes.
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', probe).strip('-.')[:240]}-{digest}"


class CellHandle(ModelHandle):
    """Original of a study, converted by a cell's recipe."""

    def __init__(self, study_model: StudyModel, cell: Cell, on_progress: Listener | None = None) -> None:
        original = study_model.original
        super().__init__(replace(original.located, name=cell.key, revision=None), original.settings)
        self.contents = original.contents
        self._study_model, self._cell = study_model, cell
        self._on_progress = on_progress
        self._described: dict[str, Any] = {}

    @cached_property
    def sha256(self) -> str:
        """Return a hash of what the model is made from, because it has no files."""
        cell = self._cell
        parts = [__version__, self.contents.sha256, cell.recipe.to_dict(), *filter(None, [cell.text_sha256])]
        return hash_json(parts)

    @cached_property
    def loaded(self) -> Transformers:
        maker, tokenizer, settings = self._study_model.maker, self._study_model.tokenizer, self.settings
        try:
            plan = maker.plan(self._cell.recipe)
        except UsageError as error:
            # Another model may have the scope that this one lacks: the grid is valid, but not this cell.
            raise UnsupportedError(error.what, error.why, error.hint) from error
        # Evaluate the saved checkpoint, if any: making it twice may take twice as long.
        folder = self._study_model.save(self._cell, self._on_progress)
        variant = maker.read(folder) if folder else maker.make(plan, begin_stages(self._on_progress, self._cell.key))
        self._described = describe_variant(self._cell.key, variant)
        made = make_language_model(variant, tokenizer(), device=settings.device, dtype=settings.computed_in)
        return Transformers(self.located, settings, made)

    def make_prompts(self, probe: Probe) -> Prompts:
        made, name = self._study_model.prompts, probe.fingerprint()
        if name not in made:
            made[name] = super().make_prompts(probe)
        prompts = made[name]
        prompts.scorer.model = self.loaded.language_model.model
        return prompts

    def release(self) -> None:
        super().release()
        for prompts in self._study_model.prompts.values():
            # Otherwise the model would stay in memory along with the next one.
            prompts.scorer.release()

    def describe(self) -> dict[str, Any]:
        return self._described
