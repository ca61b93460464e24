"""Neurons that were dropped: what is left of a tensor is compared with the same rows or columns of the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from compressknow.compress.removal.settings import block_of
from compressknow.diff.parameters import Side, Values
from compressknow.model.manifest import dropped_neurons


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
    place = block_of(name)
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
