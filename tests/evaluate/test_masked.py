"""Masked models: the answers equal those of a plain reference, in any batch, for many architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf

from compressknow.base.errors import CheckpointError, UnsupportedError
from compressknow.engine.language_model import LanguageModel, load_language_model
from compressknow.evaluate.evaluate import Prompts
from compressknow.evaluate.facts import BLANK, Fact
from compressknow.evaluate.scoring.families import MaskedScorer, make_scorer
from compressknow.evaluate.scoring.scorer import NOT_IN_VOCABULARY, SECOND_BLANK, SEVERAL_TOKENS, UNKNOWN_TOKEN
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
    score_masked,
)
from tests.knowing import save_trained
from tests.long import one_in
from tests.models import tiny

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
MORE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_SMALL, embedding_size=16)),
    "deberta-v2": lambda: hf.DebertaV2ForMaskedLM(
        hf.DebertaV2Config(**_SMALL, relative_attention=True, pos_att_type="p2c|c2p", position_biased_input=False)
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**_SMALL, local_attention=4, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=2)
    ),
    "xlm-roberta": lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**_SMALL)),
    "mpnet": lambda: hf.MPNetForMaskedLM(hf.MPNetConfig(**_SMALL)),
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained("bert", tmp_path_factory.mktemp("bert")))


def compute_mask_log_probs(lm: LanguageModel, fact: Fact) -> np.ndarray:
    """Return log-probabilities of the whole vocabulary at the blank, by the whole model."""
    ids = lm.tokenizer(fact.prompt.replace(BLANK, lm.tokenizer.mask_token))["input_ids"]
    return compute_log_probs(lm.model, ids)[ids.index(lm.tokenizer.mask_token_id)].numpy()


@pytest.mark.parametrize("vocabulary", ["full", "open"])
def test_without_candidates_the_answer_is_one_token_of_the_vocabulary(lm: LanguageModel, vocabulary: str) -> None:
    facts = [replace(fact, popularity=n + 1.0) for n, fact in enumerate(make_known_facts(closed=False))]
    probe = make_probe([*facts, replace(facts[0], id="unknown", obj_label="Zorro")], vocabulary=vocabulary)
    answers = evaluate_lm(lm, probe)
    one_word = [fact for fact in facts if " " not in fact.obj_label]
    assert answers.keys() == {fact.id for fact in one_word}
    assert Prompts(make_scorer(lm.model, lm.tokenizer, "masked", probe)).dropped == {
        SEVERAL_TOKENS: len(facts) - len(one_word),
        UNKNOWN_TOKEN: 1,
    }
    tokens = [lm.tokenizer.decode([number], skip_special_tokens=True) for number in range(len(lm.tokenizer))]
    for fact in one_word:
        gold = lm.tokenizer.convert_tokens_to_ids(fact.obj_label)
        check_answer(answers[fact.id], fact, tokens, compute_mask_log_probs(lm, fact), gold)
        assert answers[fact.id].popularity == fact.popularity


def test_unanswerable_objects_that_are_kept_are_wrong_and_have_no_rank(lm: LanguageModel) -> None:
    facts = make_known_facts(closed=False)
    answers = evaluate_lm(lm, make_probe(facts, vocabulary="full", keep_unanswerable=True))
    assert len(answers) == len(facts)
    for fact in facts:
        if " " in fact.obj_label:
            answer = answers[fact.id]
            assert (answer.correct, answer.rank, answer.logp_gold) == (False, None, None)
            assert answer.top5_logp == pytest.approx(np.sort(compute_mask_log_probs(lm, fact))[::-1][:5], abs=CLOSE)


def test_only_words_of_the_given_vocabulary_are_answered(lm: LanguageModel) -> None:
    facts = make_known_facts(closed=False)
    # Only some objects; one word is unknown to the model, one has two tokens, one is there twice.
    words = ("Velin", "forest", "marsh", "river", "desert", "Avish", "honey", "snails", "forest", "New Alba", "Zorro")
    probe = make_probe(facts, vocabulary="words", words=words)
    answers = evaluate_lm(lm, probe)
    answerable = [fact for fact in facts if fact.obj_label in words and " " not in fact.obj_label]
    assert answers.keys() == {fact.id for fact in answerable}
    dropped = Prompts(make_scorer(lm.model, lm.tokenizer, "masked", probe)).dropped
    assert dropped == {NOT_IN_VOCABULARY: len(facts) - len(answerable)}
    ids = sorted(lm.tokenizer.convert_tokens_to_ids(list(words[:8])))
    texts = lm.tokenizer.convert_ids_to_tokens(ids)
    for fact in answerable:
        check_answer(answers[fact.id], fact, texts, compute_mask_log_probs(lm, fact)[ids], texts.index(fact.obj_label))


@pytest.mark.parametrize("vocabulary", ["full", "words"])
def test_with_fold_case_the_case_of_an_object_does_not_matter(lm: LanguageModel, vocabulary: str) -> None:
    lower = [fact for fact in make_known_facts(closed=False) if " " not in fact.obj_label]
    words = tuple(fact.obj_label for fact in lower[::2])
    upper = [replace(fact, obj_label=fact.obj_label.upper()) for fact in lower]
    settings = {"vocabulary": vocabulary, "words": words if vocabulary == "words" else ()}
    folded = evaluate_lm(lm, make_probe(upper, **settings, fold_case=True))
    strict = evaluate_lm(lm, make_probe(lower, **settings))
    assert evaluate_lm(lm, make_probe(upper, **settings)) == {}
    assert folded.keys() == strict.keys()
    for fact_id, answer in folded.items():
        other = strict[fact_id]
        assert (answer.rank, answer.correct, answer.predicted) == (other.rank, other.correct, other.predicted)
        assert answer.logp_gold == pytest.approx(other.logp_gold, abs=1e-6)


@pytest.mark.parametrize("name", one_in(2, ["bert", "roberta", "distilbert", "albert", *MORE]))
def test_every_architecture_agrees_with_the_plain_reference(name: str) -> None:
    torch.manual_seed(1)
    model = MORE[name]().eval() if name in MORE else tiny(name)
    with torch.no_grad():
        for parameter in model.parameters() if name in MORE else ():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tokenizer, facts = make_word_tokenizer(), make_word_facts()
    answers = evaluate_model(model, tokenizer, "masked", make_probe(facts), batch_size=2)
    check_choices(answers, facts, lambda fact, text: score_masked(model, tokenizer, fact, text))
    backwards = evaluate_model(model, tokenizer, "masked", make_probe(reversed(facts)), batch_size=64)
    check_same(backwards, answers)


class _MixingHead(torch.nn.Module):
    """A head that mixes all positions."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden + hidden.mean(1, keepdim=True))


