"""Tasks of lm-eval on tiny models, against log-probabilities that a plain loop adds up."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import compressknow
from compressknow.base.errors import CompressknowError, UnsupportedError, UsageError
from compressknow.engine.language_model import LanguageModel, load_language_model
from compressknow.evaluate.answers import Answer, read_table, write_table
from compressknow.evaluate.facts import GENERAL
from compressknow.evaluate.gather import check_gated
from compressknow.evaluate.records import ProbeEntry
from compressknow.evaluate.sources import Options, open_all, tasks
from compressknow.evaluate.sources.task_answers import NO_GOLD
from compressknow.evaluate.sources.tasks import SHIPPED, LmEvalTask
from tests.evaluate.layouts import DATA, open_task, real_data, write_jsonl
from tests.knowing import KNOWN_FACTS, candidates, save_trained
from tests.models import save_tiny

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
CAPITALS = [fact for fact in KNOWN_FACTS if fact.relation == "capital"]
CLOZE: dict[str, Any] = {
    "task": "cloze",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "cloze.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{before}}",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 3.0},
}
GENERATED = CLOZE | {
    "task": "generated",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "doc_to_choice": None,
    "filter_list": [
        {"name": name, "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        for name in ("trimmed", "another")
    ],
    "generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
BOOLQ = [
    {"passage": "The marsh is in Corvia .", "question": "is the marsh in Corvia", "label": 1},
    {"passage": "People in Drenn speak Dorse .", "question": "is Dorse the capital", "label": 0},
]
WINOGRANDE = [
    {"sentence": "Ann saw the arlo and the pim but the _ lives in the forest.", "option1": "arlo", "option2": "pim"},
    {"sentence": "The ilk eats clay and the _ eats bark.", "option1": "bindle", "option2": "ilk"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_trained("t5", tmp_path_factory.mktemp("t5")))


@pytest.fixture(params=["llama", "t5"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def write_tasks(folder: Path, *configs: Mapping[str, Any]) -> Path:
    """Write a task folder with one file per config."""
    folder.mkdir(exist_ok=True)
    for number, config in enumerate(configs):
        (folder / f"{number}.yaml").write_text(json.dumps(config))
    return folder


def make_cloze_rows(count: int = 5) -> list[dict[str, Any]]:
    choices = candidates("capital")[:6]
    facts = CAPITALS[:count]
    return [
        {"before": fact.sentence("").rstrip(" ."), "choices": choices, "label": choices.index(fact.obj_label)}
        for fact in facts
    ]


def write_cloze(folder: Path, *configs: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = ()) -> Path:
    """Write a task folder that contains its data."""
    write_jsonl(folder / "cloze.jsonl", rows or make_cloze_rows())
    return write_tasks(folder, *(configs or [CLOZE]))


@torch.inference_mode()
def compute_log_likelihood(lm: LanguageModel, context: str, continuation: str) -> float:
    """Return the log-probability of the continuation, by one forward pass for each of its tokens."""
    model, tokenizer = lm.model, lm.tokenizer
    longest = tokenizer.model_max_length
    context_ids = tokenizer(context).input_ids
    total = 0.0
    if lm.family == "seq2seq":
        decoder = [model.config.decoder_start_token_id]
        for token in tokenizer(continuation, add_special_tokens=False).input_ids:
            encoder_input = torch.tensor([context_ids[-longest:]])
            logits = model(input_ids=encoder_input, decoder_input_ids=torch.tensor([decoder])).logits
            total += logits[0, -1].log_softmax(-1)[token].item()
            decoder.append(token)
        return total
    ids = tokenizer(context + continuation).input_ids
    start = max(len(ids) - 1 - longest, 0)
    for position in range(len(context_ids), len(ids)):
        logits = model(input_ids=torch.tensor([ids[start:position]])).logits
        total += logits[0, -1].log_softmax(-1)[ids[position]].item()
    return total


def check_answer(answer: Answer, scores: Mapping[str, float], gold: str) -> None:
    """Check that an answer follows from the scores of all choices."""
    ranked = sorted(scores, key=lambda choice: -scores[choice])
    assert answer.gold == gold
    assert answer.choices == len(scores)
    assert answer.logp_gold == pytest.approx(scores[gold], abs=1e-4)
    assert answer.top5_logp == pytest.approx([scores[choice] for choice in ranked[:5]], abs=1e-4)
    assert answer.correct == (answer.rank == 1) == (answer.predicted == gold)
    assert answer.predicted == answer.top5[0]
    # Choices that differ only in words unknown to the model have equal scores.
    assert scores[answer.predicted] == pytest.approx(scores[ranked[0]], abs=1e-4)


def test_answers_are_those_of_a_plain_loop(lm: LanguageModel, tmp_path: Path) -> None:
    answers, entry = open_task("lm-eval:cloze", include=write_cloze(tmp_path)).run(lm)
    for row, answer in zip(make_cloze_rows(), answers, strict=True):
        scores = {choice: compute_log_likelihood(lm, row["before"], f" {choice}") for choice in row["choices"]}
        check_answer(answer, scores, row["choices"][row["label"]])
        assert answer.prompt == row["before"]
    assert [answer.fact_id for answer in answers] == [f"lm-eval:cloze:{number}" for number in range(5)]
    assert {(answer.probe, answer.relation, answer.subject) for answer in answers} == {
        ("lm-eval:cloze", "cloze", GENERAL)
    }
    if lm.family == "causal":
        assert all(answer.correct for answer in answers)
    write_table(tmp_path / "answers.parquet", answers)
    assert len(read_table(tmp_path / "answers.parquet")) == 5
    assert ProbeEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
    assert (entry.facts, entry.asked, entry.dropped, entry.truncated) == (5, 5, {}, 0)
    assert (entry.chance, entry.majority, entry.average) == (pytest.approx(1 / 6), 0.2, "micro")
    assert entry.protocol == "lm-eval/3.0"


def test_accuracy_is_what_simple_evaluate_reports(t5: LanguageModel, tmp_path: Path) -> None:
    rows = make_cloze_rows(6)
    for number, row in enumerate(rows):
        row["label"] = number // 3  # some right and some wrong, whatever the model answers
    write_jsonl(tmp_path / "cloze.jsonl", rows)
    config = CLOZE | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "cloze.jsonl")}}}
    manager = TaskManager(include_path=str(write_tasks(tmp_path, config)), include_defaults=False)
    lm = HFLM(pretrained=t5.model, tokenizer=t5.tokenizer, backend="seq2seq", batch_size=4)
    results = lm_eval.simple_evaluate(lm, tasks=["cloze"], task_manager=manager, limit=5, bootstrap_iters=0)
    answers, entry = open_task("lm-eval:cloze", include=tmp_path, limit=5).run(t5)
    accuracy = sum(answer.correct for answer in answers) / len(answers)
    assert accuracy == results["results"]["cloze"][entry.source["metrics"]["cloze"]]
    assert (entry.facts, entry.asked, entry.limit) == (6, 5, 5)
    scores = [sample["filtered_resps"] for sample in results["samples"]["cloze"]]
    for answer, choices in zip(answers, scores, strict=True):
        assert max(answer.top5_logp) == pytest.approx(max(score for score, _ in choices), abs=1e-4)


def test_shipped_tasks_equal_those_of_lm_eval() -> None:
    for name, folder in {"boolq": "super_glue/boolq", "piqa": "piqa", "winogrande": "winogrande"}.items():
        original, shipped = tasks.find_entry(LM_EVAL_TASKS / folder, name).cfg, tasks.find_entry(SHIPPED, name).cfg
        if name != "winogrande":
            assert shipped["doc_to_text"] == original["doc_to_text"]
            assert shipped["doc_to_choice"] == original["doc_to_choice"]
        assert shipped["output_type"] == original["output_type"]
        metrics = [[metric["metric"] for metric in config["metric_list"]] for config in (original, shipped)]
        assert metrics[0] == metrics[1]
        assert shipped["metadata"] == original["metadata"]


def test_winogrande_scores_what_follows_the_blank(llama: LanguageModel, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("module", LM_EVAL_TASKS / "winogrande" / "preprocess_winogrande.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [row | {"answer": str(number + 1)} for number, row in enumerate(WINOGRANDE)]
    split = [
        {
            "context_options": module.doc_to_choice(row),
            "continuation": module.doc_to_target(row),
            "gold": module.doc_to_text(row),
        }
        for row in rows
    ]
    answers = {}
    for name, content in {"whole": rows, "split": split}.items():
        write_jsonl(tmp_path / name / "winogrande.jsonl", content)
        answers[name], _ = open_task("lm-eval:winogrande", data=tmp_path / name).run(llama)
    assert answers["whole"] == answers["split"]
    for row, answer in zip(rows, answers["whole"], strict=True):
        contexts = zip([row["option1"], row["option2"]], module.doc_to_choice(row), strict=True)
        ending = f" {module.doc_to_target(row)}"
        scores = {option: compute_log_likelihood(llama, context, ending) for option, context in contexts}
        check_answer(answer, scores, row[f"option{row['answer']}"])
        assert answer.subject == "common sense"
    assert answers["whole"][0].prompt == "Ann saw the arlo and the pim but the … lives in the forest."


def test_boolq_reads_labels_and_answers(llama: LanguageModel, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "glue" / "tasks" / "boolq.jsonl", BOOLQ)
    answers = [{"title": "x", "answer": bool(row["label"])} | row for row in BOOLQ]
    write_jsonl(tmp_path / "own" / "boolq.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in answers])
    with_labels, entry = open_task("lm-eval:boolq", data=tmp_path / "glue").run(llama)
    with_answers, _ = open_task("lm-eval:boolq", data=tmp_path / "own").run(llama)
    assert with_labels == with_answers
    assert [answer.gold for answer in with_labels] == ["yes", "no"]
    assert with_labels[0].prompt == "The marsh is in Corvia . Question: is the marsh in Corvia? Answer:"
    assert list(entry.source["data"]) == ["boolq.jsonl"]
    assert (entry.chance, entry.majority) == (0.5, 0.5)


def test_items_of_the_same_tokens_are_scored_where_their_continuation_begins(
    llama: LanguageModel, tmp_path: Path
) -> None:
    """The model knows only the first word and the full stop, so that both items have the same tokens."""
    rows = [
        {"context_options": ["People a", "People b"], "continuation": "c d e .", "gold": 0},
        {"context_options": ["People a b c", "People b b c"], "continuation": "d .", "gold": 0},
    ]
    write_jsonl(tmp_path / "winogrande.jsonl", rows)
    answers, _ = open_task("lm-eval:winogrande", data=tmp_path).run(llama)
    for row, answer in zip(rows, answers, strict=True):
        score = compute_log_likelihood(llama, row["context_options"][0], f" {row['continuation']}")
        assert answer.top5_logp == pytest.approx([score, score], abs=1e-4)


PROMPTS = {
    "boolq": lambda row: [
        (f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", f" {choice}") for choice in ("no", "yes")
    ],
    "piqa": lambda row: [(f"Question: {row['goal']}\nAnswer:", f" {row[key]}") for key in ("sol1", "sol2")],
    "winogrande": lambda row: [(context, f" {row['continuation']}") for context in row["context_options"]],
}


@real_data
@pytest.mark.parametrize("name", PROMPTS)
def test_real_sets_run_offline_and_score_as_a_plain_loop(lm: LanguageModel, name: str) -> None:
    answers, entry = open_task(f"lm-eval:{name}", data=DATA, limit=20).run(lm)
    lines = (DATA / "tasks" / f"{name}.jsonl").read_text().splitlines()
    assert (entry.facts, entry.asked, entry.chance) == (len(lines), 20, 0.5)
    # Passages are longer than the 64 tokens of these models.
    assert (entry.truncated > 10) == (name == "boolq")
    for line, answer in zip(lines[:4], answers, strict=False):
        row = json.loads(line)
        scores = [compute_log_likelihood(lm, *pair) for pair in PROMPTS[name](row)]
        gold = row["gold"] if name == "winogrande" else row["label"]
        assert answer.logp_gold == pytest.approx(scores[gold], abs=1e-3)
        assert sorted(answer.top5_logp) == pytest.approx(sorted(scores), abs=1e-3)
        if abs(scores[0] - scores[1]) > 1e-3:
            assert answer.correct == (scores.index(max(scores)) == gold)


def test_items_whose_beginning_does_not_fit_are_counted(lm: LanguageModel, tmp_path: Path) -> None:
    longest, is_causal = lm.tokenizer.model_max_length, lm.family == "causal"
    contexts = [" ".join(["clay"] * words) for words in range(longest - 6, longest + 4)]
    choices = ["clay", "red moss", "red ants"]
    rows = [{"before": context, "choices": choices, "label": 0} for context in contexts]
    read = [len(lm.tokenizer(context).input_ids) for context in contexts]
    # A causal model also reads an answer of two words up to the last one.
    expected = sum(tokens + is_causal > longest for tokens in read)
    _, entry = open_task("lm-eval:cloze", include=write_cloze(tmp_path / "closed", rows=rows)).run(lm)
    assert entry.truncated == expected
    for name in ("max_gen_toks", "max_new_tokens"):
        config = GENERATED | {"generation_kwargs": {"until": ["."], name: 3, "do_sample": False}}
        _, entry = open_task("lm-eval:generated", include=write_cloze(tmp_path / name, config, rows=rows)).run(lm)
        assert entry.truncated == sum(tokens + 3 * is_causal > longest for tokens in read) > 0


def test_generated_answers_are_right_or_wrong(llama: LanguageModel, tmp_path: Path) -> None:
    answers, entry = open_task("lm-eval:generated", include=write_cloze(tmp_path, GENERATED)).run(llama)
    assert [answer.predicted for answer in answers] == [fact.obj_label for fact in CAPITALS[:5]]
    assert all(answer.correct for answer in answers)
    assert {(a.rank, a.logp_gold, a.choices, a.top5) for a in answers} == {(None, None, None, ())}
    assert entry.chance is entry.majority is None
    assert entry.source["metrics"] == {"generated": "exact_match,trimmed"}
    # The right answer may be given as the number of a choice.
    config = GENERATED | {"doc_to_choice": "choices", "doc_to_target": "label"}
    numbered, _ = open_task("lm-eval:generated", include=write_cloze(tmp_path, config)).run(llama)
    assert numbered == answers
    assert [answer.gold for answer in answers] == [fact.obj_label for fact in CAPITALS[:5]]


def test_continuations_that_are_only_scored_are_right_if_they_are_the_likeliest(
    llama: LanguageModel, tmp_path: Path
) -> None:
    config = CLOZE | {"output_type": "loglikelihood", "doc_to_target": " {{choices[label]}}", "doc_to_choice": None}
    rows = make_cloze_rows(2)
    rows[1]["label"] = rows[0]["label"]
    answers, _ = open_task("lm-eval:cloze", include=write_cloze(tmp_path, config, rows=rows)).run(llama)
    gold = CAPITALS[0].obj_label
    assert [(answer.gold, answer.predicted, answer.correct) for answer in answers] == [
        (gold, gold, True),
        (gold, "", False),
    ]
    for row, answer in zip(rows, answers, strict=True):
        assert answer.logp_gold == pytest.approx(compute_log_likelihood(llama, row["before"], f" {gold}"), abs=1e-4)


def test_the_seed_draws_the_examples_of_a_task(llama: LanguageModel, tmp_path: Path) -> None:
    folder = write_cloze(tmp_path, CLOZE | {"num_fewshot": 1, "fewshot_split": "test"})
    runs = [open_task("lm-eval:cloze", include=folder, seed=seed).run(llama) for seed in (0, 1)]
    prompts = [[answer.prompt for answer in answers] for answers, _ in runs]
    assert prompts[0] != prompts[1]
    assert min(len(prompt) for prompt in prompts[0]) > max(len(row["before"]) for row in make_cloze_rows())
    assert [entry.seed for _, entry in runs] == [0, 1]


def test_generated_answers_follow_the_generation_config(tmp_path: Path) -> None:
    model, folder = save_trained("llama", tmp_path / "model"), write_cloze(tmp_path / "tasks", GENERATED)

    def write() -> list[str]:
        answers = compressknow.probe(model, tmp_path / "answers", "lm-eval:generated", tasks=folder, overwrite=True)
        return [answer.predicted for answer in answers.answers]

    first = write()
    tokens = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(first[0].split())
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"suppress_tokens": tokens}))
    assert first[0] not in write()


@pytest.mark.parametrize("metric", ["acc_norm", "acc_bytes"])
def test_the_metric_decides_the_answer(llama: LanguageModel, tmp_path: Path, metric: str) -> None:
    choices = ["Tarsk", "Port Corin", "New Alba", "ЖЖЖЖЖЖ"]
    rows = [row | {"choices": choices, "label": number % 4} for number, row in enumerate(make_cloze_rows())]
    # A metric of which less is better does not say which answers are right.
    config = CLOZE | {"metric_list": [{"metric": "acc", "higher_is_better": False}, {"metric": metric}]}
    answers, entry = open_task("lm-eval:cloze", include=write_cloze(tmp_path, config, rows=rows)).run(llama)
    assert entry.source["metrics"] == {"cloze": f"{metric},none"}
    # Longer choices are chosen although they are less likely.
    assert any(answer.top5_logp[0] < max(answer.top5_logp) for answer in answers)
    for answer in answers:
        assert answer.correct == (answer.rank == 1) == (answer.predicted == answer.gold)
        assert answer.total_logp == pytest.approx(np.logaddexp.reduce(answer.top5_logp))
        lengths = [len(text if metric == "acc_norm" else text.encode()) for text in answer.top5]
        compared = [logp / length for logp, length in zip(answer.top5_logp, lengths, strict=True)]
        assert compared == sorted(compared, reverse=True)


def test_of_several_right_choices_the_likeliest_counts(llama: LanguageModel, tmp_path: Path) -> None:
    single, rows = make_cloze_rows(), make_cloze_rows()
    for row in rows:
        row["label"] = [(row["label"] + 1) % len(row["choices"]), row["label"]]
    (expected, _), (answers, _) = (
        open_task("lm-eval:cloze", include=write_cloze(tmp_path / str(n), rows=each)).run(llama)
        for n, each in enumerate((single, rows))
    )
    assert [(answer.gold, answer.correct) for answer in answers] == [(answer.gold, True) for answer in expected]
    # Any of an item's right choices may be the most frequent one.
    for row, label in zip(rows, ([0, 1], [2, 0], [3, 0], [4, 0], 5), strict=True):
        row["label"] = label if isinstance(label, list) else [label]
    _, entry = open_task("lm-eval:cloze", include=write_cloze(tmp_path / "2", rows=rows)).run(llama)
    assert entry.majority == 0.8


def test_a_label_is_compared_with_the_choices_as_it_is(llama: LanguageModel, tmp_path: Path) -> None:
    rows = make_cloze_rows(2)
    for row in rows:
        row["choices"] = [f" {choice}" for choice in row["choices"]]
        row["label"] = row["choices"][row["label"]]
    config = CLOZE | {"target_delimiter": ""}
    answers, _ = open_task("lm-eval:cloze", include=write_cloze(tmp_path, config, rows=rows)).run(llama)
    assert [(answer.gold, answer.correct) for answer in answers] == [(row["label"].strip(), True) for row in rows]
    # As lm-eval, which would count it as wrong, does not find it.
    rows[0]["label"] = rows[0]["label"].strip()
    _, entry = open_task("lm-eval:cloze", include=write_cloze(tmp_path, config, rows=rows)).run(llama)
    assert entry.dropped == {NO_GOLD: 1}


def test_a_group_names_the_task_of_each_item(llama: LanguageModel, tmp_path: Path) -> None:
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "cloze.jsonl")}}}
    group = {"group": "both", "task": ["cloze", "generated"]}
    folder = write_cloze(tmp_path, CLOZE | data, GENERATED | data, group)
    answers, entry = open_task("lm-eval:both", include=folder, limit=2).run(llama)
    assert [(answer.fact_id, answer.relation) for answer in answers] == [
        ("lm-eval:both:cloze/0", "cloze"),
        ("lm-eval:both:cloze/1", "cloze"),
        ("lm-eval:both:generated/0", "generated"),
        ("lm-eval:both:generated/1", "generated"),
    ]
    assert (entry.facts, entry.chance, entry.majority, entry.protocol) == (10, None, None, "lm-eval/3.0")


def test_a_gate_on_an_unknown_task_is_refused_before_the_run(tmp_path: Path) -> None:
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "cloze.jsonl")}}}
    folder = write_cloze(tmp_path, CLOZE | data, {"group": "all", "task": ["cloze"]})
    atlas, single, group = open_all(["atlas", "lm-eval:cloze", "lm-eval:all"], Options(tasks=folder))
    for name in (None, "cloze", "general", "science", "animal_class"):
        check_gated([atlas, single], [name])
    with pytest.raises(UsageError, match=r"no facts have the domain or relation clozes\.\nDid you mean cloze\?"):
        check_gated([atlas, single], ["clozes"])
    with pytest.raises(UsageError, match=r"relation boolqs\.\nDid you mean boolq\?"):
        check_gated([open_task("lm-eval:boolq")], ["boolqs"])
    # Only lm-eval knows the tasks of a group.
    check_gated([atlas, group], ["clozes"])


def test_items_without_a_right_choice_are_dropped_and_counted(llama: LanguageModel, tmp_path: Path) -> None:
    rows = make_cloze_rows(3)
    rows[1]["label"] = -1
    answers, entry = open_task("lm-eval:cloze", include=write_cloze(tmp_path, rows=rows)).run(llama)
    assert [answer.fact_id for answer in answers] == ["lm-eval:cloze:0", "lm-eval:cloze:2"]
    assert entry.dropped == {NO_GOLD: 1}
    hidden = write_cloze(tmp_path, rows=[row | {"label": -1} for row in rows])
    with pytest.raises(CompressknowError, match="marks no answers as right"):
        open_task("lm-eval:cloze", include=hidden).run(llama)


def test_a_model_that_computes_nan_knows_nothing(tmp_path: Path) -> None:
    broken = load_language_model(save_trained("llama", tmp_path / "broken"))
    torch.nn.init.constant_(broken.model.get_output_embeddings().weight, float("nan"))
    answers, _ = open_task("lm-eval:cloze", include=write_cloze(tmp_path / "tasks")).run(broken)
    assert {(answer.correct, answer.rank, answer.logp_gold) for answer in answers} == {(False, None, None)}


def test_nothing_is_printed_or_left_behind(
    llama: LanguageModel, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = type(llama.tokenizer).from_pretrained(save_trained("llama", tmp_path / "model"))
    tokenizer.pad_token = None
    monkeypatch.chdir(tmp_path)  # outside a repository, git would complain
    folder = write_cloze(tmp_path / "tasks")
    pointers = [parameter.data_ptr() for parameter in llama.model.parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    levels = [logging.getLogger(name).level for name in ("lm_eval", "datasets", "transformers")]
    capfd.readouterr()
    open_task("lm-eval:cloze", include=folder, limit=2).run(replace(llama, tokenizer=tokenizer))
    assert capfd.readouterr() == ("", "")
    assert tokenizer.pad_token is None
    assert [parameter.data_ptr() for parameter in llama.model.parameters()] == pointers
    assert "tie_weights" not in vars(llama.model)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert [logging.getLogger(name).level for name in ("lm_eval", "datasets", "transformers")] == levels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tasks"]


def test_the_fingerprint_changes_with_what_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_task("lm-eval:cloze", include=write_cloze(tmp_path / "a")).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "version", lambda _: "9.9")
        assert open_task("lm-eval:cloze", include=tmp_path / "a").fingerprint() != first
    for name in ("utils.py", "_default"):
        (tmp_path / "a" / name).touch()
        assert open_task("lm-eval:cloze", include=tmp_path / "a").fingerprint() != first
        (tmp_path / "a" / name).unlink()
    assert open_task("lm-eval:cloze", include=write_cloze(tmp_path / "b")).fingerprint() == first
    assert open_task("lm-eval:cloze", include=tmp_path / "b", limit=3).fingerprint() != first
    assert open_task("lm-eval:cloze", include=tmp_path / "b", seed=1).fingerprint() != first
    write_cloze(tmp_path / "b", CLOZE | {"doc_to_text": "{{before}} the"})
    assert open_task("lm-eval:cloze", include=tmp_path / "b").fingerprint() != first
    write_cloze(tmp_path / "b", rows=make_cloze_rows(4))
    assert open_task("lm-eval:cloze", include=tmp_path / "b").fingerprint() != first


@pytest.mark.parametrize("where", ["a path", "a list", "a pattern", "a folder", "a group", "a member's settings"])
def test_the_fingerprint_changes_with_data_that_the_task_finds_by_itself(tmp_path: Path, where: str) -> None:
    data = tmp_path / "data" / "cloze.jsonl"
    write_jsonl(data, make_cloze_rows())
    config = CLOZE | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    configs: list[dict[str, Any]] = [config]
    if where == "a list":
        configs = [CLOZE | {"dataset_kwargs": {"data_files": {"test": [str(data)]}}}]
    elif where == "a pattern":
        configs = [CLOZE | {"dataset_kwargs": {"data_files": str(data.with_name("*.jsonl"))}}]
    elif where == "a folder":
        configs = [CLOZE | {"dataset_path": str(data.parent), "dataset_kwargs": None}]
    elif where == "a group":
        configs = [config | {"task": "member"}, {"group": "cloze", "task": ["member"]}]
    elif where == "a member's settings":
        configs = [{"group": "cloze", "task": [config | {"task": "member"}]}]
    folder = write_tasks(tmp_path / "tasks", *configs)
    first = open_task("lm-eval:cloze", include=folder).fingerprint()
    assert open_task("lm-eval:cloze", include=folder).fingerprint() == first
    write_jsonl(data, make_cloze_rows(4))
    assert open_task("lm-eval:cloze", include=folder).fingerprint() != first


def test_the_fingerprint_ignores_files_of_git_and_desktops(tmp_path: Path) -> None:
    folder = write_cloze(tmp_path / "tasks")
    first = open_task("lm-eval:cloze", include=folder).fingerprint()
    (folder / ".git").mkdir()
    for name in (".git/HEAD", ".DS_Store"):
        (folder / name).write_text("changed")
    assert open_task("lm-eval:cloze", include=folder).fingerprint() == first
    # lm-eval reads YAML files in any folder.
    (folder / ".git" / "other.yaml").write_text("task: other")
    assert open_task("lm-eval:cloze", include=folder).fingerprint() != first


def test_the_data_folder_comes_before_the_task_folder(tmp_path: Path) -> None:
    folder = write_cloze(tmp_path / "tasks")
    assert open_task("lm-eval:cloze", include=folder).data == folder
    write_jsonl(tmp_path / "data" / "tasks" / "cloze.jsonl", make_cloze_rows(1))
    opened = open_task("lm-eval:cloze", include=folder, data=tmp_path / "data")
    assert opened == LmEvalTask("lm-eval:cloze", "cloze", folder, tmp_path / "data" / "tasks")
    assert open_task("lm-eval:piqa", data=tmp_path / "data") == LmEvalTask("lm-eval:piqa", "piqa")


def test_refuses_tasks_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "read_own_tasks", lambda: SimpleNamespace(all_tasks=["hellaswag", "mmlu"]))
    folder = write_tasks(tmp_path, CLOZE)
    for name, why in {
        "lm-eval:helaswag": "no task 'helaswag'.\nDid you mean hellaswag",
        "lm-eval:clozes": "Did you mean cloze",
        "lm-eval:boolqq": "Did you mean boolq",
        "lm-eval:cloze": "needs cloze.jsonl, which is neither in its task folder nor in --data.\nPut it next to 0.yaml",
    }.items():
        with pytest.raises(UsageError, match=re.escape(why)):
            open_task(name, include=folder, data=tmp_path)
    assert open_task("lm-eval:mmlu").include is None
    with pytest.raises(UsageError, match=r"no folder .*nowhere"):
        open_task("lm-eval:boolq", data=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no folder .*nowhere.\nIt was given as the task folder"):
        open_task("lm-eval:boolq", include=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="at least 1"):
        open_all(["lm-eval:boolq"], Options(limit=0))
    with pytest.raises(UsageError, match="Unknown probe 'lm-eval:'"):
        open_all(["lm-eval:"], Options())


def test_an_unknown_name_is_refused_without_reading_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it takes most of a minute."""
    monkeypatch.setattr(tasks, "read_own_tasks", lambda: pytest.fail("the index was read"))
    with pytest.raises(UsageError, match=r"lm-eval has no task 'hellaswg'.\nDid you mean hellaswag"):
        open_task("lm-eval:hellaswg")
    with pytest.raises(UsageError, match="lm-eval has no task 'nosuch"):
        open_task("lm-eval:nosuch\udcff")


