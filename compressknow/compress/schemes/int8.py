"""int8: weights of 8 bits with a scale per output channel, activations of 8 bits with a scale per token.

Bit for bit what compressed-tensors computes (`calculate_qparams`, `quantize`): symmetric weights, scale =
absmax / 127.5 in the weight's own dtype, division and rounding in that dtype too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from compressknow.compress.schemes import Activations, Scheme

if TYPE_CHECKING:
    pass

WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "group_size": None}
DYNAMIC = {"type": "int", "dynamic": True, "group_size": None}


class Int8(Scheme):
    """See the module."""

    name = "int8"
    help = "8-bit weights and activations, to deploy"
    word = "int8"
    noun = "8-bit integers"
    rounds: ClassVar[Activations | None] = "token"

    def arguments(self) -> dict[str, Any]:
        """As vLLM's kernels for W8A8 take them."""
        return {
            "weights": {**WEIGHTS, "strategy": "channel"},
            "input_activations": {**DYNAMIC, "num_bits": 8, "strategy": "token", "symmetric": True},
        }

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """It has a kernel."""
        return None

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Blackwell has no int8 kernels."""
        return "not on Blackwell GPUs: no int8"
