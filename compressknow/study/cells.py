"""Evaluate the cells of a study: each probe's answers in a folder of its own, so that a study resumes to the fact."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressknow._version import __version__
from compressknow.base.errors import CompressknowError
from compressknow.base.progress import Listener, relabel_progress
from compressknow.engine.identity import describe_variant, locate
from compressknow.engine.language_model import language_model_of
from compressknow.engine.load import load_tokenizer
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.distributions import Context, Distributions
from compressknow.evaluate.evaluate import Prompts
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.noise import add_noise_floor, add_runtime_noise_floor
from compressknow.evaluate.run import count_facts, find_missing, is_answered, probe_model
from compressknow.evaluate.runtimes import LoadedInTransformers, Settings
from compressknow.evaluate.sources import Opened
from compressknow.evaluate.text import RunningText
from compressknow.model.checkpoint import build_server_error
from compressknow.study.grid import Cell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compressknow.compress.convert import VariantMaker


# What else the original is run in, to see what that alone changes.
NoiseFloor = Literal["precision", "runtime"]
_PRECISION: tuple[NoiseFloor, ...] = ("precision",)
_NOISE = {"precision": add_noise_floor, "runtime": add_runtime_noise_floor}


class StudyModel:
    """Original of a study, found and opened once: it, and every cell, is evaluated from here.

    Parameters
    ----------
    keep_in : a folder on the disk that keeps the original's distributions for cells that are evaluated in this process;
        None where there are none.
    texts : a folder that keeps calibration texts, so that a study that resumes reads the same.
    """

    def __init__(
        self,
        model: str | Path,
        settings: Settings,
        *,
        revision: str | None = None,
        keep_in: Path | None = None,
        texts: Path | None = None,
    ) -> None:
        located = locate(model, revision)
        if located.url is not None:
            raise build_server_error(model)
        if located.path.suffix == ".gguf":
            raise CompressknowError(
                f"{model} is a GGUF file: it is quantized already, and cannot be converted.",
                hint="Give the checkpoint folder that it was made from.",
            )
        self.original, self._trusted = ModelHandle(located, settings), settings.trust_remote_code
        self._written: dict[str, Prompts] = {}
        self._texts = texts
        self._whole = Distributions(self.original, keep_in) if keep_in else None
        self.tokenizer = cache(lambda: load_tokenizer(located.path, trust_remote_code=settings.trust_remote_code))

    @cached_property
    def maker(self) -> VariantMaker:
        """Return the maker of cells; it is opened when it is first needed, for it needs torch."""
        from compressknow.compress.convert import VariantMaker

        return VariantMaker(self.original.located.path, trust_remote_code=self._trusted, texts=self._texts)

    def close(self) -> None:
        """Give back the disk that the original's distributions take."""
        if self._whole:
            self._whole.close()

    def evaluate_original(
        self,
        probes: Sequence[Opened],
        folder: Path,
        on_progress: Listener | None = None,
        *,
        noise_floors: Collection[NoiseFloor] = _PRECISION,
        whole: bool = True,
    ) -> Answers:
        """Return the original's answers, kept in `folder`, with these noise floors; `whole`, with its distributions
        kept for what is compared with it."""
        return self.evaluate(self.original, probes, folder, None, on_progress, noise_floors=noise_floors, whole=whole)

    def evaluate(
        self,
        handle: ModelHandle,
        probes: Sequence[Opened],
        folder: Path,
        reference: Answers | None,
        on_progress: Listener | None = None,
        *,
        noise_floors: Collection[NoiseFloor] = (),
        whole: bool = True,
    ) -> Answers:
        """Return the answers of the original, or of a model that was made of it, kept in `folder`."""
        distributions = self._whole if whole else None
        context = Context(reference, whole=distributions)
        on_progress = relabel_progress(on_progress, facts=count_facts(probes))
        places = {probe.name: folder / name_folder(probe.name) for probe in probes}
        if distributions and reference:
            # Before the first is evaluated: then the original need not be in memory beside the cell.
            facts = [probe for probe in probes if isinstance(probe, Probe | RunningText)]
            missing = [probe for probe in facts if find_missing(handle, [probe], places[probe.name], context)]
            distributions.complete(missing, reference, on_progress)
        try:
            parts = [
                probe_model(handle, [each], places[each.name], context, on_progress=on_progress) for each in probes
            ]
            for name in noise_floors:
                parts = [
                    _NOISE[name](handle, [probe], answers, places[probe.name], on_progress, whole=distributions)
                    for probe, answers in zip(probes, parts, strict=True)
                ]
            entries = {name: entry for part in parts for name, entry in part.record.probes.items()}
            texts = {name: chunks for part in parts for name, chunks in part.texts.items()}
            rows = tuple(answer for part in parts for answer in part.answers)
            return Answers(replace(parts[0].record, probes=entries), rows, texts)
        finally:
            handle.release()

    def evaluate_cell(
        self,
        cell: Cell,
        probes: Sequence[Opened],
        cells: Path,
        reference: Answers,
        on_progress: Listener | None = None,
    ) -> Answers:
        """Return a cell's answers, kept below `cells`. Raises CompressknowError where it cannot be made or run."""
        return self.evaluate(self._handle(cell), probes, cells / self.name_folder(cell), reference, on_progress)

    def is_answered(self, cell: Cell, probe: Opened, cells: Path, reference: Answers) -> bool:
        """Return whether `evaluate_cell` would find these answers there."""
        folder = cells / self.name_folder(cell) / name_folder(probe.name)
        return is_answered(self._handle(cell), probe, folder, reference)

    def name_folder(self, cell: Cell) -> str:
        """Return a name for a cell's folder. Another recipe may have had its key in an earlier grid of a study."""
        return f"{cell.key}-{self._handle(cell).sha256[:8]}"

    def _handle(self, cell: Cell) -> CellHandle:
        return CellHandle(self.original, cell, self.maker, self.tokenizer, self._written)


