"""Encoder-decoder models: the answers equal those of a plain reference, whatever the batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5Tokenizer, WhisperConfig, WhisperForConditionalGeneration

from compressknow.base.errors import UnsupportedError
from compressknow.engine.language_model import LanguageModel, find_decoder_start, load_language_model
from compressknow.evaluate.evaluate import make_prompts
from compressknow.evaluate.facts import BLANK, Fact
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import BLANK_NOT_LAST
from tests.evaluate.references import (
    CLOSE,
    answers_to,
    as_probe,
    asked,
    check_answer,
    check_choices,
    check_same,
    filled,
    known_facts,
    log_probs,
    rewritten,
    word_facts,
    word_tokenizer,
)
from tests.knowing import save_trained
from tests.models import tiny


@pytest.fixture(scope="module")
def knows(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained("t5", tmp_path_factory.mktemp("t5")))


def decoded(knows: LanguageModel, fact: Fact, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after the first sentinel and these ids, at each, [1 + ids, vocabulary]."""
    prompt = knows.tokenizer(fact.prompt.replace(BLANK, "<extra_id_0>"))["input_ids"]
    start = [knows.model.config.decoder_start_token_id, knows.tokenizer.convert_tokens_to_ids("<extra_id_0>")]
    return log_probs(knows.model, prompt, decoder_input_ids=torch.tensor([[*start, *ids]]))[1:]


def after_the_sentinel(knows: LanguageModel, fact: Fact) -> np.ndarray:
    """Log-probabilities of the whole vocabulary after the first sentinel."""
    return decoded(knows, fact, [])[-1].numpy()


@pytest.mark.parametrize("name", ["decoder_start_token_id", "bos_token_id"])
def test_a_decoder_begins_as_generate_lets_it_whatever_config_json_says(name: str, tmp_path: Path) -> None:
    folder = save_trained("t5", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({name: 5}))
    model = load_language_model(folder).model
    assert find_decoder_start(model) == model.generate(torch.tensor([[7, 1]]), max_new_tokens=1)[0, 0] == 5
    assert model.config.decoder_start_token_id != 5


@pytest.mark.parametrize("why", ["the probe says so", "words follow", "one candidate begins another"])
def test_the_next_sentinel_counts_where_the_rest_of_the_sentence_does(knows: LanguageModel, why: str) -> None:
    facts = list(known_facts()[:16:3])
    if why == "words follow":
        facts = [replace(fact, prompt=fact.prompt.replace(".", " in the forest.")) for fact in facts]
    if why == "one candidate begins another":
        facts = [replace(fact, candidates=("New", *fact.candidates)) for fact in facts]  # type: ignore[misc]
    answers = asked(knows, as_probe(facts, score_rest=why == "the probe says so"))
    check_choices(answers, facts, lambda fact, text: filled(knows.model, knows.tokenizer, fact, text, rest=True))


def test_one_token_of_the_whole_vocabulary(knows: LanguageModel) -> None:
    facts = [fact for fact in known_facts(closed=False) if " " not in fact.obj_label]
    answers = asked(knows, as_probe(facts, vocabulary="full"))
    tokens = [knows.tokenizer.decode([number], skip_special_tokens=True) for number in range(len(knows.tokenizer))]
    for fact in facts:
        gold = knows.tokenizer.convert_tokens_to_ids(fact.obj_label)
        check_answer(answers[fact.id], fact, tokens, after_the_sentinel(knows, fact), gold)


def test_free_answers_are_decoded_greedily_up_to_the_next_sentinel(knows: LanguageModel) -> None:
    facts = known_facts(closed=False)
    answers = asked(knows, as_probe(facts, vocabulary="open"))
    assert len(answers) == len(facts)
    close = knows.tokenizer.convert_tokens_to_ids("<extra_id_1>")
    for fact in facts:
        answer, ids = answers[fact.id], list[int]()
        while (token := int(decoded(knows, fact, ids)[-1].argmax())) != close:
            ids.append(token)
        assert answer.correct
        assert answer.predicted == fact.obj_label == knows.tokenizer.decode(ids)
        expected = filled(knows.model, knows.tokenizer, fact, fact.obj_label)
        assert answer.logp_gold == pytest.approx(expected, abs=CLOSE)
        assert answer.top5_logp == pytest.approx(np.sort(after_the_sentinel(knows, fact))[::-1][:5], abs=CLOSE)


