"""`lm-eval:TASK`: tasks of EleutherAI's lm-evaluation-harness, run by it on the loaded model.

Prompts and scores are lm-eval's (without a chat template, with as many examples as the task says); its log of each item
is stored. BoolQ, PIQA and WinoGrande can run on local JSON Lines: see ``tasks_local/``.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import glob
import hashlib
import importlib.util
import json
import logging
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compressknow.base.errors import CompressknowError, UnsupportedError, UsageError
from compressknow.base.files import escape_name
from compressknow.base.packages import require
from compressknow.base.progress import silence_libraries
from compressknow.base.reading import compute_sha256
from compressknow.engine.language_model import LanguageModel
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.facts import compute_chance
from compressknow.evaluate.records import ProbeEntry
from compressknow.evaluate.sources import Options, ProbeSource, Task
from compressknow.evaluate.sources.task_answers import collect_answers, count_truncated, find_task_domain

# Prefix of the protocol of answers, before the version of the task.
PROTOCOL = "lm-eval"
# Maximum number of items at a time; fewer if the vocabulary is large.
BATCH_SIZE = 32
# Task files for lm-eval that read local JSON Lines, and the columns of their rows.
SHIPPED = Path(__file__).parent / "tasks_local"
COLUMNS = {
    "boolq": "passage, question, label (1 for yes)",
    "piqa": "goal, sol1, sol2, label (0 or 1)",
    "winogrande": "sentence, option1, option2, answer (1 or 2)",
}
_DEFINED = re.compile(rb"""^(?:task|group|tag):[ \t]*["']?([\w.+-]+)""", re.MULTILINE)


class LmEval(ProbeSource):
    help = "boolq, piqa, winogrande (--data DIR for local copies), and every other task of lm-eval"
    form = "TASK"
    takes = frozenset({"data", "tasks"})
    held_out = False
    evaluated = "run by lm-eval, judged item by item as the task does"

    def meant(self, text: str) -> bool:
        return text.lower() in COLUMNS

    def open(self, name: str, part: str, options: Options) -> LmEvalTask:
        """Open a task of the task folder, which is searched first, or of lm-eval; nothing is downloaded yet.

        `options.data` holds local files, itself or in its folder ``tasks/``: ``boolq.jsonl``, ``piqa.jsonl``,
        ``winogrande.jsonl``, in place of the sets on the Hugging Face hub, and those that the YAML of a task folder
        names, or they lie next to it. Its Python files are run, as lm-eval does.
        """
        require("datasets", "lm_eval")
        task, data, include = part, options.data, options.tasks
        opened = LmEvalTask(name, task, limit=options.limit, seed=options.seed)
        for folder, option in ((data, "--data"), (include, "the task folder")):
            if folder is not None and not folder.is_dir():
                raise UsageError(f"There is no folder {folder}.", hint=f"It was given as {option}.")
        folders = [data, data / "tasks"] if data else []
        if include and (entry := find_entry(include, task)):
            return replace(opened, include=include, data=_find_data(name, entry, folders))
        if task in COLUMNS:
            local = next((folder for folder in folders if (folder / f"{task}.jsonl").is_file()), None)
            return replace(opened, include=SHIPPED, data=local) if local else opened
        known = list_names_without(task)
        if known is None and task not in read_own_tasks().all_tasks:
            known = read_own_tasks().all_tasks
        if known is not None:
            names = [*(_read_index(include).all_tasks if include else []), *COLUMNS, *known]
            near = list(dict.fromkeys(difflib.get_close_matches(task, names, n=3)))
            suggestion = f"Did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(f"lm-eval has no task {task!r}.", hint=f"{suggestion}`lm-eval ls tasks` lists all.")
        return opened


