"""Blocks that were dropped: what is left is called by the numbers that it had, so that like is compared with like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compressknow.compress.removal.settings import block_of
from compressknow.diff.parameters import Side
from compressknow.model.structure import LinearWeight

Kept = Mapping[str, tuple[int, ...]]


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
    places = map(block_of, side.structure.parameters)
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
    place = block_of(name)
    if place is None or place[0] not in kept or place[1] >= len(kept[place[0]]):
        return name
    return f"{place[0]}.{kept[place[0]][place[1]]}.{place[2]}"


def _weight_before(kept: Kept, weight: LinearWeight) -> LinearWeight:
    parameter = _name_before(kept, weight.parameter)
    if parameter == weight.parameter:
        return weight
    place = block_of(parameter)
    return replace(
        weight,
        parameter=parameter,
        module=_name_before(kept, weight.module),
        sharing=tuple(_name_before(kept, module) for module in weight.sharing),
        layer=place[1] if place else weight.layer,
    )
