"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.blocks import Block, Reader
from compressknow.compress.recipe import Recipe
from compressknow.compress.removal.blocks import DroppedBlocks, named_blocks, refuse_all, stacks_in, without_blocks
from compressknow.compress.removal.neurons import Cut, DroppedNeurons, neurons_in, with_fewer_neurons
from compressknow.compress.removal.settings import Settings, Stack
from compressknow.compress.steps import DropBlocks, DropNeurons
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.naming import Naming
from compressknow.model.structure import NOT_LINEAR, Structure
from compressknow.model.tensors import StoredTensor, byte_view, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# How much the blocks of a stack of a checkpoint (and its module tree) are like their inputs.
Similarities = Callable[[Checkpoint, Any, Stack], tuple[float, ...]]


@dataclass(frozen=True)
class Removal:
    """What is left of a checkpoint, and its module tree.

    Attributes
    ----------
    blocks, neurons : what was dropped, by setting of the config.
    given : the checkpoint that blocks and neurons were taken from, and its module tree; `wide` is what there was before
        neurons were.
    left_out : stored tensors of dropped blocks, as the original has them, each with its group.
    names : of tensors that are named anew, the names that the original has for them.
    cuts : by stored name, the tensors that lose rows or columns. Those of `checkpoint` have their shapes only: which
        neurons stay is known once activations are.
    kept : of each feed-forward network, by the parameter name of its down projection, the neurons that stay.
    unfitted : by stored name, the values that what is left of a tensor had before it was fitted anew.
    decided : False as long as the calibration text has not said which blocks and neurons go.
    apart : whether the blocks could be run one after the other to learn that.
    """

    checkpoint: Checkpoint
    tree: PreTrainedModel = field(repr=False)
    given: tuple[Checkpoint, PreTrainedModel] = field(repr=False)
    wide: tuple[Checkpoint, PreTrainedModel] = field(repr=False)
    blocks: tuple[DroppedBlocks, ...] = ()
    neurons: tuple[DroppedNeurons, ...] = ()
    left_out: tuple[tuple[StoredTensor, str], ...] = ()
    names: dict[str, str] = field(default_factory=dict, repr=False)
    cuts: dict[str, Cut] = field(default_factory=dict, repr=False)
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    unfitted: dict[str, StoredTensor] = field(default_factory=dict, repr=False)
    decided: bool = True
    apart: bool = True

    def __bool__(self) -> bool:
        return bool(self.blocks or self.neurons)

    def before(self, stored: str) -> StoredTensor | None:
        """A tensor as the original has it, where it has been cut."""
        return self.cuts[stored].source if stored in self.cuts else None


def remove(
    checkpoint: Checkpoint, tree: PreTrainedModel, recipe: Recipe, similarities: Similarities | None = None
) -> Removal:
    """Carry the removal steps of a recipe out on headers.

    Parameters
    ----------
    tree : the checkpoint's module tree on the meta device.
    similarities : what chooses blocks where a step says how many. Without it the last ones stand for them, of which
        the shapes are as a rule the same.

    Raises
    ------
    UsageError : a block that is not there, all blocks, all neurons or none, a side that the model lacks, or two steps
        that drop blocks or neurons of the same ones.
    UnsupportedError : the config of the model cannot say what would be left.
    """
    left = Removal(checkpoint, tree, given=(checkpoint, tree), wide=(checkpoint, tree))
    if not recipe.removals:
        return left
    for step in recipe.removals:
        settings = Settings(left.tree, left.checkpoint.config, left.checkpoint.folder / "config.json")
        structure = structure_of(left.tree)
        if isinstance(step, DropBlocks):
            left = _less_deep(left, step, settings, structure, similarities)
        else:
            left = _narrower(left, step, settings, structure)
    gone = _left_out(checkpoint, structure_of(tree, recipe.module_map), tree, left)
    decided = not left.cuts and all(drop.known for drop in left.blocks)
    return replace(left, left_out=tuple(gone), decided=decided)