@dataclass(frozen=True)
class LmEvalTask(Task):
    """Task of lm-eval, or group of tasks.

    Attributes
    ----------
    name, task : the user's name, ``lm-eval:boolq``, and lm-eval's.
    include : folder of the task's YAML, `SHIPPED` or the user's; None for lm-eval's own tasks.
    data : folder of the local files that the YAML names; None if it names none.
    limit : number of items of each task, from the first, as in lm-eval; None for all.
    seed : seed for the examples in prompts, and for answers that are sampled.
    """

    name: str
    task: str
    include: Path | None = None
    data: Path | None = None
    limit: int | None = None
    seed: int = 0

    def check_family(self, family: str) -> None:
        if family not in ("causal", "seq2seq"):
            raise UnsupportedError(
                f"{self.name} cannot evaluate a {family} model: lm-eval does not support these.",
                hint="The probes atlas, lama:..., bear, facts:... and hf:... can.",
            )

    def check_data(self) -> None:
        with tempfile.TemporaryDirectory(prefix="compressknow-") as folder, silence():
            build(self, Path(folder))

    def list_names(self) -> list[str] | None:
        """Return the domain and the name of a task; None for a group, and for lm-eval's tasks, which may be groups."""
        single = _is_task(find_entry(self.include, self.task)) if self.include else self.task in COLUMNS
        return [find_task_domain(self.task), self.task] if single else None

    def local_files(self) -> dict[str, Path]:
        """Return {split: path} of the local data."""
        if not (self.include and self.data):
            return {}
        return {split: self.data / file for split, file in list_data_files(find_entry(self.include, self.task)).items()}

    def fingerprint(self) -> str:
        values = [self.name, self.task, self.limit, self.seed, version("lm_eval")]
        digest = hashlib.sha256(json.dumps(values).encode())
        files = [(path, split) for split, path in self.local_files().items()]
        if self.include:
            paths = [path for path in sorted(self.include.rglob("*")) if path.is_file()]
            pairs = [(path, path.relative_to(self.include)) for path in paths]
            files = [(path, name.as_posix()) for path, name in pairs if _is_part(name)] + files
            files += [(path, path.name) for path in self._list_other_data()]
        for path, name in files:
            digest.update(json.dumps([name, compute_sha256(path)]).encode())
        return digest.hexdigest()

    def _list_other_data(self) -> list[Path]:
        """Return the local files that `datasets` finds by itself, and those of a group's tasks."""
        assert self.include is not None
        entry = find_entry(self.include, self.task)
        # The members of a group are known only once it is loaded, so count all tasks in its folder.
        entries = [entry] if _is_task(entry) else _read_index(self.include).task_index.values()
        names = dict.fromkeys(name for each in entries for name in _list_named_data(each.cfg or {}))
        known = {path.resolve() for path in self.local_files().values()}
        return [path for name in names for path in _find_local_data(name) if path.resolve() not in known]

    def run(self, loaded: LanguageModel) -> tuple[list[Answer], ProbeEntry]:
        """Run the task on a model with lm-eval, leaving the model, its tokenizer and random states unchanged; return
        the answers, and the probe's entry in ``probe.json``. Raises UnsupportedError for a masked model, or a task that
        does not mark each item as right or wrong, CompressknowError if its data is not available or cannot be read."""
        self.check_family(loaded.family)
        with tempfile.TemporaryDirectory(prefix="compressknow-") as folder, silence(), _seed_random(loaded, self.seed):
            return _evaluate(loaded, self, build(self, Path(folder)))


def _find_data(name: str, entry: Any, folders: list[Path]) -> Path | None:
    """Return the folder with the files that the YAML of a task folder names; None if it names none."""
    files = list(list_data_files(entry).values())
    if not files:
        return None
    for folder in [*folders, entry.yaml_path.parent]:
        if all((folder / file).is_file() for file in files):
            return Path(folder)
    raise UsageError(
        f"{name} needs {', '.join(files)}, which is neither in its task folder nor in --data.",
        hint=f"Put it next to {entry.yaml_path.name}, or into DIR and pass --data DIR.",
    )


def list_names_without(task: str) -> list[str] | None:
    """Return names of lm-eval's own tasks if none of their files contains the name `task`, in a second; otherwise None,
    since reading lm-eval's index takes most of a minute."""
    spec = importlib.util.find_spec("lm_eval")
    word = re.compile(rb"(?<!\w)" + re.escape(escape_name(task).encode()) + rb"(?!\w)")
    names: dict[str, None] = {}
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in (Path(folder) / "tasks").rglob("*.yaml"):
            content = path.read_bytes()
            if word.search(content):
                return None
            names |= dict.fromkeys(name.decode() for name in _DEFINED.findall(content))
    return list(names)


@cache
def read_own_tasks() -> Any:
    """Read lm-eval's index of its own tasks, of which there are thousands: this takes most of a minute."""
    return _read_index(None, include_defaults=True)


def _is_part(name: Path) -> bool:
    """Return whether a file may be part of a task: YAML, code, or an included file, which may have no suffix."""
    is_hidden = any(part.startswith(".") for part in name.parts)
    return name.suffix in (".yaml", ".yml", ".py") or not (name.suffix or is_hidden)