def test_a_model_that_a_task_cannot_evaluate_is_refused_before_it_is_loaded(tmp_path: Path, loads: list[Path]) -> None:
    bert = save_tiny("bert", tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="lm-eval:cloze cannot evaluate a masked model"):
        compressknow.probe(bert, tmp_path / "out", ["atlas", "lm-eval:cloze"], tasks=write_cloze(tmp_path / "tasks"))
    assert not loads


def test_a_task_without_data_is_refused_before_other_probes_are_evaluated(tmp_path: Path, loads: list[Path]) -> None:
    folder = write_cloze(tmp_path / "tasks")
    (folder / "cloze.jsonl").write_text("<html>404</html>")
    model = save_trained("llama", tmp_path / "llama")
    with pytest.raises(CompressknowError, match="lm-eval:cloze cannot be loaded"):
        compressknow.probe(model, tmp_path / "answers", ["atlas", "lm-eval:cloze"], tasks=folder)
    assert not loads
    assert not (tmp_path / "answers").exists()


def test_refuses_tasks_that_cannot_run(llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot evaluate a masked model.*\n.*atlas"):
        open_task("lm-eval:boolq").run(replace(llama, family="masked"))

    manager = TaskManager(include_path=str(LM_EVAL_TASKS / "super_glue" / "boolq"), include_defaults=False)
    monkeypatch.setattr(tasks, "read_own_tasks", lambda: manager)
    with pytest.raises(
        CompressknowError, match=r"the Hub cannot be reached[\s\S]*passage, .*boolq.jsonl and pass --data"
    ):
        open_task("lm-eval:boolq").run(llama)

    write_jsonl(tmp_path / "data" / "boolq.jsonl", [{"text": "x"}])
    with pytest.raises(CompressknowError, match=r"cannot be loaded[\s\S]*Its rows must have passage"):
        open_task("lm-eval:boolq", data=tmp_path / "data").run(llama)

    long = write_cloze(tmp_path / "long", rows=[make_cloze_rows(1)[0] | {"choices": ["red " * 65, "clay"]}])
    with pytest.raises(CompressknowError, match="longer than the 64 tokens that the model can read"):
        open_task("lm-eval:cloze", include=long).run(llama)

    perplexity = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{before}}", "doc_to_choice": None}
    rolling = CLOZE | perplexity | {"metric_list": [{"metric": "word_perplexity"}]}
    code, image = GENERATED | {"unsafe_code": True}, GENERATED | {"doc_to_image": "before"}
    for number, (config, why) in enumerate(
        [(rolling, "measures perplexity"), (code, "runs code"), (image, "needs images or audio")]
    ):
        folder = write_cloze(tmp_path / str(number), config)
        with pytest.raises(UnsupportedError, match=why):
            open_task(f"lm-eval:{config['task']}", include=folder).run(llama)
    f1 = CLOZE | {"metric_list": [{"metric": "f1"}]}
    with pytest.raises(CompressknowError, match=r"cannot finish lm-eval:cloze.\nValueError: Target is multiclass"):
        open_task("lm-eval:cloze", include=write_cloze(tmp_path / "f1", f1)).run(llama)
    with pytest.raises(UnsupportedError, match="not mark each item as right or wrong"):
        open_task("lm-eval:cloze", include=write_cloze(tmp_path / "f1", f1), limit=2).run(llama)
