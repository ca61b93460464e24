"""Finding lm-eval's tasks and task folders, and building its task objects with their data."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compressknow.base.errors import CompressknowError, UnsupportedError
from compressknow.base.files import as_text
from compressknow.base.progress import quiet

# Task files for lm-eval that read local JSON lines, and what the rows of those hold.
SHIPPED = Path(__file__).parent / "tasks_local"
COLUMNS = {
    "boolq": "passage, question, label (1 for yes)",
    "piqa": "goal, sol1, sol2, label (0 or 1)",
    "winogrande": "sentence, option1, option2, answer (1 or 2)",
}
_LOGGERS = ("lm_eval", "datasets", "evaluate", "accelerate", "huggingface_hub", "httpx", "fsspec")


_DEFINED = re.compile(rb"""^(?:task|group|tag):[ \t]*["']?([\w.+-]+)""", re.MULTILINE)


@dataclass(frozen=True)
class TaskFiles:
    """Name of a task, and the files that it is made of.

    Attributes
    ----------
    name : as the user names it: ``lm-eval:boolq``.
    task : lm-eval's name for it.
    include : the folder of the task's YAML, the shipped one or the user's; None for lm-eval's own tasks.
    data : the folder of the local files that the YAML names; None where it names none.
    """

    name: str
    task: str
    include: Path | None = None
    data: Path | None = None

    def local_files(self) -> dict[str, Path]:
        """Return {split: path} of the local data."""
        if not (self.include and self.data):
            return {}
        return {split: self.data / file for split, file in list_data_files(find_entry(self.include, self.task)).items()}


def list_names_without(task: str) -> list[str] | None:
    """Return names of lm-eval's own tasks where none of their files holds the name `task`, so that none has it; else
    None.

    It reads the files as they are: a second, where the index takes most of a minute.
    """
    spec = importlib.util.find_spec("lm_eval")
    word = re.compile(rb"(?<!\w)" + re.escape(as_text(task).encode()) + rb"(?!\w)")
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


def find_entry(folder: Path, task: str) -> Any:
    """Return the entry of a task in lm-eval's index of a folder: `cfg`, `kind`, `yaml_path`. None where it has none."""
    return _read_index(folder).task_index.get(task)


def list_names(folder: Path) -> list[str]:
    """List the tasks of a task folder, groups and tags among them."""
    return list(_read_index(folder).all_tasks)


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


def build(task: TaskFiles, folder: Path) -> dict[str, Any]:
    """Build lm-eval's task objects, with their data: {"tasks": {NAME: task}, ...}. `folder` is for files of this run.

    Raises CompressknowError where the data cannot be had or read, UnsupportedError for tasks that `run_task`
    cannot run.
    """
    entry = find_entry(task.include, task.task) if task.include else None
    try:
        if entry and entry.kind.name == "TASK":
            built = dict(_read_index(task.include).load(str(_write_override(task, entry, folder))))
        else:
            built = dict(_choose_index(task).load(task.task))
    except Exception as error:  # whatever a task's own YAML, code and data bring forth
        raise _explain(task, error) from error
    for name, one in built["tasks"].items():
        _check_supported(f"lm-eval's task {name}" + ("" if name == task.task else f", of {task.task},"), one)
    return built


def _choose_index(task: TaskFiles) -> Any:
    """Return an index that holds a task and all that it is made of."""
    if task.include is None:
        return read_own_tasks()
    index = _read_index(task.include)
    return index if _is_whole(index.task_index, task.task) else _read_index(task.include, own=True)


def _is_whole(index: Mapping[str, Any], name: str) -> bool:
    """Return whether an index holds a task, and all tasks of a group; those that a group changes are not looked up."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task") if index[name].kind.name == "GROUP" else []
    members = members if isinstance(members, list) else [members]
    return all(isinstance(one, str) and _is_whole(index, one) for one in members)


def _write_override(task: TaskFiles, entry: Any, folder: Path) -> Path:
    """Write a YAML file that includes the task's own and says where its data lies; tables made of it go to `folder`."""
    config: dict[str, Any] = {"include": str(entry.yaml_path.resolve())}
    if files := task.local_files():
        paths = {split: str(path.resolve()) for split, path in files.items()}
        kwargs = dict(entry.cfg["dataset_kwargs"])
        config["dataset_kwargs"] = kwargs | {"data_files": paths, "cache_dir": str(folder / "datasets")}
    path = folder / "task.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def _check_supported(what: str, built: Any) -> None:
    """Refuse what would fail only after the model has answered."""
    if built.OUTPUT_TYPE == "loglikelihood_rolling":
        raise UnsupportedError(f"{what} measures perplexity: it has no answers that are right or wrong.")
    if getattr(built, "MULTIMODAL", False):
        raise UnsupportedError(f"{what} is not of text alone.")
    if getattr(built, "UNSAFE_CODE", False):
        raise UnsupportedError(f"{what} runs code that the model writes, which is not done here.")


def _explain(task: TaskFiles, error: Exception) -> CompressknowError:
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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print nothing, no bars, no log lines, no warnings: what matters in them is checked and raised."""
    import datasets

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