def find_entry(folder: Path, task: str) -> Any:
    """Return the entry of a task in lm-eval's index of a folder, with `cfg`, `kind` and `yaml_path`, or None."""
    return _read_index(folder).task_index.get(task)


def _is_task(entry: Any) -> bool:
    """Return whether an entry of the index exists, and is not a group or tag."""
    return entry is not None and entry.kind.name == "TASK"


def _read_index(folder: Path | None, include_defaults: bool = False) -> Any:
    with silence():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(folder) if folder else None, include_defaults=include_defaults)


def list_data_files(entry: Any) -> dict[str, str]:
    """Return {split: file} of the local files that a task's YAML names by a relative path."""
    config = (entry.cfg if entry else None) or {}
    files = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    pairs = {"train": files} if isinstance(files, str) else files
    return {
        split: file
        for split, file in (pairs.items() if isinstance(pairs, dict) else ())
        if isinstance(file, str) and "://" not in file and not Path(file).is_absolute()
    }


def _list_named_data(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield names, paths and patterns of data that a task, or a group for members that it changes, names."""
    members = config.get("task")
    members = [each for each in members if isinstance(each, dict)] if isinstance(members, list) else []
    for each in (config, *members):
        kwargs = each.get("dataset_kwargs") or {}
        queue = [each.get("dataset_path"), kwargs.get("data_dir"), kwargs.get("data_files")]
        while queue:
            value = queue.pop(0)
            if isinstance(value, str):
                yield value
            elif isinstance(value, list | dict):
                queue += value.values() if isinstance(value, dict) else value


def _find_local_data(name: str) -> list[Path]:
    """Return the files of a path or pattern; none for a name on the Hub, or for a file format."""
    if "://" in name or not ("/" in name or Path(name).suffix):
        return []
    # Not Path.glob, which fails on patterns that these libraries accept.
    paths = [Path(path) for path in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
    return [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]


def build(task: LmEvalTask, folder: Path) -> dict[str, Any]:
    """Build lm-eval's task objects with their data: {"tasks": {NAME: task}, ...}. `folder` is for temporary files.
    Raises CompressknowError if the data cannot be read, UnsupportedError for tasks that fail only at the end."""
    try:
        if task.include is None:
            built = dict(read_own_tasks().load(task.task))
        else:
            index = _read_index(task.include)
            entry = index.task_index.get(task.task)
            if _is_task(entry):
                built = dict(index.load(str(_write_override(task, entry, folder))))
            else:
                is_whole = _is_whole(index.task_index, task.task)
                built = dict((index if is_whole else _read_index(task.include, include_defaults=True)).load(task.task))
    except Exception as error:  # A task's YAML, code and data can raise anything.
        raise _explain(task, error) from error
    for name, each in built["tasks"].items():
        what = f"lm-eval's task {name}" + ("" if name == task.task else f", of {task.task},")
        if each.OUTPUT_TYPE == "loglikelihood_rolling":
            raise UnsupportedError(f"{what} measures perplexity: it has no answers that are right or wrong.")
        if getattr(each, "MULTIMODAL", False):
            raise UnsupportedError(f"{what} needs images or audio, which are not supported.")
        if getattr(each, "UNSAFE_CODE", False):
            raise UnsupportedError(f"{what} runs code that the model generates, which is not supported.")
    return built


def _is_whole(index: Mapping[str, Any], name: str) -> bool:
    """Return whether an index has a task, or a group with all of its tasks, none of which the group changes."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task") if index[name].kind.name == "GROUP" else []
    members = members if isinstance(members, list) else [members]
    return all(isinstance(member, str) and _is_whole(index, member) for member in members)


