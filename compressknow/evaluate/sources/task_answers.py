"""Conversion of lm-eval's log of a task's items to answers.

A sample of lm-eval's log is {"doc_id", "doc", "target", "arguments": [(context, continuation), ...], "filtered_resps",
"filter", "metrics": [NAME, ...], NAME: value, ...}; for choices `filtered_resps` is [(log-likelihood, is greedy), ...].
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressknow.base.errors import UnsupportedError
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.facts import BLANK, COMMON_SENSE, GENERAL
from compressknow.evaluate.scoring.ranking import find_rank, sum_logs

# Characters shown of the end of an item's context.
SHOWN = 300
_GAP = "…"
NO_GOLD = "no choice is marked as the right one"
# If a task reports several metrics, those over raw log-likelihoods and whole answers are used.
_METRICS = ("acc", "exact_match")
_OF_COMMON_SENSE = frozenset({"piqa", "winogrande"})
# Names of the maximum number of generated tokens, the first of which counts, as in lm-eval.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def collect_answers(
    probe: str, tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[Answer], Counter[str], dict[str, str], Counter[int]]:
    """Return the answers to the items of lm-eval's task objects; the number of dropped items by reason; {name of a
    task: metric that determines correct answers, as in lm-eval's results: ``acc,none``}; and, by index, the number of
    items of which that choice is right. Raises UnsupportedError if a task has no metric of single items."""
    answers: list[Answer] = []
    dropped, golds = Counter[str](), Counter[int]()
    metrics = {}
    for key, task in tasks.items():
        name, log = str(task.task_name), select_first_filter(samples[key])
        metric = _choose_metric(name, task, log)
        metrics[name] = f"{metric},{log[0]['filter']}"
        for sample in log:
            item = f"{name}/{sample['doc_id']}" if len(tasks) > 1 else str(sample["doc_id"])
            common: dict[str, Any] = {
                "probe": probe,
                "fact_id": f"{probe}:{item}",
                "relation": name,
                "subject": find_task_domain(name),
                "sub_label": "",
                "popularity": None,
            }
            correct = float(sample[metric]) == 1
            if task.OUTPUT_TYPE != "multiple_choice":
                answers.append(Answer(**common, **_read_free(task, sample, correct), choices=None))
                continue
            choices, contexts, continuation = _read_choices(task, sample)
            if indices := _find_golds(task, sample, choices):
                golds.update(set(indices))
                texts, prompt = _shorten(choices, contexts, continuation)
                lengths = _measure_lengths(metric, choices)
                fields = _read_choice(texts, indices, sample, correct, lengths)
                answers.append(Answer(**common, prompt=prompt, **fields))
            else:
                dropped[NO_GOLD] += 1
    return answers, dropped, metrics, golds


def find_task_domain(task: str) -> str:
    return COMMON_SENSE if task in _OF_COMMON_SENSE else GENERAL


def select_first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return each item once, by the first filter, as in lm-eval's results; the log has items for every filter."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _measure_lengths(metric: str, choices: Sequence[str]) -> list[int]:
    """Return the divisors of the choices' log-likelihoods in a metric (lm-eval's api/task.py)."""
    if metric == "acc_norm":
        return [max(len(choice), 1) for choice in choices]
    return [max(len(choice.encode()), 1) if metric == "acc_bytes" else 1 for choice in choices]


def _read_choice(
    texts: Sequence[str], golds: Sequence[int], sample: Mapping[str, Any], correct: bool, lengths: Sequence[int]
) -> dict[str, Any]:
    """Return fields of an answer among choices, ranked by log-likelihood / `lengths`; `golds` index the right ones."""
    scores = np.array([score for score, _ in sample["filtered_resps"][: len(texts)]], dtype=np.float64)
    compared = scores / lengths
    order = np.argsort(-compared, kind="stable")
    gold = min(golds, key=lambda index: (np.isnan(compared[index]), -compared[index]))
    rank = find_rank(gold, compared)
    return {
        "gold": texts[gold],
        "predicted": texts[order[0]],
        # If a model returns NaN, its answer in lm-eval is the first choice.
        "correct": correct and rank is not None,
        "rank": rank,
        "logp_gold": None if rank is None else float(scores[gold]),
        "top5": tuple(texts[index] for index in order[:5]),
        "top5_logp": tuple(float(scores[index]) for index in order[:5]),
        "choices": len(texts),
        "total_logp": sum_logs(scores),
    }


def _choose_metric(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the first of the task's metrics that is 0 or 1 for every item."""
    better = task.higher_is_better()
    metrics = sorted(samples[0]["metrics"], key=lambda metric: metric not in _METRICS)
    numbers = bool | int | float | np.number | np.bool_
    for metric in metrics:
        values = [sample.get(metric) for sample in samples]
        if better.get(metric, True) and all(isinstance(each, numbers) and float(each) in (0, 1) for each in values):
            return str(metric)
    raise UnsupportedError(
        f"lm-eval's task {name} does not mark each item as right or wrong.",
        f"It reports {', '.join(metrics) or 'nothing'}.",
        "Choose a task that reports acc or exact_match.",
    )


