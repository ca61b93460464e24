"""Scores and ranks are those of lm-pub-quiz, BEAR's own library: causal models score the answer and what follows it,
masked models the answer's tokens from left to right.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from lm_pub_quiz import Dataset, Evaluator

from compressknow.engine.language_model import LanguageModel, load_language_model
from compressknow.evaluate.facts import Fact, Probe
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import Query
from compressknow.evaluate.sources.sets import METADATA
from tests.evaluate.layouts import DATA, read_bear, real_data, write_jsonl
from tests.evaluate.references import evaluate_model
from tests.evaluate.trained import train_byte_level, train_metaspace, train_word_piece
from tests.models import tiny

MINILM = DATA.parent / "models" / "minilm-facts"
# Three templates each, with the object last, first or in the middle; labels that begin others, in lower case, quoted or
# of several words.
RELATIONS: dict[str, dict[str, Any]] = {
    "P36": {
        "templates": ["[Y] is the capital of [X].", "[X] has [Y] as its capital.", "The capital of [X] is [Y]."],
        "answer_space_labels": ["Rabat", "Rostov-on-Don", "São Tomé", "New York", "New York City", "the Hague", "Bern"],
        "objects": {"Morocco": 0, "Switzerland": 6, "America": 3},
    },
    "P162": {
        "templates": ["[X] is a work by [Y].", "[Y] is the producer of '[X]'.", "[X] plays as [Y]"],
        "answer_space_labels": ['"Weird Al" Yankovic', "Brian Eno", "Brian", "will.i.am", "catcher"],
        "objects": {"Even Worse": 0, "Another Green World": 1},
    },
    "P361": {
        "templates": ["The [X] is next to the [Y] .", "The [Y] is part of the [X].", "[X] (of [Y]) is a place."],
        "answer_space_labels": ["north Sea", "Black Sea", "Guinea", "Guinea-Bissau", "Équateur"],
        "objects": {"Rhine": 0, "Conakry": 2, "Bissau": 3},
    },
}
# Relations of the real set and a template: the object last, in the middle, first, without a full stop, or quoted.
REAL = [("P30", 1), ("P36", 3), ("P37", 3), ("P37", 1), ("P413", 3), ("P162", 2), ("P1303", 3), ("P413", 1)]


@pytest.fixture(scope="module")
def small_bear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bear")
    metadata = {}
    for relation, entry in RELATIONS.items():
        labels = entry["answer_space_labels"]
        ids = [f"Q{number}" for number in range(len(labels))]
        metadata[relation] = {"templates": entry["templates"], "answer_space_labels": labels, "answer_space_ids": ids}
        rows = [
            {"sub_id": f"S{index}", "sub_label": subject, "obj_id": ids[index], "obj_label": labels[index]}
            | {"answer_idx": index}
            for subject, index in entry["objects"].items()
        ]
        write_jsonl(folder / f"{relation}.jsonl", rows)
    (folder / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
    return folder


def list_texts(folder: Path) -> list[str]:
    relations = json.loads((folder / METADATA).read_text(encoding="utf-8")).values()
    texts = [text for entry in relations for text in (*entry["answer_space_labels"], *entry["templates"])]
    # As in real vocabularies, each letter with a space before it is a token. If that space were a separate token, its
    # probability would count here but not in lm-pub-quiz.
    return [f" {text}" for text in texts] * 2 + [f" {letter}" for letter in set("".join(texts)) - {" "}] * 300


def perturb(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Add noise to the weights, so large that no two answers are about as likely."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def make_gpt2(texts: Iterable[str], size: int = 600) -> LanguageModel:
    tokenizer = train_byte_level(texts, "<s> $A", size)
    config = hf.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
    return LanguageModel(perturb(hf.GPT2LMHeadModel(config)), tokenizer, "causal")


def make_llama(texts: Iterable[str]) -> LanguageModel:
    tokenizer = train_metaspace(texts)
    config = copy.deepcopy(tiny("llama").config)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    return LanguageModel(perturb(hf.LlamaForCausalLM(config)), tokenizer, "causal")


def make_bert(texts: Iterable[str]) -> LanguageModel:
    tokenizer = train_word_piece(texts)
    config = copy.deepcopy(tiny("bert").config)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    return LanguageModel(perturb(hf.BertForMaskedLM(config)), tokenizer, "masked")


def make_roberta(texts: Iterable[str]) -> LanguageModel:
    tokenizer = train_byte_level(texts, size=600)
    config = copy.deepcopy(tiny("roberta").config)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    return LanguageModel(perturb(hf.RobertaForMaskedLM(config)), tokenizer, "masked")


def score_by_lm_pub_quiz(lm: LanguageModel, folder: Path, relation: str, template: int, facts: int) -> list[np.ndarray]:
    """Return the scores of a relation's labels for each of its first facts."""
    settings = {"pll_metric": "answer_l2r+word_l2r"} if lm.family == "masked" else {}
    evaluator = Evaluator.from_model(
        lm.model,
        model_type="MLM" if settings else "CLM",
        # A copy, because lm-pub-quiz changes whether the tokenizer adds a first token.
        tokenizer=copy.deepcopy(lm.tokenizer),
        conditional_score=True,
        **settings,
    )
    dataset = Dataset.from_path(folder)[relation]
    rows = dataset.instance_table.iloc[:facts]
    return [
        np.array(
            evaluator.evaluate_instance(
                template=dataset.templates[template - 1],
                answers=dataset.answer_space.tolist(),
                subject=row["sub_label"],
                reduction="sum",
                batch_size=64,
            )
        )
        for _, row in rows.iterrows()
    ]