def _write_override(task: LmEvalTask, entry: Any, folder: Path) -> Path:
    """Write a YAML file that includes the task's YAML, with absolute paths to its data, and a cache in `folder`."""
    config: dict[str, Any] = {"include": str(entry.yaml_path.resolve())}
    if files := task.local_files():
        paths = {split: str(path.resolve()) for split, path in files.items()}
        kwargs = dict(entry.cfg["dataset_kwargs"])
        config["dataset_kwargs"] = kwargs | {"data_files": paths, "cache_dir": str(folder / "datasets")}
    path = folder / "task.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def _explain(task: LmEvalTask, error: Exception) -> CompressknowError:
    """Return our error for one of loading a task, with what to do."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    columns = COLUMNS.get(task.task)
    if isinstance(error, ConnectionError):
        if columns:
            hint = f"Put JSON Lines with {columns} into DIR/{task.task}.jsonl and pass --data DIR."
        else:
            hint = "Load it once where there is a network, or give a task folder whose YAML names local data_files."
        return CompressknowError(
            f"The data of {task.name} is not on this machine, and the Hub cannot be reached.", reason, hint
        )
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in reason:
        return UnsupportedError(
            f"{task.name} cannot be loaded.",
            "Its data set needs its own loading script, which the datasets library has not run since version 4.",
            "Give a task folder whose YAML names local data_files.",
        )
    if task.include == SHIPPED:
        reason, hint = f"{reason} ({task.task}.jsonl in {task.data})", f"Its rows must have {columns}."
    else:
        hint = "Its YAML, its code or its data are not valid for lm-eval."
    return CompressknowError(f"{task.name} cannot be loaded.", reason, hint)


def _evaluate(loaded: LanguageModel, task: LmEvalTask, built: Mapping[str, Any]) -> tuple[list[Answer], ProbeEntry]:
    lm = _wrap(loaded, built)
    results = _run_lm_eval(lm, task, built)
    answers, dropped, metrics, golds = collect_answers(task.name, built["tasks"], results["samples"])
    if not answers:
        raise CompressknowError(f"{task.name} marks no answers as right.", hint="Choose a split or file that has them.")
    # A group may have no version, of which lm-eval says "N/A"; its tasks have some.
    versions = {name: str(each) for name, each in results["versions"].items() if each not in (None, "N/A")}
    task_version = versions.get(task.task) or "+".join(sorted(set(versions.values()))) or "0"
    if files := task.local_files():
        data: Any = {path.name: compute_sha256(path) for path in files.values()}
    else:
        configs = [each.config for each in built["tasks"].values() if hasattr(each, "config")]
        data = ", ".join(dict.fromkeys(str(getattr(config, "dataset_path", None)) for config in configs))
    entry = ProbeEntry(
        protocol=f"{PROTOCOL}/{task_version}",
        fingerprint=task.fingerprint(),
        facts=sum(number["original"] for number in results["n-samples"].values()),
        asked=len(answers),
        dropped=dict(dropped),
        truncated=sum(count_truncated(results["samples"][name], lm) for name in built["tasks"]),
        chance=compute_chance(answer.choices for answer in answers),
        # Accuracy of always choosing the most frequent place.
        majority=max(golds.values()) / len(answers) if all(answer.choices for answer in answers) else None,
        limit=task.limit,
        seed=task.seed,
        source={
            "lm_eval": version("lm_eval"),
            "task": task.task,
            "data": data,
            "metrics": metrics,
            "limit takes": "the first items of each task",
        },
    )
    return answers, entry


def _run_lm_eval(lm: Any, task: LmEvalTask, built: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return lm-eval's results, including those of items. Raise CompressknowError if an item cannot be evaluated."""
    from lm_eval import evaluate

    # With the settings of `simple_evaluate`, which starts git and other programs that may print errors.
    for each in built["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=task.seed)
    try:
        results = evaluate(lm=lm, task_dict=built, limit=task.limit, bootstrap_iters=0, log_samples=True)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        # The YAML, code or metrics of a task are wrong, or the model cannot read an item.
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        if isinstance(error, AssertionError) and not str(error):
            reason = f"An answer is empty, or longer than the {lm.max_length} tokens that the model can read."
        raise CompressknowError(f"lm-eval cannot finish {task.name}.", reason) from error
    return dict(results)


def _wrap(loaded: LanguageModel, built: Mapping[str, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    # lm-eval holds the logits of a whole batch: 512 positions of 50,000 tokens are 0.1 GB per row in float32.
    rows = max(1, min(BATCH_SIZE, 2**28 // (512 * len(loaded.tokenizer))))
    # lm-eval caches the logits of equal tokens for all choices. If contexts are the choices, this saves nothing, and
    # uses wrong positions for items that differ only in where the continuation begins (0.4.13).
    cache = not any(getattr(each, "multiple_input", 0) for each in built["tasks"].values())
    model = loaded.model
    # HFLM ties the weights again; what is loaded is to be evaluated as it is.
    model.tie_weights = lambda *_, **__: None
    try:
        # A copy, since lm-eval may add a padding token.
        tokenizer = copy.deepcopy(loaded.tokenizer)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend=loaded.family, batch_size=rows, logits_cache=cache)
    finally:
        del model.tie_weights


@contextlib.contextmanager
def _seed_random(loaded: LanguageModel, seed: int) -> Iterator[None]:
    """Seed the random states, and restore them at the end."""
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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Silence output, progress bars, log lines and warnings; errors are raised anyway."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with silence_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
