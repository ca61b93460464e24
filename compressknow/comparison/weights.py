"""Sums over the values of two tensors, and the entries to compare if some were removed from a checkpoint."""

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
    """Return the sums of two tensors, computed in float64, and whether their stored bytes are equal."""
    scale_a, scale_b = read_scales(reader, a), read_scales(reader, b)
    columns = max(get_matrix_shape(values.tensor.shape)[1] for values in (a, b))
    same_form = (a.tensor.dtype, a.stored.dtype) == (b.tensor.dtype, b.stored.dtype) and _is_same(scale_a, scale_b)
    sums, same = DiffSums(), same_form
    # torch cannot read tensors without elements.
    blocks = zip(a.blocks(reader, columns), b.blocks(reader, columns), strict=True) if a.tensor.numel else ()
    for block_a, block_b in blocks:
        equal = same_form and _is_same(block_a.values, block_b.values)
        x = dequantize_block(a, block_a, scale_a)
        sums += sum_values(x, x if equal else dequantize_block(b, block_b, scale_b))
        same = same and equal
    return sums, same


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # As bytes, since NaN differs from itself, and 0 equals -0.
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def sum_values(x: torch.Tensor, y: torch.Tensor) -> DiffSums:
    """Return the sums of two float64 tensors of equal shape; `y` may be `x` itself if they are equal."""
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
    side: StoredWeights, manifest: Mapping[str, Any], other: StoredWeights, other_manifest: Mapping[str, Any]
) -> StoredWeights:
    """Return a checkpoint whose blocks have their numbers from before others were dropped, in each stack that the other
    checkpoint has, or had, with all blocks."""
    dropped, other_dropped = (each.get("removed", {}).get("blocks", []) for each in (manifest, other_manifest))
    other_before = {entry["stack"]: entry["before"] for entry in other_dropped}
    remaining: dict[str, list[int]] = {}
    for entry in dropped:
        stack, before = entry["stack"], entry["before"]
        if before in (_count_blocks(other, stack), other_before.get(stack)):
            remaining[stack] = sorted(set(range(before)) - set(entry["dropped"]))
    if not remaining:
        return side
    rename = partial(_restore_name, remaining)
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
    blocks = map(parse_block, side.structure.parameters)
    return max((block[1] + 1 for block in blocks if block and block[0] == stack), default=0)


def _restore_name(remaining: Mapping[str, Sequence[int]], name: str) -> str:
    block = parse_block(name)
    if block is None or block[1] >= len(remaining.get(block[0], ())):
        return name
    return f"{block[0]}.{remaining[block[0]][block[1]]}.{block[2]}"


def _renumber_weight(weight: LinearWeight, parameter: str) -> LinearWeight:
    block = parse_block(parameter) if parameter != weight.parameter else None
    return replace(weight, parameter=parameter, layer=block[1]) if block else weight


@dataclass(frozen=True)
class LostNeurons:
    """Neurons lost along an axis: of `before`, with `each` entries per neuron, one projection after the other."""

    axis: int
    each: int
    before: int
    dropped: tuple[range, ...]

    def remaining(self) -> tuple[int, ...]:
        """Return the remaining entries by their original numbers."""
        dropped = set(chain.from_iterable(self.dropped))
        neurons = [number for number in range(self.before) if number not in dropped]
        return tuple(number + part * self.before for part in range(self.each) for number in neurons)


def read_lost_neurons(manifest: Mapping[str, Any], side: StoredWeights) -> dict[str, LostNeurons]:
    """Return the neurons that tensors of a checkpoint lost, by stored name, as far as its manifest lists them."""
    dropped: dict[tuple[str, int] | None, list[tuple[Any, tuple[range, ...]]]] = {}
    for entry in manifest.get("removed", {}).get("neurons", []):
        for module, neurons in list_dropped_neurons(entry).items():
            dropped.setdefault(_get_block(module), []).append((entry, neurons))
    rows = {row["name"]: row for row in manifest["tensors"] if "shape_before" in row} if dropped else {}
    lost: dict[str, LostNeurons] = {}
    for parameter, tensor in side.own.items():
        for entry, neurons in dropped.get(_get_block(parameter), ()) if tensor.name in rows else ():
            if found := _find_axis(rows[tensor.name], entry, neurons):
                lost.setdefault(tensor.name, found)
    return lost


def _get_block(name: str) -> tuple[str, int] | None:
    block = parse_block(name)
    return block and block[:2]


def _find_axis(row: Mapping[str, Any], entry: Mapping[str, Any], dropped: tuple[range, ...]) -> LostNeurons | None:
    """Return the loss along the only axis that is shorter, if the neurons of an entry account for it, or None."""
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
    """Return the entries that both still have, given what each lost (None if nothing); None if this does not match."""
    lost = lost_a or lost_b
    if lost is None or len(a.shape) != len(b.shape):
        return None
    if lost_a and lost_b and replace(lost_a, dropped=()) != replace(lost_b, dropped=()):
        return None
    whole = tuple(range(lost.each * lost.before))
    remaining_a, remaining_b = (each.remaining() if each else whole for each in (lost_a, lost_b))
    if (a.shape[lost.axis], b.shape[lost.axis]) != (len(remaining_a), len(remaining_b)):
        return None
    common = set(remaining_a) & set(remaining_b)
    one, other = _select(a, lost.axis, remaining_a, common), _select(b, lost.axis, remaining_b, common)
    return (one, other) if common and one.shape == other.shape else None


def _select(values: Values, axis: int, remaining: Sequence[int], common: Collection[int]) -> Values:
    numbers = tuple(index for index, number in enumerate(remaining) if number in common)
    return values if len(numbers) == len(remaining) else replace(values, axis=axis, numbers=numbers)
