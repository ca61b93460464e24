"""About how long a calibrated conversion takes and how much memory, told before it is begun."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from compressknow.compress.plan import Plan
from compressknow.compress.recipe import Prune, Quantize, Step
from compressknow.model.structure import LinearWeight
from compressknow.system import available_cores

TRIAL, TRIALS = 512, 8
FLOAT_BYTES = 4


class Estimate(NamedTuple):
    """What calibration takes: the blocks (and single layers) that are compressed, bytes of memory at most, and seconds,
    of which a bare product of matrices tells the pace; the text is not in it."""

    blocks: int
    bytes: int
    seconds: float


def estimate(plan: Plan) -> Estimate:
    """Of a plan whose recipe has a calibration."""
    calibration = plan.recipe.calibration
    assert calibration is not None
    places = _places(plan)
    targets = {tensor.parameter for tensor in plan.tensors if tensor.in_scope}
    products = any(map(_wants_products, plan.recipe.steps))
    sums = {place: _widths(weights, targets) for place, weights in places.items()} if products else {}
    compressed = sum(any(weight.parameter in targets for weight in weights) for weights in places.values())
    operations = calibration.tokens * sum(2 * 2 * weight.used for weights in places.values() for weight in weights)
    operations += sum(2 * calibration.tokens * width**2 + width**3 for widths in sums.values() for width in widths)
    weights = max(sum(weight.stored for weight in own) for own in places.values())
    squares = max((sum(width**2 for width in widths) for widths in sums.values()), default=0)
    states = 2 * calibration.tokens * max(weight.shape[-1] for own in places.values() for weight in own)
    inside = {weight.parameter for own in places.values() for weight in own if weight.layer is not None}
    outside = sum(math.prod(shape) for name, shape in plan.structure.parameters.items() if name not in inside)
    return Estimate(compressed, FLOAT_BYTES * (2 * weights + squares + states + outside), operations / _pace())


def _wants_products(step: Step) -> bool:
    if isinstance(step, Quantize):
        return step.rounding == "gptq"
    return isinstance(step, Prune) and step.chosen.needs == "products"


def _places(plan: Plan) -> dict[str, list[LinearWeight]]:
    """The weights of each block, and each that lies in none by itself."""
    places: dict[str, list[LinearWeight]] = {}
    for weight in plan.structure.linears:
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
