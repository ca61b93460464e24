"""Weights of 4 and 8 bits, several in an integer of 32 (``pack-quantized`` of compressed-tensors), told by headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from compressknow.model.checkpoint import Checkpoint
from compressknow.model.naming import Naming
from compressknow.model.structure import Structure
from compressknow.model.tensors import StoredTensor

# What values of so many bits are called: as safetensors calls integers of 8 bits.
INT4 = "I4"
NAMES = {4: INT4, 8: "I8"}
_PACKED, _WORD = "_packed", 32


class Packed(NamedTuple):
    """The tensor in which values lie packed, and one that stands for them: under the name that they would have, with
    their shape and dtype, ``I4`` or ``I8``."""

    stored: StoredTensor
    values: StoredTensor


def packed_weights(checkpoint: Checkpoint, naming: Naming, structure: Structure) -> dict[str, Packed]:
    """Linear weights [rows, columns] that a checkpoint stores as int32 [rows, columns / 8] or [rows, columns / 4], by
    parameter; none where its config has a group of other bits."""
    bits = {_bits(group) for group in config_groups(checkpoint.config.get("quantization_config"))}
    if not bits or not bits <= NAMES.keys():
        return {}
    stored = {name.removesuffix(_PACKED): t for name, t in checkpoint.tensors.items() if name.endswith(_PACKED)}
    shapes = {weight.parameter: weight.shape for weight in structure.linears if weight.kind == "linear"}
    found = {}
    for name, binding in naming.bind(stored).items():
        tensor, (rows, columns) = stored[name], shapes.get(binding.parameter, (0, 0))
        widths = {-(-columns * number // _WORD): number for number in bits}
        if tensor.dtype == "I32" and tensor.shape[0] == rows and (number := widths.get(tensor.shape[-1])):
            values = replace(tensor, name=name, dtype=NAMES[number], shape=(rows, columns))
            found[binding.parameter] = Packed(tensor, values)
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
