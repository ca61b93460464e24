"""Removal steps of a recipe, carried out on headers: blocks and neurons go, and a smaller checkpoint is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.recipe import Recipe
from compressknow.compress.removal.blocks import (
    DroppedBlocks,
    check_named,
    check_some_remain,
    choose_blocks,
    drop_blocks,
    select_stacks,
)
from compressknow.compress.removal.neurons import Cut, DroppedNeurons, drop_neurons, select_neurons
from compressknow.compress.removal.settings import Settings, Stack
from compressknow.compress.steps import DropBlocks, DropNeurons
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.naming import Naming
from compressknow.model.structure import NOT_LINEAR, Structure
from compressknow.model.tensors import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Measures how much the blocks of a stack of a checkpoint (and its module tree) are like their inputs.
Similarities = Callable[[Checkpoint, Any, Stack], tuple[float, ...]]


@dataclass(frozen=True)
class Removal:
    """Smaller checkpoint, with its module tree, and what was left out.

    Attributes
    ----------
    original : the checkpoint that blocks and neurons were taken from, and its module tree; `wide` is the one before
        neurons were.
    blocks, neurons : what was dropped, by setting of the config.
    left_out : stored tensors of dropped blocks, as the original has them, each with its group.
    names : of tensors that have a new name, the names that the original has for them.
    cuts : by stored name, the tensors that lose rows or columns. Those of `checkpoint` have their shapes only: which
        neurons stay is known once activations are.
    selected : of each feed-forward network, by the parameter name of its down projection, the neurons that stay.
    unfitted : by stored name, the values that the rest of a tensor had before it was fitted anew.
    is_decided : False as long as the calibration text has not decided which blocks and neurons go.
    is_blockwise : True if the blocks could be run one after the other to learn that.
    """

    checkpoint: Checkpoint
    tree: PreTrainedModel = field(repr=False)
    original: tuple[Checkpoint, PreTrainedModel] = field(repr=False)
    wide: tuple[Checkpoint, PreTrainedModel] = field(repr=False)
    blocks: tuple[DroppedBlocks, ...] = ()
    neurons: tuple[DroppedNeurons, ...] = ()
    left_out: tuple[tuple[StoredTensor, str], ...] = ()
    names: dict[str, str] = field(default_factory=dict, repr=False)
    cuts: dict[str, Cut] = field(default_factory=dict, repr=False)
    selected: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    unfitted: dict[str, StoredTensor] = field(default_factory=dict, repr=False)
    is_decided: bool = True
    is_blockwise: bool = True

    def before(self, stored: str) -> StoredTensor | None:
        """Return a tensor as the original has it; None if it was not cut."""
        return self.cuts[stored].source if stored in self.cuts else None


def remove(
    checkpoint: Checkpoint, tree: PreTrainedModel, recipe: Recipe, similarities: Similarities | None = None
) -> Removal:
    """Carry the removal steps of a recipe out on headers.

    `similarities` measures which blocks go if a step says how many. Without it the last ones stand for them, whose
    shapes are as a rule the same.

    Raises UsageError for a block that does not exist, all blocks, all neurons or none, a side that the model lacks, or
    two steps that drop the same; UnsupportedError where the config of the model cannot say what would be left.
    """
    left = Removal(checkpoint, tree, original=(checkpoint, tree), wide=(checkpoint, tree))
    for step in recipe.removals:
        settings = Settings(left.tree, left.checkpoint.config, left.checkpoint.folder / "config.json")
        structure = structure_of(left.tree)
        if isinstance(step, DropBlocks):
            left = _remove_blocks(left, step, settings, structure, similarities)
        else:
            left = _remove_neurons(left, step, settings, structure)
    gone = _find_left_out(checkpoint, structure_of(tree, recipe.module_map), tree, left)
    is_decided = not left.cuts and all(drop.is_decided for drop in left.blocks)
    return replace(left, left_out=tuple(gone), is_decided=is_decided)


def _find_left_out(
    checkpoint: Checkpoint, structure: Structure, tree: PreTrainedModel, left: Removal
) -> Iterator[tuple[StoredTensor, str]]:
    stay = {left.names.get(name, name) for name in left.checkpoint.tensors}
    groups = {weight.parameter: weight.group or "other" for weight in structure.linears}
    bound = Naming(tree).bind(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if name not in stay:
            yield tensor, groups.get(bound[name].parameter, NOT_LINEAR) if name in bound else NOT_LINEAR


def _remove_blocks(
    left: Removal, step: DropBlocks, settings: Settings, structure: Structure, similarities: Similarities | None
) -> Removal:
    drops = []
    for stack in select_stacks(step, settings, structure):
        _check_untouched(stack.keys, {drop.stack.keys for drop in left.blocks}, f"blocks of {stack.name}")
        drops.append(_choose_dropped(left, step, stack, similarities))
    checkpoint, tree, names = drop_blocks(left.checkpoint, settings, drops)
    return replace(
        left,
        checkpoint=checkpoint,
        tree=tree,
        wide=(checkpoint, tree),
        blocks=(*left.blocks, *drops),
        names={new: left.names.get(old, old) for new, old in names.items()},
    )


def _choose_dropped(left: Removal, step: DropBlocks, stack: Stack, similarities: Similarities | None) -> DroppedBlocks:
    if isinstance(step.blocks, str):
        return DroppedBlocks(stack, check_named(step, stack))
    check_some_remain(step.blocks, stack)
    if len(stack.lists) > 1:
        raise UnsupportedError(
            f"Which blocks of {type(left.tree).__name__} change their input least cannot be told.",
            why=f"A block of it lies in several lists: {', '.join(stack.lists)}.",
            hint="Name the blocks to drop, such as --drop-blocks 20-23.",
        )
    if similarities is None:
        return DroppedBlocks(stack, tuple(range(stack.count - step.blocks, stack.count)), is_decided=False)
    measured = similarities(left.checkpoint, left.tree, stack)
    return DroppedBlocks(stack, choose_blocks(measured, step.blocks), measured)


def _remove_neurons(left: Removal, step: DropNeurons, settings: Settings, structure: Structure) -> Removal:
    drops = select_neurons(step, settings, structure)
    for drop in drops:
        _check_untouched(drop.width.keys, {one.width.keys for one in left.neurons}, "the same neurons")
    checkpoint, tree, cuts = drop_neurons(left.checkpoint, settings, drops)
    return replace(left, checkpoint=checkpoint, tree=tree, neurons=(*left.neurons, *drops), cuts=left.cuts | cuts)


def _check_untouched(keys: tuple[str, ...], before: set[tuple[str, ...]], what: str) -> None:
    if keys in before:
        raise UsageError(f"Two steps would drop {what}.", hint="Say it in one step.")
