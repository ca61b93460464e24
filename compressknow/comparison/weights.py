"""Sums over the values of two tensors, and the entries to compare where one of the checkpoints lost some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from compressknow.comparison.diff import Sums
from compressknow.compress.blocks import Reader, get_matrix_shape
from compressknow.compress.removal.settings import parse_block
from compressknow.compress.weights import Side, Values, dequantize_block, read_scales
from compressknow.model.manifest import list_dropped_neurons
from compressknow.model.structure import LinearWeight

# By stack, the numbers of the blocks that are left, in the model that blocks were dropped of.
Remaining = Mapping[str, tuple[int, ...]]
# By stack, how many blocks it had, and these numbers.
Dropped = Mapping[str, tuple[int, tuple[int, ...]]]


def diff_values(reader: Reader, a: Values, b: Values) -> tuple[Sums, bool]:
    """Return the sums of two tensors, taken in float64, and whether they are stored alike to the bit."""
    scale_a, scale_b = read_scales(reader, a), read_scales(reader, b)
    columns = max(get_matrix_shape(values.tensor.shape)[1] for values in (a, b))
    alike = (a.tensor.dtype, a.stored.dtype) == (b.tensor.dtype, b.stored.dtype) and _is_same(scale_a, scale_b)
    sums, same = Sums(), alike
    # torch reads no tensor without elements.
    blocks = zip(a.blocks(reader, columns), b.blocks(reader, columns), strict=True) if a.tensor.numel else ()
    for block_a, block_b in blocks:
        equal = alike and _is_same(block_a.values, block_b.values)
        x = dequantize_block(a, block_a, scale_a)
        sums += sum_values(x, x if equal else dequantize_block(b, block_b, scale_b))
        same = same and equal
    return sums, same


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # As bytes: NaN is unlike itself, and zeros of both signs are alike.
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def sum_values(x: torch.Tensor, y: torch.Tensor) -> Sums:
    """Return the sums of two tensors of one shape, float64; `y` is `x` itself where nothing differs."""
    zeros, energy = _count_zeros(x), _sum_squares(x)
    if x is y:
        return Sums(x.numel(), zeros, zeros, energy, energy)
    change = y - x
    return Sums(
        x.numel(), zeros, _count_zeros(y), energy, _sum_squares(y), _sum_squares(change), float(change.abs().max())
    )


def _count_zeros(x: torch.Tensor) -> int:
    return x.numel() - int(torch.count_nonzero(x))


def _sum_squares(x: torch.Tensor) -> float:
    return float(torch.dot(x.reshape(-1), x.reshape(-1)))


def read_dropped_blocks(manifest: Mapping[str, Any]) -> Dropped:
    """Return, by list of blocks, how many it had before a conversion, and the numbers of those left."""
    entries = manifest.get("removed", {}).get("blocks", [])
    return {
        entry["stack"]: (entry["before"], tuple(sorted(set(range(entry["before"])) - set(entry["dropped"]))))
        for entry in entries
    }


def renumber_blocks(a: Side, b: Side, dropped_a: Dropped, dropped_b: Dropped) -> tuple[Side, Side]:
    """Return both checkpoints with the numbers of the model that blocks were dropped of: of the one, where the other
    still has them all, or of what both were made of.
    """
    return _renumber(a, _match_blocks(dropped_a, b, dropped_b)), _renumber(b, _match_blocks(dropped_b, a, dropped_a))


def _match_blocks(dropped: Dropped, other: Side, dropped_of_other: Dropped) -> Remaining:
    """Return the blocks that are left of stacks that the other checkpoint has whole, or was made of."""
    had = {stack: before for stack, (before, _) in dropped_of_other.items()}
    return {
        stack: remaining
        for stack, (before, remaining) in dropped.items()
        if before in (_count_blocks(other, stack), had.get(stack))
    }


def _count_blocks(side: Side, stack: str) -> int:
    places = map(parse_block, side.structure.parameters)
    return max((place[1] + 1 for place in places if place and place[0] == stack), default=0)


def _renumber(side: Side, remaining: Remaining) -> Side:
    if not remaining:
        return side
    rename = partial(_name_before, remaining)
    structure = replace(
        side.structure,
        linears=tuple(_renumber_weight(remaining, weight) for weight in side.structure.linears),
        parameters={rename(name): shape for name, shape in side.structure.parameters.items()},
    )
    return replace(
        side,
        structure=structure,
        own={rename(name): tensor for name, tensor in side.own.items()},
        supply={rename(name): tensor for name, tensor in side.supply.items()},
        loaded_to={rename(name): rename(parameter) for name, parameter in side.loaded_to.items()},
        modules={rename(module): module for module in side.parts},
    )


def _name_before(remaining: Remaining, name: str) -> str:
    place = parse_block(name)
    if place is None or place[1] >= len(remaining.get(place[0], ())):
        return name
    return f"{place[0]}.{remaining[place[0]][place[1]]}.{place[2]}"


def _renumber_weight(remaining: Remaining, weight: LinearWeight) -> LinearWeight:
    parameter = _name_before(remaining, weight.parameter)
    if parameter == weight.parameter:
        return weight
    place = parse_block(parameter)
    return replace(
        weight,
        parameter=parameter,
        module=_name_before(remaining, weight.module),
        sharing=tuple(_name_before(remaining, module) for module in weight.sharing),
        layer=place[1] if place else weight.layer,
    )


@dataclass(frozen=True)
class Lost:
    """Neurons lost along an axis of a tensor: of the `before` neurons that had `each` entries there, one projection
    after the other, those in `dropped` are gone.
    """

    axis: int
    each: int
    before: int
    dropped: tuple[range, ...]

    def remaining(self) -> tuple[int, ...]:
        """Return the entries that are left, by their number among all that there were."""
        gone = set(chain.from_iterable(self.dropped))
        neurons = [number for number in range(self.before) if number not in gone]
        return tuple(number + part * self.before for part in range(self.each) for number in neurons)


def read_lost_neurons(manifest: Mapping[str, Any], side: Side) -> dict[str, Lost]:
    """Return what the tensors of a converted checkpoint lost, by stored name; nothing of one whose manifest does not
    say which neurons went.
    """
    entries = manifest.get("removed", {}).get("neurons", [])
    dropped = [
        (entry, _get_block(module), gone) for entry in entries for module, gone in list_dropped_neurons(entry).items()
    ]
    rows = {row["name"]: row for row in manifest["tensors"] if "shape_before" in row} if dropped else {}
    lost: dict[str, Lost] = {}
    for parameter, tensor in side.own.items():
        if (row := rows.get(tensor.name)) is not None:
            of_block = (
                _find_axis(row, entry, gone) for entry, block, gone in dropped if block == _get_block(parameter)
            )
            if first := next(filter(None, of_block), None):
                lost[tensor.name] = first
    return lost


def _get_block(name: str) -> tuple[str, int] | None:
    place = parse_block(name)
    return place and place[:2]


def _find_axis(row: Mapping[str, Any], entry: Mapping[str, Any], dropped: tuple[range, ...]) -> Lost | None:
    """Return what was lost along the one axis that is shorter, if by what the neurons of an entry account for."""
    sizes = list(enumerate(zip(row["shape_before"], row["shape"], strict=False)))
    axes = [(axis, *pair) for axis, pair in sizes if pair[0] != pair[1]]
    if len(axes) != 1 or len(row["shape_before"]) != len(row["shape"]):
        return None
    axis, before, after = axes[0]
    each = before // entry["before"]
    if not each or (before, after) != (each * entry["before"], each * entry["after"]):
        return None
    return Lost(axis, each, entry["before"], dropped)


def align(a: Values, b: Values, lost_a: Lost | None, lost_b: Lost | None) -> tuple[Values, Values] | None:
    """Return the same entries of both tensors: all, where neither lost any; None where they cannot be told."""
    aligned = _align_entries(a, b, lost_a, lost_b) if len(a.shape) == len(b.shape) else None
    return aligned or ((a, b) if a.shape == b.shape else None)


def _align_entries(a: Values, b: Values, lost_a: Lost | None, lost_b: Lost | None) -> tuple[Values, Values] | None:
    if lost_b and _is_whole(a, b, lost_b):
        return _pick(a, lost_b.axis, lost_b.remaining()), b
    if lost_a and _is_whole(b, a, lost_a):
        return a, _pick(b, lost_a.axis, lost_a.remaining())
    if lost_a and lost_b and replace(lost_a, dropped=()) == replace(lost_b, dropped=()):
        left_a, left_b = lost_a.remaining(), lost_b.remaining()
        both = sorted(set(left_a) & set(left_b))
        of_a, of_b = ({number: i for i, number in enumerate(left)} for left in (left_a, left_b))
        one = _pick(a, lost_a.axis, tuple(of_a[number] for number in both))
        other = _pick(b, lost_a.axis, tuple(of_b[number] for number in both))
        if both and one.shape == other.shape:
            return one, other
    return None


def _is_whole(other: Values, cut: Values, lost: Lost) -> bool:
    """Return whether the other tensor has all that this one had."""
    whole = list(cut.shape)
    whole[lost.axis] = lost.each * lost.before
    return list(other.shape) == whole


def _pick(values: Values, axis: int, numbers: tuple[int, ...]) -> Values:
    if numbers == tuple(range(values.shape[axis])):
        return values
    return replace(values, axis=axis, numbers=numbers)
