"""Linear layers that multiply int8 weights by int8 activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressknow.engine.layers import EngineLinear, LayerKind


class Int8Linear(EngineLinear):
    """A Linear with int8 weights whose activations are quantized as they come: the schemes ``int8``, ``int8-paper``.

    Parameters
    ----------
    weight : int8 [out, in].
    weight_scale : float [out, 1], or [1] for the whole of it.
    bias : float [out] or None.
    bits : of an activation, 2 to 8.
    per_token : each token has a scale of its own and zero stays zero; else there is one scale and one zero point for
        all tokens that come together.

    Takes [..., in] and gives [..., out] of the same float dtype. Scales and integers are what compressed-tensors
    computes in that dtype (`compute_dynamic_scales_and_zp`, `quantize`), except that it gives one scale to all tokens
    of an input [tokens, in].
    """

    word = "int8"
    weight_sums: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, *, bits: int, per_token: bool
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.per_token = per_token
        self.rounds = True
        self.lowest, self.highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        # A zero point of 1 adds these to a token's sums.
        sums = None if per_token else weight.sum(1, dtype=torch.int32)
        self.register_buffer("weight_sums", sums, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounds:
            return functional.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype), self.bias)
        tokens = x.reshape(-1, self.in_features)
        scale, zero = self._scale_of_each(tokens) if self.per_token else self._scale_of_all(tokens)
        integers = torch.div(tokens, scale)
        if zero is not None:
            integers = integers.add_(zero)
        integers = integers.clamp_(self.lowest, self.highest).round_().to(torch.int8)
        sums = torch._int_mm(integers, self.weight.t())
        if self.weight_sums is not None and zero is not None:
            sums = sums.sub_(self.weight_sums * zero.to(torch.int32))
        # Converted first: torch multiplies int32 by float32 many times more slowly than float32 by float32.
        values = sums.float().mul_(scale.float())
        scales = self.weight_scale.float().flatten()
        values = values.mul_(scales) if self.bias is None else torch.addcmul(self.bias.float(), values, scales)
        return values.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _scale_of_each(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Scales [tokens, 1]."""
        # Two passes: `aminmax` over a dimension is many times slower.
        largest = torch.maximum(tokens.amax(-1, keepdim=True), -tokens.amin(-1, keepdim=True))
        return self._not_zero(largest / ((self.highest - self.lowest) / 2)), None

    def _scale_of_all(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A scale [] and a zero point [], both of the tokens' dtype; the point is a whole number."""
        lowest, highest = tokens.aminmax()
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        scale = (highest - lowest) / (self.highest - self.lowest)
        # Where all are zero 0/0 is no number, and any point will do.
        zero = (self.lowest - lowest / scale).nan_to_num().clamp(self.lowest, self.highest).round()
        return self._not_zero(scale), zero

    def _not_zero(self, scale: torch.Tensor) -> torch.Tensor:
        return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def rounds_activations(model: nn.Module) -> bool:
    """Whether some layer rounds what comes in to integers: here, or in compressed-tensors' floats."""
    return any(map(_rounds, model.modules()))


def _rounds(module: nn.Module) -> bool:
    scheme: Any = getattr(module, "quantization_scheme", None)
    if isinstance(module, EngineLinear):
        return module.rounds is not None
    return scheme is not None and scheme.input_activations is not None


@contextlib.contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Activations stay floats: what differs then does so for another reason than that a value was rounded otherwise."""
    switched: list[tuple[Any, str, bool]] = []
    for module in filter(_rounds, model.modules()):
        # The second is compressed-tensors' own name, for modules that it has prepared.
        name = "rounds" if isinstance(module, EngineLinear) else "quantization_enabled"
        switched.append((module, name, getattr(module, name, True)))
        setattr(module, name, False)
    try:
        yield
    finally:
        for layer, name, before in switched:
            setattr(layer, name, before)


def runs_on(device: str | torch.device) -> bool:
    """Whether int8 products are fast and exact there. CPUs without VNNI clip sums of two products, or go one by one."""
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_kernels and torch.cpu._is_vnni_supported() and torch.device(device).type == "cpu"


def layer_of(module: nn.Module) -> Int8Linear | None:
    """The int8 layer for a module that compressed-tensors has prepared and that still holds int8 weights; None where
    its scheme is another one.
    """
    scheme: Any = getattr(module, "quantization_scheme", None)
    per_token = _dynamic_kind(scheme) if scheme else None
    parts = dict(module.named_parameters(recurse=False))
    if per_token is None or type(module) is not nn.Linear or not {"weight", "weight_scale"} <= set(parts):
        return None
    if parts["weight"].dtype != torch.int8 or "weight_zero_point" in parts:
        return None
    bits = scheme.input_activations.num_bits
    weight, scale = parts["weight"].data, parts["weight_scale"].data
    return Int8Linear(weight, scale, parts.get("bias"), bits=bits, per_token=per_token)


class Int8Kind(LayerKind):
    """Weights and activations of 8 bits or less."""

    def runs_on(self, device: str | torch.device) -> bool:
        """See the function."""
        return runs_on(device)

    def layer_of(self, module: nn.Module) -> Int8Linear | None:
        """See the function."""
        return layer_of(module)


def _dynamic_kind(scheme: Any) -> bool | None:
    """Whether activations have a scale a token (True) or one for all (False); None for any other scheme."""
    weights, inputs = scheme.weights, scheme.input_activations
    if inputs is None or scheme.output_activations is not None or weights is None:
        return None
    if weights.strategy not in ("channel", "tensor") or not weights.symmetric or inputs.dynamic is not True:
        return None
    if (weights.type, inputs.type) != ("int", "int") or inputs.num_bits > 8 or inputs.scale_dtype is not None:
        return None
    return {("token", True): True, ("tensor", False): False}.get((inputs.strategy, inputs.symmetric))
