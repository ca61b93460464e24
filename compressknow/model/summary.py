"""Summarize a checkpoint or a GGUF file for `inspect`: counts by group and scope, as plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.format import clean, count
from compressknow.base.notebook import Summary, SummaryRepr
from compressknow.model.checkpoint import Checkpoint, open_checkpoint
from compressknow.model.gguf_file import ORDER, Tensor, count_by_type, find_groups, list_tensors, open_gguf, read_value
from compressknow.model.structure import GROUPS, LinearWeight, ModuleMap, Structure, count_scope_parameters
from compressknow.model.tensors import find_grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Inspection(SummaryRepr, dict[str, Any]):
    """Summary of a checkpoint: the content of ``inspect --json``.

    A dict whose main keys are also properties.
    """

    @property
    def model(self) -> str:
        """Return the name of the checkpoint."""
        return str(self["model"])

    @property
    def architecture(self) -> str:
        """Return the name of the class that transformers builds."""
        return str(self["architecture"])

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Return, by group of Linear layers, counts of ``modules`` and of parameters ``stored`` and ``used``, and the
        ``weights``."""
        return dict(self["groups"])

    @property
    def scopes(self) -> dict[str, dict[str, int]]:
        """Return, by scope, the number of parameters that it contains for ``prune`` and for ``quantize``."""
        return dict(self["scopes"])

    @property
    def parameters(self) -> dict[str, int]:
        """Return the parameter counts of the whole model, ``stored`` and ``used``."""
        return dict(self["parameters"])

    @property
    def tied(self) -> list[list[str]]:
        """Return pairs of names that share a tensor."""
        return list(self["tied"])

    @property
    def unplaced(self) -> list[str]:
        """Return the Linear layers without a group."""
        return list(self["unplaced"])

    def _summary(self) -> Summary:
        title = f"{clean(self.model, 60)}: {clean(self.architecture, 60)}"
        keys = ("modules", "stored", "used")
        rows = [(name, *(count(group[key]) for key in keys)) for name, group in self.groups.items()]
        verdict = f"{count(self.parameters['stored'])} parameters."
        return Summary(title, verdict, ("Group", "Modules", "Stored", "As used"), rows)


