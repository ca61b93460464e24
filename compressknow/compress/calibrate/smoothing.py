"""What of a plan is to be smoothed, and the errors where it cannot be; `smooth` has the computation."""

from __future__ import annotations

from collections.abc import Iterable

from compressknow.compress.plan import Plan, PlannedTensor
from compressknow.errors import UnsupportedError

SHARING = "Its blocks share their weights, and each use wants other factors."
TOGETHER = "Its blocks cannot be run one by one."


def to_smooth(plan: Plan, tensors: Iterable[PlannedTensor]) -> dict[str, float]:
    """Alpha by parameter."""
    steps = {tensor.parameter: plan.quantize_step(tensor) for tensor in tensors}
    return {name: step.smooth for name, step in steps.items() if step and step.smooth}


def nothing_to_smooth(module: str) -> UnsupportedError:
    """The error for a block without a norm that can take it."""
    return UnsupportedError(
        f"Nothing in {module} can be smoothed.",
        why="Only a norm that feeds quantized layers and nothing else can take what leaves its outputs.",
        hint="Leave --smooth out, or widen --scope to all layers that read a norm.",
    )


def refuse_smoothing(plan: Plan, why: str) -> None:
    """Raise UnsupportedError where the recipe smooths."""
    if plan.recipe.smooths:
        raise UnsupportedError(
            f"{plan.structure.architecture} cannot be smoothed.", why=why, hint="Leave --smooth out."
        )
