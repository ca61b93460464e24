"""int8-paper: what torch.ao.quantization.quantize_dynamic does on x86, which the paper used.

One scale a tensor, and activations of 7 bits (its reduce_range is hard-coded), 8 bits being measurably another
computation. Bit for bit for float32 weights: it multiplies by the inverse of the scale, in float32, and no scale is
below float32's epsilon (`UniformQuantizationObserverBase._calculate_qparams`, `quantize_per_tensor`). A weight of 16
bits has a scale of its own dtype here; torch takes float32 alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from compressknow.compress.schemes import Scheme
from compressknow.compress.schemes.int8 import DYNAMIC, WEIGHTS

if TYPE_CHECKING:
    import torch


class Int8Paper(Scheme):
    """See the module."""

    name = "int8-paper"
    help = "as in the paper: per tensor, 7-bit activations"
    word = "int8"
    noun = "8-bit integers"
    rounds = "batch"

    @property
    def scale_per(self) -> Literal["row", "tensor"] | int:
        """One for all of a weight."""
        return "tensor"

    def arguments(self) -> dict[str, Any]:
        """Activations have a scale and a zero point for all that come together."""
        return {
            "weights": {**WEIGHTS, "strategy": "tensor"},
            "input_activations": {**DYNAMIC, "num_bits": 7, "strategy": "tensor", "symmetric": False},
        }

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """absmax / 127.5, of float32's epsilon at least."""
        import torch

        return (absmax / ((self.highest - self.lowest) / 2)).clamp(min=torch.finfo(torch.float32).eps)

    def steps(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """By the inverse of the scale, in float32."""
        import torch

        return values.to(torch.float32) * scales.to(torch.float32).reciprocal()
