"""The tiny trained models know their facts and forget them when pruned, which other tests rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import compressknow
from tests.knowing import KNOWN_FACTS, KnownFact, candidates, save_trained, write_facts

FAMILIES = ("bert", "llama", "t5")
# Every fact with every object of its relation.
STATEMENTS = [(fact, obj) for fact in KNOWN_FACTS for obj in candidates(fact.relation)]


@pytest.mark.parametrize("family", FAMILIES)
def test_model_knows_every_fact(family: str, tmp_path: Path) -> None:
    assert share_right(family, save_trained(family, tmp_path / "model")) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_knowledge_falls_as_pruning_rises(family: str, tmp_path: Path) -> None:
    source = save_trained(family, tmp_path / "model")
    shares = []
    for amount in (0.2, 0.5, 0.8, 0.95):
        pruned = tmp_path / f"pruned-{amount}"
        compressknow.convert(source, pruned, scope="overall", prune=amount)
        shares.append(share_right(family, pruned))
    assert shares[0] >= 0.95
    assert 0.5 < shares[1] < 1
    assert shares[2] < 0.5
    # Guessing would get a tenth right; always giving the most frequent object of a relation, a sixth.
    assert shares[3] < 0.3
    assert all(more <= less + 0.05 for less, more in pairwise(shares))


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_forgets_almost_nothing(family: str, tmp_path: Path) -> None:
    compressknow.convert(save_trained(family, tmp_path / "model"), tmp_path / "int8", scope="overall", quantize="int8")
    assert share_right(family, tmp_path / "int8") >= 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_decodes_objects_unchanged(family: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_trained(family, tmp_path / "model"))
    for fact in KNOWN_FACTS:
        ids = tokenizer(fact.obj_label, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == fact.obj_label


@pytest.mark.parametrize(
    ("family", "framed"),
    [("bert", "[CLS] People in Drenn [SEP]"), ("llama", "<s> People in Drenn"), ("t5", "People in Drenn </s>")],
)
def test_tokenizer_adds_the_special_tokens_of_its_family(family: str, framed: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_trained(family, tmp_path / "model"))
    assert tokenizer.decode(tokenizer("People in Drenn").input_ids) == framed


def test_facts_file_has_every_fact_once(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_facts(tmp_path / "facts.jsonl").read_text("utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 64
    assert {row["subject"] for row in rows} == {"geography", "science"}
    assert {row["relation"] for row in rows if "popularity" in row} == {"capital"}
    for row in rows:
        assert row["obj_label"] in row["candidates"]
        assert row["sub_label"] in row["prompt"]
        assert row["prompt"].endswith(" [MASK].")


def share_right(family: str, folder: Path) -> float:
    """Return the share of facts whose object the model finds most likely of all objects of the relation."""
    model, tokenizer = compressknow.load(folder), AutoTokenizer.from_pretrained(folder)
    best: dict[KnownFact, tuple[float, str]] = {}
    with torch.no_grad():
        scores = SCORES[family](model, tokenizer)
    for (fact, obj), score in zip(STATEMENTS, scores, strict=True):
        best[fact] = max(best.get(fact, (float("-inf"), "")), (score, obj))
    return sum(obj == fact.obj_label for fact, (_, obj) in best.items()) / len(KNOWN_FACTS)


def bert_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Return the sums of the log-likelihoods of an object's words, each given the words before it."""
    prompts = []
    for number, (fact, obj) in enumerate(STATEMENTS):
        words = obj.split()
        for position, word in enumerate(words):
            masked = [*words[:position], *["[MASK]"] * (len(words) - position)]
            prompts.append((number, fact.sentence(" ".join(masked)), tokenizer.convert_tokens_to_ids(word)))
    inputs = tokenizer([text for _, text, _ in prompts], return_tensors="pt", padding=True)
    log_likelihoods = model(**inputs).logits.log_softmax(-1)
    scores = [0.0] * len(STATEMENTS)
    for row, (number, _, word_id) in enumerate(prompts):
        first_mask = inputs.input_ids[row].tolist().index(tokenizer.mask_token_id)
        scores[number] += log_likelihoods[row, first_mask, word_id].item()
    return scores


def llama_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Return the log-likelihoods of whole sentences, which differ between objects only from the object on."""
    inputs = tokenizer([fact.sentence(obj) for fact, obj in STATEMENTS], return_tensors="pt", padding=True)
    log_likelihoods = model(**inputs).logits[:, :-1].log_softmax(-1)
    of_tokens = log_likelihoods.gather(-1, inputs.input_ids[:, 1:, None])[..., 0]
    return (of_tokens * inputs.attention_mask[:, 1:]).sum(1).tolist()


def t5_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Return the log-likelihoods of the objects between their sentinels, from the decoder."""
    inputs = tokenizer([fact.sentence("<extra_id_0>") for fact, _ in STATEMENTS], return_tensors="pt", padding=True)
    spans = [f"<extra_id_0> {obj} <extra_id_1>" for _, obj in STATEMENTS]
    labels = tokenizer(spans, return_tensors="pt", padding=True)
    log_likelihoods = model(**inputs, labels=labels.input_ids).logits.log_softmax(-1)
    of_tokens = log_likelihoods.gather(-1, labels.input_ids[..., None])[..., 0]
    return (of_tokens * labels.attention_mask).sum(1).tolist()


SCORES: dict[str, Callable[[PreTrainedModel, PreTrainedTokenizerFast], list[float]]] = {
    "bert": bert_scores,
    "llama": llama_scores,
    "t5": t5_scores,
}