@pytest.mark.parametrize("name", ["t5-gated", "t5-tied"])
@pytest.mark.parametrize("score_rest", [False, True])
def test_t5_agrees_with_the_plain_reference(name: str, score_rest: bool) -> None:
    model, tokenizer, facts = tiny(name), word_tokenizer("$A </s>", sentinels=True), word_facts()
    answers = answers_to(model, tokenizer, "seq2seq", as_probe(facts, score_rest=score_rest), batch_size=2)
    check_choices(answers, facts, lambda fact, text: filled(model, tokenizer, fact, text, rest=True))
    backwards = answers_to(model, tokenizer, "seq2seq", as_probe(reversed(facts)), batch_size=64)
    check_same(backwards, answers)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("W1 is [MASK].", "▁W1 ▁is ▁<extra_id_0> . </s>"),
        ("W1 is ([MASK]).", "▁W1 ▁is ▁( ▁<extra_id_0> ) . </s>"),
        ("[MASK] is W1.", "▁<extra_id_0> ▁is ▁W1 . </s>"),
    ],
)
def test_the_sentinels_of_mt5_are_words_of_its_vocabulary(prompt: str, read: str) -> None:
    names = [f"{space}W{number}" for space in ("", "▁") for number in range(9)]
    tokens = ["<pad>", "</s>", "<unk>", "▁is", "▁(", ")", ".", *names, "▁<extra_id_1>", "▁<extra_id_0>"]
    vocabulary = [(token, 0.0) for token in tokens]
    tokenizer, model = T5Tokenizer(vocab=vocabulary, extra_ids=0), tiny("t5-gated")
    fact = Fact("f", "words", "r", "science", "W1", "W2", prompt, ("W2", "W3 W4", "W5"))
    ids = tokenizer.convert_tokens_to_ids(read.split())
    first, following = tokenizer.convert_tokens_to_ids(["▁<extra_id_0>", "▁<extra_id_1>"])

    def score(_: Fact, text: str) -> float:
        after = tokenizer(f"{prompt.partition('[MASK]')[0]}{text}")["input_ids"][:-1]
        answer = [*after[ids.index(first) :], following]
        decoder = [model.config.decoder_start_token_id, first, *answer]
        found = log_probs(model, ids, decoder_input_ids=torch.tensor([decoder]))
        return sum(float(found[place + 1, token]) for place, token in enumerate(answer))

    check_choices(answers_to(model, tokenizer, "seq2seq", as_probe([fact], score_rest=True)), [fact], score)


@pytest.mark.parametrize("frame", ["<s> $A </s>", "$A </s>", "$A </s> <pad>"])
def test_bart_writes_the_sentence_anew(frame: str) -> None:
    model, tokenizer, facts = tiny("bart"), word_tokenizer(frame), word_facts()
    answers = answers_to(model, tokenizer, "seq2seq", as_probe(facts), batch_size=2)
    check_choices(answers, facts, lambda fact, text: rewritten(model, tokenizer, fact, text, rest=True))
    backwards = answers_to(model, tokenizer, "seq2seq", as_probe(reversed(facts)), batch_size=64)
    check_same(backwards, answers)


def test_bart_is_asked_for_the_answer_alone_where_that_is_enough() -> None:
    model, tokenizer = tiny("bart"), word_tokenizer()
    facts = [
        replace(fact, candidates=tuple(text for text in texts if {text.partition(" ")[0]} & {*texts} <= {text}))
        for fact in word_facts()
        if not fact.after.strip(".") and (texts := fact.candidates or ())
    ]
    facts = [fact for fact in facts if fact.obj_label in (fact.candidates or ())]
    answers = answers_to(model, tokenizer, "seq2seq", as_probe(facts))
    check_choices(answers, facts, lambda fact, text: rewritten(model, tokenizer, fact, text))


def test_bart_writes_no_free_answer_into_the_middle_of_a_sentence() -> None:
    facts = [replace(fact, candidates=None) for fact in word_facts()]
    probe = as_probe(facts, vocabulary="open")
    prompts = make_prompts(make_scorer(tiny("bart"), word_tokenizer(), "seq2seq", probe))
    assert prompts.dropped == {BLANK_NOT_LAST: 2}


def test_a_model_that_hears_is_not_asked_without_its_encoder(tmp_path: Path) -> None:
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    special = {f"{name}_token_id": 1 for name in ("bos", "eos", "pad", "decoder_start")}
    WhisperForConditionalGeneration(WhisperConfig(vocab_size=99, **sizes, **special)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    hears = load_language_model(tmp_path)
    with pytest.raises(UnsupportedError, match="WhisperForConditionalGeneration cannot be evaluated"):
        asked(hears, as_probe(word_facts()))


def test_a_tokenizer_that_knows_no_blank_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(UnsupportedError, match="cannot fill blanks"):
        answers_to(tiny("bart"), tokenizer, "seq2seq", as_probe(word_facts()))
