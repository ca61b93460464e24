"""`lm-eval:TASK`: tasks of EleutherAI's lm-evaluation-harness, run by it on the loaded model.

Prompts and scores are lm-eval's own (no chat template, as many examples in the prompt as the task says); what it logs
of each item is kept. BoolQ, PIQA and WinoGrande run on local JSON lines where the user has them: see ``tasks_local/``.
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

# How samples become answers.
PROTOCOL = "lm-eval"
# Items at a time, fewer where the vocabulary is large.
BATCH_SIZE = 32
# Task files for lm-eval that read local JSON lines, and what the rows of those hold.
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
        """Open one of lm-eval's tasks or one of a task folder, which is searched first; nothing is downloaded yet.

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
        places = [data, data / "tasks"] if data else []
        if include and (entry := find_entry(include, task)):
            return replace(opened, include=include, data=_find_data(name, entry, places))
        if task in COLUMNS:
            place = next((place for place in places if (place / f"{task}.jsonl").is_file()), None)
            return replace(opened, include=SHIPPED, data=place) if place else opened
        others = list_names_without(task)
        if others is None and task not in read_own_tasks().all_tasks:
            others = read_own_tasks().all_tasks
        if others is not None:
            names = [*(_read_index(include).all_tasks if include else []), *COLUMNS, *others]
            near = list(dict.fromkeys(difflib.get_close_matches(task, names, n=3)))
            suggestion = f"Did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(f"lm-eval has no task {task!r}.", hint=f"{suggestion}`lm-eval ls tasks` lists all.")
        return opened


@dataclass(frozen=True)
class LmEvalTask(Task):
    """Task of lm-eval, or group of tasks.

    Attributes
    ----------
    name, task : as the user names it, ``lm-eval:boolq``, and as lm-eval does.
    include : the folder of the task's YAML, the shipped one or the user's; None for lm-eval's own tasks.
    data : the folder of the local files that the YAML names; None if it names none.
    limit : only the first so many items of each task, as lm-eval takes them; None for all.
    seed : for the examples in prompts and for answers that are sampled.
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
        """Return the domain and the name of a task; None of a group, and of lm-eval's own tasks that may be groups."""
        single = _is_task(find_entry(self.include, self.task)) if self.include else self.task in COLUMNS
        return [find_task_domain(self.task), self.task] if single else None

    def local_files(self) -> dict[str, Path]:
        """Return {split: path} of the local data."""
        if not (self.include and self.data):
            return {}
        return {split: self.data / file for split, file in list_data_files(find_entry(self.include, self.task)).items()}

    def fingerprint(self) -> str:
        decides = [self.name, self.task, self.limit, self.seed, version("lm_eval")]
        digest = hashlib.sha256(json.dumps(decides).encode())
        files = [(path, split) for split, path in self.local_files().items()]
        if self.include:
            paths = [path for path in sorted(self.include.rglob("*")) if path.is_file()]
            named = [(path, path.relative_to(self.include)) for path in paths]
            files = [(path, name.as_posix()) for path, name in named if _is_part(name)] + files
            files += [(path, path.name) for path in self._list_other_data()]
        for path, name in files:
            digest.update(json.dumps([name, compute_sha256(path)]).encode())
        return digest.hexdigest()

    def _list_other_data(self) -> list[Path]:
        """Return the local files that `datasets` finds by itself, and those of a group's tasks."""
        assert self.include is not None
        entry = find_entry(self.include, self.task)
        # Which tasks belong to a group, its load tells; here those of its folder are all taken for its own.
        entries = [entry] if _is_task(entry) else _read_index(self.include).task_index.values()
        named = dict.fromkeys(name for each in entries for name in _list_named_data(each.cfg or {}))
        known = {path.resolve() for path in self.local_files().values()}
        return [path for name in named for path in _find_local_data(name) if path.resolve() not in known]

    def run(self, loaded: LanguageModel) -> tuple[list[Answer], ProbeEntry]:
        """Have lm-eval run it on a model; gives the answers, and the probe's entry in ``probe.json``.

        The model is neither copied nor moved nor changed, the tokenizer is left as it is, and so are all random states.

        Raises
        ------
        UnsupportedError : a masked model, or a task that does not say right or wrong of each item.
        CompressknowError : the task's data cannot be had or read.
        """
        self.check_family(loaded.family)
        with tempfile.TemporaryDirectory(prefix="compressknow-") as folder, silence(), _seed_random(loaded, self.seed):
            return _evaluate(loaded, self, build(self, Path(folder)))


