"""The int8 schemes: scales, rounding, and their description in the compressed-tensors layout.

Bit for bit what compressed-tensors computes (`calculate_qparams`, `quantize`): symmetric weights, scale =
absmax / 127.5 in the weight's own dtype, division and rounding in that dtype too. `int8-paper` alone follows
torch.ao.quantization.quantize_dynamic instead, bit for bit for float32 weights: it multiplies by the inverse of the
scale, in float32, and no scale is below float32's epsilon (`UniformQuantizationObserverBase._calculate_qparams`,
`quantize_per_tensor`). A weight of 16 bits has a scale of its own dtype here; torch takes float32 alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressknow.compress.recipe import Scheme
from compressknow.compress.targets import target_patterns

INT8_MIN, INT8_MAX = -128, 127
# Half the range of 256 levels: what compressed-tensors and torch.ao's observers both divide by.
HALF_RANGE = 127.5

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "group_size": None}
_DYNAMIC = {"type": "int", "dynamic": True, "group_size": None}

# The compressed-tensors description of each scheme. `int8-paper` is what torch.ao.quantization.quantize_dynamic does
# on x86, which the paper used: one scale a tensor, and activations of 7 bits (its reduce_range is hard-coded), 8 bits
# being measurably another computation.
SCHEME_ARGS: dict[Scheme, dict[str, Any]] = {
    "int8": {
        "weights": {**_WEIGHTS, "strategy": "channel"},
        "input_activations": {**_DYNAMIC, "num_bits": 8, "strategy": "token", "symmetric": True},
    },
    "int8-paper": {
        "weights": {**_WEIGHTS, "strategy": "tensor"},
        "input_activations": {**_DYNAMIC, "num_bits": 7, "strategy": "tensor", "symmetric": False},
    },
    "int8-weights": {"weights": {**_WEIGHTS, "strategy": "channel"}, "input_activations": None},
}


def per_channel(scheme: Scheme) -> bool:
    """Whether the scheme has a scale a row (output channel) of the weight, else one a tensor."""
    return bool(SCHEME_ARGS[scheme]["weights"]["strategy"] == "channel")


def scale_shape(scheme: Scheme, rows: int) -> tuple[int, ...]:
    return (rows, 1) if per_channel(scheme) else (1,)


def scales_of(absmax: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales for largest magnitudes, in their dtype. An all-zero channel gets the dtype's epsilon: finite, not 0."""
    scales = absmax / HALF_RANGE
    if scheme == "int8-paper":
        return scales.clamp(min=torch.finfo(torch.float32).eps)
    return torch.where(scales == 0, torch.finfo(absmax.dtype).eps, scales)


def quantize(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """int8 weights for `values` [rows, columns] and `scales` [rows, 1] or [1] of the same float dtype."""
    if scheme == "int8-paper":
        scaled = values.to(torch.float32) * scales.to(torch.float32).reciprocal()
        return scaled.clamp_(INT8_MIN, INT8_MAX).round_().to(torch.int8)
    scaled = torch.div(values.to(torch.float32), scales.to(torch.float32))
    if values.dtype != torch.float32:
        # As a division in the dtype itself rounds. The passes that follow are exact, and faster in float32.
        scaled = scaled.to(values.dtype).to(torch.float32)
    return scaled.clamp_(INT8_MIN, INT8_MAX).round_().to(torch.int8)


def dequantize(quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 values of int8 weights."""
    return quantized.to(torch.float32).mul_(scales.to(torch.float32))


def quantization_config(
    targets: Mapping[Scheme, Sequence[str]], ignore: Sequence[str], version: str, prefix: str = ""
) -> dict[str, Any]:
    """`quantization_config` of config.json: exactly the named modules of each scheme, and by name each Linear module
    that stays as it is (vLLM refuses a Linear that it finds in neither list).

    `prefix` is that of the base model, which the names may do without: see `target_patterns`.
    """
    linears = {*ignore, *(name for names in targets.values() for name in names)}
    groups = {
        f"group_{i}": {
            "format": "int-quantized",
            "targets": target_patterns(names, prefix, linears.difference(names)),
            **SCHEME_ARGS[scheme],
            "output_activations": None,
        }
        for i, (scheme, names) in enumerate(sorted(targets.items()))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": target_patterns(ignore, prefix, linears.difference(ignore)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": version,
    }
