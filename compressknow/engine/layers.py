"""Layers of the engine: those that compute with the integers of a quantized Linear, and batch-invariant float products.

Quantized weights without a layer here are unpacked to floats on loading: a scheme does not need one.

Kernels choose their way by the number of rows and of threads, so that what a row comes to depends on how many stand
next to it. Where activations are rounded to integers, later layers make answers of that.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from compressknow.base.packages import Registry


class EngineLinear(nn.Module):
    """Linear layer of the engine.

    Attributes
    ----------
    word : the dtype of its products, such as ``int8``.
    rounds : whether it rounds its inputs now; None if it never does.
    unlisted : number of weights that it does not hold as parameters.
    is_checked : whether the shape of an output has been checked.
    """

    word: ClassVar[str]
    rounds: bool | None = None
    unlisted = 0
    is_checked = False


class LayerKind(abc.ABC):
    """Kind of engine layers for modules with a certain scheme in compressed-tensors' config, whatever tool wrote it."""

    @abc.abstractmethod
    def runs_on(self, device: str | torch.device) -> bool:
        """Return whether the layer is fast and exact on this device."""

    @abc.abstractmethod
    def layer_of(self, module: nn.Module) -> EngineLinear | None:
        """Return the layer for a module with stored values, prepared by compressed-tensors; None if it does not fit."""


LAYERS: Registry[LayerKind] = Registry(
    "compressknow.layers",
    "engine layer",
    LayerKind,  # type: ignore[type-abstract]
    {"int8": "compressknow.engine.layers:Int8Kind", "int4": "compressknow.engine.layers:Int4Kind"},
)


