"""The Hub's model card (README.md) of a GGUF file that export wrote: what it was made of, its types, how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from compressknow.format import count, size
from compressknow.pages.pages import render


def render_gguf_card(record: Mapping[str, Any], file: str) -> str:
    """The card as Markdown with front matter for the Hub.

    Parameters
    ----------
    record : the content of ``FILE.gguf.json``.
    file : the GGUF file's name.
    """
    source = record["source"]
    return render(
        "gguf_card.md.j2",
        metadata=_metadata(source),
        name=source["name"],
        revision=source.get("revision"),
        architecture=str(source.get("architecture", "")),
        setup=record["setup"],
        version=record["versions"].get("compressknow", ""),
        llama_cpp=record["versions"].get("llama.cpp", ""),
        rows=[
            {
                **{"group": group, "type": kind, "tensors": count(counts["tensors"])},
                **{"parameters": count(counts["parameters"]), "size": size(counts["bytes"])},
            }
            for group, types in record["groups"].items()
            for kind, counts in types.items()
        ],
        file=shlex.quote(file),
        record=f"{file}.json",
    )


def _metadata(source: Mapping[str, Any]) -> dict[str, Any]:
    base = {"base_model": str(source["name"]), "base_model_relation": "quantized"} if source.get("revision") else {}
    return {**base, "tags": ["compressknow", "gguf"]}
