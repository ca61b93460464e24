"""`lm-eval:TASK`: tasks of EleutherAI's lm-evaluation-harness, run by it on the loaded model.

Prompts and scores are lm-eval's own (no chat template, as many examples in the prompt as the task says); what it logs
of each item is kept. BoolQ, PIQA and WinoGrande run on local JSON lines where the user has them: see ``tasks_local/``.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CompressknowError, UnsupportedError, UsageError
from compressknow.base.libraries import require
from compressknow.base.reading import sha256_of
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.records import ProbeEntry
from compressknow.evaluate.sources import Options, ProbeSource, Task
from compressknow.evaluate.sources.task_index import (
    COLUMNS,
    SHIPPED,
    TaskFiles,
    build,
    find_entry,
    list_data_files,
    list_names,
    list_names_without,
    read_own_tasks,
    silence,
)

if TYPE_CHECKING:
    from compressknow.engine.language_model import LanguageModel

# How samples become answers.
PROTOCOL = "lm-eval"
_BATCH_SIZE = 32


class LmEval(ProbeSource):
    """``lm-eval:TASK``."""

    help = "boolq, piqa, winogrande (--data DIR for local copies), and every other task of lm-eval"
    form = "TASK"
    takes = frozenset({"data", "tasks"})
    held_out = False
    evaluated = "run by lm-eval, judged item by item as the task does"

    def meant(self, text: str) -> bool:
        return text.lower() in COLUMNS

    def open(self, name: str, part: str, options: Options) -> LmEvalTask:  # noqa: ARG002
        return open_task(name, data=options.data, include=options.tasks, limit=options.limit, seed=options.seed)


@dataclass(frozen=True)
class LmEvalTask(TaskFiles, Task):
    """Task of lm-eval, or group of tasks.

    Attributes
    ----------
    limit : only the first so many items of each task, as lm-eval takes them; None for all.
    seed : for the examples in prompts and for answers that are sampled.
    """

    limit: int | None = None
    seed: int = 0

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        digest.update(json.dumps([self.name, self.task, self.limit, self.seed, version("lm_eval")]).encode())
        for path, name in self._list_files():
            digest.update(json.dumps([name, sha256_of(path)]).encode())
        return digest.hexdigest()

    def run(self, loaded: LanguageModel) -> tuple[list[Answer], ProbeEntry]:
        return run_task(loaded, self)

    def _list_files(self) -> Iterator[tuple[Path, str]]:
        """Yield the task folder's YAML and code, included files without a suffix too, and the local data."""
        for path in sorted(self.include.rglob("*")) if self.include else ():
            if path.is_file() and path.suffix in (".yaml", ".yml", ".py", ""):
                yield path, path.relative_to(self.include or path).as_posix()
        for split, path in self.local_files().items():
            yield path, split


def open_task(
    name: str, *, data: Path | None = None, include: Path | None = None, limit: int | None = None, seed: int = 0
) -> LmEvalTask:
    """Open the task ``lm-eval:TASK``, one of lm-eval's or of a task folder; nothing is downloaded yet.

    Parameters
    ----------
    data : holds the local files, itself or in its folder ``tasks/``. With BoolQ's, PIQA's or WinoGrande's there
        (``boolq.jsonl``, ...), these are run; otherwise lm-eval's own task loads its set from the Hugging Face hub.
    include : an lm-eval task folder, searched first. Relative `data_files` in its YAML are looked for in `data`, then
        beside the YAML. Its Python files are run, as lm-eval does.
    limit : the first so many items of each task, not a sample.

    Raises
    ------
    UsageError : unknown task, no such folder, a missing file of data, or a limit below 1.
    """
    require("datasets", "lm_eval")
    task = name.partition(":")[2]
    for folder, option in ((data, "--data"), (include, "the task folder")):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"There is no folder {folder}.", hint=f"It was given as {option}.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1: {limit}.")
    if include and (entry := find_entry(include, task)):
        return LmEvalTask(name, task, include, _find_data(name, entry, data), limit, seed)
    if task in COLUMNS:
        place = next((place for place in _list_places(data) if (place / f"{task}.jsonl").is_file()), None)
        return LmEvalTask(name, task, SHIPPED if place else None, place, limit, seed)
    if not task:
        raise UsageError(f"{name} names no task.", hint="lm-eval: is followed by a task of lm-eval: lm-eval:boolq.")
    others = list_names_without(task)
    if others is None and task not in read_own_tasks().all_tasks:
        others = read_own_tasks().all_tasks
    if others is not None:
        raise _make_unknown_error(task, [*(list_names(include) if include else []), *COLUMNS, *others])
    return LmEvalTask(name, task, None, None, limit, seed)


def _list_places(data: Path | None) -> list[Path]:
    return [data, data / "tasks"] if data else []


def _find_data(name: str, entry: Any, data: Path | None) -> Path | None:
    """Return the folder that holds the files that the YAML of a task folder names; None where it names none."""
    files = list(list_data_files(entry).values())
    if not files:
        return None
    for place in [*_list_places(data), entry.yaml_path.parent]:
        if all((place / file).is_file() for file in files):
            return Path(place)
    raise UsageError(
        f"{name} needs {', '.join(files)}, which neither its task folder nor --data holds.",
        hint=f"Put it beside {entry.yaml_path.name}, or into DIR and pass --data DIR.",
    )


def _make_unknown_error(task: str, names: list[str]) -> UsageError:
    near = list(dict.fromkeys(difflib.get_close_matches(task, names, n=3)))
    suggestion = f"Did you mean {' or '.join(near)}? " if near else ""
    return UsageError(f"lm-eval has no task {task!r}.", hint=f"{suggestion}`lm-eval ls tasks` lists all.")


