"""Linear layers that multiply by weights of 4 bits as they are packed, without a copy of them in floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressknow.engine.layers import EngineLinear, LayerKind

# What torch's kernel takes: these groups, and outputs by so many.
GROUP_SIZES, OUTPUTS = (32, 64, 128, 256), 16
# Instructions with which it beats a product in float32: 24 us against 46 for 576 -> 1536 on one core. With AVX2 it
# takes 87, and with others it goes one by one.
FAST = "AVX512"
# Subtracted from what is stored in 4 bits.
OFFSET = 8


class Int4Linear(EngineLinear):
    """A Linear with int4 weights in groups of input channels: the scheme ``int4``.

    What comes in, scales and what goes out are rounded to bfloat16, which is what torch's kernel takes; it multiplies
    and adds in float32 (`aten::_weight_int4pack_mm_for_cpu`). A row has the same bits in any company.

    Parameters
    ----------
    integers : int8 [out, in], from -8 to 7.
    weight_scale : float [out, groups].
    bias : float [out] or None.

    Takes [..., in] and gives [..., out] of the same float dtype.
    """

    word = "int4"
    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, integers: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.group_size = self.in_features // weight_scale.shape[1]
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.rounds = True
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32).add_(OFFSET), 1)
        # In an order of the kernel's own: no parameter that anyone could read.
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales_and_zeros", _beside(weight_scale.t()), persistent=False)

    @property
    def unlisted(self) -> int:
        """All of its weights."""
        return self.out_features * self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounds:
            weight = self.integers().to(x.dtype) * self._per_column().to(x.dtype)
            return functional.linear(x, weight, self.bias)
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        values = self._product(rows, self.scales_and_zeros.to(torch.bfloat16)).to(x.dtype)
        if self.bias is not None:
            values += self.bias
        return values.reshape(*x.shape[:-1], self.out_features)

    def integers(self) -> torch.Tensor:
        """int8 [out, in], from -8 to 7: what the kernel makes of unit vectors, in bfloat16 exactly."""
        ones = torch.ones(self.in_features // self.group_size, self.out_features)
        units = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self._product(units, _beside(ones)).t().to(torch.int8)

    def _product(self, rows: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, self.group_size, scales_and_zeros
        )
        return product

    def _per_column(self) -> torch.Tensor:
        return self.weight_scale.repeat_interleave(self.group_size, dim=1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As a checkpoint stores it, so that what is saved can be loaded."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_packed"] = pack_to_int32(self.integers(), 4)
        destination[f"{prefix}weight_shape"] = torch.tensor([self.out_features, self.in_features])


def _beside(scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [groups, out, 2] of scales [groups, out]: each with a zero, for the kernel adds another number."""
    return torch.stack([scales, torch.zeros_like(scales)], dim=-1).to(torch.bfloat16)


def runs_on(device: str | torch.device) -> bool:
    """Whether torch's kernel is fast there."""
    return torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() == FAST


def layer_of(module: nn.Module) -> Int4Linear | None:
    """The int4 layer for a module that compressed-tensors has prepared and that still holds packed weights; None where
    its scheme is another one, or the kernel does not take its shape.
    """
    scheme: Any = getattr(module, "quantization_scheme", None)
    parts = dict(module.named_parameters(recurse=False))
    named = {"weight_packed", "weight_scale", "weight_shape"}
    if type(module) is not nn.Linear or not scheme or set(parts) - {"bias"} != named or not _is_int4(scheme):
        return None
    rows, columns = parts["weight_shape"].tolist()
    size = scheme.weights.group_size
    if rows % OUTPUTS or columns % size or parts["weight_scale"].shape != (rows, columns // size):
        return None
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    integers = unpack_from_int32(parts["weight_packed"].data, 4, torch.Size((rows, columns)))
    return Int4Linear(integers, parts["weight_scale"].data, parts.get("bias"))


def _is_int4(scheme: Any) -> bool:
    weights = scheme.weights
    if weights is None or scheme.input_activations is not None or scheme.output_activations is not None:
        return False
    kind = (weights.num_bits, weights.type, weights.strategy, weights.symmetric)
    return kind == (4, "int", "group", True) and weights.group_size in GROUP_SIZES


class Int4Kind(LayerKind):
    """Weights of 4 bits; what comes in stays a float."""

    def runs_on(self, device: str | torch.device) -> bool:
        """See the function."""
        return runs_on(device)

    def layer_of(self, module: nn.Module) -> Int4Linear | None:
        """See the function."""
        return layer_of(module)
