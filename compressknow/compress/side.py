"""One checkpoint of two that are compared: the values of each parameter, whoever stores them, and what is packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from compressknow.compress.blocks import READABLE
from compressknow.compress.deviation import Values, is_scale_of
from compressknow.errors import CheckpointError
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.meta import meta_model
from compressknow.model.naming import Naming, suppliers
from compressknow.model.structure import LinearWeight, Structure
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor


@dataclass(frozen=True)
class Side:
    """What a checkpoint stores, by parameter; a tensor that is loaded to none, or fused with others, by its own name.

    Attributes
    ----------
    config : the settings that hold, defaults included.
    own : parameter -> the stored tensor of its name.
    supply : parameter -> the stored tensor that gives it its values, ties resolved; `own` included.
    loaded_to : of a tensor that is fused with others on loading, the parameter that it becomes a part of.
    parts : module -> stored tensors beside its parameters: scales, zero points, packed weights.
    """

    name: str
    config: dict[str, object]
    structure: Structure
    own: dict[str, StoredTensor]
    supply: dict[str, StoredTensor]
    loaded_to: dict[str, str]
    parts: dict[str, dict[str, StoredTensor]]

    @cached_property
    def linears(self) -> dict[str, LinearWeight]:
        return {weight.parameter: weight for weight in self.structure.linears}

    def linear(self, key: str) -> LinearWeight | None:
        """The Linear weight that a tensor is, or is a part of."""
        return self.linears.get(self.loaded_to.get(key, key))

    def values(self, key: str) -> Values | None:
        """A parameter's values; None where it has none, or none that can be read."""
        tensor = self.supply.get(key)
        if tensor is None or tensor.dtype not in READABLE:
            return None
        if self.linear(key) is None or tensor.dtype in (*FLOAT_DTYPES, "F64"):
            return Values(tensor)
        return self._dequantizable(tensor)

    def packed(self, key: str) -> str | None:
        """How a tensor is stored whose values cannot be read; None where they can, or where it is not stored."""
        if self.values(key) is not None:
            return None
        tensor, module = self.supply.get(key), key.removesuffix(".weight")
        stored = ([tensor] if tensor else []) + list(self.parts.get(module, {}).values())
        names = (f"{part.name.removeprefix(module + '.')} {part.dtype}" for part in stored)
        return " + ".join(names) if stored else None

    def packed_weights(self) -> Iterator[str]:
        """Linear weights that have packed values in place of a tensor of their own name."""
        return (name for name in self.linears if name not in self.supply and self.packed(name))

    def _dequantizable(self, tensor: StoredTensor) -> Values | None:
        """An int8 weight in the layout of compressed-tensors, symmetric, with a scale a row or one in all."""
        module = tensor.name.removesuffix(".weight")
        scale = self.parts.get(module, {}).get(f"{tensor.name}_scale")
        zero_point = f"{tensor.name}_zero_point" in self.parts.get(module, {})
        if tensor.dtype != "I8" or scale is None or zero_point or not is_scale_of(scale, tensor):
            return None
        return Values(tensor, scale)


def side_of(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Side:
    """Read a checkpoint's headers. Raises CheckpointError where it has no weights, or its config builds no model."""
    if not checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.folder} has no weights: no model.safetensors, no pytorch_model.bin, no index of either.",
            hint="Give the folder of a whole checkpoint.",
        )
    model = meta_model(checkpoint.folder, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
    structure, naming = structure_of(model), Naming(model)
    bound = naming.bind(checkpoint.tensors)
    # By their names in the tree and, where the architecture was renamed since, by those in the files.
    modules = {name.rpartition(".")[0] for name in (*structure.parameters, *bound)} - {""}
    quantized = "quantization_config" in checkpoint.config
    own: dict[str, StoredTensor] = {}
    whole: dict[str, str] = {}
    loaded_to: dict[str, str] = {}
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        binding = bound.get(name)
        if binding and not binding.reshaped and binding.parameter not in own:
            own[binding.parameter] = tensor
            whole[name] = binding.parameter
        elif binding is None and quantized and (module := _module_of(name, modules)):
            parts.setdefault(module, {})[name] = tensor
        else:
            own[name] = tensor
            if binding:
                loaded_to[name] = binding.parameter
    stored = suppliers(checkpoint, whole, structure.tied)
    supply = own | {parameter: checkpoint.tensors[name] for parameter, name in stored.items()}
    return Side(checkpoint.name, model.config.to_dict(), structure, own, supply, loaded_to, parts)


def _module_of(name: str, modules: set[str]) -> str | None:
    """The innermost module that a name lies in."""
    while name := name.rpartition(".")[0]:
        if name in modules:
            return name
    return None