def run_task(
    loaded: LanguageModel, task: LmEvalTask, *, batch_size: int = _BATCH_SIZE
) -> tuple[list[Answer], ProbeEntry]:
    """Have lm-eval run a task on a model; gives the answers, and the probe's entry in ``probe.json``.

    The model is neither copied nor moved nor changed, the tokenizer is left as it is, and so are all random states.
    In batches of at most `batch_size`, fewer where the vocabulary is large.

    The entry has "truncated" besides the usual keys: so many items lost the beginning of their context, because the
    model takes no longer text.

    Raises
    ------
    UnsupportedError : a masked model, or a task that does not say right or wrong of each item.
    CompressknowError : the task's data cannot be had or read.
    """
    if loaded.family not in ("causal", "seq2seq"):
        raise UnsupportedError(
            f"{task.name} cannot evaluate a {loaded.family} model: lm-eval does not support these.",
            hint="The probes atlas, lama:..., bear, facts:... and hf:... can.",
        )
    with tempfile.TemporaryDirectory(prefix="compressknow-") as folder, silence(), _seed_random(loaded, task.seed):
        return _evaluate(loaded, task, build(task, Path(folder)), batch_size)


def _evaluate(
    loaded: LanguageModel, task: LmEvalTask, built: Mapping[str, Any], batch_size: int
) -> tuple[list[Answer], ProbeEntry]:
    from compressknow.evaluate.sources.task_answers import Collected, count_truncated

    lm = _wrap(loaded, built, batch_size)
    results = _run_lm_eval(lm, task, built)
    collected, cut = Collected(), 0
    for name, one in built["tasks"].items():
        samples = results["samples"][name]
        collected.add(task.name, one, samples, several=len(built["tasks"]) > 1)
        cut += count_truncated(samples, lm)
    if not collected.answers:
        raise CompressknowError(f"{task.name} marks no answers as right.", hint="Choose a split or file that has them.")
    entry = ProbeEntry(
        protocol=f"{PROTOCOL}/{_choose_version(task, results['versions'])}",
        fingerprint=task.fingerprint(),
        facts=sum(number["original"] for number in results["n-samples"].values()),
        asked=len(collected.answers),
        dropped=dict(collected.dropped),
        truncated=cut,
        chance=collected.chance,
        majority=collected.majority,
        limit=task.limit,
        seed=task.seed,
        source={
            "lm_eval": version("lm_eval"),
            "task": task.task,
            "data": _describe_data(task, built),
            "metrics": collected.metrics,
            "limit takes": "the first items of each task",
        },
    )
    return collected.answers, entry


def _run_lm_eval(lm: Any, task: LmEvalTask, built: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return lm-eval's results, each item's among them. Raise CompressknowError where an item cannot be evaluated."""
    from lm_eval import evaluate

    # Not `simple_evaluate`: it starts git and other programs, whose complaints would be seen. Its settings are these.
    for one in built["tasks"].values():
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=task.seed)
    try:
        results = evaluate(lm=lm, task_dict=built, limit=task.limit, bootstrap_iters=0, log_samples=True)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        # Of an item that its YAML or code does not suit, or that the model cannot take; figures over all items too.
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        if isinstance(error, AssertionError) and not str(error):
            reason = f"An answer is empty, or longer than the {lm.max_length} tokens that the model takes."
        raise CompressknowError(f"lm-eval cannot finish {task.name}.", reason) from error
    return dict(results)


def _wrap(loaded: LanguageModel, built: Mapping[str, Any], batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    # lm-eval keeps the logits of a whole batch: 512 positions of 50,000 tokens are 0.1 GB a row in float32.
    rows = max(1, min(batch_size, 2**28 // (512 * len(loaded.tokenizer))))
    # lm-eval runs the same tokens once for all choices. Where choices are contexts, that saves nothing, and takes the
    # wrong positions for items whose tokens are the same but for where the continuation begins (0.4.13).
    cache = not any(getattr(one, "multiple_input", 0) for one in built["tasks"].values())
    model = loaded.model
    # HFLM ties the weights anew; what is loaded is to be evaluated as it is.
    model.tie_weights = lambda *_, **__: None
    try:
        # lm-eval gives a tokenizer without a padding token one: to a copy.
        tokenizer = copy.deepcopy(loaded.tokenizer)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend=loaded.family, batch_size=rows, logits_cache=cache)
    finally:
        del model.tie_weights


def _describe_data(task: LmEvalTask, built: Mapping[str, Any]) -> Any:
    """Return {file: sha256} of local data; otherwise where on the hub the sets lie."""
    if files := task.local_files():
        return {path.name: sha256_of(path) for path in files.values()}
    configs = [one.config for one in built["tasks"].values() if hasattr(one, "config")]
    paths = dict.fromkeys(str(getattr(config, "dataset_path", None)) for config in configs)
    return ", ".join(paths)


def _choose_version(task: LmEvalTask, versions: Mapping[str, Any]) -> str:
    """Return the task's own version; of a group without one, those of its tasks."""
    if versions.get(task.task) is not None:
        return str(versions[task.task])
    return "+".join(sorted({str(one) for one in versions.values() if one is not None})) or "0"


@contextlib.contextmanager
def _seed_random(loaded: LanguageModel, seed: int) -> Iterator[None]:
    """Seed the random states, and put them back in the end."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    device = loaded.model.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
