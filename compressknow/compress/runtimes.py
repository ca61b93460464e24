"""What runs a converted checkpoint, told from its manifest, and why vLLM does not where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compressknow.compress.schemes import SCHEMES, known, word_of

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
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def runtimes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What loads a converted checkpoint and computes what it says."""
    return (TRANSFORMERS, ENGINE, *([] if vllm_obstacle(manifest) else [VLLM]))


def vllm_limit(manifest: Mapping[str, Any]) -> str | None:
    """On which hardware vLLM cannot run a checkpoint that it otherwise does; None where there is no such limit."""
    if vllm_obstacle(manifest):
        return None
    limits = (scheme.vllm_limit() for scheme in known(row["scheme"] for row in _quantized(manifest)))
    return next((limit for limit in limits if limit), None)


def vllm_obstacle(manifest: Mapping[str, Any]) -> str | None:
    """Why vLLM does not run a checkpoint, as the end of "It does not run in vLLM: "; None where it does."""
    architecture = str(manifest["source"]["architecture"])
    if architecture not in VLLM_ARCHITECTURES:
        return f"{architecture} is not among the text generation models that are known to run there"
    quantized = {_module(row): row for row in _quantized(manifest)}
    names = sorted({row["scheme"] for row in quantized.values()})
    obstacles = (SCHEMES[n].vllm_obstacle() if n in SCHEMES else f"it has no kernel for {n}" for n in names)
    if obstacle := next((obstacle for obstacle in obstacles if obstacle), None):
        return obstacle
    word = word_of(known(names))
    for group, what in (("final", "the final layer"), ("other", "a layer beside attention and feed-forward")):
        name = next((module for module, row in quantized.items() if row["group"] == group), None)
        if name:
            return f"{what} ({name}) is {word}, but vLLM supports it only in floating point"
    modules = {_module(row) for row in manifest["tensors"] if row["name"].endswith(".weight")}
    split = next(_split(modules, quantized), None)
    return f"it fuses {split}, so all or none of these must be {word}" if split else None


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
