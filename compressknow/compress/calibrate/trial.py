"""Whether a model can be smoothed: tried on a few tokens, before it writes a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from compressknow.compress.calibrate.compression import Targets
from compressknow.compress.calibrate.forward import Call, NotApart
from compressknow.compress.calibrate.gathering import Sums
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.calibrate.walk import walk
from compressknow.compress.plan import Plan, PlannedTensor, make_plan
from compressknow.compress.pool import Pool
from compressknow.engine.language_model import embedding_rows
from compressknow.model.groups import structure_of
from compressknow.model.tensors import OpenFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from compressknow.compress.calibrate.smooth import (
    SHARING,
    TOGETHER,
    norms_before,
    nothing_to_smooth,
    refuse_smoothing,
    to_smooth,
)

# So many tokens show what a block's layers read.
TRIED_TOKENS = 8


def refuse_unsmoothable(plan: Plan, tree: PreTrainedModel) -> None:
    """Raise UnsupportedError where a recipe smooths and a block in scope has nothing that can be.

    A few tokens tell, before there is a text.
    """
    if not plan.recipe.smooths:
        return
    if plan.removal and not plan.removal.decided:
        # What goes is not known yet; what a norm feeds is as in the whole model.
        checkpoint, tree = plan.removal.given
        plan = make_plan(checkpoint, tree, structure_of(tree, plan.recipe.module_map), plan.recipe)
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
    """Visits one block of each kind in which something is to be smoothed: of one class, with the same weights."""

    alone: Collection[str] = ()

    def __init__(
        self, plan: Plan, streamed: StreamedModel, targets: Mapping[str, list[PlannedTensor]], pool: Pool
    ) -> None:
        self._streamed, self._pool = streamed, pool
        wanted = {module: list(to_smooth(plan, tensors)) for module, tensors in targets.items()}
        self._blocks = {module: names for module, names in wanted.items() if names and module in streamed.blocks}
        if not self._blocks:
            raise nothing_to_smooth(next(module for module, names in wanted.items() if names))
        self._left = {self._kind(module) for module in self._blocks}

    def _kind(self, module: str) -> tuple[type, frozenset[str]]:
        names = frozenset(name.removeprefix(module) for name in self._blocks.get(module, ()))
        return type(self._streamed.model.get_submodule(module)), names

    @property
    def done(self) -> bool:
        """When no kind is left."""
        return not self._left

    def watched(self, module: str) -> Collection[str]:
        """The weights in a block that are to be smoothed, of a kind that was not tried yet."""
        return self._blocks.get(module, ()) if self._kind(module) in self._left else ()

    def sums(self, module: str) -> Sums:
        """They are not asked for."""
        return Sums(self.watched(module), products=False, peaks=False, check=self._pool.check)

    def visit(self, module: str, again: Callable[[], Any]) -> None:
        """Raises UnsupportedError where none of them can be."""
        weights = {name: self._streamed.model.get_parameter(name) for name in self.watched(module)}
        if not any(norms_before(module, self._streamed.model.get_submodule(module), weights, again)):
            raise nothing_to_smooth(module)
        self._left.remove(self._kind(module))

    def output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """Nothing is learned from it."""
