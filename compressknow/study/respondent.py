"""A cell that is asked: its model is made in memory when the first question comes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressknow import __version__
from compressknow.engine.identity import describe_variant
from compressknow.engine.language_model import LanguageModel, language_model_of
from compressknow.probe.ask import Questions
from compressknow.probe.facts import Probe
from compressknow.probe.run import Respondent
from compressknow.study.grid import Cell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compressknow.compress.variant import VariantMaker


class CellRespondent(Respondent):
    """The original of a study, converted by a cell's recipe.

    Parameters
    ----------
    original : of the same settings.
    maker : of the original's checkpoint, open.
    tokenizer : gives the original's.
    written : questions that other cells were asked, by probe: the same tokens, for one tokenizer and architecture.
    """

    def __init__(
        self,
        original: Respondent,
        cell: Cell,
        maker: VariantMaker,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        written: dict[str, Questions],
    ) -> None:
        super().__init__(replace(original.located, name=cell.key), original.settings)
        self._original, self._cell, self._maker = original, cell, maker
        self._tokenizer, self._written = tokenizer, written
        self._described: dict[str, Any] = {}

    @cached_property
    def sha256(self) -> str:
        """A hash of what the model is made of: no file holds it."""
        made_of = [__version__, self._original.sha256, self._cell.recipe.to_dict()]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    @cached_property
    def loaded(self) -> LanguageModel:
        variant = self._maker.make(self._maker.plan(self._cell.recipe))
        self._described = describe_variant(self._cell.key, variant)
        settings = self.settings
        return language_model_of(
            variant, self._maker, self._tokenizer(), device=settings.device, dtype=settings.computed_in
        )

    def questions(self, probe: Probe) -> Questions:
        # By content: a search has two halves of one probe.
        name = probe.fingerprint()
        if name not in self._written:
            self._written[name] = super().questions(probe)
        questions = self._written[name]
        questions.scorer.model = self.loaded.model
        return questions

    def release(self) -> None:
        super().release()
        for questions in self._written.values():
            # The model would stay in memory beside the next one.
            questions.scorer.release()

    def described(self) -> dict[str, Any]:
        return self._described
