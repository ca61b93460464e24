"""fp8: weights of 8-bit floats (e4m3) with a scale per output channel, activations too with a scale per token.

Bit for bit what compressed-tensors computes (`calculate_qparams`, `quantize`): scale = absmax / 448 in the weight's own
dtype, division in that dtype too, and the nearest of e4m3's values, which lie closer together the smaller they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from compressknow.compress.schemes import SCALE, Activations, Scheme, Stored

if TYPE_CHECKING:
    import torch

# The largest number of e4m3: the format has no infinity.
LARGEST = 448
_FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}


class Fp8(Scheme):
    """See the module."""

    name = "fp8"
    help = "8-bit floats (e4m3), weights and activations"
    word = "fp8"
    noun = "8-bit floats"
    lowest, highest = -LARGEST, LARGEST
    format = "float-quantized"
    rounds: ClassVar[Activations | None] = "token"

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        """Floats of one byte, and their scales."""
        return Stored("", "F8_E4M3", shape), Stored(SCALE, dtype, self.scale_shape(shape))

    def arguments(self) -> dict[str, Any]:
        """As vLLM's kernels for FP8 take them."""
        return {
            "weights": {**_FLOAT, "dynamic": False, "strategy": "channel"},
            "input_activations": {**_FLOAT, "dynamic": True, "strategy": "token"},
        }

    def round(self, steps: torch.Tensor) -> torch.Tensor:
        """float8_e4m3fn."""
        import torch

        return steps.clamp_(self.lowest, self.highest).to(torch.float8_e4m3fn)

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """It has a kernel."""
        return None

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Ada and Hopper are the first GPUs that multiply such floats."""
        return "on GPUs; before Ada and Hopper, activations stay floats"
