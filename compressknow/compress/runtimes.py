"""Runtimes of a converted checkpoint, told from its manifest, and why vLLM is none of them where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.compress.schemes import SCHEMES, choose_word, find_schemes

TRANSFORMERS, ENGINE, VLLM = "transformers", "compressknow", "vLLM"
# Text models that vLLM implements itself, by their classes in transformers. Mixtures of experts are not among them:
# transformers fuses their experts, so that there is no quantized form of them here.
VLLM_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Apertus Arcee Bloom Cohere Cohere2 Cwm Ernie4_5 Exaone4 Falcon Gemma Gemma2 Gemma3 GPTBigCode GPTJ GPTNeoX "
        "Glm Glm4 Granite Llama Mistral Mpt Nemotron OPT Olmo Olmo2 Olmo3 Persimmon Phi Phi3 Qwen2 Qwen3 SeedOss "
        "StableLm Starcoder2"
    ).split()
) | {"GPT2LMHeadModel"}
# Layers that vLLM joins into one where they stand side by side (its `packed_modules_mapping`).
FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


def list_runtimes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what loads a converted checkpoint and computes what it says."""
    return (TRANSFORMERS, ENGINE, *([] if find_vllm_obstacle(manifest) else [VLLM]))


def find_vllm_limit(manifest: Mapping[str, Any]) -> str | None:
    """Return where or how alone vLLM runs a checkpoint; None where it does not, and where there is no such limit."""
    if find_vllm_obstacle(manifest):
        return None
    shapes = _collect_shapes(manifest)
    limits = (scheme.vllm_limit(shapes[scheme.name]) for scheme in find_schemes(shapes))
    return next((limit for limit in limits if limit), None)


def find_vllm_obstacle(manifest: Mapping[str, Any]) -> str | None:
    """Return why vLLM does not run a checkpoint, as the end of "It does not run in vLLM: "; None where it does."""
    architecture = str(manifest["source"]["architecture"])
    if architecture not in VLLM_ARCHITECTURES:
        return f"{architecture} is not among the text generation models that are known to run there"
    if unused := manifest.get("unused"):
        return f"{architecture} has no place for {unused[0]}, at which its loader stops"
    quantized = {_name_module(row): row for row in _find_quantized(manifest)}
    shapes = _collect_shapes(manifest)
    obstacles = (
        SCHEMES[name].vllm_obstacle(shapes[name]) if name in SCHEMES else f"it has no kernel for {name}"
        for name in sorted(shapes)
    )
    if obstacle := next((obstacle for obstacle in obstacles if obstacle), None):
        return obstacle
    word = choose_word(find_schemes(shapes))
    for group, what in (("final", "the final layer"), ("other", "a layer beside attention and feed-forward")):
        name = next((module for module, row in quantized.items() if row["group"] == group), None)
        if name:
            return f"{what} ({name}) is {word}, but vLLM supports it only in floating point"
    modules = {_name_module(row) for row in manifest["tensors"] if row["name"].endswith(".weight")}
    return next((f"it fuses {split}" for split in _describe_split(modules, quantized, word)), None)


def _find_quantized(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (row for row in manifest["tensors"] if row.get("scheme"))


def _collect_shapes(manifest: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the weights that each scheme stores."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for row in _find_quantized(manifest):
        shapes.setdefault(row["scheme"], []).append(tuple(row["shape"]))
    return shapes


def _name_module(row: Mapping[str, Any]) -> str:
    return str(row["name"]).removesuffix(".weight")


def _describe_split(modules: set[str], quantized: Mapping[str, Mapping[str, Any]], word: str) -> Iterator[str]:
    """Describe layers that stand side by side, would be joined, and are not all quantized in one way."""
    ways = {module: (row["scheme"], row.get("parameters")) for module, row in quantized.items()}
    for module, way in ways.items():
        parent, _, leaf = module.rpartition(".")
        together = next((leaves for leaves in FUSED if leaf in leaves), ())
        there = [name for name in together if f"{parent}.{name}" in modules]
        others = [ways.get(f"{parent}.{name}") for name in there]
        if any(other != way for other in others):
            must = f"all or none of these must be {word}" if None in others else "these must be quantized in one way"
            yield f"{', '.join(there[:-1])} and {there[-1]} of {parent}, so {must}"
