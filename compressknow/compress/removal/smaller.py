"""Removal steps of a recipe, carried out on headers: a smaller checkpoint is left. Of blocks that go, the tensors are
left out, the later ones renamed, and the config has fewer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.recipe import Recipe
from compressknow.compress.removal.neurons import Cut, DroppedNeurons, drop_neurons, select_neurons
from compressknow.compress.removal.settings import BLOCK, Config, Shapes, Stack, find_stacks, parse_block, read_shapes
from compressknow.compress.steps import DropBlocks, Where
from compressknow.compress.weights import Values
from compressknow.model.checkpoint import Checkpoint, list_some
from compressknow.model.groups import read_structure
from compressknow.model.loading import Binding, NameMapping, find_missing_weights
from compressknow.model.meta import rebuild_model
from compressknow.model.structure import Structure
from compressknow.model.tensors import StoredTensor

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
    unfitted : by stored name, the values that the rest of a tensor had before it was refitted.
    is_blockwise : True if the blocks could be run one after the other to learn what goes.
    """

    checkpoint: Checkpoint
    tree: PreTrainedModel = field(repr=False)
    original: tuple[Checkpoint, PreTrainedModel] = field(repr=False)
    wide: tuple[Checkpoint, PreTrainedModel] = field(repr=False)
    blocks: tuple[Stack, ...] = ()
    neurons: tuple[DroppedNeurons, ...] = ()
    left_out: tuple[tuple[StoredTensor, str], ...] = ()
    names: dict[str, str] = field(default_factory=dict, repr=False)
    cuts: dict[str, Cut] = field(default_factory=dict, repr=False)
    selected: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    unfitted: dict[str, Values] = field(default_factory=dict, repr=False)
    is_blockwise: bool = True

    @property
    def is_decided(self) -> bool:
        """Return False as long as the calibration text has not decided which blocks and neurons go."""
        return bool(self.selected or not self.cuts) and all(drop.is_decided for drop in self.blocks)


def remove(
    checkpoint: Checkpoint, tree: PreTrainedModel, recipe: Recipe, similarities: Similarities | None = None
) -> Removal:
    """Carry the removal steps of a recipe out on headers.

    `similarities` measures which blocks go if a step says how many. Without it the last ones stand for them, whose
    shapes are as a rule the same.

    Raises UsageError for a block that does not exist, all blocks, all neurons or none, a side that the model lacks, or
    two steps that drop the same; UnsupportedError if the config of the model cannot say what would be left.
    """
    left = Removal(checkpoint, tree, original=(checkpoint, tree), wide=(checkpoint, tree))
    for step in recipe.removals:
        settings = Config(left.tree, left.checkpoint.config, left.checkpoint.folder / "config.json")
        structure = read_structure(left.tree)
        if isinstance(step, DropBlocks):
            left = _remove_blocks(left, step, settings, structure, similarities)
            continue
        drops = select_neurons(step, settings, structure)
        for drop in drops:
            _check_untouched(drop.keys, {one.keys for one in left.neurons}, "the same neurons")
        smaller, narrower, cuts = drop_neurons(left.checkpoint, settings, drops)
        left = replace(left, checkpoint=smaller, tree=narrower, neurons=(*left.neurons, *drops), cuts=left.cuts | cuts)
    stay = {left.names.get(name, name) for name in left.checkpoint.tensors}
    structure, bound = read_structure(tree, recipe.module_map), NameMapping(tree).bind(checkpoint.tensors)
    gone = (
        (tensor, structure.find_group(bound[name].parameter if name in bound else None))
        for name, tensor in checkpoint.tensors.items()
        if name not in stay
    )
    return replace(left, left_out=tuple(gone))


def _remove_blocks(
    left: Removal, step: DropBlocks, settings: Config, structure: Structure, similarities: Similarities | None
) -> Removal:
    stacks = []
    for stack in _select_stacks(step, settings, structure):
        _check_untouched(stack.keys, {other.keys for other in left.blocks}, f"blocks of {stack.name}")
        stacks.append(_choose_dropped(left, step, stack, similarities))
    checkpoint, tree, names = _drop_blocks(left.checkpoint, settings, stacks)
    return replace(
        left,
        checkpoint=checkpoint,
        tree=tree,
        wide=(checkpoint, tree),
        blocks=(*left.blocks, *stacks),
        names={new: left.names.get(old, old) for new, old in names.items()},
    )


