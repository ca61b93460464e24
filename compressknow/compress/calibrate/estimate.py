"""Estimate of the time and memory that a calibrated conversion takes, made before it begins."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from compressknow.base.system import available_cores
from compressknow.compress.plan import Plan
from compressknow.compress.removal.smaller import Removal
from compressknow.compress.steps import Prune, Quantize, Step
from compressknow.model.groups import structure_of
from compressknow.model.structure import LinearWeight, Structure

# A product of two matrices of this size is tried so many times to tell the pace.
TRIAL, TRIALS = 512, 8
FLOAT_BYTES = 4


class Estimate(NamedTuple):
    """Cost of calibration, without its text: the blocks (and single layers) that are compressed, bytes of memory at
    most, and seconds at the pace of a bare product of matrices."""

    blocks: int
    bytes: int
    seconds: float


def estimate(plan: Plan) -> Estimate:
    """Estimate the cost of a plan whose recipe has a calibration."""
    calibration = plan.recipe.calibration
    assert calibration is not None
    pace = _measure_pace()
    parts = list(_estimate_removal(plan.removal, calibration.tokens, pace)) if plan.removal else []
    if any(step.calibrated for step in plan.recipe.steps if isinstance(step, Prune | Quantize)):
        parts.append(_estimate_compression(plan, calibration.tokens, pace))
    blocks, most = max(part.blocks for part in parts), max(part.bytes for part in parts)
    return Estimate(blocks, most, sum(part.seconds for part in parts))


def _estimate_removal(removal: Removal, tokens: int, pace: float) -> Iterator[Estimate]:
    """Estimate one run of the text through the model to choose blocks, and two for neurons, with X^T X and a fit."""
    if any(not drop.is_decided for drop in removal.blocks):
        places = _group_by_block(structure_of(removal.original[1]))
        operations = 2 * tokens * _count_used(places)
        yield Estimate(_count_blocks(places), _count_bytes(places, tokens, 0), operations / pace)
    if removal.neurons and not removal.is_decided:
        widths = [network.width for drop in removal.neurons for network in drop.networks]
        places = _group_by_block(structure_of(removal.wide[1]))
        # X^T X, and what is left of it twice in float64.
        memory = _count_bytes(places, tokens, 5 * max(widths) ** 2)
        operations = 2 * 2 * tokens * _count_used(places) + _count_operations(widths, tokens)
        yield Estimate(_count_blocks(places), memory, operations / pace)


def _estimate_compression(plan: Plan, tokens: int, pace: float) -> Estimate:
    places = _group_by_block(plan.structure)
    targets = {tensor.parameter for tensor in plan.tensors if tensor.in_scope}
    widths: list[list[int]] = []
    if any(_needs_products(step) for step in plan.recipe.steps):
        for weights in places.values():
            # Layers side by side in a module as a rule read the same tensor.
            own = [weight for weight in weights if weight.parameter in targets]
            read = {(w.module.rpartition(".")[0], w.shape[-2 if w.transposed else -1]) for w in own}
            widths.append([width for _, width in read])
    operations = 2 * 2 * tokens * _count_used(places) + sum(_count_operations(own, tokens) for own in widths)
    blocks = sum(any(weight.parameter in targets for weight in weights) for weights in places.values())
    squares = max((sum(width**2 for width in own) for own in widths), default=0)
    inside = {weight.parameter for weights in places.values() for weight in weights if weight.layer is not None}
    outside = sum(math.prod(shape) for name, shape in plan.structure.parameters.items() if name not in inside)
    return Estimate(blocks, _count_bytes(places, tokens, squares, outside), operations / pace)


def _needs_products(step: Step) -> bool:
    if isinstance(step, Quantize):
        return step.rounding == "gptq"
    return isinstance(step, Prune) and step.chosen.needs == "products"


Places = Mapping[str, Sequence[LinearWeight]]


def _group_by_block(structure: Structure) -> Places:
    """Return the weights of each block, and each that lies in none by itself."""
    places: dict[str, list[LinearWeight]] = {}
    for weight in structure.linears:
        if weight.group != "vision":
            block = weight.module if weight.layer is None else f"{weight.stack} {weight.layer}"
            places.setdefault(block, []).append(weight)
    return places


def _count_blocks(places: Places) -> int:
    return sum(any(weight.layer is not None for weight in weights) for weights in places.values())


def _count_used(places: Places) -> int:
    return sum(weight.used for weights in places.values() for weight in weights)


def _count_operations(widths: Iterable[int], tokens: int) -> int:
    """Count the operations for X^T X of so many channels, and its decomposition."""
    return sum(2 * tokens * width**2 + width**3 for width in widths)


def _count_bytes(places: Places, tokens: int, sums: int, outside: int | None = None) -> int:
    """Count the bytes of hidden states, with the largest block and so many sums, or with what lies outside the blocks:
    that is not there while blocks run. By default the Linear weights outside count alone."""
    block = max(sum(weight.stored for weight in weights) for weights in places.values())
    states = 2 * tokens * max(weight.shape[-1] for weights in places.values() for weight in weights)
    if outside is None:
        outside = sum(weight.stored for weights in places.values() for weight in weights if weight.layer is None)
    return FLOAT_BYTES * (states + max(2 * block + sums, outside))


def _measure_pace() -> float:
    """Measure the operations per second of all cores, on a product of matrices."""
    matrix = torch.rand(TRIAL, TRIAL)
    torch.mm(matrix, matrix)
    start = time.perf_counter()
    for _ in range(TRIALS):
        torch.mm(matrix, matrix)
    spent = time.perf_counter() - start
    return 2 * TRIAL**3 * TRIALS / spent * max(1, available_cores() / torch.get_num_threads())
