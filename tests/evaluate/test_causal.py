"""Causal models: the answers equal those of a plain reference without cache, in any batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers.normalizers import NFD, Sequence, StripAccents

from compressknow.engine.language_model import LanguageModel, load_language_model
from compressknow.evaluate.evaluate import LEAST, Prompts, evaluate
from compressknow.evaluate.facts import Fact
from compressknow.evaluate.scoring.decoding import DecodingScorer
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import BLANK_NOT_LAST, NO_BEGINNING, SEVERAL_TOKENS, Query
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
    score_causal,
)
from tests.knowing import save_trained
from tests.long import one_in
from tests.models import tiny

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
# Windows shorter than the prompts, so that the cache drops their beginnings.
_WINDOW = {"sliding_window": 3}
_MAMBA = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
MORE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SMALL, **_WINDOW)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SMALL, **_WINDOW, head_dim=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_SMALL, **_WINDOW, head_dim=8, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SMALL)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**_MAMBA, state_size=4)),
}
WITHOUT_CACHE = ("mamba",)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained("llama", tmp_path_factory.mktemp("llama")))


def compute_next_log_probs(lm: LanguageModel, fact: Fact) -> np.ndarray:
    """Return log-probabilities of the whole vocabulary after the prompt, by the whole model."""
    return compute_log_probs(lm.model, lm.tokenizer(fact.before)["input_ids"])[-1].numpy()


def test_the_rest_of_the_sentence_is_scored_if_the_probe_says_so(lm: LanguageModel) -> None:
    facts = make_known_facts()[::3]
    answers = evaluate_lm(lm, make_probe(facts, score_rest=True))
    check_choices(answers, facts, lambda fact, text: score_causal(lm.model, lm.tokenizer, fact, text, rest=True))


def test_the_rest_of_the_sentence_is_scored_if_it_contains_words(lm: LanguageModel) -> None:
    facts = [replace(fact, prompt=fact.prompt.replace(".", " in the forest.")) for fact in make_known_facts()[::5]]
    answers = evaluate_lm(lm, make_probe(facts))
    check_choices(answers, facts, lambda fact, text: score_causal(lm.model, lm.tokenizer, fact, text, rest=True))


def test_the_rest_of_the_sentence_is_scored_if_one_candidate_begins_another(lm: LanguageModel) -> None:
    facts = [replace(fact, candidates=(*fact.candidates, "New")) for fact in make_known_facts()[:16:3]]  # type: ignore[misc]
    answers = evaluate_lm(lm, make_probe(facts))
    check_choices(answers, facts, lambda fact, text: score_causal(lm.model, lm.tokenizer, fact, text, rest=True))
    # Without the full stop, "New" would be as likely as all candidates that begin with it together.
    assert all(answer.correct for answer in answers.values())


def test_a_candidate_that_begins_another_gets_a_full_stop_if_the_prompt_has_none(lm: LanguageModel) -> None:
    facts = [replace(fact, candidates=(*fact.candidates, "New")) for fact in make_known_facts()[:16:3]]  # type: ignore[misc]
    answers = evaluate_lm(lm, make_probe([replace(fact, prompt=fact.prompt.removesuffix(".")) for fact in facts]))
    check_choices(answers, facts, lambda fact, text: score_causal(lm.model, lm.tokenizer, fact, text, rest=True))
    assert all(answer.correct and answer.grade == "produced" for answer in answers.values())


def test_answers_are_one_token_of_the_vocabulary_or_of_given_words(lm: LanguageModel) -> None:
    facts = make_known_facts(closed=False)
    one_word = [fact for fact in facts if " " not in fact.obj_label]
    full = make_probe(facts, vocabulary="full")
    answers = evaluate_lm(lm, full)
    assert answers.keys() == {fact.id for fact in one_word}
    dropped = Prompts(make_scorer(lm.model, lm.tokenizer, "causal", full)).dropped
    assert dropped == {SEVERAL_TOKENS: len(facts) - len(one_word)}
    tokens = [lm.tokenizer.decode([number], skip_special_tokens=True) for number in range(len(lm.tokenizer))]
    words = ("forest", "marsh", "Velin", "Avish", "honey", "clay")
    ids = sorted(lm.tokenizer.convert_tokens_to_ids(list(words)))
    texts = lm.tokenizer.convert_ids_to_tokens(ids)
    chosen = evaluate_lm(lm, make_probe(facts, vocabulary="words", words=words))
    assert chosen.keys() == {fact.id for fact in one_word if fact.obj_label in words}
    for fact in one_word:
        expected = compute_next_log_probs(lm, fact)
        check_answer(answers[fact.id], fact, tokens, expected, lm.tokenizer.convert_tokens_to_ids(fact.obj_label))
        if fact.id in chosen:
            check_answer(chosen[fact.id], fact, texts, expected[ids], texts.index(fact.obj_label))


def write_greedily(lm: LanguageModel, fact: Fact, tokens: int) -> str:
    """Return what the model writes after the prompt, token by token, up to the end of the sentence."""
    ids = list(lm.tokenizer(fact.before)["input_ids"])
    start = len(ids)
    while len(ids) < start + tokens:
        ids.append(int(compute_log_probs(lm.model, ids)[-1].argmax()))
    return lm.tokenizer.decode(ids[start:], skip_special_tokens=True).partition(".")[0].strip()


def test_a_right_free_answer_has_rank_1_however_it_is_spelled(lm: LanguageModel) -> None:
    facts = [replace(fact, obj_label=fact.obj_label.lower()) for fact in make_known_facts(closed=False)]
    answers = evaluate_lm(lm, make_probe(facts, vocabulary="open"))
    assert all(answer.correct and answer.rank == 1 for answer in answers.values())


def test_a_right_free_answer_counts_without_the_accents_that_the_tokenizer_drops(lm: LanguageModel) -> None:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.backend_tokenizer.normalizer = Sequence([NFD(), StripAccents()])
    facts = [fact for fact in make_known_facts(closed=False) if "e" in fact.obj_label]
    facts = [replace(fact, obj_label=fact.obj_label.replace("e", "é")) for fact in facts]
    answers = evaluate_model(lm.model, tokenizer, lm.family, make_probe(facts, vocabulary="open"))
    assert len(answers) > 5
    assert {(answer.correct, answer.rank, answer.grade) for answer in answers.values()} == {(True, 1, "produced")}


@pytest.mark.parametrize("batch_size", [1, 32])
def test_free_answers_are_decoded_greedily(lm: LanguageModel, batch_size: int) -> None:
    facts = make_known_facts(closed=False)
    answers = evaluate_lm(lm, make_probe(facts, vocabulary="open"), batch_size=batch_size)
    assert len(answers) == len(facts)
    for fact in facts[:: 1 if batch_size > 1 else 9]:
        answer, expected = answers[fact.id], compute_next_log_probs(lm, fact)
        gold = lm.tokenizer(fact.obj_label, add_special_tokens=False)["input_ids"]
        assert answer.correct
        assert answer.predicted == answer.top5[0] == write_greedily(lm, fact, len(gold) + 4) == fact.obj_label
        assert answer.rank == 1 + (expected > expected[gold[0]]).sum()
        assert answer.logp_gold == pytest.approx(score_causal(lm.model, lm.tokenizer, fact, fact.obj_label), abs=CLOSE)
        assert answer.top5_logp == pytest.approx(np.sort(expected)[::-1][:5], abs=CLOSE)
        others = np.argsort(-expected)[1:5]
        assert answer.top5[1:] == tuple(lm.tokenizer.decode([token], skip_special_tokens=True) for token in others)
        assert answer.choices is None


def test_time_left_is_estimated_before_the_first_batch_of_many_facts(lm: LanguageModel) -> None:
    known = make_known_facts()
    facts = tuple(replace(known[number % len(known)], id=str(number)) for number in range(LEAST))
    progress: list[tuple[float | None, ...]] = []
    scorer = make_scorer(lm.model, lm.tokenizer, lm.family, make_probe(facts))
    next(evaluate(Prompts(scorer), advance=lambda *done: progress.append(done)))
    start, (done, total, left) = progress
    assert start == (done, total) == (0, LEAST)
    assert left is not None
    assert left > 0


def test_a_free_answer_needs_the_blank_at_the_end_of_the_sentence(lm: LanguageModel) -> None:
    fact = replace(make_known_facts(closed=False)[0], prompt="The [MASK] lives in the forest.")
    probe = make_probe([fact], vocabulary="open")
    assert Prompts(make_scorer(lm.model, lm.tokenizer, "causal", probe)).dropped == {BLANK_NOT_LAST: 1}


@pytest.mark.parametrize(
    "name", one_in(2, ["opt", "llama", "llama-tied", "qwen3", "gpt-neox", "gpt2", "mixtral", *MORE])
)
def test_every_architecture_agrees_with_the_plain_reference(name: str) -> None:
    torch.manual_seed(1)
    model = MORE[name]().eval() if name in MORE else tiny(name)
    with torch.no_grad():
        for parameter in model.parameters() if name in MORE else ():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tokenizer = make_word_tokenizer("$A" if name in ("gpt2", "gpt-neox", "bloom") else "<s> $A")
    facts = make_word_facts()
    answers = evaluate_model(model, tokenizer, "causal", make_probe(facts), batch_size=2)
    check_choices(answers, facts, lambda fact, text: score_causal(model, tokenizer, fact, text, rest=True))
    backwards = evaluate_model(model, tokenizer, "causal", make_probe(reversed(facts)), batch_size=64)
    check_same(backwards, answers)
    scorer = make_scorer(model, tokenizer, "causal", make_probe(facts))
    assert isinstance(scorer, DecodingScorer)
    query = scorer.make_query(facts[0])
    assert isinstance(query, Query)
    with torch.inference_mode():
        _, prefix = scorer.read_first([query])
    assert (prefix.cache is None) == (name in WITHOUT_CACHE)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "mamba"])
def test_free_answers_of_many_tokens_do_not_depend_on_the_cache(name: str) -> None:
    torch.manual_seed(1)
    model = MORE[name]().eval() if name in MORE else tiny(name)
    lm = LanguageModel(model, make_word_tokenizer("<s> $A"), "causal")
    facts = [replace(fact, candidates=None) for fact in make_word_facts(first=False) if not fact.after.strip(".")]
    for fact_id, answer in evaluate_lm(lm, make_probe(facts, vocabulary="open")).items():
        fact = next(fact for fact in facts if fact.id == fact_id)
        assert answer.predicted == write_greedily(lm, fact, len(fact.obj_label.split()) + 4)


@pytest.mark.parametrize("frame", ["$A", "<s> $A", "<s> $A </s>", "$A </s>", "<s> $A <pad>", "$A </s> <pad>"])
def test_texts_begin_as_the_tokenizer_begins_them_and_are_not_closed(frame: str) -> None:
    model, tokenizer, facts = tiny("llama"), make_word_tokenizer(frame), make_word_facts()
    answers = evaluate_model(model, tokenizer, "causal", make_probe(facts))
    check_choices(answers, facts, lambda fact, text: score_causal(model, tokenizer, fact, text, rest=True))


def test_a_text_that_begins_with_the_blank_begins_with_eos_if_there_is_no_bos() -> None:
    model, tokenizer, fact = tiny("gpt2"), make_word_tokenizer("$A"), make_word_facts()[-1]
    tokenizer.bos_token = None
    answers = evaluate_model(model, tokenizer, "causal", make_probe([fact]))
    check_choices(answers, [fact], lambda fact, text: score_causal(model, tokenizer, fact, text, rest=True))
    tokenizer.eos_token = None
    others = make_word_facts()[:-1]
    prompts = Prompts(make_scorer(model, tokenizer, "causal", make_probe([*others, fact])))
    assert prompts.dropped == {NO_BEGINNING: 1}
    assert prompts.total == len(others)