def _read_choices(task: Any, sample: Mapping[str, Any]) -> tuple[list[str], list[str], str | None]:
    """Return the task's choices, the contexts and, if these are the choices, the continuation."""
    arguments = sample["arguments"]
    if hasattr(task, "doc_to_choice"):
        choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    else:
        choices = [continuation.strip() for _, continuation, *_ in arguments]
    contexts = [argument[0] for argument in arguments[: len(choices)]]
    return choices, contexts, arguments[0][1] if getattr(task, "multiple_input", 0) else None


def _find_golds(task: Any, sample: Mapping[str, Any], choices: Sequence[str]) -> list[int]:
    """Return indices of the right choices, read as by lm-eval, without those out of range."""
    several_contexts = getattr(task, "multiple_input", 0)
    gold = task.doc_to_text(sample["doc"]) if several_contexts else sample["target"]
    indices = []
    for each in gold if isinstance(gold, list) else [gold]:
        if isinstance(each, str):
            # The choices of a task without `doc_to_choice` are read without spaces around them.
            text = each if hasattr(task, "doc_to_choice") else each.strip()
            indices += [choices.index(text)] if text in choices else []
        elif 0 <= int(each) < len(choices):
            indices.append(int(each))
    return indices


def _shorten(choices: Sequence[str], contexts: Sequence[str], continuation: str | None) -> tuple[list[str], str]:
    """Return texts of the choices and of the item. If contexts are the choices, their common beginning is cut off.

    >>> _shorten([], ["She saw Ann, so Ann", "She saw Ann, so Bea"], " ran.")
    (['Ann', 'Bea'], 'She saw Ann, so … ran.')
    """
    if continuation is None:
        return [choice.strip() for choice in choices], cut_tail(contexts[0])
    words = [context.split() for context in contexts]
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    beginning = [column[0] for column in equal]
    texts = [" ".join(context[len(beginning) :]) for context in words]
    if not all(texts):
        return [choice.strip() for choice in choices], cut_tail(f"{_GAP} {continuation}")
    return texts, cut_tail(" ".join([*beginning, _GAP, continuation]))


def _read_free(task: Any, sample: Mapping[str, Any], correct: bool) -> dict[str, Any]:
    """Return fields of a generated answer, or of a continuation that was only scored."""
    gold, response = sample["target"], sample["filtered_resps"][0]
    if isinstance(gold, int) and getattr(task.config, "doc_to_choice", None) is not None:
        gold = task.doc_to_choice(sample["doc"])[gold]
    gold = str(gold[0] if isinstance(gold, list | tuple) and gold else gold).strip()
    fields = {"prompt": cut_tail(str(sample["arguments"][0][0])), "gold": gold, "correct": correct}
    if task.OUTPUT_TYPE == "loglikelihood":
        # lm-eval only reports whether the continuation is the greedy one.
        return fields | {"predicted": gold if correct else "", "logp_gold": float(response[0])} | _UNRANKED
    if isinstance(response, list | tuple):
        response = response[0] if response else ""
    return fields | {"predicted": str(response).strip(), "logp_gold": None} | _UNRANKED


_UNRANKED: dict[str, Any] = {"rank": None, "top5": (), "top5_logp": ()}


def cut_tail(text: str) -> str:
    """Return the last words of a text, at most `SHOWN` characters, with single spaces and without LAMA's blank.

    >>> cut_tail("Question:  who?\\nAnswer:")
    'Question: who? Answer:'
    >>> len(cut_tail("word " * 100)), cut_tail("word " * 100)[:6]
    (296, '… word')
    """
    words = text.replace(BLANK, _GAP).split()
    whole = " ".join(words)
    if len(whole) <= SHOWN:
        return whole
    cut = whole[-(SHOWN - 2) :]
    return f"{_GAP} {cut.partition(' ')[2] or cut}"


def count_truncated(samples: Sequence[Mapping[str, Any]], lm: Any) -> int:
    """Count the items whose context loses its beginning because it is too long for the model: a causal one also reads
    the continuation without its last token, or needs room for the answer that it generates."""

    def is_cut(arguments: Sequence[Any]) -> bool:
        text, room = str(arguments[0]), 0
        if isinstance(arguments[1], Mapping):
            limits = (number for name in _LIMITS if (number := arguments[1].get(name)) is not None)
            room = 0 if lm.backend == "seq2seq" else int(next(limits, lm.max_gen_toks))
        elif lm.backend == "causal":
            text, room = text + str(arguments[1]), -1
        longest: int = lm.max_length - room
        # A token has at least one byte, except one or two special ones, so most texts need not be encoded.
        return len(text.encode()) + 2 > longest and len(lm.tok_encode(text)) > longest

    return sum(any(map(is_cut, sample["arguments"])) for sample in select_first_filter(samples))
