"""Removal steps of a recipe, executed on headers. The smaller checkpoint lacks the tensors of dropped blocks, has new
names for those of later blocks, and a config with fewer blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compressknow.base.errors import CheckpointError, UnsupportedError, UsageError
from compressknow.compress.recipe import Recipe
from compressknow.compress.removal.neurons import Cut, DroppedNeurons, drop_neurons, select_neurons
from compressknow.compress.removal.settings import BLOCK, Config, Shapes, Stack, find_stacks, parse_block, read_shapes
from compressknow.compress.steps import DropBlocks, Where
from compressknow.compress.weights import Values
from compressknow.engine.load import find_reason
from compressknow.model.checkpoint import Checkpoint, list_some
from compressknow.model.groups import read_structure
from compressknow.model.loading import Binding, NameMapping, find_missing_weights
from compressknow.model.meta import find_failure, rebuild_model
from compressknow.model.structure import Structure
from compressknow.model.tensors import StoredTensor

# Measures how similar the outputs of a stack's blocks are to their inputs, in a checkpoint and its module tree.
Similarities = Callable[[Checkpoint, Any, Stack], tuple[float, ...]]


@dataclass(frozen=True)
class Removal:
    """Smaller checkpoint, with its module tree, and what was dropped.

    Attributes
    ----------
    original : the original checkpoint and its module tree; `wide` has blocks dropped, but not neurons.
    blocks, neurons : what was dropped, by setting of the config.
    left_out : stored tensors of dropped blocks, as in the original, each with its group.
    names : the original names of tensors, by their new names.
    cuts : by stored name, the tensors that lose rows or columns. In `checkpoint`, these have only their new shapes
        until the neurons are selected by activations.
    selected : the remaining neurons of each feed-forward network, by the parameter name of its down projection.
    unfitted : by stored name, the remaining values of a tensor before it was refitted.
    is_blockwise : True if the blocks could be run one after the other to choose what is dropped.
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
        """Return False as long as the calibration text has not decided which blocks and neurons are dropped."""
        return bool(self.selected or not self.cuts) and all(drop.is_decided for drop in self.blocks)


def remove(
    checkpoint: Checkpoint, tree: PreTrainedModel, recipe: Recipe, similarities: Similarities | None = None
) -> Removal:
    """Execute the removal steps of a recipe on headers.

    `similarities` measures which blocks to drop if a step gives only their number. Without it, the last blocks, which
    usually have the same shapes, are dropped provisionally.

    Raises UsageError for a block that does not exist, all blocks, all neurons or none, a side that the model lacks, or
    two steps that drop the same; UnsupportedError if the config cannot describe the remaining model.
    """
    removal = Removal(checkpoint, tree, original=(checkpoint, tree), wide=(checkpoint, tree))
    for step in recipe.removals:
        settings = Config(removal.tree, removal.checkpoint.config, removal.checkpoint.folder / "config.json")
        structure = read_structure(removal.tree)
        if isinstance(step, DropBlocks):
            removal = _remove_blocks(removal, step, settings, structure, similarities)
            continue
        drops = select_neurons(step, settings, structure)
        for drop in drops:
            _check_not_repeated(drop.keys, {each.keys for each in removal.neurons}, "the same neurons")
        smaller, narrower, new_cuts = drop_neurons(removal.checkpoint, settings, drops)
        neurons, cuts = (*removal.neurons, *drops), removal.cuts | new_cuts
        removal = replace(removal, checkpoint=smaller, tree=narrower, neurons=neurons, cuts=cuts)
    remaining = {removal.names.get(name, name) for name in removal.checkpoint.tensors}
    structure, bound = read_structure(tree, recipe.module_map), NameMapping(tree).bind(checkpoint.tensors)
    left_out = (
        (tensor, structure.find_group(bound[name].parameter if name in bound else None))
        for name, tensor in checkpoint.tensors.items()
        if name not in remaining
    )
    return replace(removal, left_out=tuple(left_out))


def _remove_blocks(
    removal: Removal, step: DropBlocks, settings: Config, structure: Structure, similarities: Similarities | None
) -> Removal:
    stacks = []
    for stack in _select_stacks(step, settings, structure):
        _check_not_repeated(stack.keys, {other.keys for other in removal.blocks}, f"blocks of {stack.name}")
        stacks.append(_choose_dropped(removal, step, stack, similarities))
    checkpoint, tree, names = _drop_blocks(removal.checkpoint, settings, stacks)
    return replace(
        removal,
        checkpoint=checkpoint,
        tree=tree,
        wide=(checkpoint, tree),
        blocks=(*removal.blocks, *stacks),
        names={new: removal.names.get(old, old) for new, old in names.items()},
    )


