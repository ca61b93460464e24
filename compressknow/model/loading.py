"""Find out how transformers loads a checkpoint's tensors: which parameter each becomes, and what does not fit.

Names in files differ from those in the module tree if an architecture was refactored since (GPT-NeoX: ``embed_out`` is
now ``lm_head``; Mixtral: one tensor per expert is now one stack), if a base model's checkpoint lacks its prefix, and if
weights are tied. To find what does not fit, `from_pretrained` itself loads the tensors on the meta device: it renames,
splits, fuses, ties and (by the quantizer that the config names) prepares layers as usual.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from compressknow.base.errors import CheckpointError, is_out_of_memory
from compressknow.base.packages import require
from compressknow.base.progress import silence_libraries
from compressknow.model.checkpoint import MERGE, Checkpoint, list_config_groups, list_some, open_checkpoint
from compressknow.model.meta import build_meta_model
from compressknow.model.structure import Structure
from compressknow.model.tensors import StoredTensor, get_torch_dtype, has_same_bytes

Shape = tuple[int, ...]
Header = tuple[str, Shape]


@dataclass(frozen=True)
class Binding:
    """Destination of a stored tensor: the `parameters` of the module tree that get its values, several if it is split.
    `reshaped` says that it is fused, split or transposed on loading. `rows` are those that each of several parameters
    gets, if these are whole rows."""

    parameters: tuple[str, ...]
    reshaped: bool = False
    rows: tuple[range, ...] = ()

    @property
    def parameter(self) -> str:
        return self.parameters[0]


class NameMapping:
    """Mapping of stored names for one module tree on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._model = model
        self._tree = dict(model.state_dict())

    def bind(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Binding]:
        """Return the parameters that stored tensors are loaded to, by stored name, if the module tree has them. If one
        is stored under an old and a new name, transformers loads the first."""
        bound: dict[str, Binding] = {}
        whole: set[str] = set()
        converted: dict[tuple[str, int], list[tuple[str, str]]] = {}
        # In the order of transformers, since a renaming may depend on earlier names.
        for stored in sorted(tensors, key=dot_natural_key):
            name, pattern = self._rename(stored, self._tree)
            if pattern is None and name in self._tree and name not in whole:
                bound[stored] = Binding((name,))
                whole.add(name)
            elif pattern is not None and name in self._tree:
                converted.setdefault((name, self._converter_of(pattern)), []).append((stored, pattern))
        for (name, converter), parts in converted.items():
            sources = [(pattern, tensors[stored].shape) for stored, pattern in parts]
            binding = self._bind_converted(name, self._converters[converter], sources)
            bound |= {stored: binding for stored, _ in parts}
        return {stored: bound[stored] for stored in tensors if stored in bound}

    def _converter_of(self, pattern: str) -> int:
        # Like transformers, take the last that has the pattern.
        return max(i for i, each in enumerate(self._converters) if pattern in each.source_patterns)

    def _bind_converted(self, name: str, converter: Any, sources: list[tuple[str, Shape]]) -> Binding:
        """Bind the results of a converter to its sources, each a pattern and a shape, by converting meta tensors."""
        empty = [(pattern, torch.empty(shape, device="meta")) for pattern, shape in sources]
        whole = self._convert(name, converter, empty)
        parameters = tuple(parameter for parameter in whole if parameter in self._tree)
        if not parameters:
            # The conversion failed: derive the parameters from its patterns.
            first = converter.target_patterns[0]
            names = (name.replace(first, target) for target in converter.target_patterns)
            return Binding(tuple(target for target in names if target in self._tree) or (name,), reshaped=True)
        return Binding(parameters, reshaped=True, rows=self._rows(name, converter, sources, parameters))

    def _rows(
        self, name: str, converter: Any, sources: list[tuple[str, Shape]], parameters: tuple[str, ...]
    ) -> tuple[range, ...]:
        """Return which rows of a source each of several parameters gets, by converting row numbers: if the converter
        only splits, they come out as contiguous ranges."""
        pattern, shape = sources[0]
        if len(sources) > 1 or len(parameters) < 2 or not shape:
            return ()
        numbers = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        results = self._convert(name, converter, [(pattern, numbers)])
        rows = [results.get(parameter, numbers[:0]).flatten().tolist() for parameter in parameters]
        ranges = tuple(range(part[0], part[-1] + 1) if part else range(0) for part in rows)
        is_split = all(part == list(span) for part, span in zip(rows, ranges, strict=True))
        fits = all(self._tree[p].shape == (len(r), *shape[1:]) for p, r in zip(parameters, ranges, strict=True))
        return ranges if is_split and fits and sum(map(len, ranges)) == shape[0] else ()

    def _convert(self, name: str, converter: Any, sources: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(converter)
        for pattern, tensor in sources:
            converter.add_tensor(name, name, pattern, lambda tensor=tensor: tensor)
        results = {}
        with suppress(Exception):  # An operation may fail anywhere on tensors that it was not made for.
            results = converter.convert(name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in results.items()}

    def convert(self, parameter: str, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a parameter as transformers converts it from its stored tensors, given by name. Raises KeyError if the
        conversion does not give that parameter."""
        parts: list[tuple[str, torch.Tensor]] = []
        name = parameter
        for stored in sorted(sources, key=dot_natural_key):
            name, pattern = self._rename(stored, self._tree)
            assert pattern is not None  # Otherwise it would need no conversion.
            parts.append((pattern, sources[stored]))
        converter = self._converters[self._converter_of(parts[-1][0])]
        return self._convert(name, converter, parts)[parameter]

    def missing_parts(self, stored: Collection[str]) -> list[str]:
        """Return the tensors that are not `stored`, of parameters that are converted from several tensors, of which
        others are stored. These are the names under which transformers saves the model, not those of older formats."""
        expected: dict[str, set[str]] = {}
        names = set[str]()
        with suppress(Exception):  # An operation may fail anywhere, as in a conversion.
            names = set(revert_weight_conversion(self._model, self._tree))
        for name in names:
            parameter, pattern = self._rename(name, self._tree)
            if pattern is not None:
                expected.setdefault(parameter, set()).add(name)
        return [name for parts in expected.values() if parts & set(stored) for name in parts.difference(stored)]

    def transposes(self, stored: str, shape: tuple[int, ...], parameter: str) -> bool:
        """Return whether the last two axes of a stored tensor are swapped when it is loaded to `parameter`."""
        pattern = self._rename(stored, self._tree)[1]
        steps = (step for entry in self._converters if pattern in entry.source_patterns for step in entry.operations)
        swaps = [step for step in steps if isinstance(step, Transpose)]
        # Some swaps depend on the shapes.
        return any(not step.check_dims or shape != tuple(self._tree[parameter].shape) for step in swaps)

    def scale_follows(self, stored: str, parameter: str) -> bool:
        """Return whether a scale stored next to `stored` would be loaded next to `parameter`."""
        tree = {**self._tree, parameter + "_scale": self._tree[parameter]}
        return self._rename(stored + "_scale", tree) == (parameter + "_scale", None)

    def _rename(self, stored: str, tree: Mapping[str, Any]) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            stored, self._renamings, self._converters, self._prefix, tree
        )
        if renamed[0] not in tree and stored in tree:
            # Like transformers, do not rename a name that the tree already has.
            renamed = rename_source_key(stored, [], [], self._prefix, tree)
        return renamed


def find_suppliers(checkpoint: Checkpoint, bound: Mapping[str, Binding], tied: Mapping[str, str]) -> dict[str, str]:
    """Return the stored tensor with the unchanged values of each parameter, with ties resolved by the files' contents.

    `bound` is where stored tensors are loaded to; `tied` maps a parameter to the one whose storage it shares by the
    model's class and config. Parameters that are both stored, with different values, are not tied, whatever the config
    says: transformers loads them separately (as in Flan-T5).
    """
    supply = {binding.parameter: stored for stored, binding in bound.items() if not binding.reshaped}
    for target, source in tied.items():
        if target in supply and source in supply:
            if has_same_bytes(checkpoint.tensors[supply[target]], checkpoint.tensors[supply[source]]):
                supply[target] = supply[source]
        elif source in supply:
            supply[target] = supply[source]
    # A checkpoint may hold only the target of a tie. The source, and others tied to it, then get its values.
    for target, source in tied.items():
        if source not in supply and target in supply:
            supply[source] = supply[target]
    for target, source in tied.items():
        if target not in supply and source in supply:
            supply[target] = supply[source]
    return supply


# Names for packed integers by their bits, after safetensors.
PACKED_DTYPES = {4: "I4", 8: "I8"}
_PACKED, _WORD = "_packed", 32


def find_packed_weights(
    checkpoint: Checkpoint, naming: NameMapping, structure: Structure
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Return, by parameter, the Linear weights [rows, columns] that a checkpoint stores packed (compressed-tensors'
    ``pack-quantized``); empty if its config has a group with other bits.

    Each is the int32 tensor [rows, columns / 8] or [rows, columns / 4], and one that represents its values, with the
    name that they would have unpacked, their shape and their dtype, ``I4`` or ``I8``.
    """
    weights = [group.get("weights") for group in list_config_groups(checkpoint.config.get("quantization_config"))]
    bits: set[Any] = {each.get("num_bits") if isinstance(each, Mapping) else None for each in weights}
    if not bits or not bits <= PACKED_DTYPES.keys():
        return {}
    stored = {name.removesuffix(_PACKED): t for name, t in checkpoint.tensors.items() if name.endswith(_PACKED)}
    shapes = {weight.parameter: weight.shape for weight in structure.linears if weight.kind == "linear"}
    packed = {}
    for name, binding in naming.bind(stored).items():
        tensor, (rows, columns) = stored[name], shapes.get(binding.parameter, (0, 0))
        widths = {-(-columns * number // _WORD): number for number in bits}
        if tensor.dtype == "I32" and tensor.shape[0] == rows and (number := widths.get(tensor.shape[-1])):
            values = replace(tensor, name=name, dtype=PACKED_DTYPES[number], shape=(rows, columns))
            packed[binding.parameter] = tensor, values
    return packed


# What transformers says if it cannot convert stored tensors to a weight.
CONVERSION_FAILED = "issues during automatic conversion of the weights"


@dataclass(frozen=True)
class LoadReport:
    """Report of a load: weights without a tensor (which would be random), tensors without a weight, weights of another
    shape (stored and expected), floats stored for integers or the reverse, which would be rounded silently, and what
    stopped the load, if anything."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    retyped: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def conversion_failed(self) -> bool:
        """Return whether transformers could not convert stored tensors to a weight."""
        return self.failure is not None and CONVERSION_FAILED in self.failure


def load_report(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Header]
) -> LoadReport:
    """Load tensors, given as dtype (``F32``) and shape by name, as plain transformers does, without their values.
    `config` is that of the checkpoint, including its quantization; it is not changed."""
    # transformers needs it for `device_map`; its absence would look like a fault of the checkpoint.
    require("accelerate")
    state = {
        name: torch.empty(shape, dtype=get_torch_dtype(dtype), device="meta")
        for name, (dtype, shape) in tensors.items()
    }
    options = {"device_map": "meta", "dtype": "auto", "ignore_mismatched_sizes": True, "output_loading_info": True}
    config = copy.deepcopy(config)
    # As in `compressknow.model.meta`, do not require an attention kernel that may not be installed.
    config._attn_implementation = "eager"
    try:
        with silence_libraries():
            model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    except Exception as error:  # Any failure of transformers or a quantizer would also happen to a user.
        if is_out_of_memory(error):
            raise
        return LoadReport(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    # Tied weights that are both stored are compared on loading, except on the meta device.
    for pair in model.all_tied_weights_keys.items():
        dtypes = {state[name].dtype for name in pair if name in state}
        if len(dtypes) > 1 and torch.float8_e4m3fn in dtypes:
            return LoadReport(failure=f"it compares {pair[0]} with {pair[1]}, but torch cannot compare 8-bit floats.")
    mismatched = {name: (tuple(stored), tuple(needed)) for name, stored, needed in sorted(info["mismatched_keys"])}
    loaded = model.state_dict()
    retyped = (n for n in state.keys() & loaded.keys() if state[n].is_floating_point() != loaded[n].is_floating_point())
    missing, unexpected = (tuple(sorted(info[keys])) for keys in ("missing_keys", "unexpected_keys"))
    return LoadReport(missing, unexpected, mismatched, tuple(sorted(retyped)))


def list_headers(checkpoint: Checkpoint) -> dict[str, Header]:
    """Return the dtype and shape of each tensor in a checkpoint's files, by name."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}


def find_missing_weights(
    checkpoint: Checkpoint, tree: PreTrainedModel, report: LoadReport | None = None
) -> tuple[str, ...]:
    """Return the weights of a checkpoint's module tree that its files lack, under their own name and a tied one. For
    weights converted from several tensors (such as one per expert), return the tensors that the files lack.

    A pooler that the class can be built without (``add_pooling_layer``) is not part of every checkpoint: it does not
    count if all of it is missing. `report` is that of the checkpoint, if it was made already.
    """
    report = report or load_report(type(tree), tree.config, list_headers(checkpoint))
    missing = set(report.missing)
    if "add_pooling_layer" in inspect.signature(type(tree).__init__).parameters:
        pooler = {name for name in tree.state_dict() if name.startswith("pooler.")}
        missing -= pooler if pooler <= missing else set()
    if report.mismatched or report.conversion_failed:
        # If experts are missing, their stack has the wrong shape.
        missing.update(NameMapping(tree).missing_parts(checkpoint.tensors))
    return tuple(sorted(missing))


def open_complete(
    model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Checkpoint, PreTrainedModel]:
    """Open a checkpoint that has every weight of its model, and its module tree on the meta device. Raises as
    `open_checkpoint` and `build_meta_model` do, and CheckpointError if weights are missing or have another shape:
    transformers would fill them with random numbers."""
    checkpoint = open_checkpoint(model, revision)
    tree = build_meta_model(checkpoint.folder, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
    # A quantized checkpoint has other tensors than its module tree; it is rejected elsewhere.
    if not checkpoint.tensors or checkpoint.config.get("quantization_config"):
        return checkpoint, tree
    report = load_report(type(tree), tree.config, list_headers(checkpoint))
    if missing := find_missing_weights(checkpoint, tree, report):
        count = "a weight" if len(missing) == 1 else f"{len(missing)} weights"
        if any(".lora_A." in name for name in checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.folder} holds the layers of an adapter (LoRA) in place of {count} of "
                f"{type(tree).__name__}: {list_some(missing)}.",
                hint=MERGE,
            )
        raise CheckpointError(
            f"{checkpoint.folder} lacks {count} of {type(tree).__name__}: {list_some(missing)}.",
            why="transformers would fill them with random numbers.",
            hint="Download or save it again, or check that `architectures` in its config.json names the class that the "
            "weights were saved from.",
        )
    hint = "The config and the weights do not match: download or save both again."
    weights = {name for name, _ in tree.named_parameters(remove_duplicate=False)}
    for name, (stored, needed) in report.mismatched.items():
        if name in weights:
            what = f"{name} has shape {list(stored)}, but config.json says {list(needed)}."
            raise CheckpointError(what, hint=hint)
    if report.conversion_failed:
        raise CheckpointError(
            f"{checkpoint.folder} does not match its config.json: transformers cannot convert its tensors to all "
            f"weights of {type(tree).__name__}.",
            hint=hint,
        )
    return checkpoint, tree
