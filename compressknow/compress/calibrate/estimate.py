"""About how long a calibrated conversion takes and how much memory, told before it is begun."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from compressknow.base.system import available_cores
from compressknow.compress.plan import Plan
from compressknow.compress.removal.smaller import Removal
from compressknow.compress.steps import Prune, Quantize, Step
from compressknow.model.groups import structure_of
from compressknow.model.structure import LinearWeight, Structure

TRIAL, TRIALS = 512, 8
FLOAT_BYTES = 4


class Estimate(NamedTuple):
    """What calibration takes: the blocks (and single layers) that are compressed, bytes of memory at most, and seconds,
    of which a bare product of matrices tells the pace; the text is not in it."""

    blocks: int
    bytes: int
    seconds: float


class _Work(NamedTuple):
    """Blocks, bytes at most, and operations of what is done in one go over the text."""

    blocks: int
    bytes: int
    operations: float


def estimate(plan: Plan) -> Estimate:
    """Of a plan whose recipe has a calibration."""
    calibration = plan.recipe.calibration
    assert calibration is not None
    parts = list(_of_removal(plan.removal, calibration.tokens)) if plan.removal else []
    if any(step.calibrated for step in plan.recipe.steps if isinstance(step, Prune | Quantize)):
        parts.append(_of_weights(plan, calibration.tokens))
    blocks, most = max(part.blocks for part in parts), max(part.bytes for part in parts)
    return Estimate(blocks, most, sum(part.operations for part in parts) / _pace())


def _of_removal(removal: Removal, tokens: int) -> Iterator[_Work]:
    """The text runs once through the model to choose blocks, and twice for neurons, with X^T X and a fit."""
    if any(not drop.known for drop in removal.blocks):
        places = _places(structure_of(removal.given[1]))
        yield _Work(_blocks(places), _memory(places, tokens, 0), 2 * tokens * _used(places))
    if removal.neurons and not removal.decided:
        widths = [one.width for drop in removal.neurons for one in drop.networks]
        places = _places(structure_of(removal.wide[1]))
        products = sum(2 * tokens * width**2 + width**3 for width in widths)
        # X^T X, and what is left of it twice in float64.
        memory = _memory(places, tokens, 5 * max(widths) ** 2)
        yield _Work(_blocks(places), memory, 2 * 2 * tokens * _used(places) + products)


def _blocks(places: Mapping[str, Sequence[LinearWeight]]) -> int:
    return sum(any(weight.layer is not None for weight in own) for own in places.values())


def _used(places: Mapping[str, Sequence[LinearWeight]]) -> int:
    return sum(weight.used for own in places.values() for weight in own)


def _memory(places: Mapping[str, Sequence[LinearWeight]], tokens: int, sums: int) -> int:
    """Of the hidden states, with the largest block and sums of so many floats, or with what lies outside the blocks: it
    is Linear too, or as large as the final layer, and is not there while blocks run."""
    block = max(sum(weight.stored for weight in own) for own in places.values())
    states = 2 * tokens * max(weight.shape[-1] for own in places.values() for weight in own)
    outside = sum(weight.stored for own in places.values() for weight in own if weight.layer is None)
    return FLOAT_BYTES * (states + max(2 * block + sums, outside))


def _of_weights(plan: Plan, tokens: int) -> _Work:
    places = _places(plan.structure)
    targets = {tensor.parameter for tensor in plan.tensors if tensor.in_scope}
    products = any(map(_wants_products, plan.recipe.steps))
    sums = {place: _widths(weights, targets) for place, weights in places.items()} if products else {}
    compressed = sum(any(weight.parameter in targets for weight in weights) for weights in places.values())
    operations = 2 * 2 * tokens * _used(places)
    operations += sum(2 * tokens * width**2 + width**3 for widths in sums.values() for width in widths)
    weights = max(sum(weight.stored for weight in own) for own in places.values())
    squares = max((sum(width**2 for width in widths) for widths in sums.values()), default=0)
    states = 2 * tokens * max(weight.shape[-1] for own in places.values() for weight in own)
    inside = {weight.parameter for own in places.values() for weight in own if weight.layer is not None}
    outside = sum(math.prod(shape) for name, shape in plan.structure.parameters.items() if name not in inside)
    return _Work(compressed, FLOAT_BYTES * (states + max(2 * weights + squares, outside)), operations)


def _wants_products(step: Step) -> bool:
    if isinstance(step, Quantize):
        return step.rounding == "gptq"
    return isinstance(step, Prune) and step.chosen.needs == "products"


def _places(structure: Structure) -> dict[str, list[LinearWeight]]:
    """The weights of each block, and each that lies in none by itself."""
    places: dict[str, list[LinearWeight]] = {}
    for weight in structure.linears:
        if weight.group != "vision":
            block = weight.module if weight.layer is None else f"{weight.stack} {weight.layer}"
            places.setdefault(block, []).append(weight)
    return places


def _widths(weights: list[LinearWeight], targets: set[str]) -> list[int]:
    """Input channels of what is in scope; layers side by side in a module as a rule read the same tensor."""
    own = [weight for weight in weights if weight.parameter in targets]
    return [width for _, width in {(w.module.rpartition(".")[0], w.shape[-2 if w.transposed else -1]) for w in own}]


def _pace() -> float:
    """Operations a second of all cores, tried on a product of matrices."""
    matrix = torch.rand(TRIAL, TRIAL)
    torch.mm(matrix, matrix)
    start = time.perf_counter()
    for _ in range(TRIALS):
        torch.mm(matrix, matrix)
    spent = time.perf_counter() - start
    pace: float = 2 * TRIAL**3 * TRIALS / spent * max(1, available_cores() / torch.get_num_threads())
    return pace