def _left_out(
    checkpoint: Checkpoint, structure: Structure, tree: PreTrainedModel, left: Removal
) -> Iterator[tuple[StoredTensor, str]]:
    stay = {left.names.get(name, name) for name in left.checkpoint.tensors}
    groups = {weight.parameter: weight.group or "other" for weight in structure.linears}
    bound = Naming(tree).bind(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if name not in stay:
            yield tensor, groups.get(bound[name].parameter, NOT_LINEAR) if name in bound else NOT_LINEAR


def _less_deep(
    left: Removal, step: DropBlocks, settings: Settings, structure: Structure, similarities: Similarities | None
) -> Removal:
    drops = []
    for stack in stacks_in(step, settings, structure):
        _refuse_twice(stack.keys, {drop.stack.keys for drop in left.blocks}, f"blocks of {stack.name}")
        drops.append(_dropped(left, step, stack, similarities))
    without = without_blocks(left.checkpoint, settings, drops)
    return replace(
        left,
        checkpoint=without.checkpoint,
        tree=without.tree,
        wide=(without.checkpoint, without.tree),
        blocks=(*left.blocks, *drops),
        names={new: left.names.get(old, old) for new, old in without.names.items()},
    )


def _dropped(left: Removal, step: DropBlocks, stack: Stack, similarities: Similarities | None) -> DroppedBlocks:
    if isinstance(step.blocks, str):
        return _without(stack, named_blocks(step, stack))
    refuse_all(step.blocks, stack)
    if len(stack.lists) > 1:
        raise UnsupportedError(
            f"Which blocks of {type(left.tree).__name__} change their input least cannot be told.",
            why=f"A block of it lies in several lists: {', '.join(stack.lists)}.",
            hint="Name the blocks to drop, such as --drop-blocks 20-23.",
        )
    if similarities is None:
        return replace(_without(stack, range(stack.count - step.blocks, stack.count)), known=False)
    from compressknow.compress.removal.calibrated import blocks_to_drop

    found = similarities(left.checkpoint, left.tree, stack)
    return replace(_without(stack, blocks_to_drop(found, step.blocks)), similarities=found)


def _without(stack: Stack, dropped: Iterable[int]) -> DroppedBlocks:
    return DroppedBlocks(stack, tuple(sorted(set(range(stack.count)) - set(dropped))))


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


@dataclass(frozen=True)
class KeptNeurons:
    """The neurons of a feed-forward network that stay (`numbers`, int64, ascending), and new weights [out, kept] of the
    projection that reads them; None leaves it as it was."""

    numbers: torch.Tensor
    down: torch.Tensor | None = None


def cut_tensors(
    reader: Reader, removal: Removal, kept: Mapping[str, KeptNeurons], folder: Path
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Write the cut tensors of a removal into `folder`, in files named as the weight files that they come from.

    Parameters
    ----------
    kept : of each feed-forward network, by the parameter name of its down projection.

    Returns
    -------
    The tensors in their new places, by stored name; and, of those with new weights, what they would be without.
    """
    made: dict[str, StoredTensor] = {}
    unfitted: dict[str, StoredTensor] = {}
    files: dict[Path, BinaryIO] = {}
    try:
        for name, cut in removal.cuts.items():
            path = folder / cut.source.file.relative_to(removal.checkpoint.folder)
            if path not in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                files[path] = path.open("xb")
            stored, neurons = removal.checkpoint.tensors[name], kept[cut.network.down.parameter]
            versions = [(made, neurons)]
            if neurons.down is not None and cut.parameter == cut.network.down.parameter:
                versions.append((unfitted, replace(neurons, down=None)))
            for tensors, version in versions:
                tensors[name] = replace(stored, file=path, offset=files[path].tell(), loaded=None)
                for rows in _rows(reader, cut, version):
                    files[path].write(byte_view(rows.contiguous()))
    finally:
        for file in files.values():
            file.close()
    return made, unfitted


def _rows(reader: Reader, cut: Cut, kept: KeptNeurons) -> Iterator[torch.Tensor]:
    """A cut tensor in pieces, in its own dtype."""
    down = cut.network.down
    if kept.down is not None and cut.parameter == down.parameter:
        values = kept.down.T if down.transposed else kept.down
        yield values.to(torch_dtype(cut.source.dtype))
        return
    numbers = torch.cat([kept.numbers + cut.network.width * part for part in range(cut.each)])
    for block in reader.blocks(cut.source):
        yield _part(block, cut, numbers)


def _part(block: Block, cut: Cut, numbers: torch.Tensor) -> torch.Tensor:
    """What stays of some rows of a tensor; its last axis are the columns of a block."""
    if cut.axis == len(cut.source.shape) - 1:
        return block.values[:, numbers]
    rows = block.rows
    inside = numbers[(numbers >= rows.start) & (numbers < rows.stop)]
    return block.values[inside - rows.start]
