"""What runs a converted checkpoint, and the proof that it loads: its config and headers, put through transformers on
the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.compress.plan import PlannedTensor
from compressknow.errors import UnsupportedError
from compressknow.model.checkpoint import Checkpoint, open_checkpoint, some_of
from compressknow.model.loading import Header, LoadReport, headers_of, load_report
from compressknow.model.meta import config_from_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TRANSFORMERS, ENGINE, VLLM = "transformers", "compressknow", "vLLM"
# Text models that vLLM implements itself, by their classes in transformers. Mixtures of experts are not among them:
# transformers fuses their experts, so that there is no int8 form of them here.
VLLM_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Apertus Arcee Bloom Cohere Cohere2 Cwm Ernie4_5 Exaone4 Falcon Gemma Gemma2 Gemma3 GPTBigCode GPTJ GPTNeoX "
        "Glm Glm4 Granite Llama Mistral Mpt Nemotron OPT Olmo Olmo2 Olmo3 Persimmon Phi Phi3 Qwen2 Qwen3 SeedOss "
        "StableLm Starcoder2"
    ).split()
) | {"GPT2LMHeadModel"}
# Layers that vLLM joins into one where they stand side by side (its `packed_modules_mapping`).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
NO_INT8_HARDWARE = "not on Blackwell GPUs: no int8"


def runtimes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What loads a converted checkpoint and computes what it says."""
    return (TRANSFORMERS, ENGINE, *([] if vllm_obstacle(manifest) else [VLLM]))


def vllm_limit(manifest: Mapping[str, Any]) -> str | None:
    """On which hardware vLLM cannot run a checkpoint that it otherwise does; None where there is no such limit."""
    return NO_INT8_HARDWARE if not vllm_obstacle(manifest) and any(_quantized(manifest)) else None


def vllm_obstacle(manifest: Mapping[str, Any]) -> str | None:
    """Why vLLM does not run a checkpoint, as the end of "It does not run in vLLM: "; None where it does."""
    architecture = str(manifest["source"]["architecture"])
    if architecture not in VLLM_ARCHITECTURES:
        return f"{architecture} is not among the text generation models that are known to run there"
    quantized = {_module(row): row for row in _quantized(manifest)}
    if others := sorted({row["scheme"] for row in quantized.values()} - {"int8"}):
        return f"it has no kernel for {others[0]}"
    for group, what in (("final", "the final layer"), ("other", "a layer beside attention and feed-forward")):
        name = next((module for module, row in quantized.items() if row["group"] == group), None)
        if name:
            return f"{what} ({name}) is int8, which it takes in floats only"
    modules = {_module(row) for row in manifest["tensors"] if row["name"].endswith(".weight")}
    split = next(_split(modules, quantized), None)
    return f"it joins {split} into one layer, which must be int8 as a whole" if split else None


def _quantized(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (row for row in manifest["tensors"] if row.get("scheme"))


def _module(row: Mapping[str, Any]) -> str:
    return str(row["name"]).removesuffix(".weight")


def _split(modules: set[str], quantized: Iterable[str]) -> Iterator[str]:
    """Layers that stand side by side, would be joined, and are not all quantized."""
    done = set(quantized)
    for module in quantized:
        parent, _, leaf = module.rpartition(".")
        together = next((leaves for leaves in FUSED if leaf in leaves), ())
        there = [name for name in together if f"{parent}.{name}" in modules]
        if not all(f"{parent}.{name}" in done for name in there):
            yield f"{', '.join(there[:-1])} and {there[-1]} of {parent}"


# What transformers says then; the table that it goes on to refer to is not shown.
CONVERSION_FAILED = "issues during automatic conversion of the weights"


def prove(source: Checkpoint, tree: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, Header]) -> None:
    """Load an output as plain transformers would, without its values.

    Parameters
    ----------
    source : the checkpoint that it was made of, and `tree` its module tree. Tensors that no weight takes, and weights
        that none gives, are no fault of the output where the source has them too.
    config : the output's config.json.
    tensors : dtype and shape by name, as its headers have them.

    Raises
    ------
    UnsupportedError : transformers would not load every weight.
    """
    found = load_report(type(tree), config_from_dict(tree, copy.deepcopy(dict(config))), tensors)
    if fault := _fault(found, source, tree):
        raise UnsupportedError(
            f"{type(tree).__name__} cannot be compressed so: transformers would not load the output.",
            why=fault,
            hint="Prune only, or narrow --scope (or --exclude) to other layers.",
        )


def prove_written(source: Checkpoint, tree: PreTrainedModel, folder: Path) -> None:
    """The same for a folder with a config.json and weight files."""
    written = open_checkpoint(folder)
    prove(source, tree, written.config, headers_of(written))


def planned_headers(tensors: Iterable[PlannedTensor]) -> dict[str, Header]:
    """Dtype and shape of all that a plan writes, scales included, by name."""
    headers: dict[str, Header] = {}
    for tensor in tensors:
        headers[tensor.name] = tensor.dtype, tensor.source.shape
        if tensor.scale_names:
            headers |= dict.fromkeys(tensor.scale_names, (tensor.source.dtype, tensor.scale_shape))
    return headers


def _fault(found: LoadReport, source: Checkpoint, tree: PreTrainedModel) -> str | None:
    if found == LoadReport():
        return None
    if found.failure and CONVERSION_FAILED in found.failure:
        return "It fuses or splits weights of this model on loading, and fails to where others of them are quantized."
    if found.failure:
        return f"Loading stops: {found.failure}"
    before = load_report(type(tree), tree.config, headers_of(source))
    kinds = {
        "It finds no values for": (found.missing, before.missing),
        "It finds no place for": (found.unexpected, before.unexpected),
        "It finds another shape in": (found.mismatched, before.mismatched),
    }
    faults = {what: set(now) - set(then) for what, (now, then) in kinds.items()}
    return next((f"{what} {some_of(names)}." for what, names in faults.items() if names), None)
