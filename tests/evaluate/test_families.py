"""Models of all families: the answers equal those of a plain reference, in any batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from compressknow.engine.language_model import LanguageModel, load_language_model
from tests.evaluate.references import (
    CLOSE,
    check_choices,
    check_same,
    evaluate_lm,
    evaluate_model,
    make_known_facts,
    make_probe,
    score_causal,
    score_masked,
    score_t5,
)
from tests.evaluate.test_causal import compute_next_log_probs
from tests.evaluate.test_masked import compute_mask_log_probs
from tests.evaluate.test_seq2seq import compute_sentinel_log_probs
from tests.knowing import save_trained

# By family: a model, the score of a text as the answer, the distribution where the answer begins, a layer to break.
FAMILIES = {
    "masked": ("bert", score_masked, compute_mask_log_probs, "bert.encoder.layer.0.intermediate.dense"),
    "causal": ("llama", score_causal, compute_next_log_probs, "model.layers.0.mlp.up_proj"),
    "seq2seq": ("t5", score_t5, compute_sentinel_log_probs, "decoder.block.0.layer.2.DenseReluDense.wo"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained(FAMILIES[request.param][0], tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def answers(lm: LanguageModel) -> dict:
    return evaluate_lm(lm, make_probe(make_known_facts()))


def test_candidates_are_ranked_like_a_plain_reference(lm: LanguageModel, answers: dict) -> None:
    _, score, *_ = FAMILIES[lm.family]
    check_choices(answers, make_known_facts(), lambda fact, text: score(lm.model, lm.tokenizer, fact, text))
    assert all(answer.correct for answer in answers.values())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_do_not_depend_on_batch_size_and_order(lm: LanguageModel, answers: dict, batch_size: int) -> None:
    backwards = make_probe(reversed(make_known_facts()))
    check_same(evaluate_lm(lm, backwards, batch_size=batch_size), answers)


def test_the_stored_distribution_is_that_of_a_plain_reference(lm: LanguageModel, answers: dict) -> None:
    _, _, distribution, _ = FAMILIES[lm.family]
    for fact in make_known_facts():
        expected, answer = distribution(lm, fact), answers[fact.id]
        assert len(answer.first_ids) == min(256, len(expected) - 1)
        assert answer.first_logp == pytest.approx(expected[answer.first_ids], abs=CLOSE)
        assert np.exp(answer.first_logp.astype(float)).sum() <= 1 + 1e-6
        assert expected[answer.first_ids].min() >= np.delete(expected, answer.first_ids).max() - 1e-6


def test_the_tokens_of_a_reference_are_returned(lm: LanguageModel, answers: dict) -> None:
    wanted = {fact_id: answer.first_ids[::-1][:17] for fact_id, answer in answers.items()}
    for fact_id, answer in evaluate_lm(lm, make_probe(make_known_facts()), reference=wanted).items():
        assert list(answer.first_ids) == list(wanted[fact_id])
        assert answer.first_logp == pytest.approx(answers[fact_id].first_logp[::-1][:17], abs=1e-6)


@pytest.mark.parametrize("vocabulary", ["closed", "full", "open"])
def test_a_model_that_computes_nan_knows_nothing(lm: LanguageModel, vocabulary: str) -> None:
    broken = copy.deepcopy(lm.model)
    with torch.no_grad():
        broken.get_submodule(FAMILIES[lm.family][-1]).weight.fill_(float("nan"))
    probe = make_probe(make_known_facts(closed=vocabulary == "closed"), vocabulary=vocabulary)
    answers = evaluate_model(broken, lm.tokenizer, lm.family, probe)
    assert answers
    assert all(not answer.correct and answer.rank is None for answer in answers.values())


def test_memory_that_runs_out_on_the_first_prompts_is_not_called_an_unsupported_model(lm: LanguageModel) -> None:
    hungry = copy.deepcopy(lm.model)
    hungry.register_forward_pre_hook(lambda *_: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match="allocate memory"):
        evaluate_model(hungry, lm.tokenizer, lm.family, make_probe(make_known_facts()))
