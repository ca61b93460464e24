"""A search made by hand."""

from __future__ import annotations

from dataclasses import replace

from compressknow.pages.records import ModelFacts
from compressknow.pages.search import Search, Trial
from compressknow.stats.records import Estimate


def estimate(value: float) -> Estimate:
    return Estimate(value, max(0.0, value - 0.04), min(1.0, value + 0.04))


def tried(setup: str, kind: str, size: int, kept: float, held_out: float | None = None) -> Trial:
    recipe = {"module_map": "structural", "steps": [{"prune": size / 1e8, "scope": ["attention"]}]}
    sizes = {"sparse-bytes": size, "bytes": 2 * size, "nonzero": size // 2}
    known = None if held_out is None else estimate(held_out)
    return Trial(setup, kind, recipe, estimate(kept), 150 if kept > 0.5 else 30, sizes, known, harm=0.25)


def found(text: str = "a-model") -> Search:
    all_tried = (
        tried("Overall_GP 20%", "paper", 80_000_000, 0.97),
        tried(f"Att[layers 0-6]_GP 50% {text}", "layers", 90_000_000, 0.99),
        tried("Att_GP 30% + FF_GP 25% + Att+FF_GQ", "search", 60_000_000, 0.96, 0.95),
        tried("Att_GP 80% + FF_GP 80%", "search", 30_000_000, 0.1),
    )
    sizes = {"sparse-bytes": 100_000_000, "bytes": 100_000_000, "nonzero": 50_000_000}
    model = ModelFacts(text, None, "0" * 64, "LlamaForCausalLM", "causal", 50_000_000, 100_000_000, "BF16")
    return Search(
        original=model,
        keep=0.9,
        minimize="sparse-bytes",
        probes=("atlas", text),
        searched=150,
        first=30,
        held_out=150,
        graded=150,
        known_searched=93,
        known_held_out=92,
        known_graded=94,
        level=0.99,
        sizes=sizes,
        tried=all_tried,
        confirmed=(all_tried[2],),
        winner=replace(all_tried[2], graded=estimate(0.94)),
        closest=None,
        naive=all_tried[0],
        rounding=0.985,
        seed=0,
        versions={"compressknow": "0.1.0"},
        command=f"compressknow search {text}",
    )
