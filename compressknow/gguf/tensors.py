"""Tensors of a GGUF file, and the checkpoint's weights in each, by the name map of llama.cpp's gguf package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UsageError, suggest_word
from compressknow.base.reading import group_by
from compressknow.model.gguf_file import EMBEDDING, ORDER, UNPLACED, Tensor, count_by_type, list_tensors
from compressknow.model.structure import NOT_LINEAR, SCOPES, LinearWeight, compile_pattern, list_scopes, select

if TYPE_CHECKING:
    from compressknow.compress.weights import StoredWeights

# GGUF merges experts into one tensor, which checkpoints may store one by one.
EXPERT = re.compile(r"experts\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
# Bytes that a file has beyond the intermediate one: what llama.cpp adds, and each of our keys.
_METADATA, _RULE = 4096, 48
ALIGNMENT = 32


@dataclass(frozen=True)
class Tensors:
    """Tensors of a GGUF file and the checkpoint that it was made from: for each tensor, the Linear weights that it
    consists of, and the names that the checkpoint stores these under. `start` is the size before the tensors."""

    source: StoredWeights
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, tuple[LinearWeight, ...]]
    stored: Mapping[str, tuple[str, ...]]
    start: int = 0

    @cached_property
    def groups(self) -> dict[str, str]:
        """Return the group of each tensor: that of its Linear weights; a tied embedding belongs to the final layer."""
        return {name: self._get_group(tensor) for name, tensor in self.tensors.items()}

    def _get_group(self, tensor: Tensor) -> str:
        if tensor.name in self.weights:
            return self.weights[tensor.name][0].group or UNPLACED
        if tensor.name.startswith("token_embd."):
            return EMBEDDING
        return NOT_LINEAR if len(tensor.shape) < 2 else UNPLACED

    def find_by_scope(self, scope: str) -> list[str]:
        """Return the tensors in a scope. Raises UsageError if there are none."""
        selected = {weight.parameter for weight in select(self.source.structure, (scope,), "quantize")}
        return [name for name, each in self.weights.items() if any(weight.parameter in selected for weight in each)]

    def find_by_pattern(self, text: str, option: str) -> list[str]:
        """Return the tensors whose name a regular expression matches. Raises UsageError if there are none."""
        pattern = compile_pattern(option, text)
        names = [name for name, tensor in self.tensors.items() if len(tensor.shape) > 1 and pattern.search(name)]
        if not names:
            scopes = list_scopes(self.source.structure)
            kinds = dict.fromkeys(re.sub(r"\d+", "N", name) for name in self.groups if "norm" not in name)
            raise UsageError(
                f"{option} {text!r} is not a scope, and matches no tensor of the GGUF file.",
                hint=f"{suggest_word(text, scopes)}Choose from {', '.join(scopes)}. Tensors (N stands for a number): "
                f"{', '.join(kind for kind in kinds if kind.endswith('.weight'))}.",
            )
        return names


def resolve_types(tensors: Tensors, types: Iterable[tuple[str, str]], option: str = "--type-of") -> dict[str, str]:
    """Return the type of each tensor that a rule matches, by the last one that does. Raises UsageError for a rule that
    matches none."""
    return {
        name: kind
        for target, kind in types
        for name in (tensors.find_by_scope(target) if target in SCOPES else tensors.find_by_pattern(target, option))
    }


def describe_tensors(reader: Any, source: StoredWeights) -> Tensors:
    """Return the content of an open GGUF file, except the values of its weights."""
    tensors, name_map = list_tensors(reader), _get_name_map(reader)
    parts = group_by(source.loaded_to, source.loaded_to.__getitem__)
    # Ordered sets: a tensor may hold several weights (experts, merged projections), and a weight be in several tensors.
    weights: dict[str, dict[LinearWeight, None]] = {}
    stored: dict[str, dict[str, None]] = {}
    for weight in source.structure.linears if name_map else ():
        supplier = source.supply.get(weight.parameter)
        for name in parts.get(weight.parameter) or ([supplier.name] if supplier else []):
            for each in (name, weight.parameter):
                tensor = name_map.get_name(EXPERT.sub("experts.", each), try_suffixes=_SUFFIXES)
                if tensor in tensors:
                    weights.setdefault(tensor, {})[weight] = None
                    stored.setdefault(tensor, {})[name] = None
                    break
    by_tensor = {name: tuple(each) for name, each in weights.items()}
    return Tensors(
        source, tensors, by_tensor, {name: tuple(each) for name, each in stored.items()}, int(reader.data_offset)
    )


def _get_name_map(reader: Any) -> Any:
    """Return the name map of the file's architecture; None if the gguf package does not know it."""
    import gguf

    name = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    arch = next((arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    blocks = [field.contents() for key, field in reader.fields.items() if key.endswith("block_count")]
    return gguf.get_tensor_name_map(arch, max(blocks, default=0)) if arch is not None else None


def count_by_group(tensors: Tensors, types: Mapping[str, str] | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Count tensors, parameters and bytes by group and type; `types` are those chosen in a dry run, if any."""
    import gguf

    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.tensors.items():
        if types and (kind := types.get(name, tensor.type)) != tensor.type:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
            tensor = replace(tensor, type=kind, nbytes=tensor.numel // block * size)
        groups.setdefault(tensors.groups[name], []).append(tensor)
    return {group: count_by_type(groups[group]) for group in ORDER if group in groups}


def align(nbytes: int) -> int:
    """Return the bytes of a tensor in a file, with padding.

    >>> align(18), align(64)
    (32, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def is_matrix(tensors: Tensors, name: str) -> bool:
    """Return whether llama.cpp quantizes a tensor: a Linear weight, or the token embedding."""
    return name in tensors.weights or name == "token_embd.weight"


def measure_overhead(tensors: Tensors) -> int:
    """Return an upper bound of the bytes of all but the matrices: vocabulary, norms, metadata, rules for types."""
    names = [name for name in tensors.tensors if is_matrix(tensors, name)]
    others = sum(align(each.nbytes) for name, each in tensors.tensors.items() if name not in names)
    rules = sum(len(name) + _RULE for name in names)
    return tensors.start + others + rules + _METADATA
