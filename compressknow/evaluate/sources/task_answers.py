"""Answers from lm-eval's log of a task's items.

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


def collect_answers(
    probe: str, tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[Answer], Counter[str], dict[str, str], Counter[int]]:
    """Return the answers to the items of lm-eval's task objects; what was dropped, by reason; {name of a task: its
    metric that says right or wrong, as lm-eval's results name it: ``acc,none``}; and how often each place is right.
    Raises UnsupportedError if a task has no figure that says right or wrong item by item."""
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
            if places := _find_golds(task, sample, choices):
                golds[places[0]] += 1
                texts, prompt = _shorten(choices, contexts, continuation)
                lengths = _measure_lengths(metric, choices)
                answers.append(Answer(**common, prompt=prompt, **_read_choice(texts, places, sample, correct, lengths)))
            else:
                dropped[NO_GOLD] += 1
    return answers, dropped, metrics, golds


def find_task_domain(task: str) -> str:
    return COMMON_SENSE if task in _OF_COMMON_SENSE else GENERAL


def select_first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return each item once: they come once for each filter, and results go by the first one as well."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _measure_lengths(metric: str, choices: Sequence[str]) -> list[int]:
    """Return by what a metric divides the choices' log-likelihoods before it compares them (lm-eval's api/task.py)."""
    if metric == "acc_norm":
        return [max(len(choice), 1) for choice in choices]
    return [max(len(choice.encode()), 1) if metric == "acc_bytes" else 1 for choice in choices]


def _read_choice(
    texts: Sequence[str], places: Sequence[int], sample: Mapping[str, Any], correct: bool, lengths: Sequence[int]
) -> dict[str, Any]:
    """Return fields of an answer that was chosen; `places` are those of the right choices, which are ranked by
    log-likelihood over `lengths`."""
    scores = np.array([score for score, _ in sample["filtered_resps"][: len(texts)]], dtype=np.float64)
    compared = scores / lengths
    order = np.argsort(-compared, kind="stable")
    gold = min(places, key=lambda index: (np.isnan(compared[index]), -compared[index]))
    rank = find_rank(gold, compared)
    return {
        "gold": texts[gold],
        "predicted": texts[order[0]],
        # If a model produces NaN, lm-eval takes the first choice for its answer.
        "correct": correct and rank is not None,
        "rank": rank,
        "logp_gold": None if rank is None else float(scores[gold]),
        "top5": tuple(texts[index] for index in order[:5]),
        "top5_logp": tuple(float(scores[index]) for index in order[:5]),
        "choices": len(texts),
        "total_logp": sum_logs(scores),
    }


def _choose_metric(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the first of the task's metrics that says right or wrong of every item."""
    better = task.higher_is_better()
    named = sorted(samples[0]["metrics"], key=lambda metric: metric not in _METRICS)
    numbers = bool | int | float | np.number | np.bool_
    for metric in named:
        values = [sample.get(metric) for sample in samples]
        if better.get(metric, True) and all(isinstance(each, numbers) and float(each) in (0, 1) for each in values):
            return str(metric)
    raise UnsupportedError(
        f"lm-eval's task {name} does not mark each item as right or wrong.",
        f"It reports {', '.join(named) or 'nothing'}.",
        "Choose a task that reports acc or exact_match.",
    )


def _read_choices(task: Any, sample: Mapping[str, Any]) -> tuple[list[str], list[str], str | None]:
    """Return the choices as the task has them, the contexts, and what follows where these are chosen from."""
    arguments = sample["arguments"]
    if hasattr(task, "doc_to_choice"):
        choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    else:
        choices = [continuation.strip() for _, continuation, *_ in arguments]
    contexts = [argument[0] for argument in arguments[: len(choices)]]
    return choices, contexts, arguments[0][1] if getattr(task, "multiple_input", 0) else None


def _find_golds(task: Any, sample: Mapping[str, Any], choices: Sequence[str]) -> list[int]:
    """Return indices of the right choices, read as lm-eval does; what is out of range is none."""
    several_contexts = getattr(task, "multiple_input", 0)
    gold = task.doc_to_text(sample["doc"]) if several_contexts else sample["target"]
    found = []
    for one in gold if isinstance(gold, list) else [gold]:
        if isinstance(one, str):
            texts = choices if one in choices else [choice.strip() for choice in choices]
            found += [texts.index(one.strip())] if one.strip() in texts else []
        elif 0 <= int(one) < len(choices):
            found.append(int(one))
    return found


def _shorten(choices: Sequence[str], contexts: Sequence[str], continuation: str | None) -> tuple[list[str], str]:
    """Return texts of the choices and of the item; contexts that are chosen from without the words they all begin with.

    >>> _shorten([], ["She saw Ann, so Ann", "She saw Ann, so Bea"], " ran.")
    (['Ann', 'Bea'], 'She saw Ann, so … ran.')
    """
    if continuation is None:
        return [choice.strip() for choice in choices], cut_tail(contexts[0])
    words = [context.split() for context in contexts]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    begin = [column[0] for column in same]
    texts = [" ".join(of_one[len(begin) :]) for of_one in words]
    if not all(texts):
        return [choice.strip() for choice in choices], cut_tail(f"{_GAP} {continuation}")
    return texts, cut_tail(" ".join([*begin, _GAP, continuation]))


def _read_free(task: Any, sample: Mapping[str, Any], correct: bool) -> dict[str, Any]:
    """Return fields of an answer that was written freely, or of a continuation that was only scored."""
    gold, response = sample["target"], sample["filtered_resps"][0]
    if isinstance(gold, int) and getattr(task.config, "doc_to_choice", None) is not None:
        gold = task.doc_to_choice(sample["doc"])[gold]
    gold = str(gold[0] if isinstance(gold, list | tuple) and gold else gold).strip()
    fields = {"prompt": cut_tail(str(sample["arguments"][0][0])), "gold": gold, "correct": correct}
    if task.OUTPUT_TYPE == "loglikelihood":
        # The continuation is the greedy one or not; which one is, lm-eval does not say.
        return fields | {"predicted": gold if correct else "", "logp_gold": float(response[0])} | _UNRANKED
    if isinstance(response, list | tuple):
        response = response[0] if response else ""
    return fields | {"predicted": str(response).strip(), "logp_gold": None} | _UNRANKED


_UNRANKED: dict[str, Any] = {"rank": None, "top5": (), "top5_logp": ()}


def cut_tail(text: str) -> str:
    """Return the last words of a text, `SHOWN` characters at most, with single spaces and without LAMA's blank.

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
    """Count the items that lose the beginning of their context, as the model takes no longer text.

    A causal model reads all of the context and the continuation but its last token; an encoder the context alone; where
    an answer is written, the context leaves room for it.
    """

    def is_cut(arguments: Sequence[Any]) -> bool:
        text, room = str(arguments[0]), 0
        if isinstance(arguments[1], Mapping):
            room = 0 if lm.backend == "seq2seq" else int(arguments[1].get("max_gen_toks", lm.max_gen_toks))
        elif lm.backend == "causal":
            text, room = text + str(arguments[1]), -1
        longest: int = lm.max_length - room
        # A token is a byte at least, but for a special one or two: most texts need not be encoded.
        return len(text.encode()) + 2 > longest and len(lm.tok_encode(text)) > longest

    return sum(any(map(is_cut, sample["arguments"])) for sample in select_first_filter(samples))
