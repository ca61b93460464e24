"""Whether a model can be smoothed: tried on a few tokens, before it writes a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from compressknow.compress.calibrate.compression import Targets
from compressknow.compress.calibrate.forward import Call, NotApart
from compressknow.compress.calibrate.gathering import Sums
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.calibrate.smooth import norms_before
from compressknow.compress.calibrate.smoothing import (
    SHARING,
    TOGETHER,
    nothing_to_smooth,
    refuse_smoothing,
    to_smooth,
)
from compressknow.compress.calibrate.walk import walk
from compressknow.compress.plan import Plan, PlannedTensor
from compressknow.compress.pool import Pool
from compressknow.engine.language_model import embedding_rows
from compressknow.model.tensors import OpenFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# So many tokens show what a block's layers read.
TRIED_TOKENS = 8


def refuse_unsmoothable(plan: Plan, tree: PreTrainedModel) -> None:
    """Raise UnsupportedError where a recipe smooths and the first block in scope has nothing that can be: found by a
    few tokens, before the model writes a text.
    """
    if not plan.recipe.smooths:
        return
    with OpenFiles() as files, Pool(1) as pool:
        streamed = StreamedModel(tree, plan.sources, files)
        targets = Targets(plan, streamed.blocks)
        if targets.repeated:
            refuse_smoothing(plan, SHARING)
        trying = _TryingToSmooth(plan, streamed, targets.once, pool)
        ids = torch.arange(TRIED_TOKENS)[None] % embedding_rows(streamed.model)
        two = {"decoder_input_ids": ids} if streamed.model.config.is_encoder_decoder else {}
        try:
            walk(streamed, [{"input_ids": ids, **two}], trying, pool)
        except NotApart:
            refuse_smoothing(plan, TOGETHER)


class _TryingToSmooth:
    """Visits the first block in which something is to be smoothed."""

    alone: Collection[str] = ()

    def __init__(
        self, plan: Plan, streamed: StreamedModel, targets: Mapping[str, list[PlannedTensor]], pool: Pool
    ) -> None:
        self._plan, self._streamed, self._targets, self._pool = plan, streamed, targets, pool
        self.done = False

    def watched(self, module: str) -> Collection[str]:
        """The weights in a block that are to be smoothed."""
        return list(to_smooth(self._plan, self._targets.get(module, ())))

    def sums(self, module: str) -> Sums:
        """They are not asked for."""
        return Sums(self.watched(module), products=False, peaks=False, check=self._pool.check)

    def visit(self, module: str, again: Callable[[], Any]) -> None:
        """Raises UnsupportedError where none of them can be."""
        weights = {name: self._streamed.model.get_parameter(name) for name in self.watched(module)}
        if not any(norms_before(module, self._streamed.model.get_submodule(module), weights, again)):
            raise nothing_to_smooth(module)
        self.done = True

    def output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """Nothing is learned from it."""
