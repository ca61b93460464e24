"""A small manifest in the form that a conversion writes."""

from __future__ import annotations

from typing import Any


def make_figures(parameters: int, *, pruned: int = 0, quantized: int = 0, in_scope: int = 0) -> dict[str, int]:
    return {
        "parameters": parameters,
        "in_scope": in_scope,
        "pruned": pruned,
        "zeros_before": 0,
        "zeros_after": pruned,
        "quantized": quantized,
        "bytes_before": 2 * parameters,
        "bytes_after": 2 * parameters - quantized,
    }


def make_row(name: str, group: str | None, scheme: str | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "group": group,
        "shape": [1000, 1000],
        "dtype_before": "bfloat16",
        "dtype_after": "int8" if scheme else "bfloat16",
        "numel": 1_000_000,
        "pruned": 200_000 if scheme else 0,
        "zeros": 200_000 if scheme else 0,
        "scheme": scheme,
        "relative_error": 0.01 if scheme else 0.0,
        "sha256": "0" * 64,
    }


def make_manifest(*, scheme: str | None = "int8", **changes: Any) -> dict[str, Any]:
    """Return the manifest of a Llama whose attention was pruned by 20 % and, unless `scheme` is None, quantized."""
    quantized = 2_000_000 if scheme else 0
    steps: list[dict[str, Any]] = [{"prune": 0.2, "method": "l1-unstructured", "scope": ["attention"], "include": []}]
    if scheme:
        steps.append({"quantize": scheme, "scope": ["attention"], "include": []})
    return {
        "schema": 1,
        "versions": {"compressknow": "0.1.0"},
        "source": {
            "name": "someone/tiny-llama",
            "revision": "c0ffee",
            "files": {"model.safetensors": "1" * 64},
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
        },
        "setup": "Att_GPQ 20%",
        "recipe": {"module_map": "structural", "steps": steps},
        "totals": make_figures(5_000_000, pruned=400_000, quantized=quantized, in_scope=2_000_000),
        "groups": {
            "attention": make_figures(2_000_000, pruned=400_000, quantized=quantized, in_scope=2_000_000),
            "feed-forward": make_figures(3_000_000),
            "final": make_figures(0),
            "other": make_figures(0),
        },
        "tensors": [
            make_row("model.layers.0.self_attn.q_proj.weight", "attention", scheme),
            make_row("model.layers.0.self_attn.k_proj.weight", "attention", scheme),
            make_row("model.layers.0.mlp.up_proj.weight", "feed-forward"),
        ],
        "untied": [],
        "runtimes": ["transformers", "compressknow", "vLLM"],
    } | changes
