"""Weights of 4 bits, eight in an integer of 32 (``pack-quantized`` of compressed-tensors), told by headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.model.checkpoint import Checkpoint
from compressknow.model.naming import Naming
from compressknow.model.structure import Structure
from compressknow.model.tensors import StoredTensor

# What the values are called, as safetensors calls integers of 8 bits I8.
INT4 = "I4"
_PACKED, _PER_INTEGER = "_packed", 8


def packed_int4(checkpoint: Checkpoint, naming: Naming, structure: Structure) -> dict[str, StoredTensor]:
    """Linear weights [rows, columns] that a checkpoint stores as int32 [rows, columns / 8], by parameter; none where
    its config does not say that all that is quantized has 4 bits."""
    groups = list(config_groups(checkpoint.config.get("quantization_config")))
    if not groups or any(_bits(group) != 4 for group in groups):
        return {}
    stored = {name.removesuffix(_PACKED): t for name, t in checkpoint.tensors.items() if name.endswith(_PACKED)}
    shapes = {weight.parameter: weight.shape for weight in structure.linears if weight.kind == "linear"}
    found = {}
    for name, binding in naming.bind(stored).items():
        rows, columns = shapes.get(binding.parameter, (0, 0))
        if (stored[name].dtype, stored[name].shape) == ("I32", (rows, -(-columns // _PER_INTEGER))):
            found[binding.parameter] = stored[name]
    return found


def config_groups(quantization: Any) -> Iterator[Mapping[str, Any]]:
    """The groups of layers of a `quantization_config`, each with the settings of its weights."""
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _bits(group: Mapping[str, Any]) -> Any:
    weights = group.get("weights")
    return weights.get("num_bits") if isinstance(weights, Mapping) else None
