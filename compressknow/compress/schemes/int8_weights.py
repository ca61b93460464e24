"""int8-weights: the weights of int8; activations stay floats."""

from __future__ import annotations

from typing import Any

from compressknow.compress.schemes import Scheme
from compressknow.compress.schemes.int8 import WEIGHTS, Int8


class Int8Weights(Int8):
    """See the module."""

    name = "int8-weights"
    help = "8-bit weights; activations stay float"
    rounds = None

    def arguments(self) -> dict[str, Any]:
        """The weights of int8 alone."""
        return {"weights": {**WEIGHTS, "strategy": "channel"}, "input_activations": None}

    vllm_obstacle = Scheme.vllm_obstacle
    vllm_limit = Scheme.vllm_limit
