"""Searches made by hand."""

from __future__ import annotations

from dataclasses import replace

from compressknow.comparison.records import Estimate
from compressknow.pages.card.make import read_model_facts
from compressknow.pages.search import Search, Trial
from tests.pages.answering import make_model


def make_estimate(value: float) -> Estimate:
    return Estimate(value, max(0.0, value - 0.04), min(1.0, value + 0.04))


def make_trial(setup: str, size: int, kept: float, held_out: float | None = None) -> Trial:
    confirmed = None if held_out is None else make_estimate(held_out)
    return Trial(setup, {"blk.0.attn_q.weight": setup}, size, 1e6 / size, make_estimate(kept), confirmed)


def make_types(text: str) -> dict[str, str]:
    """Return types of two layers in the order of a GGUF file, and of a tensor outside any layer."""
    return {
        text: "f16",
        "blk.0.ffn_up.weight": "q6_k",
        "blk.0.attn_q.weight": "iq4_nl",
        f"blk.1.attn_{text}.weight": "q2_k",
        "blk.1.attn_q.weight": "q8_0",
    }


def make_search(text: str = "a-model") -> Search:
    trials = (
        make_trial("100 % q8_0", 80_000_000, 0.97),
        make_trial(f"60.0 % q5_k, 40.0 % q4_k {text}", 65_000_000, 0.965),
        replace(make_trial("60.0 % q4_k, 30.0 % q3_k, 10.0 % q6_k", 60_000_000, 0.96, 0.95), types=make_types(text)),
        make_trial("100 % q2_k", 30_000_000, 0.1),
    )
    facts = {"sha256": "0" * 64, "architecture": "LlamaForCausalLM", "family": "causal", "parameters": 50_000_000}
    model = make_model(name=text, revision=None, bytes=100_000_000, dtype="BF16", **facts)
    return Search(
        original=read_model_facts(model),
        form="gguf",
        keep=0.9,
        budget=None,
        by="facts and text, rounded by GPTQ",
        probes=("atlas", text),
        searched=153,
        held_out=147,
        graded=150,
        known_searched=93,
        known_held_out=92,
        known_graded=94,
        level=1 - 0.01 / 3,
        bytes=100_000_000,
        tried=trials,
        confirmed=(trials[2],),
        winner=replace(trials[2], graded=make_estimate(0.94)),
        closest=None,
        recipe='[export]\ntype = "q4_k_s"',
        rounding=0.985,
        seed=0,
        versions={"compressknow": "0.1.0"},
        command=f"compressknow search {text}",
    )


def make_size_search() -> Search:
    """Return a search for a size, which has no trials."""
    search = make_search()
    assert search.winner is not None
    winner = replace(search.winner, kept=Estimate(None), held_out=None)
    return replace(
        search, keep=None, budget=60_000_000, tried=(), confirmed=(), held_out=0, known_held_out=0, winner=winner
    )
