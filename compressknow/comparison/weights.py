"""Sums over the values of two tensors, and the entries to compare where one of the checkpoints lost some."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from compressknow.comparison.diff import DiffSums
from compressknow.compress.blocks import Reader, get_matrix_shape
from compressknow.compress.removal.settings import parse_block
from compressknow.compress.weights import StoredWeights, Values, dequantize_block, read_scales
from compressknow.model.manifest import list_dropped_neurons
from compressknow.model.structure import LinearWeight


def diff_values(reader: Reader, a: Values, b: Values) -> tuple[DiffSums, bool]:
    """Return the sums of two tensors, taken in float64, and whether they are stored bit for bit the same."""
    scale_a, scale_b = read_scales(reader, a), read_scales(reader, b)
    columns = max(get_matrix_shape(values.tensor.shape)[1] for values in (a, b))
    alike = (a.tensor.dtype, a.stored.dtype) == (b.tensor.dtype, b.stored.dtype) and _is_same(scale_a, scale_b)
    sums, same = DiffSums(), alike
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
    # As bytes: NaN does not equal itself, and zeros of both signs are equal.
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def sum_values(x: torch.Tensor, y: torch.Tensor) -> DiffSums:
    """Return the sums of two tensors of one shape, float64; `y` is `x` itself where nothing differs."""
    zeros, energy = _count_zeros(x), _sum_squares(x)
    if x is y:
        return DiffSums(x.numel(), zeros, zeros, energy, energy)
    change = y - x
    return DiffSums(
        x.numel(), zeros, _count_zeros(y), energy, _sum_squares(y), _sum_squares(change), float(change.abs().max())
    )


def _count_zeros(x: torch.Tensor) -> int:
    return x.numel() - int(torch.count_nonzero(x))


def _sum_squares(x: torch.Tensor) -> float:
    return float(torch.dot(x.reshape(-1), x.reshape(-1)))


def renumber_blocks(
    side: StoredWeights, manifest: Mapping[str, Any], other: StoredWeights, its_manifest: Mapping[str, Any]
) -> StoredWeights:
    """Return a checkpoint with the numbers that its blocks had before others were dropped, in the stacks that the other
    checkpoint still has whole, or was made of."""
    dropped, of_other = (each.get("removed", {}).get("blocks", []) for each in (manifest, its_manifest))
    had = {entry["stack"]: entry["before"] for entry in of_other}
    remaining: dict[str, list[int]] = {}
    for entry in dropped:
        stack, before = entry["stack"], entry["before"]
        if before in (_count_blocks(other, stack), had.get(stack)):
            remaining[stack] = sorted(set(range(before)) - set(entry["dropped"]))
    if not remaining:
        return side
    rename = partial(_name_before, remaining)
    structure = replace(
        side.structure,
        linears=tuple(_renumber_weight(weight, rename(weight.parameter)) for weight in side.structure.linears),
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


def _count_blocks(side: StoredWeights, stack: str) -> int:
    places = map(parse_block, side.structure.parameters)
    return max((place[1] + 1 for place in places if place and place[0] == stack), default=0)


def _name_before(remaining: Mapping[str, Sequence[int]], name: str) -> str:
    place = parse_block(name)
    if place is None or place[1] >= len(remaining.get(place[0], ())):
        return name
    return f"{place[0]}.{remaining[place[0]][place[1]]}.{place[2]}"


def _renumber_weight(weight: LinearWeight, parameter: str) -> LinearWeight:
    place = parse_block(parameter) if parameter != weight.parameter else None
    return replace(weight, parameter=parameter, layer=place[1]) if place else weight


@dataclass(frozen=True)
class LostNeurons:
    """Neurons lost along an axis of a tensor: of the `before` neurons that had `each` entries there, one projection
    after the other, those in `dropped` are gone."""

    axis: int
    each: int
    before: int
    dropped: tuple[range, ...]

    def remaining(self) -> tuple[int, ...]:
        """Return the entries that are left, by their number among all that there were."""
        gone = set(chain.from_iterable(self.dropped))
        neurons = [number for number in range(self.before) if number not in gone]
        return tuple(number + part * self.before for part in range(self.each) for number in neurons)


def read_lost_neurons(manifest: Mapping[str, Any], side: StoredWeights) -> dict[str, LostNeurons]:
    """Return what the tensors of a converted checkpoint lost, by stored name; nothing of one whose manifest does not
    say which neurons went."""
    entries = manifest.get("removed", {}).get("neurons", [])
    dropped = [
        (entry, _get_block(module), gone) for entry in entries for module, gone in list_dropped_neurons(entry).items()
    ]
    rows = {row["name"]: row for row in manifest["tensors"] if "shape_before" in row} if dropped else {}
    lost: dict[str, LostNeurons] = {}
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


def _find_axis(row: Mapping[str, Any], entry: Mapping[str, Any], dropped: tuple[range, ...]) -> LostNeurons | None:
    """Return what was lost along the one axis that is shorter, if by what the neurons of an entry account for."""
    sizes = list(enumerate(zip(row["shape_before"], row["shape"], strict=False)))
    axes = [(axis, *pair) for axis, pair in sizes if pair[0] != pair[1]]
    if len(axes) != 1 or len(row["shape_before"]) != len(row["shape"]):
        return None
    axis, before, after = axes[0]
    each = before // entry["before"]
    if not each or (before, after) != (each * entry["before"], each * entry["after"]):
        return None
    return LostNeurons(axis, each, entry["before"], dropped)


def align(a: Values, b: Values, lost_a: LostNeurons | None, lost_b: LostNeurons | None) -> tuple[Values, Values] | None:
    """Return the same entries of both tensors: all, where neither lost any; None if they are unknown."""
    # One may have all that the other was made of, though it lost some before.
    for first, second in ((None, lost_b), (lost_a, None), (lost_a, lost_b)):
        if aligned := _align_entries(a, b, first, second):
            return aligned
    return (a, b) if a.shape == b.shape else None


def _align_entries(
    a: Values, b: Values, lost_a: LostNeurons | None, lost_b: LostNeurons | None
) -> tuple[Values, Values] | None:
    """Return the entries that both have left, if that is what they lost: None for a tensor that lost nothing."""
    lost = lost_a or lost_b
    if lost is None or len(a.shape) != len(b.shape):
        return None
    if lost_a and lost_b and replace(lost_a, dropped=()) != replace(lost_b, dropped=()):
        return None
    whole = tuple(range(lost.each * lost.before))
    left_a, left_b = (each.remaining() if each else whole for each in (lost_a, lost_b))
    if (a.shape[lost.axis], b.shape[lost.axis]) != (len(left_a), len(left_b)):
        return None
    both = set(left_a) & set(left_b)
    one, other = _pick(a, lost.axis, left_a, both), _pick(b, lost.axis, left_b, both)
    return (one, other) if both and one.shape == other.shape else None


def _pick(values: Values, axis: int, left: Sequence[int], wanted: Collection[int]) -> Values:
    numbers = tuple(place for place, number in enumerate(left) if number in wanted)
    return values if len(numbers) == len(left) else replace(values, axis=axis, numbers=numbers)
