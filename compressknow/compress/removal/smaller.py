"""A checkpoint from which the removal steps of a recipe have taken blocks and neurons, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compressknow.compress.plan import NOT_LINEAR
from compressknow.compress.recipe import DropBlocks, DropNeurons, Recipe
from compressknow.compress.removal.blocks import DroppedBlocks, named_blocks, refuse_all, stacks_in, without_blocks
from compressknow.compress.removal.neurons import Cut, DroppedNeurons, neurons_in, with_fewer_neurons
from compressknow.compress.removal.settings import Settings, Stack
from compressknow.errors import UnsupportedError, UsageError
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.naming import Naming
from compressknow.model.structure import Structure
from compressknow.model.tensors import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the blocks of a stack, which ones a step that says how many drops: ascending.
Chooser = Callable[[Checkpoint, Any, Stack, int], tuple[int, ...]]


def the_last(checkpoint: Checkpoint, tree: PreTrainedModel, stack: Stack, number: int) -> tuple[int, ...]:  # noqa: ARG001
    """What stands for the blocks that only the calibration text tells: as many, of the same shapes."""
    return tuple(range(stack.count - number, stack.count))


@dataclass(frozen=True)
class Removal:
    """What is left of a checkpoint, and its module tree.

    Attributes
    ----------
    blocks, neurons : what was dropped, by setting of the config.
    left_out : stored tensors of dropped blocks, as the original has them, each with its group.
    names : of tensors that are named anew, the names that the original has for them.
    cuts : by stored name, the tensors that lose rows or columns. Those of `checkpoint` have their shapes only: which
        neurons stay is known once activations are.
    """

    checkpoint: Checkpoint
    tree: PreTrainedModel = field(repr=False)
    blocks: tuple[DroppedBlocks, ...] = ()
    neurons: tuple[DroppedNeurons, ...] = ()
    left_out: tuple[tuple[StoredTensor, str], ...] = ()
    names: dict[str, str] = field(default_factory=dict, repr=False)
    cuts: dict[str, Cut] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return bool(self.blocks or self.neurons)

    def before(self, stored: str) -> StoredTensor | None:
        """A tensor as the original has it, where it has been cut."""
        return self.cuts[stored].source if stored in self.cuts else None


def remove(checkpoint: Checkpoint, tree: PreTrainedModel, recipe: Recipe, choose_blocks: Chooser = the_last) -> Removal:
    """Carry the removal steps of a recipe out on headers. `tree` is the checkpoint's module tree on the meta device.

    Raises
    ------
    UsageError : a block that is not there, all blocks, all neurons or none, a side that the model lacks, or two steps
        that drop blocks or neurons of the same ones.
    UnsupportedError : the config of the model cannot say what would be left.
    """
    left = Removal(checkpoint, tree)
    if not recipe.removals:
        return left
    refuse_uncalibrated(recipe)
    for step in recipe.removals:
        settings = Settings(left.tree, left.checkpoint.config, left.checkpoint.folder / "config.json")
        structure = structure_of(left.tree)
        if isinstance(step, DropBlocks):
            left = _less_deep(left, step, settings, structure, choose_blocks)
        else:
            left = _narrower(left, step, settings, structure)
    return replace(left, left_out=tuple(_left_out(checkpoint, structure_of(tree, recipe.module_map), tree, left)))


def refuse_uncalibrated(recipe: Recipe) -> None:
    """Raise UnsupportedError where a step chooses by activations, which nothing gathers yet."""
    for step in recipe.removals:
        if isinstance(step, DropNeurons) or step.named is None:
            raise UnsupportedError(
                f"{step.label} looks at activations, which nothing gathers here yet.",
                hint="Name the blocks to drop, such as --drop-blocks 20-23.",
            )


def _left_out(
    checkpoint: Checkpoint, structure: Structure, tree: PreTrainedModel, left: Removal
) -> Iterator[tuple[StoredTensor, str]]:
    stay = {left.names.get(name, name) for name in left.checkpoint.tensors}
    groups = {weight.parameter: weight.group or "other" for weight in structure.linears}
    bound = Naming(tree).bind(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if name not in stay:
            yield tensor, groups.get(bound[name].parameter, NOT_LINEAR) if name in bound else NOT_LINEAR


def _less_deep(left: Removal, step: DropBlocks, settings: Settings, structure: Structure, choose: Chooser) -> Removal:
    drops = []
    for stack in stacks_in(step, settings, structure):
        _refuse_twice(stack.keys, {drop.stack.keys for drop in left.blocks}, f"blocks of {stack.name}")
        if isinstance(step.blocks, str):
            dropped = named_blocks(step, stack)
        else:
            refuse_all(step.blocks, stack)
            dropped = choose(left.checkpoint, left.tree, stack, step.blocks)
        drops.append(DroppedBlocks(stack, tuple(sorted(set(range(stack.count)) - set(dropped)))))
    without = without_blocks(left.checkpoint, settings, drops)
    return replace(
        left,
        checkpoint=without.checkpoint,
        tree=without.tree,
        blocks=(*left.blocks, *drops),
        names={new: left.names.get(old, old) for new, old in without.names.items()},
    )


def _narrower(left: Removal, step: DropNeurons, settings: Settings, structure: Structure) -> Removal:
    drops = neurons_in(step, settings, structure)
    for drop in drops:
        _refuse_twice(drop.width.keys, {one.width.keys for one in left.neurons}, "the same neurons")
    narrower = with_fewer_neurons(left.checkpoint, settings, drops)
    return replace(
        left,
        checkpoint=narrower.checkpoint,
        tree=narrower.tree,
        neurons=(*left.neurons, *drops),
        cuts=left.cuts | narrower.cuts,
    )


def _refuse_twice(keys: tuple[str, ...], before: set[tuple[str, ...]], what: str) -> None:
    if keys in before:
        raise UsageError(f"Two steps would drop {what}.", hint="Say it in one step.")
