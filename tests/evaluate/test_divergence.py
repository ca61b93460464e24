"""KL divergences out of stored answers, against those of the whole vocabulary by torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from compressknow.comparison.paired import compare_probe
from compressknow.comparison.records import KlFigures
from compressknow.evaluate.records import ProbeEntry
from tests.evaluate.references import evaluate_model, make_probe, make_word_facts, make_word_tokenizer
from tests.models import tiny


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return other


def large_vocabulary() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=40)
    return shaken(GPT2LMHeadModel(config).eval())


def movement(before: PreTrainedModel, after: PreTrainedModel) -> tuple[KlFigures, float]:
    """That of the answers to two facts, and the mean divergence over the whole vocabulary by torch."""
    tokenizer, facts = make_word_tokenizer("<s> $A"), make_word_facts()[:2]
    originals = evaluate_model(before, tokenizer, "causal", make_probe(facts))
    reference = {name: answer.first_ids for name, answer in originals.items()}
    others = evaluate_model(after, tokenizer, "causal", make_probe(facts), reference=reference)
    whole = []
    for fact in facts:
        ids = torch.tensor([tokenizer(fact.before)["input_ids"]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, -1].double().log_softmax(-1) for model in (before, after))
        whole.append(float(functional.kl_div(q, p, log_target=True, reduction="sum")))
    entry = ProbeEntry(protocol="p/1", fingerprint="f", facts=1, asked=1, reference="a")
    figures = compare_probe(list(originals.values()), list(others.values()), entry, entry, probe="atlas", ran_in="")
    assert figures.movement is not None
    return figures.movement, float(np.mean(whole))


def test_of_a_small_vocabulary_the_divergence_is_that_of_all_its_tokens() -> None:
    before = tiny("llama")
    found, whole = movement(before, shaken(before))
    assert found.kl_mean == pytest.approx(whole, abs=1e-5)
    assert found.rest is None
    assert not found.is_lower_bound
    assert whole > 0.01


def test_of_a_large_vocabulary_it_is_a_lower_bound_and_says_so() -> None:
    before = large_vocabulary()
    found, whole = movement(before, shaken(before))
    assert 0 < found.kl_mean < whole - 1e-4
    assert found.is_lower_bound
    assert found.rest is not None
    assert all(0.01 < share < 1 - 256 / 600 + 0.01 for share in found.rest)
