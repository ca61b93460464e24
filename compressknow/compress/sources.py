"""Stored tensors of each module's weight, with ties and fused tensors resolved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compressknow.base.errors import CheckpointError, UnsupportedError
from compressknow.base.format import clean
from compressknow.compress.schemes import SCHEMES, Scheme
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.loading import Binding, NameMapping, find_suppliers
from compressknow.model.manifest import read_manifest
from compressknow.model.meta import find_direct_reads
from compressknow.model.structure import LinearWeight, Structure
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor

# Why a weight has no quantized form that loads and runs correctly.
NO_FORM = {
    "conv1d": "transformers' {word} loader supports only nn.Linear; a Conv1D would be left with integers for weights.",
    "experts": "transformers fuses all experts of a block into one weight; its {word} loader supports only nn.Linear.",
    "reshaped": "transformers fuses, splits or transposes it on loading, and cannot do so with a separate scale.",
    "read": "Its model reads the weight directly, bypassing the layer, and would leave its inputs unquantized.",
}
# Configs that make transformers unpack weights that were published quantized, perhaps only so (DeepSeek-V3, gpt-oss).
UNPACKERS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
# What to do if no scope can be quantized.
PRUNE_OR_EXPORT = "Prune only, or quantize it as a GGUF file (`compressknow export`), if it generates text."


class Sources:
    """Stored tensors of a checkpoint, by parameter of its module tree, with ties resolved. Raises as `check_usable`."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, structure: Structure) -> None:
        check_usable(checkpoint)
        self._tensors = dict(checkpoint.tensors)
        self._naming = NameMapping(model)
        self._shapes = structure.parameters
        modules = model.named_modules(remove_duplicate=False)
        self._embeddings = sorted(f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding))
        self.weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        # The tensors in the order of the checkpoint.
        self.position = {name: i for i, name in enumerate(checkpoint.tensors)}
        self.bound: dict[str, Binding] = self._naming.bind(checkpoint.tensors)
        self._model = model
        self._parts: dict[str, list[StoredTensor]] = {}
        for name, binding in self.bound.items():
            for parameter in binding.parameters:
                self._parts.setdefault(parameter, []).append(self._tensors[name])
        self.supply = find_suppliers(checkpoint, self.bound, structure.tied)

    def of(self, weight: LinearWeight) -> list[StoredTensor]:
        """Return the stored tensors that make up a weight: one, unless a fused weight is stored in parts."""
        if weight.parameter in self._parts:
            return self._parts[weight.parameter]
        return [self.tensor(weight.parameter)] if weight.parameter in self.supply else []

    def find_siblings(self, weight: LinearWeight) -> tuple[str, ...]:
        """Return the parameters that one stored tensor is split into on loading, including the weight's own."""
        stored = self._parts.get(weight.parameter, [])
        several = [binding.parameters for part in stored if len((binding := self.bound[part.name]).parameters) > 1]
        return several[0] if several else ()

    def split(self, weight: LinearWeight) -> bool:
        """Split a tensor that is stored for several parameters into one per parameter. Return False if transformers
        does not split it between rows."""
        stored = self._parts[weight.parameter][0]
        binding = self.bound[stored.name]
        if not binding.rows:
            return False
        del self._tensors[stored.name], self.bound[stored.name]
        for parameter, rows in zip(binding.parameters, binding.rows, strict=True):
            part = stored.rows(parameter, rows)
            self._tensors[parameter], self.bound[parameter] = part, Binding((parameter,))
            self._parts[parameter], self.position[parameter] = [part], self.position[stored.name]
        return True

    def tensor(self, parameter: str) -> StoredTensor:
        """Return the stored tensor with the values of a parameter."""
        return self._tensors[self.supply[parameter]]

    def is_supplied(self, parameter: str) -> bool:
        """Return whether the checkpoint holds its values, under its own name or a tied one."""
        return parameter in self._parts or parameter in self.supply

    def values(self, parameter: str, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        """Return a parameter as its module holds it, from its stored tensors as `read` returns them."""
        parts = self._parts.get(parameter) or [self.tensor(parameter)]
        if not any(self.bound[part.name].reshaped for part in parts if part.name in self.bound):
            return read(parts[0])
        return self._naming.convert(parameter, {part.name: read(part) for part in parts})

    def matrix_of(self, stored: StoredTensor, parameter: str) -> int:
        """Return which matrix of a stack a stored tensor belongs to, by the number in an expert's name; else 0."""
        number = re.search(r"experts\.(\d+)\.", stored.name) if len(self._shapes[parameter]) > 2 else None
        return int(number.group(1)) if number else 0

    def is_stored(self, parameter: str) -> bool:
        return parameter in self._parts

    def is_borrowed(self, weight: LinearWeight, stored: StoredTensor) -> bool:
        """Return whether a weight has no bytes of its own in the checkpoint, but those of another parameter."""
        binding = self.bound.get(stored.name)
        if binding is None or weight.parameter not in binding.parameters:
            return True
        supplier = self.supply.get(weight.parameter, stored.name)
        return supplier != stored.name and _locate(self._tensors[supplier]) == _locate(stored)

    def is_transposed_on_loading(self, stored: StoredTensor) -> bool:
        """Return whether transformers transposes a stored matrix, or each of a stack, on loading."""
        binding = self.bound.get(stored.name)
        return binding is not None and self._naming.transposes(stored.name, stored.shape, binding.parameter)

    def find_tied_embedding(self, weight: LinearWeight) -> str | None:
        """Return the embedding that a weight shares its values with, if any."""
        supplier = self.supply.get(weight.parameter)
        tied = [p for p in self._embeddings if supplier and self.supply.get(p) == supplier]
        return min(tied, key=lambda p: (p != supplier, not self.is_stored(p)), default=None)

    def distinct(self) -> Iterator[StoredTensor]:
        """Yield the stored tensors; if several names share one storage, only those that supply a parameter."""
        supplying = set(self.supply.values())
        seen: dict[tuple[Any, ...], str] = {}
        for stored in self.supply.values():
            seen.setdefault(_locate(self._tensors[stored]), stored)
        for name, tensor in self._tensors.items():
            if name in supplying or seen.setdefault(_locate(tensor), name) == name:
                yield tensor

    def check(self, weight: LinearWeight, schemes: Mapping[LinearWeight, Scheme | None]) -> None:
        """Raise an error if a weight is not stored as the config says, or has no form in its scheme that loads and runs
        correctly. `schemes` are those of all weights in scope."""
        parts, scheme = self.of(weight), schemes[weight]
        if not parts:
            raise CheckpointError(
                f"The checkpoint lacks {weight.parameter}, which its config says it has.",
                hint="Is it a base model without this head? Narrow --scope, or correct `architectures` in its config.",
            )
        for part in parts:
            if part.dtype not in FLOAT_DTYPES:
                raise UnsupportedError(
                    f"{part.name} is stored as {part.dtype}.",
                    why="Weights of 32 or 16 bits (F32, F16, BF16) can be compressed; this looks quantized already."
                    if part.itemsize == 1
                    else f"Only {', '.join(FLOAT_DTYPES)} can be compressed.",
                    hint="Start from the original checkpoint, or save it in one of these dtypes.",
                )
        if scheme and (reason := self._find_obstacle(weight, scheme)):
            raise UnsupportedError(
                f"{weight.module} ({parts[0].name}) cannot be quantized to {scheme.word}.",
                why=reason,
                hint=self._suggest_options(scheme, [each for each, other in schemes.items() if other == scheme]),
            )

    def _suggest_options(self, scheme: Scheme, alike: Sequence[LinearWeight]) -> str:
        """Suggest options with which all weights can be stored, and options that leave out those that cannot."""
        obstacles = {each: why for each in alike if self.of(each) and (why := self._find_obstacle(each, scheme))}
        misfits = list(obstacles)
        with SCHEMES.explain_failures(scheme.name):
            fit = scheme.fit({each.shape for each in alike}) or {}
            by_shape = all(why == scheme.misfit(each.shape) for each, why in obstacles.items())
        changed = {name: value for name, value in fit.items() if value != scheme.values()[name]}
        options = " ".join(
            f"{each.option} {changed[each.name]}" for each in scheme.parameters() if each.name in changed
        )
        parameters = f"With {options} all layers in scope can be stored. " if options else ""
        names = " or ".join(each.option for each in scheme.parameters())
        # Only a `fit` of its own tries other values.
        if names and by_shape and type(scheme).fit is Scheme.fit:
            parameters = f"Another value of {names} may fit all layers in scope. "
        # If experts are stored one by one, transformers loads no other quantized layer either.
        if any(each.kind == "experts" and len(self.of(each)) > 1 for each in misfits):
            return PRUNE_OR_EXPORT
        if len(misfits) == len(alike):
            return parameters.rstrip() or f"Nothing in the scope has an {scheme.word} form. {PRUNE_OR_EXPORT}"
        pattern = "|".join(dict.fromkeys(_build_kind_pattern(each.module) for each in misfits))
        return f"{parameters}Prune it only, or leave out layers without an {scheme.word} form: --exclude '{pattern}'."

    def _find_obstacle(self, weight: LinearWeight, scheme: Scheme) -> str | None:
        parts = self.of(weight)
        part, bound = parts[0], [self.bound[part.name] for part in parts if part.name in self.bound]
        if weight.kind != "linear":
            return NO_FORM[weight.kind].format(word=scheme.word)
        if bound:
            name = part.name if bound[0].parameter == weight.parameter else weight.parameter
            is_reshaped = any(binding.reshaped for binding in bound)
            if is_reshaped or not self._naming.scale_follows(name, weight.parameter):
                return NO_FORM["reshaped"]
        if self._read & set(weight.modules):
            return NO_FORM["read"]
        with SCHEMES.explain_failures(scheme.name):
            return scheme.misfit(part.shape)

    @cached_property
    def _read(self) -> set[str]:
        """Return the modules whose weight's values are read directly, not only its dtype."""
        return {module for module, read in find_direct_reads(self._model).items() if read == "values"}


def _build_kind_pattern(module: str) -> str:
    """Return a pattern for the modules that differ from this one only in block numbers.

    >>> _build_kind_pattern("backbone.layers.0.mixer.dt_proj")
    'backbone\\\\.layers\\\\.\\\\d+\\\\.mixer\\\\.dt_proj$'
    """
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module)) + "$"


def _locate(tensor: StoredTensor) -> tuple[Any, ...]:
    return tensor.file, tensor.offset, tensor.nbytes, tensor.name if not tensor.nbytes else ""


def check_usable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a folder has no weights, UnsupportedError if they are quantized already."""
    checkpoint.check_has_weights()
    if quantization := checkpoint.config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        source = ""
        with suppress(CheckpointError):
            source = f", {clean(read_manifest(checkpoint.folder)['source']['name'], 80)}"
        hint = f"Start from the original checkpoint{source}."
        if unpacker := UNPACKERS.get(str(method)):
            hint += (
                f" If there is none, load this one with quantization_config=transformers.{unpacker}(dequantize=True), "
                "save that, and give its folder."
            )
        raise UnsupportedError(
            f"{checkpoint.name} is quantized already ({method}).",
            why="Compressing it again would add to its errors.",
            hint=hint,
        )
