"""TODO

Bit for bit what compressed-tensors computes (`calculate_qparams`, `quantize`): symmetric weights, scale =
absmax / 127.5 in the weight's own dtype, division and rounding in that dtype too.

One scale a tensor, and activations of 7 bits (its reduce_range is hard-coded), 8 bits being measurably another
computation. Bit for bit for float32 weights: it multiplies by the inverse of the scale, in float32, and no scale is
below float32's epsilon (`UniformQuantizationObserverBase._calculate_qparams`, `quantize_per_tensor`). A weight of 16
bits has a scale of its own dtype here; torch takes float32 alone.

Packed as compressed-tensors packs them (`pack_to_int32`), which vLLM reads on GPUs: four integers of a row, each plus
128, in 32 bits, the first in the lowest ones. Until 0.1 they lay as int8 (``int-quantized``), which is still read.

Bit for bit what compressed-tensors computes (`calculate_qparams`, `quantize`): scale = absmax / 448 in the weight's own
dtype, division in that dtype too, and the nearest of e4m3's values, which lie closer together the smaller they are.

Bit for bit what compressed-tensors computes and packs (`calculate_qparams`, `quantize`, `pack_to_int32`): symmetric
weights, scale = absmax / 7.5 in the weight's own dtype, and eight integers of a row, each plus 8, in 32 bits, the first
in the lowest ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressknow.compress.parameters import parameter
from compressknow.compress.schemes import SCALE, Activations, Scheme, Stored

if TYPE_CHECKING:
    import torch


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


# Integers in one of 32 bits.
PER_WORD_8 = 4


class Int8Weights(Int8):
    """See the module."""

    name = "int8-weights"
    help = "8-bit weights; activations stay float"
    format = "pack-quantized"
    rounds = None

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        """Four weights in 32 bits, the scales, and the shape that unpacking needs."""
        rows, columns = shape
        packed = Stored("_packed", "I32", (rows, -(-columns // PER_WORD_8)))
        return packed, Stored(SCALE, dtype, self.scale_shape(shape)), Stored("_shape", "I64", (2,))

    def arguments(self) -> dict[str, Any]:
        """The weights of int8 alone."""
        return {"weights": {**WEIGHTS, "strategy": "channel"}, "input_activations": None}

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """int32 [rows, columns / 4]; what a row lacks is zero."""
        import torch
        from torch.nn.functional import pad

        unsigned = codes.contiguous().view(torch.uint8) ^ 128
        return pad(unsigned, (0, -unsigned.shape[1] % PER_WORD_8)).view(torch.int32)

    def constants(self, shape: tuple[int, ...]) -> Mapping[str, torch.Tensor]:
        """The shape."""
        import torch

        return {"_shape": torch.tensor(shape, dtype=torch.int64)}

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """On CPUs it has no kernel for 8 bits (0.32, `MarlinLinearKernel`, `CPUWNA16LinearKernel`)."""
        return "on GPUs"


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


GROUP_SIZES = (32, 64, 128)
# Integers in one of 32 bits, and what is added to each so that it is not negative.
PER_WORD_4, OFFSET = 8, 8
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
        packed = Stored("_packed", "I32", (rows, columns // PER_WORD_4))
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