class Int8Linear(EngineLinear):
    """Linear layer with int8 weights and dynamically quantized activations: the schemes ``int8`` and ``int8-paper``.

    Parameters
    ----------
    weight : int8 [out, in].
    weight_scale : float [out, 1], or [1] for the whole weight.
    bias : float [out] or None.
    bits : width of an activation, 2 to 8.
    per_token : whether each token has its own scale, and zero stays zero; else they share a scale and a zero point.

    Takes [..., in] and returns [..., out] in the same float dtype. Scales and integers are computed in that dtype as by
    compressed-tensors (`compute_dynamic_scales_and_zp`, `quantize`), except that it uses one scale for all tokens of an
    input [tokens, in].
    """

    word, rounds = "int8", True
    weight_sums: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, *, bits: int, per_token: bool
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.per_token = per_token
        self.lowest, self.highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if not per_token:
            # The zero point times these is part of a token's sums.
            self.register_buffer("weight_sums", weight.sum(1, dtype=torch.int32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounds:
            return functional.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype), self.bias)
        # Its result for a row does not depend on the other rows, so leave `_Products`, which takes time per operation.
        with torch._C.DisableTorchFunction():
            return self._multiply_integers(x)

    def _multiply_integers(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        zero = None
        if self.per_token:
            # Two passes, because `aminmax` over a dimension is many times slower.
            largest = torch.maximum(tokens.amax(-1, keepdim=True), -tokens.amin(-1, keepdim=True))
            scale = largest / ((self.highest - self.lowest) / 2)
        else:
            scale, zero = self._compute_joint_scale(tokens)
        # If a scale is 0, so is the output, whatever the integers are.
        integers = torch.div(tokens, scale)
        if zero is not None:
            integers = integers.add_(zero)
        integers = integers.clamp_(self.lowest, self.highest).round_().to(torch.int8)
        sums = torch._int_mm(integers, self.weight.t())
        if zero is not None:
            sums = sums.sub_(self.weight_sums * zero.to(torch.int32))
        # Convert first, because torch multiplies int32 by float32 many times more slowly than float32 by float32.
        values = sums.float().mul_(scale.float())
        scales = self.weight_scale.float().flatten()
        values = values.mul_(scales) if self.bias is None else torch.addcmul(self.bias.float(), values, scales)
        return values.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _compute_joint_scale(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a scale [] and a zero point [], both in the tokens' dtype; the point is a whole number."""
        lowest, highest = tokens.aminmax()
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        scale = (highest - lowest) / (self.highest - self.lowest)
        # If all are zero, 0/0 is NaN, and any zero point will do.
        zero = (self.lowest - lowest / scale).nan_to_num().clamp(self.lowest, self.highest).round()
        return scale, zero


def has_rounded_activations(model: nn.Module) -> bool:
    """Return whether a layer of the engine or of compressed-tensors rounds its inputs to fewer bits."""
    return any(map(_is_rounding, model.modules()))


def _is_rounding(module: nn.Module) -> bool:
    scheme: Any = getattr(module, "quantization_scheme", None)
    if isinstance(module, EngineLinear):
        return module.rounds is not None
    return scheme is not None and scheme.input_activations is not None


@contextlib.contextmanager
def disable_rounding(model: nn.Module) -> Iterator[None]:
    """Keep activations as floats in this context, so that differences are not due to their rounding."""
    switched: list[tuple[Any, str, bool]] = []
    for module in filter(_is_rounding, model.modules()):
        # `quantization_enabled` is the attribute of modules that compressed-tensors has prepared.
        name = "rounds" if isinstance(module, EngineLinear) else "quantization_enabled"
        switched.append((module, name, getattr(module, name, True)))
        setattr(module, name, False)
    try:
        yield
    finally:
        for layer, name, before in switched:
            setattr(layer, name, before)


class Int8Kind(LayerKind):
    """Kind with weights and activations of 8 bits or fewer."""

    def runs_on(self, device: str | torch.device) -> bool:
        # CPUs without VNNI saturate sums of two products, or compute products one by one.
        has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return has_kernels and torch.cpu._is_vnni_supported() and torch.device(device).type == "cpu"

    def layer_of(self, module: nn.Module) -> Int8Linear | None:
        scheme: Any = getattr(module, "quantization_scheme", None)
        per_token = _is_per_token(scheme) if scheme else None
        parts = dict(module.named_parameters(recurse=False))
        if per_token is None or type(module) is not nn.Linear or not {"weight", "weight_scale"} <= set(parts):
            return None
        if parts["weight"].dtype != torch.int8 or "weight_zero_point" in parts:
            return None
        bits = scheme.input_activations.num_bits
        weight, scale = parts["weight"].data, parts["weight_scale"].data
        return Int8Linear(weight, scale, parts.get("bias"), bits=bits, per_token=per_token)


def _is_per_token(scheme: Any) -> bool | None:
    """Return whether activations have a scale per token (True) or a joint scale (False); None for any other scheme."""
    weights, inputs = scheme.weights, scheme.input_activations
    if inputs is None or scheme.output_activations is not None or weights is None:
        return None
    if weights.strategy not in ("channel", "tensor") or not weights.symmetric or inputs.dynamic is not True:
        return None
    if (weights.type, inputs.type) != ("int", "int") or inputs.num_bits > 8 or inputs.scale_dtype is not None:
        return None
    return {("token", True): True, ("tensor", False): False}.get((inputs.strategy, inputs.symmetric))


# Groups that torch's kernel takes, and what outputs must be a multiple of.
GROUP_SIZES, OUTPUTS = (32, 64, 128, 256), 16
# Instructions with which the kernel is faster than a product in float32: 24 us instead of 46 for 576 -> 1536 on one
# core. With AVX2 it takes 87 us; otherwise it is not vectorized.
FAST = "AVX512"
# Subtracted from the stored 4-bit values.
OFFSET = 8
_BLOCK = 64  # outputs that the kernel packs together


class Int4Linear(EngineLinear):
    """Linear layer with int4 weights in groups of input channels: the scheme ``int4``.

    Inputs, scales and outputs are rounded to bfloat16, the dtype of torch's kernel, which multiplies and adds in
    float32 (`aten::_weight_int4pack_mm_for_cpu`). The result for a row does not depend on the other rows.

    Parameters
    ----------
    integers : int8 [out, in], from -8 to 7.
    weight_scale : float [out, groups].
    bias : float [out] or None.

    Takes [..., in] and returns [..., out] in the same float dtype.
    """

    word, rounds = "int4", True
    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, integers: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.group_size, self.unlisted = self.in_features // weight_scale.shape[1], integers.numel()
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32).add_(OFFSET), 1)
        # A buffer, not a parameter, because it has the kernel's own order.
        self.register_buffer("packed", packed, persistent=False)
        scales = weight_scale.t()
        # The zeros are the kernel's offsets.
        both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).to(torch.bfloat16)
        self.register_buffer("scales_and_zeros", both, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounds:
            scales = self.weight_scale.repeat_interleave(self.group_size, dim=1)
            weight = self.integers().to(x.dtype) * scales.to(x.dtype)
            return functional.linear(x, weight, self.bias)
        # As in `Int8Linear`.
        with torch._C.DisableTorchFunction():
            rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
            scales, multiply = self.scales_and_zeros.to(torch.bfloat16), torch.ops.aten._weight_int4pack_mm_for_cpu
            values: torch.Tensor = multiply(rows, self.packed, self.group_size, scales).to(x.dtype)
            if self.bias is not None:
                values += self.bias
            return values.reshape(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Return a tensor of integers, for code that casts to the weight's dtype only if it is a float (NLLB-MoE)."""
        return self.packed.view(torch.int8)

    def integers(self) -> torch.Tensor:
        """Return int8 [out, in], from -8 to 7. The kernel's order (torch's `weight_to_int4pack_kernel` for AVX-512) is
        by 64 outputs, input and output; a byte holds outputs n and n + 32, or n and n + 1 if fewer than 64 are left."""
        size, end = self.in_features, self.out_features // _BLOCK * _BLOCK
        whole, rest = self.packed[:end].view(-1, size, _BLOCK // 2), self.packed[end:].view(size, -1)
        blocks = torch.cat([whole & 15, whole >> 4], dim=2).transpose(1, 2).reshape(end, size)
        last = torch.stack([rest & 15, rest >> 4], dim=2).flatten(1).t()
        return torch.cat([blocks, last]).to(torch.int8).sub_(OFFSET)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Store the tensors of a checkpoint, so that a saved model can be loaded."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_packed"] = pack_to_int32(self.integers(), 4)
        destination[f"{prefix}weight_shape"] = torch.tensor([self.out_features, self.in_features])


class Int4Kind(LayerKind):
    """Kind with 4-bit weights and float inputs."""

    def runs_on(self, device: str | torch.device) -> bool:
        return torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() == FAST

    def layer_of(self, module: nn.Module) -> Int4Linear | None:
        scheme: Any = getattr(module, "quantization_scheme", None)
        parts = dict(module.named_parameters(recurse=False))
        stored = {"weight_packed", "weight_scale", "weight_shape"}
        if type(module) is not nn.Linear or not scheme or set(parts) - {"bias"} != stored:
            return None
        weights, activations = scheme.weights, (scheme.input_activations, scheme.output_activations)
        if weights is None or activations != (None, None) or weights.group_size not in GROUP_SIZES:
            return None
        if (weights.num_bits, weights.type, weights.strategy) != (4, "int", "group"):
            return None
        rows, columns = parts["weight_shape"].tolist()
        size = weights.group_size
        if rows % OUTPUTS or columns % size or parts["weight_scale"].shape != (rows, columns // size):
            return None
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        integers = unpack_from_int32(parts["weight_packed"].data, 4, torch.Size((rows, columns)))
        layer = Int4Linear(integers, parts["weight_scale"].data, parts.get("bias"))
        # Another release of torch may pack in another order.
        return layer if torch.equal(layer.integers(), integers) else None


# Every product has this many rows, because only products of equal shape are sure to use the same algorithm (AMD EPYC
# and Intel Xeon, AVX-512, MKL, torch 2.13). With 128, a long input takes 1.2 times as long as in one product, and one
# of 128 rows no longer; with 16 it would be 2.5 times.
ROWS = 128
# Few rows, such as a batch's next tokens before a large vocabulary, take less time in a part of one of these sizes. A
# layer uses those that give it the same bits.
FEWER_ROWS = (16, 32, 64)


def multiply_in_parts(
    x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor], fewer: Sequence[int] = ()
) -> torch.Tensor:
    """Compute a product of rows [..., in] as [..., out], by `ROWS` rows or the least of `fewer` that holds them all."""
    rows = x.reshape(-1, x.shape[-1])
    size = next((size for size in fewer if len(rows) <= size), ROWS)
    if len(rows) == size:
        return product(rows).reshape(*x.shape[:-1], -1)
    filled = functional.pad(rows, (0, 0, 0, -len(rows) % size))
    products = [product(part) for part in torch.split(filled, size)]
    values = products[0] if len(products) == 1 else torch.cat(products)
    return values[: len(rows)].reshape(*x.shape[:-1], values.shape[-1])


class BatchInvariantLinear(nn.Linear):
    """Linear layer of [..., in] to [..., out], computed `ROWS` rows at a time, or `fewer`."""

    fewer: tuple[int, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # `_Products` would fill them up to `ROWS`.
        with torch._C.DisableTorchFunction():
            return multiply_in_parts(x, super().forward, self.fewer)


def _find_fewer(layer: nn.Linear) -> tuple[int, ...]:
    """Find which of `FEWER_ROWS` give rows the same bits as `ROWS`, wherever they stand."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, layer.in_features, generator=generator).to(layer.weight)
    with torch.inference_mode():
        parts = {size: functional.linear(rows[-size:], layer.weight, layer.bias) for size in (*FEWER_ROWS, ROWS)}
        return tuple(size for size in FEWER_ROWS if torch.equal(parts[size], parts[ROWS][-size:]))


class _Products(TorchFunctionMode):
    """Mode in which products of rows and a matrix are computed `ROWS` rows at a time, and batched products from one
    memory layout: for a batch of one, kernels would read parts of larger tensors in place, in another way."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) > 2 and args[0].dim() == 4:
            return func(*_copy_heads(args[:3], kwargs), *args[3:], **kwargs)
        index = _ROWS_INDEX.get(func)
        if index is not None and not kwargs and _is_matrix(args[index + 1]):
            return multiply_in_parts(args[index], lambda part: func(*args[:index], part, *args[index + 1 :]))
        if index is not None or func in _BATCH_PRODUCTS:
            args = tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in args)
        return func(*args, **kwargs)


# The index of the rows among a function's arguments; the matrix is the next argument.
_ROWS_INDEX: dict[Any, int] = {
    **dict.fromkeys((functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm), 0),
    torch.addmm: 1,
}
_BATCH_PRODUCTS = {torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.Tensor.baddbmm}


def _is_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.is_floating_point()


def _copy_heads(tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield queries, keys and values [batch, heads, tokens, size], each in memory of its own."""
    for tensor in tensors:
        # A head that all queries share would be read in place.
        shared = tensor.shape[1] == 1 and not kwargs.get("enable_gqa")
        yield (tensor.expand(-1, tensors[0].shape[1], -1, -1) if shared else tensor).contiguous()


def make_batch_invariant(model: nn.Module) -> None:
    """Make the float products of a model batch-invariant, in place; its weights, names and hooks stay.

    A plain Linear gets another class. Other modules that hold a matrix (routers, fused experts, an architecture's own
    Linear), and the parents of such layers (attention), run their forward with torch's products replaced.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.__class__, module.fewer = BatchInvariantLinear, _find_fewer(module)  # type: ignore[assignment]
            continue
        # A whole model only calls its layers.
        parts = (module,) if isinstance(module, PreTrainedModel) else (module, *module.children())
        if not isinstance(module, BatchInvariantLinear | EngineLinear) and any(map(_has_matrix, parts)):
            module.forward = functools.partial(_forward_in_parts, module.forward)
    if isinstance(model, PreTrainedModel):
        # The other implementations pass the rows of all experts to one kernel.
        model.set_experts_implementation("eager")


def undo_batch_invariant(model: nn.Module) -> None:
    """Undo `make_batch_invariant`, which makes single rows take many times as long, except for how experts run."""
    for module in model.modules():
        if type(module) is BatchInvariantLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        replaced = vars(module).get("forward")
        if isinstance(replaced, functools.partial) and replaced.func is _forward_in_parts:
            module.forward = replaced.args[0]


def _has_matrix(module: nn.Module) -> bool:
    parameters = () if isinstance(module, nn.Embedding) else module.parameters(recurse=False)
    return isinstance(module, EngineLinear) or any(each.dim() > 1 and each.is_floating_point() for each in parameters)


_replaced = ContextVar("_replaced", default=False)


def _forward_in_parts(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _replaced.get():
        return forward(*args, **kwargs)
    token = _replaced.set(True)
    try:
        with _Products():
            return forward(*args, **kwargs)
    finally:
        _replaced.reset(token)
