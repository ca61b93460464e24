"""A checkpoint without some of its blocks: their tensors left out, the later ones renamed, a smaller config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.removal.settings import BLOCK, Settings, Shapes, Stack, block_of, shapes_of, stacks_of
from compressknow.compress.steps import DropBlocks
from compressknow.model.checkpoint import Checkpoint, some_of
from compressknow.model.loading import missing_weights
from compressknow.model.meta import rebuild_model
from compressknow.model.naming import Binding, Naming
from compressknow.model.structure import LinearWeight, Structure

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

HINT = "Drop other blocks, or prune instead."


@dataclass(frozen=True)
class DroppedBlocks:
    """The blocks that a stack keeps, by their numbers before; `similarities` are those of all its blocks, where these
    decided it (see `choice.blocks_to_drop`). `known` is False as long as nothing has: then others may be kept."""

    stack: Stack
    kept: tuple[int, ...]
    similarities: tuple[float, ...] = ()
    known: bool = True

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.stack.count)) - set(self.kept)))


def stacks_in(step: DropBlocks, settings: Settings, structure: Structure) -> tuple[Stack, ...]:
    """The stacks that a step drops blocks of.

    Raises
    ------
    UnsupportedError : no setting of the config counts blocks (ALBERT's share one set of weights).
    UsageError : its scope names a side that the model does not have.
    """
    stacks = [stack for stack in stacks_of(settings) if any(True for _ in _linears(stack, structure))]
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
    sides = {side for stack in stacks for side in sides_of(stack, structure)} - {None}
    if missing := [side for side in step.where.scope if side not in sides]:
        raise UsageError(f"{structure.architecture} has no blocks in its {missing[0]}.", hint="Leave out --scope.")
    return tuple(stack for stack in stacks if sides_of(stack, structure) <= set(step.where.scope))


def sides_of(stack: Stack, structure: Structure) -> set[str | None]:
    """``encoder``, ``decoder`` or both; None in a model of one stack."""
    return {weight.stack for weight in _linears(stack, structure)}


def _linears(stack: Stack, structure: Structure) -> Iterator[LinearWeight]:
    """The Linear weights in the blocks of a stack, but those of towers."""
    for weight in structure.linears:
        place = block_of(weight.parameter)
        if place and place[0] in stack.lists and weight.group != "vision":
            yield weight


def named_blocks(step: DropBlocks, stack: Stack) -> tuple[int, ...]:
    """The blocks of a stack that a step names.

    Raises UsageError where there is no such block, or where none would be left.
    """
    named = step.named or ()
    there = f"{stack.name} has blocks 0-{stack.count - 1}."
    if beyond := [number for number in named if number >= stack.count]:
        raise UsageError(f"There is no block {beyond[0]} to drop.", hint=there)
    refuse_all(len(named), stack)
    return named


def refuse_all(number: int, stack: Stack) -> None:
    """Raise UsageError where a stack has no more blocks than are to be dropped."""
    if number >= stack.count:
        raise UsageError(
            f"Dropping {number} blocks would leave none: {stack.name} has {stack.count}.",
            hint=f"Drop at most {stack.count - 1}.",
        )


@dataclass(frozen=True)
class Without:
    """A checkpoint without some blocks, its module tree, and the names that its tensors had, by the new ones."""

    checkpoint: Checkpoint
    tree: PreTrainedModel
    names: dict[str, str]


def without_blocks(checkpoint: Checkpoint, settings: Settings, drops: Iterable[DroppedBlocks]) -> Without:
    """Leave blocks out.

    Raises
    ------
    UnsupportedError : the blocks are not of one kind and the config cannot say which are left, or the stored names
        cannot be told apart by block, or a dropped block holds weights that others share.
    """
    whole = settings.whole
    kept: dict[str, tuple[int, ...]] = {}
    for drop in drops:
        whole = drop.stack.cut(whole, drop.kept)
        kept |= dict.fromkeys(drop.stack.lists, drop.kept)
    config = settings.written(whole)
    tree = rebuild_model(settings.tree, config, settings.path)
    sources = _sources(settings.shapes, tree, kept)
    _refuse_unlike(settings.tree, tree, sources, kept)
    names = _stored_names(checkpoint, settings.tree, {old: new for new, old in sources.items()}, kept)
    tensors = {new: replace(checkpoint.tensors[old], name=new) for new, old in names.items()}
    smaller = replace(checkpoint, config=config, tensors=tensors)
    _refuse_misnamed(checkpoint, settings.tree, smaller, tree, names, sources)
    if lost := missing_weights(smaller, tree):
        # Zamba2's shared block is stored where it first stands.
        raise _cannot_say(tree, f"The blocks that are left share {some_of(lost)} with one that is dropped.")
    return Without(smaller, tree, names)


Kept = Mapping[str, tuple[int, ...]]


def _sources(old: Shapes, tree: PreTrainedModel, kept: Kept) -> dict[str, str]:
    """Of each parameter of the smaller model, the one of the original that gives it its values."""
    found = {}
    for name, shape in shapes_of(tree).items():
        place, source = block_of(name), name
        if place and place[0] in kept:
            source = f"{place[0]}.{kept[place[0]][place[1]]}.{place[2]}"
            # T5 keeps its table of relative positions, which all blocks use, in the first.
            source = source if source in old else name
        if old.get(source) != shape:
            raise _cannot_say(tree, f"No block that is left has values for {name}.")
        found[name] = source
    if lost := {name for name in old if not _is_dropped(name, kept)} - set(found.values()):
        raise _cannot_say(tree, f"The smaller model has no place for {some_of(lost)}.")
    return found


def _is_dropped(name: str, kept: Kept) -> bool:
    place = block_of(name)
    return bool(place and place[0] in kept and place[1] not in kept[place[0]])


def _cannot_say(tree: PreTrainedModel, why: str) -> UnsupportedError:
    return UnsupportedError(f"These blocks of {type(tree).__name__} cannot be dropped.", why=why, hint=HINT)


def _refuse_unlike(old: PreTrainedModel, new: PreTrainedModel, sources: Mapping[str, str], kept: Kept) -> None:
    """Raise UnsupportedError where a block that is left would become another kind of block in its new place."""
    given = set()
    for name, source in sources.items():
        if name == source and (place := block_of(name)) and place[0] in kept and kept[place[0]][place[1]] != place[1]:
            # What was given a parameter of the block that was there before is meant to differ, with all around it.
            parts = name.split(".")
            given |= {".".join(parts[:length]) for length in range(1, len(parts))}
    before = dict(old.named_modules())
    for name, module in new.named_modules():
        if name not in given and (place := block_of(name + ".x")) and place[0] in kept:
            number = kept[place[0]][place[1]]
            was = before.get(f"{place[0]}.{number}.{place[2]}".removesuffix(".x"))
            if unlike := _unlike(was, module, place[1] - number):
                raise _cannot_say(new, f"Block {number} of {place[0]} would become block {place[1]}: {unlike}.")


def _unlike(before: nn.Module | None, after: nn.Module, shift: int) -> str | None:
    """What two modules have not in common, but numbers that count blocks; None where they compute the same."""
    if type(before) is not type(after):
        return f"it has a {type(after).__name__} there"
    told, said = _told(before), _told(after)
    for key in sorted(told.keys() | said.keys()):
        one, other = told.get(key), said.get(key)
        moved = type(one) is int and type(other) is int and other == one + shift
        if one != other and not moved:
            return f"its {key} is {other!r} there, not {one!r}"
    return None


def _told(module: Any) -> dict[str, Any]:
    """What a module's own attributes say of how it computes."""
    plain = (bool, int, float, str, type(None), tuple)
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}


