"""KL divergences from stored answers, against those over the whole vocabulary by torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from compressknow.comparison.records import KlFigures
from compressknow.evaluate.records import ProbeEntry
from tests.evaluate.references import evaluate_model, make_probe, make_word_facts, make_word_tokenizer
from tests.models import tiny
from tests.pages.answering import compare_rows


def perturb(model: PreTrainedModel) -> PreTrainedModel:
    perturbed = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in perturbed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return perturbed


def measure_movement(before: PreTrainedModel, after: PreTrainedModel) -> tuple[KlFigures, float]:
    """Return the movement of the answers to two facts, and their mean divergence over the whole vocabulary by torch."""
    tokenizer, facts = make_word_tokenizer("<s> $A"), make_word_facts()[:2]
    originals = evaluate_model(before, tokenizer, "causal", make_probe(facts))
    reference = {name: answer.first_ids for name, answer in originals.items()}
    others = evaluate_model(after, tokenizer, "causal", make_probe(facts), reference=reference)
    divergences = []
    for fact in facts:
        ids = torch.tensor([tokenizer(fact.before)["input_ids"]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, -1].double().log_softmax(-1) for model in (before, after))
        divergences.append(float(functional.kl_div(q, p, log_target=True, reduction="sum")))
    entry = ProbeEntry(protocol="p/1", fingerprint="f", facts=1, asked=1, reference="a")
    figures = compare_rows(list(originals.values()), list(others.values()), entry)
    assert figures.movement is not None
    return figures.movement, float(np.mean(divergences))


def test_the_divergence_of_a_small_vocabulary_is_exact() -> None:
    before = tiny("llama")
    movement, exact = measure_movement(before, perturb(before))
    assert movement.kl_mean == pytest.approx(exact, abs=1e-5)
    assert movement.rest is None
    assert not movement.is_lower_bound
    assert exact > 0.01


def test_the_divergence_of_a_large_vocabulary_is_a_lower_bound() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=40)
    before = perturb(GPT2LMHeadModel(config).eval())
    movement, exact = measure_movement(before, perturb(before))
    assert 0 < movement.kl_mean < exact - 1e-4
    assert movement.is_lower_bound
    assert movement.rest is not None
    assert all(0.01 < share < 1 - 256 / 600 + 0.01 for share in movement.rest)