def _find_data(name: str, entry: Any, places: list[Path]) -> Path | None:
    """Return the folder that holds the files that the YAML of a task folder names; None if it names none."""
    files = list(list_data_files(entry).values())
    if not files:
        return None
    for place in [*places, entry.yaml_path.parent]:
        if all((place / file).is_file() for file in files):
            return Path(place)
    raise UsageError(
        f"{name} needs {', '.join(files)}, which neither its task folder nor --data holds.",
        hint=f"Put it next to {entry.yaml_path.name}, or into DIR and pass --data DIR.",
    )


def list_names_without(task: str) -> list[str] | None:
    """Return names of lm-eval's own tasks where no file of these holds the name `task`; else None.

    It reads the files as they are: a second, where the index takes most of a minute.
    """
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
    """Read lm-eval's index of its own tasks. They are thousands: it takes most of a minute."""
    return _read_index(None, own=True)


def _is_part(name: Path) -> bool:
    """Return whether a file may be a part of a task: YAML, code, and included files, which may have no suffix."""
    is_hidden = any(part.startswith(".") for part in name.parts)
    return name.suffix in (".yaml", ".yml", ".py") or not (name.suffix or is_hidden)


def find_entry(folder: Path, task: str) -> Any:
    """Return the entry of a task in lm-eval's index of a folder: `cfg`, `kind`, `yaml_path`. None if it has none."""
    return _read_index(folder).task_index.get(task)


def _is_task(entry: Any) -> bool:
    """Return whether an entry of the index is there, and no group or tag."""
    return entry is not None and entry.kind.name == "TASK"


def _read_index(folder: Path | None, own: bool = False) -> Any:
    with silence():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(folder) if folder else None, include_defaults=own)


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
    """Yield what a task names as its data, and a group for members that it changes: names, paths and patterns."""
    members = config.get("task")
    for each in (config, *(one for one in (members if isinstance(members, list) else []) if isinstance(one, dict))):
        kwargs = each.get("dataset_kwargs") or {}
        left = [each.get("dataset_path"), kwargs.get("data_dir"), kwargs.get("data_files")]
        while left:
            value = left.pop(0)
            if isinstance(value, str):
                yield value
            elif isinstance(value, list | dict):
                left += value.values() if isinstance(value, dict) else value