def inspect_checkpoint(
    model: str | Path, *, module_map: ModuleMap, revision: str | None, trust_remote_code: bool
) -> Inspection:
    """Open a checkpoint, or a folder with only its config.json, and summarize its contents. Reads headers, some rows of
    each matrix, and pairs of stored weights that the config calls tied. Raises the errors of `open_checkpoint` and
    `build_meta_model`."""
    # For a hub id, do not download the weights just to count parameters.
    checkpoint = open_checkpoint(model, revision, weights=Path(model).exists())
    from compressknow.model.groups import read_structure
    from compressknow.model.loading import find_missing_weights
    from compressknow.model.meta import build_meta_model

    tree = build_meta_model(checkpoint.folder, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
    structure = read_structure(tree, module_map)
    if not checkpoint.tensors:
        # T5's class ties its head whatever the config says, but Flan-T5's config is right about its weights.
        if checkpoint.config.get("tie_word_embeddings") is False:
            heads = {weight.parameter for weight in structure.linears if weight.group == "final"}
            tied = {name: source for name, source in structure.tied.items() if name not in heads}
            structure = replace(structure, tied=tied)
        return summarize(structure, checkpoint.name, None)
    dtypes, ties = _find_stored_dtypes(checkpoint, tree, structure)
    summary = summarize(replace(structure, tied=ties), checkpoint.name, dtypes)
    grid = find_grid(checkpoint.tensors.values())
    missing = list(find_missing_weights(checkpoint, tree))
    return Inspection({**summary, "missing": missing, **({"grid": grid} if grid else {})})


def summarize(structure: Structure, source_name: str, stored_dtypes: Mapping[str, str] | None) -> Inspection:
    """Return the record behind `inspect` and its `--json`; `stored_dtypes` are those of the weight files (``F32``), by
    the names of the module tree; None without weights.

    Counts are elements: `stored` counts a tensor once, `used` once per use in a forward pass (ALBERT's shared layer). A
    final layer tied to the embedding counts in `final`, but only once in `parameters`.
    """
    shared = sum(weight.used - weight.stored for weight in structure.linears)
    groups = {group: [w for w in structure.linears if w.group == group] for group in GROUPS}
    if not groups["vision"]:
        del groups["vision"]
    return Inspection(
        {
            "model": source_name,
            "architecture": structure.architecture,
            "model_type": structure.model_type,
            "module_map": structure.module_map,
            "groups": {group: _group(weights, structure, stored_dtypes or {}) for group, weights in groups.items()},
            "scopes": count_scope_parameters(structure),
            "parameters": {"stored": structure.stored, "used": structure.stored + shared},
            "tied": sorted([name, source] for name, source in structure.tied.items()),
            "unplaced": list(dict.fromkeys(structure.unplaced)),
            "opaque": dict(structure.opaque),
        }
    )


def _group(weights: list[LinearWeight], structure: Structure, dtypes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "modules": len({weight.module for weight in weights}),
        "stored": sum(weight.stored for weight in weights),
        "used": sum(weight.used for weight in weights),
        "weights": [
            {
                "name": weight.parameter,
                "shape": list(weight.shape),
                # A checkpoint may hold a tied weight only under its other name.
                "dtype": dtypes.get(weight.parameter) or dtypes.get(structure.tied.get(weight.parameter, "")),
                "kind": weight.kind,
                "layer": weight.layer,
                "stack": weight.stack,
                "cross": weight.cross,
                "uses": weight.uses,
            }
            for weight in weights
        ],
    }


def _find_stored_dtypes(
    checkpoint: Checkpoint, model: PreTrainedModel, structure: Structure
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the stored dtype of each parameter, and the ties that the weight files confirm."""
    from compressknow.model.loading import NameMapping, find_packed_weights, find_suppliers

    naming = NameMapping(model)
    bound = naming.bind(checkpoint.tensors)
    stored = {parameter: name for name, binding in bound.items() for parameter in binding.parameters}
    stored |= find_suppliers(checkpoint, bound, structure.tied)
    dtypes = {parameter: checkpoint.tensors[name].dtype for parameter, name in stored.items()}
    for parameter, (words, values) in find_packed_weights(checkpoint, naming, structure).items():
        stored[parameter], dtypes[parameter] = words.name, values.dtype
    stored_of = {pair: {stored[each] for each in pair if each in stored} for pair in structure.tied.items()}
    ties = dict(pair for pair, tensors in stored_of.items() if len(tensors) < 2)
    return dtypes, ties


def inspect_gguf(parts: Sequence[Path]) -> Inspection:
    """Summarize the contents of a GGUF file, in one part or several, without reading weights. Raises CheckpointError if
    it is damaged."""
    readers = [open_gguf(part) for part in parts]
    tensors = list_tensors(*readers)
    groups = find_groups(tensors)
    stored = sum(tensor.numel for tensor in tensors.values())
    architecture = str(read_value(readers[0], "general.architecture"))
    origin = {key: read_value(readers[0], f"compressknow.{key}") for key in ("setup", "source.name", "source.sha256")}
    return Inspection(
        {
            "model": parts[0].name,
            "architecture": architecture,
            "model_type": architecture,
            "bytes": sum(part.stat().st_size for part in parts),
            **({"made_of": {key: value for key, value in origin.items() if value}} if any(origin.values()) else {}),
            "groups": {
                group: _describe_group([tensor for name, tensor in tensors.items() if groups[name] == group])
                for group in ORDER
                if group in groups.values()
            },
            "scopes": {},
            "parameters": {"stored": stored, "used": stored},
            "tied": [],
            "unplaced": [],
            "opaque": {},
        }
    )


def _describe_group(tensors: Sequence[Tensor]) -> dict[str, Any]:
    stored = sum(tensor.numel for tensor in tensors)
    return {
        **{"modules": len(tensors), "stored": stored, "used": stored, "types": count_by_type(tensors)},
        "weights": [
            {"name": each.name, "shape": list(each.shape[::-1]), "dtype": each.type, "layer": each.layer}
            for each in tensors
        ],
    }
