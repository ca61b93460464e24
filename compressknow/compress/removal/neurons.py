"""A checkpoint with narrower feed-forward blocks: rows of the projections into them and columns of the one out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, UnsupportedError, UsageError
from compressknow.compress.removal.settings import Settings, Width, block_of, shapes_of, widths_of
from compressknow.compress.steps import DropNeurons
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.meta import rebuild_model
from compressknow.model.naming import Naming
from compressknow.model.structure import LinearWeight, Structure
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What int4 and the kernels of all runtimes take columns by.
MOST_MULTIPLE = 128
# A width is cut in steps of an eighth at most.
FEWEST_STEPS = 8


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network of `width` neurons: the Linear that reads them (`down`), and of each parameter that has
    rows or columns for them the axis, and how many it has for each neuron."""

    down: LinearWeight
    width: int
    cuts: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class DroppedNeurons:
    """A setting of the config that becomes `after`, and the feed-forward networks that it is the width of."""

    width: Width
    after: int
    networks: tuple[FeedForward, ...]


def neurons_in(step: DropNeurons, settings: Settings, structure: Structure) -> tuple[DroppedNeurons, ...]:
    """What a step drops.

    Raises
    ------
    UnsupportedError : no setting is the width of the feed-forward blocks alone, or what has it is no plain Linear.
    UsageError : its scope names one side of a model whose sides have one width, or none that the model has; or the
        amount would drop none or all.
    """
    linears = {w.parameter: w for w in structure.linears if w.group == "feed-forward" and w.layer is not None}
    biases = {f"{weight.module}.bias" for weight in linears.values()} & settings.shapes.keys()
    widths = widths_of(settings, linears.keys() | biases)
    if not widths:
        raise UnsupportedError(
            f"No neuron of {structure.architecture} can be dropped.",
            why="No setting of its config is the width of its feed-forward blocks alone.",
            hint="Prune them instead: --scope feed-forward --prune 0.2.",
        )
    found = [(width, tuple(_networks(width, linears, structure))) for width in widths]
    chosen = _on_side(step, found, structure)
    return tuple(DroppedNeurons(width, kept_of(width.value, step), networks) for width, networks in chosen)


def kept_of(width: int, step: DropNeurons) -> int:
    """How many of `width` neurons are kept. Raises UsageError where that would be none, or all."""
    multiple = step.multiple or largest_multiple(width)
    # Half a multiple is kept.
    kept = int((width * (1 - step.amount)) / multiple + 0.5) * multiple
    if not 0 < kept < width:
        raise UsageError(
            f"Dropping {step.amount:.6g} of {width} neurons, in steps of {multiple}, would drop "
            f"{'none' if kept else 'all'} of them.",
            hint="Choose another amount, or set multiple = 1 in a recipe for the exact amount.",
        )
    return kept


def largest_multiple(width: int) -> int:
    """The largest power of two up to 128 that divides a width at least eight times.

    >>> largest_multiple(1536), largest_multiple(128), largest_multiple(48), largest_multiple(5461)
    (128, 16, 4, 1)
    """
    multiple = min(width & -width, MOST_MULTIPLE)
    while multiple > 1 and multiple * FEWEST_STEPS > width:
        multiple //= 2
    return multiple


def _networks(width: Width, linears: Mapping[str, LinearWeight], structure: Structure) -> Iterator[FeedForward]:
    """The feed-forward networks that a setting is the width of, one a block."""
    blocks: dict[Any, dict[str, tuple[int, int]]] = {}
    for name, cut in width.cuts.items():
        place = block_of(name)
        blocks.setdefault(place and place[:2], {})[name] = cut
    for cuts in blocks.values():
        downs = [linears[name] for name, (axis, _) in cuts.items() if name in linears and _reads(linears[name], axis)]
        if len(downs) != 1 or any(name in linears and linears[name].kind == "experts" for name in cuts):
            raise UnsupportedError(
                f"No neuron of {structure.architecture} can be dropped.",
                why="It has several feed-forward networks in a block (a mixture of experts).",
                hint="Prune them instead: --scope feed-forward --prune 0.2.",
            )
        yield FeedForward(downs[0], width.value, cuts)


