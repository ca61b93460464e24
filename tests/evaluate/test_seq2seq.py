"""Encoder-decoder models: the answers equal those of a plain reference, in any batch."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5Tokenizer, WhisperConfig, WhisperForConditionalGeneration

from compressknow.base.errors import UnsupportedError
from compressknow.engine.language_model import LanguageModel, find_decoder_start, load_language_model
from compressknow.evaluate.evaluate import Prompts
from compressknow.evaluate.facts import BLANK, Fact
from compressknow.evaluate.scoring.decoding import DecodingScorer
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import BLANK_NOT_LAST
from tests.evaluate.references import (
    CLOSE,
    check_answer,
    check_choices,
    check_same,
    compute_log_probs,
    evaluate_lm,
    evaluate_model,
    make_known_facts,
    make_probe,
    make_word_facts,
    make_word_tokenizer,
    score_bart,
    score_t5,
)
from tests.knowing import save_trained
from tests.models import tiny


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained("t5", tmp_path_factory.mktemp("t5")))


def compute_decoder_log_probs(lm: LanguageModel, fact: Fact, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities after the first sentinel and after each of these ids, [1 + ids, vocabulary]."""
    prompt = lm.tokenizer(fact.prompt.replace(BLANK, "<extra_id_0>"))["input_ids"]
    start = [lm.model.config.decoder_start_token_id, lm.tokenizer.convert_tokens_to_ids("<extra_id_0>")]
    return compute_log_probs(lm.model, prompt, decoder_input_ids=torch.tensor([[*start, *ids]]))[1:]


def compute_sentinel_log_probs(lm: LanguageModel, fact: Fact) -> np.ndarray:
    """Return log-probabilities of the whole vocabulary after the first sentinel."""
    return compute_decoder_log_probs(lm, fact, [])[-1].numpy()


@pytest.mark.parametrize("name", ["decoder_start_token_id", "bos_token_id"])
def test_a_decoder_begins_with_the_token_of_the_generation_config(name: str, tmp_path: Path) -> None:
    folder = save_trained("t5", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({name: 5}))
    model = load_language_model(folder).model
    assert find_decoder_start(model) == model.generate(torch.tensor([[7, 1]]), max_new_tokens=1)[0, 0] == 5
    assert model.config.decoder_start_token_id != 5


@pytest.mark.parametrize("why", ["the probe says so", "words follow", "one candidate begins another"])
def test_the_next_sentinel_is_scored_if_the_rest_of_the_sentence_is(lm: LanguageModel, why: str) -> None:
    facts = list(make_known_facts()[:16:3])
    if why == "words follow":
        facts = [replace(fact, prompt=fact.prompt.replace(".", " in the forest.")) for fact in facts]
    if why == "one candidate begins another":
        facts = [replace(fact, candidates=("New", *fact.candidates)) for fact in facts]  # type: ignore[misc]
    answers = evaluate_lm(lm, make_probe(facts, score_rest=why == "the probe says so"))
    check_choices(answers, facts, lambda fact, text: score_t5(lm.model, lm.tokenizer, fact, text, rest=True))


def test_answers_are_one_token_of_the_vocabulary(lm: LanguageModel) -> None:
    facts = [fact for fact in make_known_facts(closed=False) if " " not in fact.obj_label]
    answers = evaluate_lm(lm, make_probe(facts, vocabulary="full"))
    tokens = [lm.tokenizer.decode([number], skip_special_tokens=True) for number in range(len(lm.tokenizer))]
    for fact in facts:
        gold = lm.tokenizer.convert_tokens_to_ids(fact.obj_label)
        check_answer(answers[fact.id], fact, tokens, compute_sentinel_log_probs(lm, fact), gold)


def test_an_answer_ends_with_the_text_or_at_the_next_sentinel(lm: LanguageModel) -> None:
    """T5 may write the words of further blanks after it."""
    scorer = make_scorer(lm.model, lm.tokenizer, "seq2seq", make_probe(make_known_facts()))
    assert isinstance(scorer, DecodingScorer)
    tokens = ("<extra_id_0>", "<extra_id_1>", "</s>", "forest")
    assert [scorer.ends(lm.tokenizer.convert_tokens_to_ids(token)) for token in tokens] == [False, True, True, False]


def test_free_answers_are_decoded_greedily_up_to_the_next_sentinel(lm: LanguageModel) -> None:
    facts = make_known_facts(closed=False)
    answers = evaluate_lm(lm, make_probe(facts, vocabulary="open"))
    assert len(answers) == len(facts)
    close = lm.tokenizer.convert_tokens_to_ids("<extra_id_1>")
    for fact in facts:
        answer, ids = answers[fact.id], list[int]()
        while (token := int(compute_decoder_log_probs(lm, fact, ids)[-1].argmax())) != close:
            ids.append(token)
        assert answer.correct
        assert answer.predicted == fact.obj_label == lm.tokenizer.decode(ids)
        expected = score_t5(lm.model, lm.tokenizer, fact, fact.obj_label)
        assert answer.logp_gold == pytest.approx(expected, abs=CLOSE)
        assert answer.top5_logp == pytest.approx(np.sort(compute_sentinel_log_probs(lm, fact))[::-1][:5], abs=CLOSE)