def _choose_dropped(left: Removal, step: DropBlocks, stack: Stack, similarities: Similarities | None) -> Stack:
    if beyond := [number for number in step.named or () if number >= stack.count]:
        there = f"{stack.name} has blocks 0-{stack.count - 1}."
        raise UsageError(f"There is no block {beyond[0]} to drop.", hint=there)
    number = step.blocks if isinstance(step.blocks, int) else len(step.named or ())
    if number >= stack.count:
        what = f"Dropping {number} blocks would leave none: {stack.name} has {stack.count}."
        raise UsageError(what, hint=f"Drop at most {stack.count - 1}.")
    if step.named is not None:
        return replace(stack, dropped=step.named)
    if len(stack.lists) > 1:
        raise UnsupportedError(
            f"Which blocks of {type(left.tree).__name__} change their input least is unknown.",
            why=f"One of its blocks is in several lists: {', '.join(stack.lists)}.",
            hint="Name the blocks to drop, such as --drop-blocks 20-23.",
        )
    if similarities is None:
        return replace(stack, dropped=tuple(range(stack.count - number, stack.count)), is_decided=False)
    measured = similarities(left.checkpoint, left.tree, stack)
    return replace(stack, dropped=choose_blocks(measured, number), similarities=measured)


def _check_untouched(keys: tuple[str, ...], before: set[tuple[str, ...]], what: str) -> None:
    if keys in before:
        raise UsageError(f"Two steps would drop {what}.", hint="Do it in one step.")


def choose_blocks(similarities: Sequence[float], number: int) -> tuple[int, ...]:
    """Choose the blocks that change their input least, ascending.

    Parameters
    ----------
    similarities : of each block, the mean over tokens of the cosine between a token's hidden state before and after it.
        1 - that is the block's influence (Men et al. 2024, ShortGPT, arXiv 2403.03853, section 3.2).
    number : of blocks to choose; the first of equal ones.

    >>> choose_blocks([0.5, 0.9, 0.8, 0.9], 2)
    (1, 3)
    """
    order = sorted(range(len(similarities)), key=lambda block: (-similarities[block], block))
    return tuple(sorted(order[:number]))


def _select_stacks(step: DropBlocks, settings: Config, structure: Structure) -> tuple[Stack, ...]:
    """Select the stacks that a step drops blocks of. Raises UnsupportedError if no setting of the config counts
    blocks, UsageError if the step's scope names a side that the model does not have."""
    stacks = [stack for stack in find_stacks(settings) if _list_sides(stack, structure)]
    if not stacks:
        shared = any(weight.uses > 1 for weight in structure.linears)
        why, hint = "No setting of its config counts the blocks of a stack, and nothing else.", "Prune it instead."
        if shared:
            why, hint = "Its blocks share weights.", "Drop neurons instead (--drop-neurons), or prune."
        raise UnsupportedError(f"No block of {structure.architecture} can be dropped.", why, hint)
    if step.where == Where():
        return tuple(stacks)
    sides = {side for stack in stacks for side in _list_sides(stack, structure)} - {None}
    if missing := [side for side in step.where.scope if side not in sides]:
        raise UsageError(f"{structure.architecture} has no blocks in its {missing[0]}.", hint="Leave out --scope.")
    return tuple(stack for stack in stacks if _list_sides(stack, structure) <= set(step.where.scope))


def _list_sides(stack: Stack, structure: Structure) -> set[str | None]:
    """Return the sides of the Linear weights in the blocks of a stack, but for towers (None: a model of one stack)."""
    return {
        weight.stack
        for weight in structure.linears
        if weight.group != "vision" and (place := parse_block(weight.parameter)) and place[0] in stack.lists
    }


def _drop_blocks(
    checkpoint: Checkpoint, settings: Config, stacks: Iterable[Stack]
) -> tuple[Checkpoint, PreTrainedModel, dict[str, str]]:
    """Leave blocks out; return the smaller checkpoint, its module tree, and the tensors' former names by the new ones.
    Raises UnsupportedError if what is left would not be what these blocks were."""
    whole = settings.whole
    remaining: dict[str, tuple[int, ...]] = {}
    for stack in stacks:
        whole = stack.cut(whole)
        remaining |= dict.fromkeys(stack.lists, stack.remaining)
    config = settings.update_raw(whole)
    tree = rebuild_model(settings.tree, config, settings.path)
    sources = _map_parameters(settings.shapes, tree, remaining)
    _check_alike(settings.tree, tree, sources, remaining)
    bound = NameMapping(settings.tree).bind(checkpoint.tensors)
    names = _map_stored(checkpoint, bound, {old: new for new, old in sources.items()}, remaining)
    tensors = {new: replace(checkpoint.tensors[old], name=new) for new, old in names.items()}
    smaller = replace(checkpoint, config=config, tensors=tensors)
    loaded = NameMapping(tree).bind(tensors)
    for new, old in names.items():
        expected = bound[old].parameters if old in bound else None
        if expected != (tuple(sources[parameter] for parameter in loaded[new].parameters) if new in loaded else None):
            raise _explain(tree, f"{old} could not be told apart from tensors of other blocks.")
    if lost := find_missing_weights(smaller, tree):
        # Zamba2's shared block is stored where it first stands.
        raise _explain(tree, f"The blocks that are left share {list_some(lost)} with one that is dropped.")
    return smaller, tree, names


