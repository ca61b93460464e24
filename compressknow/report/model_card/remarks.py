"""What the reader of a conversion must know beside its figures: where it runs, and whether it grew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.compress.runtimes import VLLM_ARCHITECTURES, runtimes, vllm_limit, vllm_obstacle
from compressknow.report.figures import size


def where_it_runs(manifest: Mapping[str, Any]) -> str:
    """A sentence, or two where a decoder that vLLM knows does not run there."""
    limit, obstacle = vllm_limit(manifest), vllm_obstacle(manifest)
    told = f"Runs in {', '.join(runtimes(manifest))}{f' ({limit})' if limit else ''}."
    known = manifest["source"]["architecture"] in VLLM_ARCHITECTURES
    return f"{told} It does not run in vLLM: {obstacle}." if obstacle and known else told


def growth(manifest: Mapping[str, Any]) -> Iterator[str]:
    """That the output is larger than the input, and why; nothing where it is not."""
    before, after = (manifest["totals"][key] for key in ("bytes_before", "bytes_after"))
    if after <= before:
        return
    cause = (
        "the final layer is now stored beside the embedding that it shared its weight with. "
        "The scope `blocks` leaves it alone"
        if manifest.get("untied")
        else "the scales of its narrow layers take more than int8 saves"
    )
    yield f"The output is larger than the input ({size(after)} against {size(before)}): {cause}."