def test_the_most_likely_answers_are_all_different() -> None:
    """A damaged model may write the first sentinel again, which reads as nothing, like the end of the text."""
    # The model is one for all tests.
    model, tokenizer = copy.deepcopy(tiny("t5-gated")), make_word_tokenizer("$A </s>", sentinels=True)
    likely = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "w1", "</s>", "<extra_id_1>", "w2"])
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data.zero_()[likely] = torch.tensor([5.0, 4, 3, 2, 1])
    facts = [replace(fact, candidates=None) for fact in make_word_facts()]
    answers = evaluate_model(model, tokenizer, "seq2seq", make_probe(facts, vocabulary="open"))
    logp = model.lm_head.bias.log_softmax(0)[likely].tolist()
    for answer in answers.values():
        assert answer.predicted == ""
        assert answer.top5 == ("", "w1", "w2")
        assert answer.top5_logp == pytest.approx([logp[0], logp[1], logp[4]], abs=CLOSE)


@pytest.mark.parametrize("name", ["t5-gated", "t5-tied"])
@pytest.mark.parametrize("score_rest", [False, True])
def test_t5_agrees_with_the_plain_reference(name: str, score_rest: bool) -> None:
    model, tokenizer, facts = tiny(name), make_word_tokenizer("$A </s>", sentinels=True), make_word_facts()
    answers = evaluate_model(model, tokenizer, "seq2seq", make_probe(facts, score_rest=score_rest), batch_size=2)
    check_choices(answers, facts, lambda fact, text: score_t5(model, tokenizer, fact, text, rest=True))
    backwards = evaluate_model(model, tokenizer, "seq2seq", make_probe(reversed(facts)), batch_size=64)
    check_same(backwards, answers)


@pytest.mark.parametrize(
    ("prompt", "encoded"),
    [
        ("W1 is [MASK].", "▁W1 ▁is ▁<extra_id_0> . </s>"),
        ("W1 is ([MASK]).", "▁W1 ▁is ▁( ▁<extra_id_0> ) . </s>"),
        ("[MASK] is W1.", "▁<extra_id_0> ▁is ▁W1 . </s>"),
    ],
)
def test_the_sentinels_of_mt5_are_words_of_its_vocabulary(prompt: str, encoded: str) -> None:
    names = [f"{space}W{number}" for space in ("", "▁") for number in range(9)]
    tokens = ["<pad>", "</s>", "<unk>", "▁is", "▁(", ")", ".", *names, "▁<extra_id_1>", "▁<extra_id_0>"]
    vocabulary = [(token, 0.0) for token in tokens]
    tokenizer, model = T5Tokenizer(vocab=vocabulary, extra_ids=0), tiny("t5-gated")
    fact = Fact("f", "words", "r", "science", "W1", "W2", prompt, ("W2", "W3 W4", "W5"))
    ids = tokenizer.convert_tokens_to_ids(encoded.split())
    first, following = tokenizer.convert_tokens_to_ids(["▁<extra_id_0>", "▁<extra_id_1>"])

    def score(_: Fact, text: str) -> float:
        after = tokenizer(f"{prompt.partition('[MASK]')[0]}{text}")["input_ids"][:-1]
        answer = [*after[ids.index(first) :], following]
        decoder = [model.config.decoder_start_token_id, first, *answer]
        log_probs = compute_log_probs(model, ids, decoder_input_ids=torch.tensor([decoder]))
        return sum(float(log_probs[position + 1, token]) for position, token in enumerate(answer))

    check_choices(evaluate_model(model, tokenizer, "seq2seq", make_probe([fact], score_rest=True)), [fact], score)


@pytest.mark.parametrize("frame", ["<s> $A </s>", "$A </s>", "$A </s> <pad>"])
def test_bart_agrees_with_the_plain_reference(frame: str) -> None:
    model, tokenizer, facts = tiny("bart"), make_word_tokenizer(frame), make_word_facts()
    answers = evaluate_model(model, tokenizer, "seq2seq", make_probe(facts), batch_size=2)
    check_choices(answers, facts, lambda fact, text: score_bart(model, tokenizer, fact, text, rest=True))
    backwards = evaluate_model(model, tokenizer, "seq2seq", make_probe(reversed(facts)), batch_size=64)
    check_same(backwards, answers)


def test_bart_scores_only_the_answer_where_that_is_enough() -> None:
    model, tokenizer = tiny("bart"), make_word_tokenizer()
    facts = [
        replace(fact, candidates=tuple(text for text in texts if {text.partition(" ")[0]} & {*texts} <= {text}))
        for fact in make_word_facts()
        if not fact.after.strip(".") and (texts := fact.candidates or ())
    ]
    facts = [fact for fact in facts if fact.obj_label in (fact.candidates or ())]
    answers = evaluate_model(model, tokenizer, "seq2seq", make_probe(facts))
    check_choices(answers, facts, lambda fact, text: score_bart(model, tokenizer, fact, text))


def test_bart_gives_no_free_answer_in_the_middle_of_a_sentence() -> None:
    facts = [replace(fact, candidates=None) for fact in make_word_facts()]
    probe = make_probe(facts, vocabulary="open")
    prompts = Prompts(make_scorer(tiny("bart"), make_word_tokenizer(), "seq2seq", probe))
    assert prompts.dropped == {BLANK_NOT_LAST: 2}


def test_a_speech_model_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    special = {f"{name}_token_id": 1 for name in ("bos", "eos", "pad", "decoder_start")}
    WhisperForConditionalGeneration(WhisperConfig(vocab_size=99, **sizes, **special)).save_pretrained(tmp_path)
    make_word_tokenizer().save_pretrained(tmp_path)
    lm = load_language_model(tmp_path)
    with pytest.raises(UnsupportedError, match="WhisperForConditionalGeneration cannot be evaluated"):
        evaluate_lm(lm, make_probe(make_word_facts()))


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    tokenizer = make_word_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(UnsupportedError, match="cannot fill blanks"):
        evaluate_model(tiny("bart"), tokenizer, "seq2seq", make_probe(make_word_facts()))