# By list of blocks, the numbers that those which are left had before.
Remaining = Mapping[str, tuple[int, ...]]


def _map_parameters(old: Shapes, tree: PreTrainedModel, remaining: Remaining) -> dict[str, str]:
    """Map each parameter of the smaller model to the one of the original that gives it its values."""
    sources = {}
    for name, shape in read_shapes(tree).items():
        place, source = parse_block(name), name
        if place and place[0] in remaining:
            source = f"{place[0]}.{remaining[place[0]][place[1]]}.{place[2]}"
            # T5 keeps its table of relative positions, which all blocks use, in the first.
            source = source if source in old else name
        if old.get(source) != shape:
            raise _explain(tree, f"No block that is left has values for {name}.")
        sources[name] = source
    stays = {
        name
        for name in old
        if not (place := parse_block(name)) or place[0] not in remaining or place[1] in remaining[place[0]]
    }
    if lost := stays - set(sources.values()):
        raise _explain(tree, f"The smaller model has no place for {list_some(lost)}.")
    return sources


def _explain(tree: PreTrainedModel, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"These blocks of {type(tree).__name__} cannot be dropped.",
        why=why,
        hint="Drop other blocks, or prune instead.",
    )


def _check_alike(old: PreTrainedModel, new: PreTrainedModel, sources: Mapping[str, str], remaining: Remaining) -> None:
    """Raise UnsupportedError if a block that is left would become another kind of block in its new place."""
    differing = set()
    for name, source in sources.items():
        place = parse_block(name)
        if name == source and place and place[0] in remaining and remaining[place[0]][place[1]] != place[1]:
            # A module that gets a parameter of an earlier block is meant to differ.
            parts = name.split(".")
            differing |= {".".join(parts[:length]) for length in range(1, len(parts))}
    # Blocks may share a module: OpenAI GPT's have one activation.
    before = dict(old.named_modules(remove_duplicate=False))
    for name, module in new.named_modules(remove_duplicate=False):
        place = parse_block(name + ".x")
        if name not in differing and place and place[0] in remaining:
            number = remaining[place[0]][place[1]]
            was = before.get(f"{place[0]}.{number}.{place[2]}".removesuffix(".x"))
            if difference := _compare(was, module, place[1] - number):
                raise _explain(new, f"Block {number} of {place[0]} would become block {place[1]}: {difference}.")


def _compare(before: nn.Module | None, after: nn.Module, shift: int) -> str | None:
    """Say how two modules differ, but for numbers that count blocks; None if they compute the same."""
    if type(before) is not type(after):
        return f"it has a {type(after).__name__} there"
    settings, changed = _read_settings(before), _read_settings(after)
    for key in sorted(settings.keys() | changed.keys()):
        one, other = settings.get(key), changed.get(key)
        is_moved = type(one) is int and type(other) is int and other == one + shift
        if one != other and not is_moved:
            return f"its {key} is {other!r} there, not {one!r}"
    return None


def _read_settings(module: Any) -> dict[str, Any]:
    """Return the attributes of a module that say how it computes."""
    plain = (bool, int, float, str, type(None), tuple)
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}


def _map_stored(
    checkpoint: Checkpoint, bound: Mapping[str, Binding], places: Mapping[str, str], remaining: Remaining
) -> dict[str, str]:
    """Map the new names of the stored tensors that are left to their names; `places` maps parameters to new names."""
    # The stored names of lists of blocks, each with that in the module tree: a base model's lack its prefix.
    lists = {}
    for stored, binding in bound.items():
        match, place = BLOCK.match(stored), parse_block(binding.parameter)
        if match and place and place[0] in remaining and int(match["number"]) == place[1]:
            lists[match["list"]] = place[0]
    names = {}
    for stored in checkpoint.tensors:
        match, number = BLOCK.match(stored), None
        parameter = bound[stored].parameter if stored in bound else None
        if parameter is not None and parameter not in places:
            continue
        if match is None or match["list"] not in lists:
            names[stored] = stored
            continue
        if parameter is not None and (place := parse_block(places[parameter])):
            number = place[1]
        elif int(match["number"]) in (numbers := remaining[lists[match["list"]]]):
            number = numbers.index(int(match["number"]))
        if number is not None:
            names[f"{match['list']}.{number}.{match['rest']}"] = stored
    return names