def _stored_names(
    checkpoint: Checkpoint, tree: PreTrainedModel, places: Mapping[str, str], kept: Kept
) -> dict[str, str]:
    """The names of the stored tensors that are left, new name -> old; `places` maps a parameter to its new name."""
    bound = Naming(tree).bind(checkpoint.tensors)
    lists = _stored_lists(bound, kept)
    names = {}
    for stored in checkpoint.tensors:
        found, binding, number = BLOCK.match(stored), bound.get(stored), None
        if binding is not None and binding.parameter not in places:
            continue
        if found is None or found["list"] not in lists:
            names[stored] = stored
            continue
        if binding is not None and (place := block_of(places[binding.parameter])):
            number = place[1]
        elif int(found["number"]) in (of_list := kept[lists[found["list"]]]):
            number = of_list.index(int(found["number"]))
        if number is not None:
            names[f"{found['list']}.{number}.{found['rest']}"] = stored
    return names


def _stored_lists(bound: Mapping[str, Binding], kept: Kept) -> dict[str, str]:
    """The stored names of lists of blocks, each with that in the module tree: a base model's lack its prefix."""
    lists = {}
    for stored, binding in bound.items():
        found, place = BLOCK.match(stored), block_of(binding.parameter)
        if found and place and place[0] in kept and int(found["number"]) == place[1]:
            lists[found["list"]] = place[0]
    return lists


def _refuse_misnamed(
    before: Checkpoint,
    old: PreTrainedModel,
    after: Checkpoint,
    new: PreTrainedModel,
    names: Mapping[str, str],
    sources: Mapping[str, str],
) -> None:
    """Raise UnsupportedError where what is stored under a new name is not loaded to the parameter that it is for."""
    was, now = Naming(old).bind(before.tensors), Naming(new).bind(after.tensors)
    for name, stored in names.items():
        expected = was[stored].parameters if stored in was else None
        found = tuple(sources[parameter] for parameter in now[name].parameters) if name in now else None
        if expected != found:
            raise _cannot_say(new, f"{stored} could not be told apart from tensors of other blocks.")
