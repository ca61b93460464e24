"""int4: weights of 4 bits with a scale for each group of input channels; activations stay floats.

Bit for bit what compressed-tensors computes and packs (`calculate_qparams`, `quantize`, `pack_to_int32`): symmetric
weights, scale = absmax / 7.5 in the weight's own dtype, and eight integers of a row, each plus 8, in 32 bits, the first
in the lowest ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from compressknow.compress.parameters import parameter
from compressknow.compress.schemes import SCALE, Scheme, Stored

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (32, 64, 128)
# Integers in one of 32 bits, and what is added to each so that it is not negative.
PACKED, OFFSET = 8, 8
# What inputs and outputs must be a multiple of in vLLM's kernel for CPUs (0.32, `CPUWNA16LinearKernel.can_implement`);
# that for GPUs (`MarlinLinearKernel`) pads what is odd.
VLLM_CPU = 32


class Int4(Scheme):
    """See the module."""

    name = "int4"
    help = "4-bit weights; activations stay float"
    word = "int4"
    noun = "4-bit integers"
    bits, lowest, highest = 4, -8, 7
    format = "pack-quantized"
    group_size: int | None = parameter(
        default=None,
        kind=int,
        help="Input channels that share a scale: 32, 64 or 128.  [default: the largest that divides all in scope]",
        must="32, 64 or 128",
        fits=lambda size: size in GROUP_SIZES,
    )

    @property
    def scale_per(self) -> int:
        """A group of input channels: of the smallest size as long as none is chosen."""
        return self.group_size or GROUP_SIZES[0]

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        """Eight weights in 32 bits, the scales, and the shape that unpacking needs."""
        rows, columns = shape
        packed = Stored("_packed", "I32", (rows, columns // PACKED))
        return packed, Stored(SCALE, dtype, self.scale_shape(shape)), Stored("_shape", "I64", (2,))

    def fit(self, shapes: Iterable[tuple[int, ...]]) -> dict[str, Any] | None:
        """Its own group size, or else the largest that divides them all."""
        columns = {shape[1] for shape in shapes}
        sizes = (*([self.group_size] if self.group_size else []), *reversed(GROUP_SIZES))
        return next(({"group_size": size} for size in sizes if not any(n % size for n in columns)), None)

    def arguments(self) -> dict[str, Any]:
        """Weights alone."""
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
        return {
            "weights": {**weights, "strategy": "group", "group_size": self.scale_per},
            "input_activations": None,
        }

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """int32 [rows, columns / 8]."""
        import torch

        # Two bytes are one integer here, the first in its lower half, and then share a byte.
        pairs = (codes + OFFSET).view(torch.int16)
        return (pairs | pairs >> 4).to(torch.uint8).view(torch.int32)

    def constants(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The shape."""
        import torch

        return {"_shape": torch.tensor(shape, dtype=torch.int64)}

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """It has kernels."""
        return None

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:
        """Odd sizes are for GPUs; in bfloat16 the kernel for CPUs loses much (`make test-vllm`)."""
        if all(size % VLLM_CPU == 0 for shape in shapes for size in shape):
            return "on CPUs with --dtype float16"
        return f"on GPUs: its kernel for CPUs takes layers by multiples of {VLLM_CPU}"