def _find_local_data(name: str) -> list[Path]:
    """Return the files that a path or a pattern is of; none of a name on the Hub, or of a kind of file."""
    if "://" in name or not ("/" in name or Path(name).suffix):
        return []
    # Not Path.glob: it fails on patterns that these libraries take.
    found = [Path(path) for path in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
    return [file for path in found for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]


def build(task: LmEvalTask, folder: Path) -> dict[str, Any]:
    """Build lm-eval's task objects, with their data: {"tasks": {NAME: task}, ...}. `folder` is for files of this run.
    Raises CompressknowError if the data cannot be had or read, UnsupportedError for tasks that would fail only after
    the model has answered."""
    try:
        if task.include is None:
            built = dict(read_own_tasks().load(task.task))
        else:
            index = _read_index(task.include)
            entry = index.task_index.get(task.task)
            if _is_task(entry):
                built = dict(index.load(str(_write_override(task, entry, folder))))
            else:
                whole = _is_whole(index.task_index, task.task)
                built = dict((index if whole else _read_index(task.include, own=True)).load(task.task))
    except Exception as error:  # a task's own YAML, code and data may raise anything
        raise _explain(task, error) from error
    for name, one in built["tasks"].items():
        what = f"lm-eval's task {name}" + ("" if name == task.task else f", of {task.task},")
        if one.OUTPUT_TYPE == "loglikelihood_rolling":
            raise UnsupportedError(f"{what} measures perplexity: it has no answers that are right or wrong.")
        if getattr(one, "MULTIMODAL", False):
            raise UnsupportedError(f"{what} is not of text alone.")
        if getattr(one, "UNSAFE_CODE", False):
            raise UnsupportedError(f"{what} runs code that the model writes, which is not done here.")
    return built


def _is_whole(index: Mapping[str, Any], name: str) -> bool:
    """Return whether an index holds a task, and all tasks of a group; those that a group changes are not looked up."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task") if index[name].kind.name == "GROUP" else []
    members = members if isinstance(members, list) else [members]
    return all(isinstance(one, str) and _is_whole(index, one) for one in members)


def _write_override(task: LmEvalTask, entry: Any, folder: Path) -> Path:
    """Write a YAML file that includes the task's own and says where its data lies; tables made of it go to `folder`."""
    config: dict[str, Any] = {"include": str(entry.yaml_path.resolve())}
    if files := task.local_files():
        paths = {split: str(path.resolve()) for split, path in files.items()}
        kwargs = dict(entry.cfg["dataset_kwargs"])
        config["dataset_kwargs"] = kwargs | {"data_files": paths, "cache_dir": str(folder / "datasets")}
    path = folder / "task.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def _explain(task: LmEvalTask, error: Exception) -> CompressknowError:
    """Return an error of loading in words that say what to do."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    columns = COLUMNS.get(task.task)
    if isinstance(error, ConnectionError):
        if columns:
            hint = f"Put JSON lines with {columns} into DIR/{task.task}.jsonl and pass --data DIR."
        else:
            hint = "Load it once where there is a network, or give a task folder whose YAML names local data_files."
        return CompressknowError(
            f"The data of {task.name} is not on this machine, and the Hub cannot be reached.", reason, hint
        )
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in reason:
        return UnsupportedError(
            f"{task.name} cannot be loaded.",
            "Its data set comes as a script, which the datasets library has not run since version 4.",
            "Give a task folder whose YAML names local data_files.",
        )
    if task.include == SHIPPED:
        reason, hint = f"{reason} ({task.task}.jsonl in {task.data})", f"Its rows hold {columns}."
    else:
        hint = "Its YAML, its code or its data do not suit lm-eval."
    return CompressknowError(f"{task.name} cannot be loaded.", reason, hint)


def _evaluate(loaded: LanguageModel, task: LmEvalTask, built: Mapping[str, Any]) -> tuple[list[Answer], ProbeEntry]:
    lm = _wrap(loaded, built)
    results = _run_lm_eval(lm, task, built)
    answers, dropped, metrics, golds = collect_answers(task.name, built["tasks"], results["samples"])
    if not answers:
        raise CompressknowError(f"{task.name} marks no answers as right.", hint="Choose a split or file that has them.")
    versions = results["versions"]
    own = versions.get(task.task)
    if own is None:
        # For a group without a version, those of its tasks.
        own = "+".join(sorted({str(one) for one in versions.values() if one is not None})) or "0"
    if files := task.local_files():
        data: Any = {path.name: compute_sha256(path) for path in files.values()}
    else:
        configs = [one.config for one in built["tasks"].values() if hasattr(one, "config")]
        data = ", ".join(dict.fromkeys(str(getattr(config, "dataset_path", None)) for config in configs))
    entry = ProbeEntry(
        protocol=f"{PROTOCOL}/{own}",
        fingerprint=task.fingerprint(),
        facts=sum(number["original"] for number in results["n-samples"].values()),
        asked=len(answers),
        dropped=dict(dropped),
        truncated=sum(count_truncated(results["samples"][name], lm) for name in built["tasks"]),
        chance=compute_chance(answer.choices for answer in answers),
        # Accuracy of always choosing the most frequent place.
        majority=max(golds.values()) / len(answers) if golds.total() == len(answers) else None,
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
    """Return lm-eval's results, each item's among them. Raise CompressknowError if an item cannot be evaluated."""
    from lm_eval import evaluate

    # Not `simple_evaluate`: it starts git and other programs, whose complaints would be seen. Its settings are these.
    for one in built["tasks"].values():
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=task.seed)
    try:
        results = evaluate(lm=lm, task_dict=built, limit=task.limit, bootstrap_iters=0, log_samples=True)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        # Raised by an item that does not suit the YAML, the code or the model, or by figures over all items.
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        if isinstance(error, AssertionError) and not str(error):
            reason = f"An answer is empty, or longer than the {lm.max_length} tokens that the model takes."
        raise CompressknowError(f"lm-eval cannot finish {task.name}.", reason) from error
    return dict(results)


def _wrap(loaded: LanguageModel, built: Mapping[str, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    # lm-eval keeps the logits of a whole batch: 512 positions of 50,000 tokens are 0.1 GB a row in float32.
    rows = max(1, min(BATCH_SIZE, 2**28 // (512 * len(loaded.tokenizer))))
    # lm-eval runs the same tokens once for all choices. Where choices are contexts, that saves nothing, and takes the
    # wrong positions for items whose tokens are the same but for where the continuation begins (0.4.13).
    cache = not any(getattr(one, "multiple_input", 0) for one in built["tasks"].values())
    model = loaded.model
    # HFLM ties the weights again; what is loaded is to be evaluated as it is.
    model.tie_weights = lambda *_, **__: None
    try:
        # lm-eval gives a tokenizer without a padding token one: to a copy.
        tokenizer = copy.deepcopy(loaded.tokenizer)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend=loaded.family, batch_size=rows, logits_cache=cache)
    finally:
        del model.tie_weights


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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print nothing, no bars, no log lines, no warnings: what matters in them is checked and raised."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with silence_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
