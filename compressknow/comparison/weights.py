"""How far the values of two tensors are apart, and what is compared where one side was made of less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from compressknow.comparison.differences import Sums
from compressknow.compress.blocks import Reader, matrix_shape
from compressknow.compress.removal.settings import parse_block
from compressknow.compress.weights import Side, Values, dequantize_block, read_scales
from compressknow.model.manifest import dropped_neurons
from compressknow.model.structure import LinearWeight

Kept = Mapping[str, tuple[int, ...]]


def deviation(reader: Reader, a: Values, b: Values) -> tuple[Sums, bool]:
    """The sums of what is compared of two tensors, taken in float64, and whether it is stored alike to the bit."""
    scale_a, scale_b = read_scales(reader, a), read_scales(reader, b)
    columns = max(matrix_shape(values.tensor.shape)[1] for values in (a, b))
    alike = (a.tensor.dtype, a.stored.dtype) == (b.tensor.dtype, b.stored.dtype) and _same(scale_a, scale_b)
    sums, same = Sums(), alike
    # torch reads no tensor without elements.
    blocks = zip(a.blocks(reader, columns), b.blocks(reader, columns), strict=True) if a.tensor.numel else ()
    for block_a, block_b in blocks:
        equal = alike and _same(block_a.values, block_b.values)
        x = dequantize_block(a, block_a, scale_a)
        sums += sums_of(x, x if equal else dequantize_block(b, block_b, scale_b))
        same = same and equal
    return sums, same


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # As bytes: NaN is unlike itself, and zeros of both signs are alike.
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def sums_of(x: torch.Tensor, y: torch.Tensor) -> Sums:
    """Return the sums of two tensors of one shape, float64; `y` is `x` itself where nothing differs."""
    zeros, energy = _zeros(x), _energy(x)
    if x is y:
        return Sums(x.numel(), zeros, zeros, energy, energy)
    change = y - x
    return Sums(x.numel(), zeros, _zeros(y), energy, _energy(y), _energy(change), float(change.abs().max()))


def _zeros(x: torch.Tensor) -> int:
    return x.numel() - int(torch.count_nonzero(x))


def _energy(x: torch.Tensor) -> float:
    return float(torch.dot(x.reshape(-1), x.reshape(-1)))


@dataclass(frozen=True)
class Dropped:
    """What became of a stack of blocks: how many it had `before`, and the numbers of those that it `kept`."""

    before: int
    kept: tuple[int, ...]


def dropped_blocks(manifest: Mapping[str, Any]) -> dict[str, Dropped]:
    """What a conversion dropped, by list of blocks."""
    entries = manifest.get("removed", {}).get("blocks", [])
    return {
        entry["stack"]: Dropped(entry["before"], tuple(sorted(set(range(entry["before"])) - set(entry["dropped"]))))
        for entry in entries
    }


def numbered_alike(
    a: Side, b: Side, dropped_a: Mapping[str, Dropped], dropped_b: Mapping[str, Dropped]
) -> tuple[Side, Side]:
    """Both sides with the numbers of the model that blocks were dropped of: of the one, where the other still has them
    all, or of what both were made of."""
    return _numbered(a, _of_the_other(dropped_a, b, dropped_b)), _numbered(b, _of_the_other(dropped_b, a, dropped_a))


def _of_the_other(dropped: Mapping[str, Dropped], other: Side, its: Mapping[str, Dropped]) -> Kept:
    """The blocks that are left of stacks that the other side has whole, or was made of."""
    had = {stack: drop.before for stack, drop in its.items()}
    return {
        stack: drop.kept for stack, drop in dropped.items() if drop.before in (_count(other, stack), had.get(stack))
    }


def _count(side: Side, stack: str) -> int:
    places = map(parse_block, side.structure.parameters)
    return max((place[1] + 1 for place in places if place and place[0] == stack), default=0)


def _numbered(side: Side, kept: Kept) -> Side:
    if not kept:
        return side
    name = partial(_name_before, kept)
    structure = replace(
        side.structure,
        linears=tuple(_weight_before(kept, weight) for weight in side.structure.linears),
        parameters={name(each): shape for each, shape in side.structure.parameters.items()},
    )
    return replace(
        side,
        structure=structure,
        own={name(each): tensor for each, tensor in side.own.items()},
        supply={name(each): tensor for each, tensor in side.supply.items()},
        loaded_to={name(each): name(parameter) for each, parameter in side.loaded_to.items()},
        modules={name(module): module for module in side.parts},
    )


def _name_before(kept: Kept, name: str) -> str:
    place = parse_block(name)
    if place is None or place[0] not in kept or place[1] >= len(kept[place[0]]):
        return name
    return f"{place[0]}.{kept[place[0]][place[1]]}.{place[2]}"


def _weight_before(kept: Kept, weight: LinearWeight) -> LinearWeight:
    parameter = _name_before(kept, weight.parameter)
    if parameter == weight.parameter:
        return weight
    place = parse_block(parameter)
    return replace(
        weight,
        parameter=parameter,
        module=_name_before(kept, weight.module),
        sharing=tuple(_name_before(kept, module) for module in weight.sharing),
        layer=place[1] if place else weight.layer,
    )


@dataclass(frozen=True)
class Lost:
    """What became of an axis of a tensor: of the `before` neurons that had `each` entries there, one projection after
    the other, those in `dropped` are gone."""

    axis: int
    each: int
    before: int
    dropped: tuple[range, ...]

    def kept(self) -> tuple[int, ...]:
        """The entries that are left, by their number among all that there were."""
        gone = set(chain.from_iterable(self.dropped))
        neurons = [number for number in range(self.before) if number not in gone]
        return tuple(number + part * self.before for part in range(self.each) for number in neurons)


def lost_neurons(manifest: Mapping[str, Any], side: Side) -> dict[str, Lost]:
    """By stored name, what the tensors of a converted checkpoint lost; nothing of one whose manifest does not say which
    neurons went."""
    entries = manifest.get("removed", {}).get("neurons", [])
    dropped = [(entry, _block(module), gone) for entry in entries for module, gone in dropped_neurons(entry).items()]
    rows = {row["name"]: row for row in manifest["tensors"] if "shape_before" in row} if dropped else {}
    found: dict[str, Lost] = {}
    for parameter, tensor in side.own.items():
        if (row := rows.get(tensor.name)) is not None:
            those = (_lost(row, entry, gone) for entry, block, gone in dropped if block == _block(parameter))
            if lost := next(filter(None, those), None):
                found[tensor.name] = lost
    return found


def _block(name: str) -> tuple[str, int] | None:
    place = parse_block(name)
    return place and place[:2]


def _lost(row: Mapping[str, Any], entry: Mapping[str, Any], dropped: tuple[range, ...]) -> Lost | None:
    """Along the one axis that is shorter, if by what the neurons of an entry account for."""
    sizes = list(enumerate(zip(row["shape_before"], row["shape"], strict=False)))
    axes = [(axis, *pair) for axis, pair in sizes if pair[0] != pair[1]]
    if len(axes) != 1 or len(row["shape_before"]) != len(row["shape"]):
        return None
    axis, before, after = axes[0]
    each = before // entry["before"]
    if not each or (before, after) != (each * entry["before"], each * entry["after"]):
        return None
    return Lost(axis, each, entry["before"], dropped)


def aligned(a: Values, b: Values, lost_a: Lost | None, lost_b: Lost | None) -> tuple[Values, Values] | None:
    """The same entries of both sides: all, where neither lost any; None where they cannot be told."""
    if len(a.shape) == len(b.shape):
        for pair in _by_position(a, b, lost_a, lost_b):
            return pair
    return (a, b) if a.shape == b.shape else None


def _by_position(a: Values, b: Values, lost_a: Lost | None, lost_b: Lost | None) -> Iterator[tuple[Values, Values]]:
    if lost_b and _is_whole(a, b, lost_b):
        yield _picked(a, lost_b.axis, lost_b.kept()), b
    elif lost_a and _is_whole(b, a, lost_a):
        yield a, _picked(b, lost_a.axis, lost_a.kept())
    elif lost_a and lost_b and replace(lost_a, dropped=()) == replace(lost_b, dropped=()):
        kept_a, kept_b = lost_a.kept(), lost_b.kept()
        both = sorted(set(kept_a) & set(kept_b))
        of_a, of_b = ({number: i for i, number in enumerate(kept)} for kept in (kept_a, kept_b))
        one = _picked(a, lost_a.axis, tuple(of_a[number] for number in both))
        other = _picked(b, lost_a.axis, tuple(of_b[number] for number in both))
        if both and one.shape == other.shape:
            yield one, other


def _is_whole(other: Values, cut: Values, lost: Lost) -> bool:
    """Whether the other side has all that this one had."""
    whole = list(cut.shape)
    whole[lost.axis] = lost.each * lost.before
    return list(other.shape) == whole


def _picked(values: Values, axis: int, numbers: tuple[int, ...]) -> Values:
    if numbers == tuple(range(values.shape[axis])):
        return values
    return replace(values, axis=axis, numbers=numbers)