def _choose_dropped(removal: Removal, step: DropBlocks, stack: Stack, similarities: Similarities | None) -> Stack:
    if invalid := [number for number in step.named or () if number >= stack.count]:
        hint = f"{stack.name} has blocks 0-{stack.count - 1}."
        raise UsageError(f"There is no block {invalid[0]} to drop.", hint=hint)
    number = step.blocks if isinstance(step.blocks, int) else len(step.named or ())
    if number >= stack.count:
        what = f"Dropping {number} blocks would leave none: {stack.name} has {stack.count}."
        raise UsageError(what, hint=f"Drop at most {stack.count - 1}.")
    if step.named is not None:
        return replace(stack, dropped=step.named)
    if len(stack.lists) > 1:
        raise UnsupportedError(
            f"The blocks of {type(removal.tree).__name__} that change their input least cannot be found.",
            why=f"Each of its blocks is split between several lists: {', '.join(stack.lists)}.",
            hint="Name the blocks to drop, such as --drop-blocks 20-23.",
        )
    if similarities is None:
        return replace(stack, dropped=tuple(range(stack.count - number, stack.count)), is_decided=False)
    measured = similarities(removal.checkpoint, removal.tree, stack)
    return replace(stack, dropped=choose_blocks(measured, number), similarities=measured)


def _check_not_repeated(keys: tuple[str, ...], before: set[tuple[str, ...]], dropped: str) -> None:
    if keys in before:
        raise UsageError(f"Two steps would drop {dropped}.", hint="Do it in one step.")


def choose_blocks(similarities: Sequence[float], number: int) -> tuple[int, ...]:
    """Choose the blocks that change their input least, ascending.

    Parameters
    ----------
    similarities : for each block, the mean over tokens of the cosine between a token's hidden states before and after
        it: 1 minus the block's influence (Men et al. 2024, ShortGPT, arXiv 2403.03853, section 3.2).
    number : number of blocks to choose; the first of equal ones are chosen.

    >>> choose_blocks([0.5, 0.9, 0.8, 0.9], 2)
    (1, 3)
    """
    order = sorted(range(len(similarities)), key=lambda block: (-similarities[block], block))
    return tuple(sorted(order[:number]))


def _select_stacks(step: DropBlocks, settings: Config, structure: Structure) -> tuple[Stack, ...]:
    """Select the stacks from which a step drops blocks. Raises UnsupportedError if no setting of the config counts
    blocks, UsageError if the step's scope names a side that the model does not have."""
    stacks = [stack for stack in find_stacks(settings) if _list_sides(stack, structure)]
    if not stacks:
        shared = any(weight.uses > 1 for weight in structure.linears)
        why, hint = "No setting of its config counts only the blocks of a stack.", "Prune it instead."
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
    """Return the sides of the Linear weights in a stack's blocks, without vision towers; None if there is one stack."""
    return {
        weight.stack
        for weight in structure.linears
        if weight.group != "vision" and (block := parse_block(weight.parameter)) and block[0] in stack.lists
    }


def _drop_blocks(
    checkpoint: Checkpoint, settings: Config, stacks: Iterable[Stack]
) -> tuple[Checkpoint, PreTrainedModel, dict[str, str]]:
    """Drop blocks; return the smaller checkpoint, its module tree, and the tensors' former names by the new ones.
    Raises UnsupportedError if the remaining blocks would not compute the same as before."""
    whole = settings.whole
    remaining: dict[str, tuple[int, ...]] = {}
    for stack in stacks:
        whole = stack.cut(whole)
        remaining |= dict.fromkeys(stack.lists, stack.remaining)
    config = settings.update_raw(whole)
    try:
        tree = rebuild_model(settings.tree, config, settings.path)
    except CheckpointError as error:
        # OLMo Hybrid's config requires a block of attention.
        raise _explain(settings.tree, f"transformers cannot build the rest: {error.why}") from error
    sources = _map_parameters(settings.shapes, tree, remaining)
    _check_kinds(settings.tree, tree, sources, remaining)
    bound = NameMapping(settings.tree).bind(checkpoint.tensors)
    names = _map_stored(checkpoint, bound, {old: new for new, old in sources.items()}, remaining)
    tensors = {new: replace(checkpoint.tensors[old], name=new) for new, old in names.items()}
    smaller = replace(checkpoint, config=config, tensors=tensors)
    loaded = NameMapping(tree).bind(tensors)
    for new, old in names.items():
        expected = bound[old].parameters if old in bound else None
        if expected != (tuple(sources[parameter] for parameter in loaded[new].parameters) if new in loaded else None):
            raise _explain(tree, f"{old} could not be told apart from tensors of other blocks.")
    if missing := find_missing_weights(smaller, tree):
        # Zamba2's shared block is stored under its first use.
        raise _explain(tree, f"The remaining blocks share {list_some(missing)} with one that is dropped.")
    if (failure := find_failure(tree)) and not find_failure(settings.tree):
        # The cache of most hybrid models needs a block of attention.
        raise _explain(tree, f"transformers cannot run the rest: {find_reason(failure)}")
    return smaller, tree, names


