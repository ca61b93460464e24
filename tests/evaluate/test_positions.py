"""How long a prompt may be, by architecture; longer facts are dropped and counted, not cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LEDConfig, LEDForConditionalGeneration

from compressknow.engine.language_model import count_positions, load_language_model
from compressknow.evaluate.evaluate import Prompts, evaluate
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import TOO_LONG, Query
from tests.evaluate.layouts import read_facts_file
from tests.knowing import save_trained, write_facts
from tests.models import tiny


class Unlimited:
    model_max_length = 10**30


class Short:
    model_max_length = 12


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("bert", 40), ("roberta", 38), ("gpt2", 40), ("opt", 40), ("llama", 64), ("bart", 40), ("t5-gated", None)],
)
def test_a_model_reads_as_many_tokens_as_it_has_positions(name: str, tokens: int | None) -> None:
    assert count_positions(tiny(name), Unlimited()) == tokens


def test_the_side_with_fewer_positions_limits_both() -> None:
    config = LEDConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        attention_window=8,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=24,
    )
    assert count_positions(LEDForConditionalGeneration(config), Unlimited()) == 24


@pytest.mark.parametrize("name", ["bert", "t5-gated"])
def test_a_tokenizer_may_allow_fewer_tokens(name: str) -> None:
    assert count_positions(tiny(name), Short()) == 12


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_prompt_that_is_too_long_is_dropped_and_counted(family: str, tmp_path: Path) -> None:
    lm = load_language_model(save_trained(family, tmp_path / "model"))
    probe = read_facts_file(write_facts(tmp_path / "facts.jsonl"))
    long = replace(probe.facts[0], id="long", prompt="The capital " * 60 + probe.facts[0].prompt)
    fits = replace(probe.facts[0], id="fits", prompt="The capital " * 20 + probe.facts[0].prompt)
    prompts = Prompts(make_scorer(lm.model, lm.tokenizer, lm.family, replace(probe, facts=(long, fits))))
    assert prompts.dropped == {TOO_LONG: 1}
    assert [answer.fact_id for batch in evaluate(prompts) for answer in batch] == ["fits"]
    # The longest answers fit too, and four tokens more if a model writes them freely.
    fact = probe.facts[0]
    open_fact = replace(fact, candidates=None)
    for each, tokens in ((fact, 2), *([(open_fact, 2 + 4)] if family == "llama" else [])):
        scorer = make_scorer(lm.model, lm.tokenizer, lm.family, replace(probe, facts=(each,), vocabulary="open"))
        queries = (scorer.make_query(replace(each, prompt="The " * words + each.prompt)) for words in range(64))
        assert max(len(query.prompt) for query in queries if isinstance(query, Query)) == 64 - tokens