def name_folder(probe: str) -> str:
    """Return the name of the folder that holds the answers to a probe: readable, and of that probe alone.

    >>> name_folder("lama:trex")
    'lama-trex-18e0'
    """
    digest = hashlib.sha256(probe.encode()).hexdigest()[:4]
    # No name is longer than 255 bytes.
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', probe).strip('-.')[:240]}-{digest}"


class CellHandle(ModelHandle):
    """Original of a study, converted by a cell's recipe.

    Parameters
    ----------
    original : of the same settings.
    maker : of the original's checkpoint, open.
    tokenizer : gives the original's.
    written : prompts that other cells were given, by probe: the same tokens, for one tokenizer and architecture.
    """

    def __init__(
        self,
        original: ModelHandle,
        cell: Cell,
        maker: VariantMaker,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        written: dict[str, Prompts],
    ) -> None:
        super().__init__(replace(original.located, name=cell.key, revision=None), original.settings)
        self._original, self._cell, self._maker = original, cell, maker
        self.contents = original.contents
        self._tokenizer, self._written = tokenizer, written
        self._described: dict[str, Any] = {}

    @cached_property
    def sha256(self) -> str:
        """Return a hash of what the model is made of: no file holds it."""
        parts = [__version__, self.contents.sha256, self._cell.recipe.to_dict()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def loaded(self) -> LoadedInTransformers:
        variant = self._maker.make(self._maker.plan(self._cell.recipe))
        self._described = describe_variant(self._cell.key, variant)
        settings = self.settings
        return LoadedInTransformers(
            language_model_of(variant, self._tokenizer(), device=settings.device, dtype=settings.computed_in)
        )

    def make_prompts(self, probe: Probe) -> Prompts:
        # By content: a search has two halves of one probe.
        name = probe.fingerprint()
        if name not in self._written:
            self._written[name] = super().make_prompts(probe)
        prompts = self._written[name]
        prompts.scorer.model = self.loaded.language_model.model
        return prompts

    def release(self) -> None:
        super().release()
        for prompts in self._written.values():
            # The model would stay in memory beside the next one.
            prompts.scorer.release()

    def describe(self) -> dict[str, Any]:
        return self._described


def save_cell(study_model: StudyModel, cell: Cell, models: Path) -> None:
    """Write a cell's checkpoint below `models`, calibrated on the study's own text, unless a run before has."""
    from compressknow.compress.convert import convert
    from compressknow.pages.model_card import make_model_card

    folder = models / study_model.name_folder(cell)
    if not folder.exists():
        models.mkdir(exist_ok=True)
        maker, recipe = study_model.maker, cell.recipe
        text = maker.text(maker.plan(recipe)) if recipe.calibration else None
        convert(maker.checkpoint.folder, folder, recipe, text=text, render_card=make_model_card)
