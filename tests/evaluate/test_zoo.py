"""Every masked, causal and sequence-to-sequence class of transformers scores two facts as a plain loop does: one
sentence at a time, each token by a pass over all tokens before it, without batch or cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from compressknow.base.errors import UnsupportedError
from compressknow.engine.language_model import find_family
from compressknow.evaluate.facts import BLANK, Fact
from tests.evaluate.references import (
    WORDS,
    FastTokenizer,
    encode_sentence,
    evaluate_model,
    make_probe,
    make_word_facts,
    make_word_tokenizer,
    score_masked,
)
from tests.long import one_in
from tests.model.test_zoo import BEFORE_5_20, BUILT_SINCE_5_20, NOT_BUILT, ZOO
from tests.zoo import tiny_model

CLASSES = {name: model_type for model_type, name in reversed(ZOO)}
# Classes that do not read text alone, with the error that they give.
REFUSED = {
    "MusicgenForCausalLM": "fails on the first prompts",  # four streams of audio codes
    "MusicgenMelodyForCausalLM": "fails on the first prompts",
    "VoxtralRealtimeForConditionalGeneration": "fails on the first prompts",  # audio with every token
}
# Classes that need the timm package, or the states of another model.
NOT_TINY = NOT_BUILT | {"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"}
# Classes that older releases do not build from settings as small as those of the zoo.
TINY_LATER = BUILT_SINCE_5_20 | {"BltForCausalLM", "CohereCompassForCausalLM", "DbrxForCausalLM"}


def make_two_facts(*, closed: bool = True) -> tuple[Fact, Fact]:
    """Make facts of equal length, for one batch; candidates have one to three tokens, and one begins another."""
    first = make_word_facts()[0]
    assert first.candidates is not None
    short, middle, long = first.candidates[:3]
    first = replace(first, candidates=(short, middle, long, f"{short} w9"), obj_label=long)
    facts = first, replace(first, id="g", prompt=first.prompt.replace(WORDS[10], WORDS[40]), obj_label=middle)
    return facts if closed else tuple(replace(fact, candidates=None) for fact in facts)  # type: ignore[return-value]


def score_plainly(model: PreTrainedModel, tokenizer: FastTokenizer, family: str, fact: Fact, text: str) -> float:
    """Return the log-probability of the text and what follows it, one token at a time."""
    if family == "masked":
        return score_masked(model, tokenizer, fact, text)
    before, _, after = fact.prompt.partition(BLANK)
    ids, positions = encode_sentence(tokenizer, before, text, after)
    # The end of the text is not scored.
    ids = ids[:-1]
    if family == "causal":
        return sum(compute_next_log_prob(model, ids[:end], ids[end]) for end in range(positions[0], len(ids)))
    start = getattr(model.config, "decoder_start_token_id", None)
    decoder = [model.config.decoder.bos_token_id if start is None else start, *ids[: positions[0]]]
    prompt = tokenizer(fact.prompt.replace(BLANK, tokenizer.mask_token))["input_ids"]
    rest = ids[positions[0] :]
    return sum(
        compute_next_log_prob(model, prompt, token, decoder_input_ids=torch.tensor([decoder + rest[:number]]))
        for number, token in enumerate(rest)
    )


def compute_next_log_prob(model: PreTrainedModel, ids: list[int], token: int, **decoder: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, **decoder).logits
    return float(logits[0, -1].double().log_softmax(-1)[token])


@contextmanager
def silence() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("name", one_in(6, sorted(CLASSES.keys() - NOT_TINY)))
def test_a_class_scores_two_facts_as_a_plain_loop_does(name: str) -> None:
    if BEFORE_5_20 and name in TINY_LATER:
        pytest.skip(f"transformers {transformers.__version__} builds no tiny {name}")
    with silence():
        model = tiny_model(CLASSES[name], name, noise=0.1)
        tokenizer, family = make_word_tokenizer(), find_family(model)
        assert family is not None
        if name in REFUSED:
            with pytest.raises(UnsupportedError, match=REFUSED[name]):
                evaluate_model(model, tokenizer, family, make_probe(make_two_facts()))
            return
        answers = evaluate_model(model, tokenizer, family, make_probe(make_two_facts()))
        for fact in make_two_facts():
            assert fact.candidates is not None
            scores = np.array([score_plainly(model, tokenizer, family, fact, text) for text in fact.candidates])
            assert np.isfinite(scores).all()
            answer, order = answers[fact.id], np.argsort(-scores)
            assert answer.top5_logp == pytest.approx(scores[order], abs=1e-3)
            assert answer.logp_gold == pytest.approx(scores[fact.candidates.index(fact.obj_label)], abs=1e-3)
        if family != "masked":
            assert len(evaluate_model(model, tokenizer, family, make_probe(make_two_facts(closed=False)))) == 2


@pytest.mark.skipif(BEFORE_5_20, reason="the classes are those of newer releases")
def test_nearly_every_class_is_built_and_evaluated() -> None:
    assert len(NOT_TINY | REFUSED.keys()) <= 0.03 * len(CLASSES)
    assert NOT_TINY | REFUSED.keys() <= CLASSES.keys()


def test_a_masked_model_saved_as_a_causal_one_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    probe = make_probe(make_two_facts())
    with silence(), pytest.raises(UnsupportedError, match="sees the tokens that it is to predict") as refused:
        evaluate_model(transformers.BertLMHeadModel(config).eval(), make_word_tokenizer(), "causal", probe)
    assert "is_decoder" in str(refused.value)


def test_a_model_without_a_first_token_of_the_decoder_is_refused() -> None:
    model = tiny_model("bart", "BartForConditionalGeneration", noise=0.1)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(UnsupportedError, match="names no token that its decoder begins with"):
        evaluate_model(model, make_word_tokenizer(), "seq2seq", make_probe(make_two_facts()))
