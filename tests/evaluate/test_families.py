"""What holds of models of all families: the answers equal those of a plain reference, whatever the batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from compressknow.engine.language_model import LanguageModel, load_language_model
from tests.evaluate.references import (
    CLOSE,
    answers_to,
    as_probe,
    asked,
    causal,
    check_choices,
    check_same,
    filled,
    known_facts,
    masked,
)
from tests.evaluate.test_causal import next_token
from tests.evaluate.test_masked import at_the_mask
from tests.evaluate.test_seq2seq import after_the_sentinel
from tests.knowing import save_trained

# By family: a model, the score of a text as an answer, the distribution where an answer begins, and a layer to break.
FAMILIES = {
    "masked": ("bert", masked, at_the_mask, "bert.encoder.layer.0.intermediate.dense"),
    "causal": ("llama", causal, next_token, "model.layers.0.mlp.up_proj"),
    "seq2seq": ("t5", filled, after_the_sentinel, "decoder.block.0.layer.2.DenseReluDense.wo"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def knows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained(FAMILIES[request.param][0], tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def closed(knows: LanguageModel) -> dict:
    return asked(knows, as_probe(known_facts()))


def test_candidates_are_ranked_as_a_plain_reference_ranks_them(knows: LanguageModel, closed: dict) -> None:
    _, score, *_ = FAMILIES[knows.family]
    check_choices(closed, known_facts(), lambda fact, text: score(knows.model, knows.tokenizer, fact, text))
    assert all(answer.correct for answer in closed.values())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_do_not_depend_on_batch_size_and_order(knows: LanguageModel, closed: dict, batch_size: int) -> None:
    backwards = as_probe(reversed(known_facts()))
    check_same(asked(knows, backwards, batch_size=batch_size), closed)


def test_the_distribution_kept_is_the_reference_s(knows: LanguageModel, closed: dict) -> None:
    _, _, distribution, _ = FAMILIES[knows.family]
    for fact in known_facts():
        expected, answer = distribution(knows, fact), closed[fact.id]
        assert len(answer.first_ids) == min(256, len(expected) - 1)
        assert answer.first_logp == pytest.approx(expected[answer.first_ids], abs=CLOSE)
        assert np.exp(answer.first_logp.astype(float)).sum() <= 1 + 1e-6
        assert expected[answer.first_ids].min() >= np.delete(expected, answer.first_ids).max() - 1e-6


def test_a_reference_s_tokens_are_asked_for_and_come_back(knows: LanguageModel, closed: dict) -> None:
    wanted = {fact_id: answer.first_ids[::-1][:17] for fact_id, answer in closed.items()}
    for fact_id, answer in asked(knows, as_probe(known_facts()), reference=wanted).items():
        assert list(answer.first_ids) == list(wanted[fact_id])
        assert answer.first_logp == pytest.approx(closed[fact_id].first_logp[::-1][:17], abs=1e-6)


@pytest.mark.parametrize("vocabulary", ["closed", "full", "open"])
def test_a_model_that_computes_no_numbers_knows_nothing(knows: LanguageModel, vocabulary: str) -> None:
    broken = copy.deepcopy(knows.model)
    with torch.no_grad():
        broken.get_submodule(FAMILIES[knows.family][-1]).weight.fill_(float("nan"))
    probe = as_probe(known_facts(closed=vocabulary == "closed"), vocabulary=vocabulary)
    answers = answers_to(broken, knows.tokenizer, knows.family, probe)
    assert answers
    assert all(not answer.correct and answer.rank is None for answer in answers.values())
