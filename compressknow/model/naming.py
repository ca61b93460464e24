"""Map the names in a checkpoint's files to those in its module tree, as transformers does on loading.

They differ where an architecture was refactored since (GPT-NeoX: ``embed_out`` is now ``lm_head``; Mixtral: one
tensor an expert is now one stack), where a base model's checkpoint lacks its prefix, and where weights are tied.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from compressknow.model.checkpoint import Checkpoint
from compressknow.model.structure import Structure
from compressknow.model.tensors import StoredTensor, same_bytes


@dataclass(frozen=True)
class Binding:
    """Destination of a stored tensor: the `parameters` of the module tree that get values of it, several where it is
    split on the way; `reshaped` where it is fused, split or transposed, so that it is not stored in the form that a
    module holds. `rows` of it are what each of several parameters gets, where these are whole rows."""

    parameters: tuple[str, ...]
    reshaped: bool = False
    rows: tuple[range, ...] = ()

    @property
    def parameter(self) -> str:
        return self.parameters[0]


class Naming:
    """Mapping of stored names for one module tree on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._model = model
        self._tree = dict(model.state_dict())

    def bind(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Binding]:
        """Return the parameters that stored tensors are loaded to, by stored name, if the module tree has a place."""
        bound: dict[str, Binding] = {}
        converted: dict[tuple[str, int], list[tuple[str, str]]] = {}
        # In the order of transformers: a renaming may wait for a name that comes before it.
        for stored in sorted(tensors, key=dot_natural_key):
            name, pattern = self._rename(stored, self._tree)
            if pattern is None and name in self._tree:
                bound[stored] = Binding((name,))
            elif pattern is not None and name in self._tree:
                converted.setdefault((name, self._converter_of(pattern)), []).append((stored, pattern))
        for (name, converter), parts in converted.items():
            binding = self._bind_converted(name, self._converters[converter], parts, tensors)
            bound |= {stored: binding for stored, _ in parts}
        return {stored: bound[stored] for stored in tensors if stored in bound}

    def _converter_of(self, pattern: str) -> int:
        # The last that has the pattern, as transformers takes it.
        return max(i for i, each in enumerate(self._converters) if pattern in each.source_patterns)

    def _bind_converted(
        self, name: str, converter: Any, parts: list[tuple[str, str]], tensors: Mapping[str, StoredTensor]
    ) -> Binding:
        """Bind what a converter makes of its sources, found by letting it convert tensors that have no memory."""
        empty = [(pattern, torch.empty(tensors[stored].shape, device="meta")) for stored, pattern in parts]
        whole = self._convert(name, converter, empty)
        parameters = tuple(parameter for parameter in whole if parameter in self._tree)
        if not parameters:
            # It did not run on these: what it is for is told by its patterns.
            first = converter.target_patterns[0]
            names = (name.replace(first, target) for target in converter.target_patterns)
            return Binding(tuple(target for target in names if target in self._tree) or (name,), reshaped=True)
        return Binding(parameters, reshaped=True, rows=self._rows(name, converter, parts, tensors, parameters))

    def _rows(
        self,
        name: str,
        converter: Any,
        parts: list[tuple[str, str]],
        tensors: Mapping[str, StoredTensor],
        parameters: tuple[str, ...],
    ) -> tuple[range, ...]:
        """Return which rows of one source each of several parameters gets: the numbers of its rows, put through a
        converter, come out as unbroken ranges where it does nothing but cut it."""
        shape = tensors[parts[0][0]].shape
        if len(parts) > 1 or len(parameters) < 2 or not shape:
            return ()
        numbers = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        made = self._convert(name, converter, [(parts[0][1], numbers)])
        rows = [made.get(parameter, numbers[:0]).flatten().tolist() for parameter in parameters]
        ranges = tuple(range(part[0], part[-1] + 1) if part else range(0) for part in rows)
        cut = all(part == list(span) for part, span in zip(rows, ranges, strict=True))
        fits = all(self._tree[p].shape == (len(r), *shape[1:]) for p, r in zip(parameters, ranges, strict=True))
        return ranges if cut and fits and sum(map(len, ranges)) == shape[0] else ()

    def _convert(self, name: str, converter: Any, sources: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(converter)
        for pattern, tensor in sources:
            converter.add_tensor(name, name, pattern, lambda tensor=tensor: tensor)
        try:
            made = converter.convert(name, model=self._model, config=self._model.config)
        except Exception:  # An operation on tensors that it was not made for may fail anywhere.
            return {}
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def convert(self, parameter: str, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what transformers makes a parameter of, from all the stored tensors (by name) it is converted from.

        Raises KeyError where its conversion does not give that parameter.
        """
        parts: list[tuple[str, torch.Tensor]] = []
        name = parameter
        for stored in sorted(sources, key=dot_natural_key):
            name, pattern = self._rename(stored, self._tree)
            assert pattern is not None  # Else it would be stored as the module holds it.
            parts.append((pattern, sources[stored]))
        converter = self._converters[self._converter_of(parts[-1][0])]
        return self._convert(name, converter, parts)[parameter]

    def missing_parts(self, stored: Collection[str]) -> list[str]:
        """Return, of parameters that are converted from several tensors, the names that are not `stored`, though others
        of the same parameter are.

        The names are those under which transformers saves the model: nothing is found of one that is stored in an older
        form.
        """
        try:
            names = set(revert_weight_conversion(self._model, self._tree))
        except Exception:  # As when it converts, an operation may fail anywhere.
            return []
        expected: dict[str, set[str]] = {}
        for name in names:
            parameter, pattern = self._rename(name, self._tree)
            if pattern is not None:
                expected.setdefault(parameter, set()).add(name)
        return [name for parts in expected.values() if parts & set(stored) for name in parts.difference(stored)]

    def transposes(self, stored: str, shape: tuple[int, ...], parameter: str) -> bool:
        """Return whether a stored tensor has its last two axes swapped on the way to `parameter`."""
        pattern = self._rename(stored, self._tree)[1]
        steps = (step for entry in self._converters if pattern in entry.source_patterns for step in entry.operations)
        swaps = [step for step in steps if isinstance(step, Transpose)]
        # Some are only made where the shapes call for them.
        return any(not step.check_dims or shape != tuple(self._tree[parameter].shape) for step in swaps)

    def scale_follows(self, stored: str, parameter: str) -> bool:
        """Return whether a scale stored beside `stored` would be loaded beside `parameter`."""
        tree = {**self._tree, parameter + "_scale": self._tree[parameter]}
        return self._rename(stored + "_scale", tree) == (parameter + "_scale", None)

    def _rename(self, stored: str, tree: Mapping[str, Any]) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            stored, self._renamings, self._converters, self._prefix, tree
        )
        if renamed[0] not in tree and stored in tree:
            # As transformers does: a name that the tree has already is not renamed.
            renamed = rename_source_key(stored, [], [], self._prefix, tree)
        return renamed


def find_suppliers(checkpoint: Checkpoint, bound: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    """Return which stored tensor gives each parameter its values, ties resolved against what the files hold.

    `bound` maps stored names to parameters, `tied` a parameter to the one whose storage it shares by the model's
    class and config. Two that are both stored with different values are not tied, whatever the config says:
    transformers loads them so (Flan-T5 is such a model).
    """
    supply = {parameter: stored for stored, parameter in bound.items()}
    for target, source in tied.items():
        if target in supply and source in supply:
            if same_bytes(checkpoint.tensors[supply[target]], checkpoint.tensors[supply[source]]):
                supply[target] = supply[source]
        elif source in supply:
            supply[target] = supply[source]
    # A checkpoint may hold the target of a tie alone: then the source, and all else tied to it, takes its values.
    for target, source in tied.items():
        if source not in supply and target in supply:
            supply[source] = supply[target]
    for target, source in tied.items():
        if target not in supply and source in supply:
            supply[target] = supply[source]
    return supply


# What values of so many bits are called: as safetensors calls integers of 8 bits.
PACKED_DTYPES = {4: "I4", 8: "I8"}
_PACKED, _WORD = "_packed", 32


def packed_weights(
    checkpoint: Checkpoint, naming: Naming, structure: Structure
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Return Linear weights [rows, columns] that lie packed in a checkpoint (compressed-tensors' ``pack-quantized``),
    by parameter; none where its config has a group of other bits.

    Each is the int32 tensor [rows, columns / 8] or [rows, columns / 4], and one that stands for its values: under the
    name that they would have, with their shape and dtype, ``I4`` or ``I8``.
    """
    weights = (group.get("weights") for group in config_groups(checkpoint.config.get("quantization_config")))
    bits: set[Any] = {each.get("num_bits") if isinstance(each, Mapping) else None for each in weights}
    if not bits or not bits <= PACKED_DTYPES.keys():
        return {}
    stored = {name.removesuffix(_PACKED): t for name, t in checkpoint.tensors.items() if name.endswith(_PACKED)}
    shapes = {weight.parameter: weight.shape for weight in structure.linears if weight.kind == "linear"}
    found = {}
    for name, binding in naming.bind(stored).items():
        tensor, (rows, columns) = stored[name], shapes.get(binding.parameter, (0, 0))
        widths = {-(-columns * number // _WORD): number for number in bits}
        if tensor.dtype == "I32" and tensor.shape[0] == rows and (number := widths.get(tensor.shape[-1])):
            values = replace(tensor, name=name, dtype=PACKED_DTYPES[number], shape=(rows, columns))
            found[binding.parameter] = tensor, values
    return found


def config_groups(quantization: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the groups of layers of a `quantization_config`, each with the settings of its weights."""
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group