# By list of blocks, the original numbers of the remaining ones.
Remaining = Mapping[str, tuple[int, ...]]


def _map_parameters(old: Shapes, tree: PreTrainedModel, remaining: Remaining) -> dict[str, str]:
    """Map each parameter of the smaller model to the one with its values in the original."""
    sources = {}
    for name, shape in read_shapes(tree).items():
        block, source = parse_block(name), name
        if block and block[0] in remaining:
            source = f"{block[0]}.{remaining[block[0]][block[1]]}.{block[2]}"
            # T5's table of relative positions, which all blocks use, belongs to the first block.
            source = source if source in old else name
        if old.get(source) != shape:
            raise _explain(tree, f"No remaining block has values for {name}.")
        sources[name] = source
    needed = {
        name
        for name in old
        if not (block := parse_block(name)) or block[0] not in remaining or block[1] in remaining[block[0]]
    }
    if unused := needed - set(sources.values()):
        raise _explain(tree, f"The smaller model has no place for {list_some(unused)}.")
    return sources


def _explain(tree: PreTrainedModel, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"These blocks of {type(tree).__name__} cannot be dropped.",
        why=why,
        hint="Drop other blocks, or prune instead.",
    )


def _check_kinds(old: PreTrainedModel, new: PreTrainedModel, sources: Mapping[str, str], remaining: Remaining) -> None:
    """Raise UnsupportedError if a remaining block would become another kind of block in its new place."""
    excepted = set()
    for name, source in sources.items():
        block = parse_block(name)
        if name == source and block and block[0] in remaining and remaining[block[0]][block[1]] != block[1]:
            # A parameter that stays in its old place is meant to differ, with all modules around it.
            parts = name.split(".")
            excepted |= {".".join(parts[:length]) for length in range(1, len(parts))}
    # Blocks may share a module, such as OpenAI GPT's activation.
    before = dict(old.named_modules(remove_duplicate=False))
    for name, module in new.named_modules(remove_duplicate=False):
        block = parse_block(name + ".x")
        if name not in excepted and block and block[0] in remaining:
            number = remaining[block[0]][block[1]]
            original = before.get(f"{block[0]}.{number}.{block[2]}".removesuffix(".x"))
            if difference := _compare(original, module, block[1] - number):
                raise _explain(new, f"Block {number} of {block[0]} would become block {block[1]}: {difference}.")


def _compare(before: nn.Module | None, after: nn.Module, shift: int) -> str | None:
    """Describe how two modules differ, except in block numbers; None if they compute the same."""
    if type(before) is not type(after):
        return f"it has a {type(after).__name__} there"
    old_settings, new_settings = _read_settings(before), _read_settings(after)
    for key in sorted(old_settings.keys() | new_settings.keys()):
        old, new = old_settings.get(key), new_settings.get(key)
        is_block_number = type(old) is int and type(new) is int and new == old + shift
        if old != new and not is_block_number:
            return f"its {key} is {new!r} there, not {old!r}"
    return None


def _read_settings(module: Any) -> dict[str, Any]:
    """Return the attributes of a module that determine how it computes."""
    plain = (bool, int, float, str, type(None), tuple)
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}


def _map_stored(
    checkpoint: Checkpoint, bound: Mapping[str, Binding], new_names: Mapping[str, str], remaining: Remaining
) -> dict[str, str]:
    """Map the new names of the remaining stored tensors to their names; `new_names` are those of parameters."""
    # The names of lists of blocks in the files, with those in the module tree: files of a base model lack its prefix.
    lists = {}
    for stored, binding in bound.items():
        match, block = BLOCK.match(stored), parse_block(binding.parameter)
        if match and block and block[0] in remaining and int(match["number"]) == block[1]:
            lists[match["list"]] = block[0]
    names = {}
    for stored in checkpoint.tensors:
        match, number = BLOCK.match(stored), None
        parameter = bound[stored].parameter if stored in bound else None
        if parameter is not None and parameter not in new_names:
            continue
        if match is None or match["list"] not in lists:
            names[stored] = stored
            continue
        if parameter is not None and (block := parse_block(new_names[parameter])):
            number = block[1]
        elif int(match["number"]) in (numbers := remaining[lists[match["list"]]]):
            number = numbers.index(int(match["number"]))
        if number is not None:
            names[f"{match['list']}.{number}.{match['rest']}"] = stored
    return names