def _reads(weight: LinearWeight, axis: int) -> bool:
    """Whether an axis of a weight is its input."""
    return axis == len(weight.shape) - (2 if weight.transposed else 1)


def _on_side(
    step: DropNeurons, found: Sequence[tuple[Width, tuple[FeedForward, ...]]], structure: Structure
) -> list[tuple[Width, tuple[FeedForward, ...]]]:
    """What a step's scope leaves of the settings."""
    if step.where == type(step.where)():
        return list(found)
    chosen = []
    for width, networks in found:
        inside = {network.down.stack in step.where.scope for network in networks}
        if inside == {True, False}:
            raise UsageError(
                f"The encoder and the decoder of {structure.architecture} have one width, {width.keys[-1]}: neurons "
                "cannot be dropped in one of them alone.",
                hint="Leave out --scope.",
            )
        if inside == {True}:
            chosen.append((width, networks))
    if not chosen:
        raise UsageError(
            f"{structure.architecture} has no feed-forward blocks in its {' and '.join(step.where.scope)}.",
            hint="Leave out --scope.",
        )
    return chosen


@dataclass(frozen=True)
class Cut:
    """A stored tensor of which some rows or columns stay: `source` is as it is stored, of the given `parameter`; `axis`
    of its shape has `each` entries, of one projection after the other, for a neuron of `network`."""

    source: StoredTensor
    parameter: str
    axis: int
    each: int
    network: FeedForward


@dataclass(frozen=True)
class Narrower:
    """A checkpoint with fewer neurons, its module tree, and what is cut, by stored name. The cut tensors of the
    checkpoint have their shapes, but no place that could be read."""

    checkpoint: Checkpoint
    tree: PreTrainedModel
    cuts: dict[str, Cut]


def with_fewer_neurons(checkpoint: Checkpoint, settings: Settings, drops: Sequence[DroppedNeurons]) -> Narrower:
    """Leave neurons out, whichever these will be.

    Raises UnsupportedError where what is stored is no tensor of floats for each projection.
    """
    whole = settings.whole
    for drop in drops:
        whole = drop.width.cut(whole, drop.after)
    config = settings.written(whole)
    tree = rebuild_model(settings.tree, config, settings.path)
    after = {network.down.parameter: drop.after for drop in drops for network in drop.networks}
    cuts = dict(_cuts(checkpoint, settings.tree, [network for drop in drops for network in drop.networks]))
    tensors = {
        name: _narrow(cuts[name], after[cuts[name].network.down.parameter]) if name in cuts else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return Narrower(replace(checkpoint, config=config, tensors=tensors), tree, cuts)


def _narrow(cut: Cut, kept: int) -> StoredTensor:
    shape = list(cut.source.shape)
    shape[cut.axis] = kept * cut.each
    return replace(cut.source, shape=tuple(shape))


def _cuts(checkpoint: Checkpoint, tree: PreTrainedModel, networks: Sequence[FeedForward]) -> Iterator[tuple[str, Cut]]:
    shapes, wanted = shapes_of(tree), {name: network for network in networks for name in network.cuts}
    found = set()
    for stored, binding in Naming(tree).bind(checkpoint.tensors).items():
        for parameter in set(binding.parameters) & wanted.keys():
            tensor, network = checkpoint.tensors[stored], wanted[parameter]
            if binding.reshaped or tensor.dtype not in FLOAT_DTYPES or tensor.shape != shapes[parameter]:
                raise UnsupportedError(
                    f"No neuron of {type(tree).__name__} can be dropped.",
                    why=f"{stored} is not stored as {parameter} is: in floats of 32 or 16 bits, a tensor for each.",
                    hint="Prune instead: --scope feed-forward --prune 0.2.",
                )
            axis, each = network.cuts[parameter]
            found.add(parameter)
            yield stored, Cut(tensor, parameter, axis, each, network)
    if lacking := sorted(wanted.keys() - found):
        raise CheckpointError(
            f"The checkpoint lacks {lacking[0]}, which its config says it has.", hint="Download or save it again."
        )