def test_a_head_that_mixes_positions_sees_them_all() -> None:
    model = copy.deepcopy(tiny("bert"))
    model.cls = _MixingHead(model.cls)
    tokenizer, facts = make_word_tokenizer(), make_word_facts()
    scorer = make_scorer(model, tokenizer, "masked", make_probe(facts))
    assert isinstance(scorer, MaskedScorer)
    ids, positions = torch.tensor([[5, 6, tokenizer.mask_token_id, 7]]), torch.tensor([2])
    assert not scorer._test_head(ids, positions)
    answers = evaluate_model(model, tokenizer, "masked", make_probe(facts))
    check_choices(answers, facts, lambda fact, text: score_masked(model, tokenizer, fact, text))


def test_a_tokenizer_without_special_tokens_works_too() -> None:
    model, tokenizer, facts = tiny("bert"), make_word_tokenizer("$A"), make_word_facts()
    answers = evaluate_model(model, tokenizer, "masked", make_probe(facts))
    check_choices(answers, facts, lambda fact, text: score_masked(model, tokenizer, fact, text))


def test_a_tokenizer_without_a_mask_or_of_another_model_is_refused() -> None:
    tokenizer = make_word_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(UnsupportedError, match="mask"):
        make_scorer(tiny("bert"), tokenizer, "masked", make_probe(make_word_facts()))
    larger = make_word_tokenizer()
    larger.add_tokens(["more"])
    with pytest.raises(CheckpointError, match="100 tokens"):
        make_scorer(tiny("bert"), larger, "masked", make_probe(make_word_facts()))


@pytest.mark.parametrize(
    ("family", "name", "token"),
    [("masked", "bert", "<mask>"), ("seq2seq", "bart", "<mask>"), ("seq2seq", "t5-gated", "<extra_id_0>")],
)
def test_a_fact_that_contains_the_token_of_the_blank_is_dropped(family: str, name: str, token: str) -> None:
    first, *others = make_word_facts()
    facts = [replace(first, prompt=f"w1 {token} is {BLANK}."), *others]
    scorer = make_scorer(tiny(name), make_word_tokenizer(sentinels=name == "t5-gated"), family, make_probe(facts))
    prompts = Prompts(scorer)
    assert (prompts.total, prompts.dropped) == (len(others), {SECOND_BLANK: 1})


def test_a_tokenizer_that_makes_several_tokens_of_its_mask_is_refused() -> None:
    tokenizer = make_word_tokenizer()
    tokenizer.mask_token = "w1 w1"
    with pytest.raises(CheckpointError, match="mask tokens of"):
        evaluate_model(tiny("bert"), tokenizer, "masked", make_probe(make_word_facts()))