def score_all_candidates(lm: LanguageModel, probe: Probe, fact: Fact) -> np.ndarray:
    """Return the scores of all candidates, even of those that an answer does not need."""
    scorer = make_scorer(lm.model, lm.tokenizer, lm.family, probe)
    query = scorer.make_query(fact)
    assert isinstance(query, Query)
    with torch.inference_mode():
        log_probs, state = scorer.read_first([query])
        firsts = scorer.bound_options([query], log_probs)[0]
        return scorer.finish(state, [(0, ids) for ids in query.options], firsts, np.full(len(firsts), -np.inf))


def check_agreement(lm: LanguageModel, folder: Path, relation: str, template: int, facts: int = 9) -> int:
    """Return the number of facts compared."""
    probe = read_bear(folder, template)
    probe = replace(probe, facts=tuple(fact for fact in probe.facts if fact.relation == relation)[:facts])
    answers = evaluate_model(lm.model, lm.tokenizer, lm.family, probe)
    all_scores = score_by_lm_pub_quiz(lm, folder, relation, template, facts)
    for fact, scores in zip(probe.facts, all_scores, strict=True):
        assert score_all_candidates(lm, probe, fact) == pytest.approx(scores, abs=1e-3)
        answer, order = answers[fact.id], np.argsort(-scores, kind="stable")
        assert fact.candidates is not None
        assert answer.top5 == tuple(fact.candidates[index] for index in order[:5])
        assert answer.rank == list(order).index(fact.candidates.index(fact.obj_label)) + 1
    return len(all_scores)


@pytest.mark.parametrize("template", [1, 2, 3])
@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_bert, make_roberta])
def test_a_small_bear_is_scored_and_ranked_as_by_lm_pub_quiz(make: Any, template: int, small_bear: Path) -> None:
    lm = make(list_texts(small_bear))
    compared = sum(check_agreement(lm, small_bear, relation, template) for relation in RELATIONS)
    assert compared == 8


@pytest.fixture(scope="module")
def real_gpt2() -> LanguageModel:
    return make_gpt2(list_texts(DATA / "bear"), size=2000)


@real_data
@pytest.mark.parametrize(("relation", "template"), REAL)
def test_a_causal_model_scores_and_ranks_the_real_bear_as_lm_pub_quiz(
    relation: str, template: int, real_gpt2: LanguageModel
) -> None:
    assert check_agreement(real_gpt2, DATA / "bear", relation, template, facts=4) == 4


@pytest.fixture(scope="module")
def minilm() -> LanguageModel:
    return load_language_model(MINILM, dtype="float32")


@pytest.mark.skipif(not MINILM.is_dir(), reason="there is no folder of shared models")
@real_data
@pytest.mark.parametrize(("relation", "template"), [("P30", 1), ("P413", 3), ("P162", 2), ("P364", 3)])
def test_a_masked_model_scores_and_ranks_the_real_bear_as_lm_pub_quiz(
    relation: str, template: int, minilm: LanguageModel
) -> None:
    assert check_agreement(minilm, DATA / "bear", relation, template, facts=2) == 2
