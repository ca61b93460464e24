"""int8-weights: the weights of int8; activations stay floats (W8A16).

Packed as compressed-tensors packs them (`pack_to_int32`), which vLLM reads on GPUs: four integers of a row, each plus
128, in 32 bits, the first in the lowest ones. Until 0.1 they lay as int8 (``int-quantized``), which is still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compressknow.compress.schemes import SCALE, Stored
from compressknow.compress.schemes.int8 import WEIGHTS, Int8

if TYPE_CHECKING:
    import torch

# Integers in one of 32 bits.
PACKED = 4


class Int8Weights(Int8):
    """See the module."""

    name = "int8-weights"
    help = "8-bit weights; activations stay float"
    format = "pack-quantized"
    rounds = None

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        """Four weights in 32 bits, the scales, and the shape that unpacking needs."""
        rows, columns = shape
        packed = Stored("_packed", "I32", (rows, -(-columns // PACKED)))
        return packed, Stored(SCALE, dtype, self.scale_shape(shape)), Stored("_shape", "I64", (2,))

    def arguments(self) -> dict[str, Any]:
        """The weights of int8 alone."""
        return {"weights": {**WEIGHTS, "strategy": "channel"}, "input_activations": None}

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """int32 [rows, columns / 4]; what a row lacks is zero."""
        import torch
        from torch.nn.functional import pad

        unsigned = codes.contiguous().view(torch.uint8) ^ 128
        return pad(unsigned, (0, -unsigned.shape[1] % PACKED)).view(torch.int32)

    def constants(self, shape: tuple[int, ...]) -> Mapping[str, torch.Tensor]:
        """The shape."""
        import torch

        return {"_shape": torch.tensor(shape, dtype=torch.int64)}

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """On CPUs it has no kernel for 8 bits (0.32, `MarlinLinearKernel`, `CPUWNA16LinearKernel`)."""
        return "on GPUs"
