"""Removal of blocks: their tensors are left out, the later ones renamed, and the config has fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.removal.settings import BLOCK, Settings, Shapes, Stack, find_stacks, parse_block, read_shapes
from compressknow.compress.steps import DropBlocks
from compressknow.model.checkpoint import Checkpoint, some_of
from compressknow.model.loading import missing_weights
from compressknow.model.meta import rebuild_model
from compressknow.model.naming import Binding, Naming
from compressknow.model.structure import Structure

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

HINT = "Drop other blocks, or prune instead."


@dataclass(frozen=True)
class DroppedBlocks:
    """Blocks of a stack that are dropped, by their numbers before; `similarities` are those of all its blocks, if these
    decided it (see `choose_blocks`). As long as `is_decided` is False, other blocks may be dropped instead."""

    stack: Stack
    dropped: tuple[int, ...]
    similarities: tuple[float, ...] = ()
    is_decided: bool = True

    @property
    def remaining(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.stack.count)) - set(self.dropped)))


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


def select_stacks(step: DropBlocks, settings: Settings, structure: Structure) -> tuple[Stack, ...]:
    """Select the stacks that a step drops blocks of.

    Raises UnsupportedError where no setting of the config counts blocks (ALBERT's share one set of weights), UsageError
    where the step's scope names a side that the model does not have.
    """
    stacks = [stack for stack in find_stacks(settings) if _list_sides(stack, structure)]
    if not stacks:
        shared = any(weight.uses > 1 for weight in structure.linears)
        raise UnsupportedError(
            f"No block of {structure.architecture} can be dropped.",
            why="Its blocks share one set of weights."
            if shared
            else "No setting of its config counts the blocks of a stack, and nothing else.",
            hint="Drop neurons instead (--drop-neurons), or prune." if shared else "Prune it instead.",
        )
    if step.where.scope == type(step.where)().scope:
        return tuple(stacks)
    sides = {side for stack in stacks for side in _list_sides(stack, structure)} - {None}
    if missing := [side for side in step.where.scope if side not in sides]:
        raise UsageError(f"{structure.architecture} has no blocks in its {missing[0]}.", hint="Leave out --scope.")
    return tuple(stack for stack in stacks if _list_sides(stack, structure) <= set(step.where.scope))


def _list_sides(stack: Stack, structure: Structure) -> set[str | None]:
    """Return ``encoder``, ``decoder`` or both, by the Linear weights in the blocks of a stack, but for towers; None in
    a model of one stack."""
    return {
        weight.stack
        for weight in structure.linears
        if weight.group != "vision" and (place := parse_block(weight.parameter)) and place[0] in stack.lists
    }


def check_named(step: DropBlocks, stack: Stack) -> tuple[int, ...]:
    """Return the blocks of a stack that a step names.

    Raises UsageError if there is no such block, or if none would be left.
    """
    named = step.named or ()
    there = f"{stack.name} has blocks 0-{stack.count - 1}."
    if beyond := [number for number in named if number >= stack.count]:
        raise UsageError(f"There is no block {beyond[0]} to drop.", hint=there)
    check_some_remain(len(named), stack)
    return named


def check_some_remain(number: int, stack: Stack) -> None:
    """Raise UsageError if a stack has no more blocks than are to be dropped."""
    if number >= stack.count:
        raise UsageError(
            f"Dropping {number} blocks would leave none: {stack.name} has {stack.count}.",
            hint=f"Drop at most {stack.count - 1}.",
        )


def drop_blocks(
    checkpoint: Checkpoint, settings: Settings, drops: Iterable[DroppedBlocks]
) -> tuple[Checkpoint, PreTrainedModel, dict[str, str]]:
    """Leave blocks out; return the smaller checkpoint, its module tree, and the tensors' former names by the new ones.

    Raises UnsupportedError where the blocks are not of one kind and the config cannot say which are left, where the
    stored names do not tell the block, or where a dropped block holds weights that others share.
    """
    whole = settings.whole
    remaining: dict[str, tuple[int, ...]] = {}
    for drop in drops:
        whole = drop.stack.cut(whole, drop.remaining)
        remaining |= dict.fromkeys(drop.stack.lists, drop.remaining)
    config = settings.update_raw(whole)
    tree = rebuild_model(settings.tree, config, settings.path)
    sources = _map_parameters(settings.shapes, tree, remaining)
    _check_alike(settings.tree, tree, sources, remaining)
    names = _map_stored(checkpoint, settings.tree, {old: new for new, old in sources.items()}, remaining)
    tensors = {new: replace(checkpoint.tensors[old], name=new) for new, old in names.items()}
    smaller = replace(checkpoint, config=config, tensors=tensors)
    _check_names(checkpoint, settings.tree, smaller, tree, names, sources)
    if lost := missing_weights(smaller, tree):
        # Zamba2's shared block is stored where it first stands.
        raise _explain(tree, f"The blocks that are left share {some_of(lost)} with one that is dropped.")
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
        raise _explain(tree, f"The smaller model has no place for {some_of(lost)}.")
    return sources


def _explain(tree: PreTrainedModel, why: str) -> UnsupportedError:
    return UnsupportedError(f"These blocks of {type(tree).__name__} cannot be dropped.", why=why, hint=HINT)


def _check_alike(old: PreTrainedModel, new: PreTrainedModel, sources: Mapping[str, str], remaining: Remaining) -> None:
    """Raise UnsupportedError if a block that is left would become another kind of block in its new place."""
    differing = set()
    for name, source in sources.items():
        place = parse_block(name)
        if name == source and place and place[0] in remaining and remaining[place[0]][place[1]] != place[1]:
            # What gets a parameter of the block that was there before is meant to differ, with all around it.
            parts = name.split(".")
            differing |= {".".join(parts[:length]) for length in range(1, len(parts))}
    before = dict(old.named_modules())
    for name, module in new.named_modules():
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
    checkpoint: Checkpoint, tree: PreTrainedModel, places: Mapping[str, str], remaining: Remaining
) -> dict[str, str]:
    """Map the new names of the stored tensors that are left to their names; `places` maps parameters to new names."""
    bound = Naming(tree).bind(checkpoint.tensors)
    lists = _find_stored_lists(bound, remaining)
    names = {}
    for stored in checkpoint.tensors:
        match, binding, number = BLOCK.match(stored), bound.get(stored), None
        if binding is not None and binding.parameter not in places:
            continue
        if match is None or match["list"] not in lists:
            names[stored] = stored
            continue
        if binding is not None and (place := parse_block(places[binding.parameter])):
            number = place[1]
        elif int(match["number"]) in (numbers := remaining[lists[match["list"]]]):
            number = numbers.index(int(match["number"]))
        if number is not None:
            names[f"{match['list']}.{number}.{match['rest']}"] = stored
    return names


def _find_stored_lists(bound: Mapping[str, Binding], remaining: Remaining) -> dict[str, str]:
    """Return the stored names of lists of blocks, each with that in the module tree: a base model's lack its prefix."""
    lists = {}
    for stored, binding in bound.items():
        match, place = BLOCK.match(stored), parse_block(binding.parameter)
        if match and place and place[0] in remaining and int(match["number"]) == place[1]:
            lists[match["list"]] = place[0]
    return lists


def _check_names(
    before: Checkpoint,
    old: PreTrainedModel,
    after: Checkpoint,
    new: PreTrainedModel,
    names: Mapping[str, str],
    sources: Mapping[str, str],
) -> None:
    """Raise UnsupportedError if a tensor would not be loaded, by its new name, to the parameter that it is for."""
    was, now = Naming(old).bind(before.tensors), Naming(new).bind(after.tensors)
    for name, stored in names.items():
        expected = was[stored].parameters if stored in was else None
        loaded = tuple(sources[parameter] for parameter in now[name].parameters) if name in now else None
        if expected != loaded:
            raise _explain(new, f"{stored} could not be told apart from tensors of other blocks.")
