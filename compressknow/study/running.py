"""Run the cells of a study in this process, or on a Ray cluster."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from compressknow.base.errors import CompressknowError, OutputError, UnsupportedError, UsageError
from compressknow.base.files import write_whole
from compressknow.base.format import count
from compressknow.base.progress import Listener, Pace, Stage, begin_stages, relabel_progress, report_progress
from compressknow.compress.calibrate.text import CalibrationText
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Calibration
from compressknow.evaluate.answers import RECORD, Answers
from compressknow.evaluate.run import count_facts
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Opened
from compressknow.study.cells import CellResult, StudyModel, name_folder
from compressknow.study.grid import Cell

LOCAL = "local"
LOST_WORKERS = 4
SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class RayOptions:
    """Ray cluster for a study's cells.

    Attributes
    ----------
    address : address of the cluster (``auto``, ``ray://HOST:10001``, ``HOST:6379``), or ``local`` to start one here.
    num_cpus, num_gpus : resources of each task, which runs as many threads as CPUs.
    """

    address: str = "auto"
    num_cpus: float = 1
    num_gpus: float = 0


@dataclass(frozen=True)
class CellBatch:
    """Cells to evaluate: `folder` keeps their answers, `original` is the reference."""

    study_model: StudyModel
    cells: Sequence[Cell]
    probes: Sequence[Opened]
    folder: Path
    original: Answers


# Yields results as they come; answers that the folder has are not evaluated again.
Run = Callable[[CellBatch], Generator[CellResult]]


@contextmanager
def open_runner(ray: RayOptions | None, on_progress: Listener | None) -> Iterator[Run]:
    """Yield a function that runs batches: cell by cell in this process, or on the cluster while the context lasts.
    Raises CompressknowError if the cluster does not answer, UsageError if no task could ever start there."""
    if ray is None:
        yield partial(_run_here, on_progress)
        return
    cluster = _start_ray(ray)
    try:
        if ray.address == LOCAL:
            _check_resources(cluster, ray)
        yield partial(_run_on_ray, cluster, ray, on_progress)
    finally:
        cluster.shutdown()


def _evaluate(batch: CellBatch, cell: Cell, on_progress: Listener | None = None) -> CellResult:
    answers = batch.study_model.evaluate_cell(cell, batch.probes, batch.folder, batch.original, on_progress)
    return CellResult(cell, batch.original, answers)


def _run_here(on_progress: Listener | None, batch: CellBatch) -> Generator[CellResult]:
    # Number 1 is the original, which was evaluated before.
    for number, cell in enumerate(batch.cells, start=2):
        try:
            result = _evaluate(batch, cell, relabel_progress(on_progress, number=number, of=len(batch.cells) + 1))
        except OutputError:
            # A full disk or an unwritable folder would fail every cell. The study can be resumed.
            raise
        except Exception as error:
            # Out of memory, or any error of a model's code: other cells may still succeed.
            result = _fail(batch, cell, error)
        yield result


def _fail(batch: CellBatch, cell: Cell, error: BaseException) -> CellResult:
    return CellResult(cell, batch.original, why=describe_error(error), refused=isinstance(error, UnsupportedError))


def describe_error(error: BaseException) -> str:
    """Return why a cell failed, in one line."""
    if isinstance(error, CompressknowError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _run_on_ray(ray: Any, where: RayOptions, on_progress: Listener | None, batch: CellBatch) -> Generator[CellResult]:
    model, maker = batch.study_model.original, batch.study_model.maker
    # A hub id is downloaded by the worker; a folder must be on storage that it shares.
    source, revision = batch.study_model.source
    original = (source if isinstance(source, str) else str(source.resolve()), revision, model.sha256, model.settings)
    shared = {probe.name: (ray.put(probe), ray.put(batch.original.only([probe.name]))) for probe in batch.probes}
    run = ray.remote(num_cpus=where.num_cpus, num_gpus=where.num_gpus, max_retries=LOST_WORKERS)(_run)
    begin = begin_stages(on_progress, model.located.name)
    texts: dict[Calibration | None, Any] = {None: None}

    def share_text(recipe: Recipe) -> Any:
        """Return the calibration text of a recipe, made here; None if it has none, or making it fails: then the worker
        reports why, and only its cell fails."""
        if recipe.calibration not in texts:
            try:
                texts[recipe.calibration] = ray.put(maker.get_text(maker.plan(recipe), begin))
            except Exception:  # Even out of memory: the worker may have more.
                return None
        return texts[recipe.calibration]

    pending: dict[Any, tuple[Cell, Opened]] = {}
    for cell in batch.cells:
        for probe in batch.probes:
            if not batch.study_model.is_answered(cell, probe, batch.folder, batch.original):
                threads = max(1, round(where.num_cpus))
                job = run.remote(original, threads, cell, *shared[probe.name], share_text(cell.recipe))
                pending[job] = (cell, probe)
    yield from _collect(ray, batch, pending, on_progress)


def _collect(
    ray: Any, batch: CellBatch, pending: dict[Any, tuple[Cell, Opened]], on_progress: Listener | None
) -> Generator[CellResult]:
    """Yield a cell's result once all of its probes are answered; after each, the stage of all facts restarts."""
    failed: dict[Cell, BaseException] = {}
    remaining = Counter(cell for cell, _ in pending.values())
    yield from (_evaluate(batch, cell) for cell in batch.cells if not remaining[cell])
    total = count_facts([probe for _, probe in pending.values()])
    cells = f"{count(len(remaining))} cell{'s' * (len(remaining) != 1)} on Ray"
    stage = Stage("evaluate", cells, ", ".join(probe.name for probe in batch.probes))
    pace = Pace(total)
    while pending:
        cell = None
        with report_progress(on_progress, stage) as advance:
            while cell is None or remaining[cell]:
                if total:
                    advance(total - count_facts([probe for _, probe in pending.values()]), total, pace.left)
                (ready, *_), _ = ray.wait(list(pending), num_returns=1)
                cell, probe = pending.pop(ready)
                try:
                    files = ray.get(ready)
                except Exception as error:
                    failed.setdefault(cell, getattr(error, "cause", None) or error)
                else:
                    _store(batch.folder / batch.study_model.name_folder(cell) / name_folder(probe.name), files)
                pace.add(count_facts([probe]))
                remaining[cell] -= 1
        yield _fail(batch, cell, failed[cell]) if cell in failed else _evaluate(batch, cell)


def _start_ray(where: RayOptions) -> Any:
    import ray

    try:
        host, _, port = where.address.removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():
            # If nothing listens there, Ray itself would retry for minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
        place = {"include_dashboard": False} if where.address == LOCAL else {"address": where.address}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **place)
    except Exception as error:
        raise CompressknowError(
            f"No Ray cluster answers at {where.address}.",
            why=describe_error(error),
            hint="Start one (ray start --head) and pass its address, or leave out --ray.",
        ) from error
    return ray


def _check_resources(ray: Any, where: RayOptions) -> None:
    """Raise UsageError if a task needs more than this machine has: Ray would wait for another machine forever."""
    resources = ray.cluster_resources()
    for option, name, needed in (("cpus", "CPU", where.num_cpus), ("gpus", "GPU", where.num_gpus)):
        if needed > (has := resources.get(name, 0)):
            raise UsageError(f"--num-{option} {needed:g}: Ray finds {has:g} on this machine.", hint="Give a task less.")


def _run(
    original: tuple[str, str | None, str, Settings],
    threads: int,
    cell: Cell,
    probe: Opened,
    reference: Answers,
    text: CalibrationText | None,
) -> dict[str, bytes]:
    """Return the answers' files, in a worker; `original` is a path or Hub id, its revision, SHA-256 and settings."""
    import torch

    torch.set_num_threads(threads)
    model, revision, sha256, settings = original
    study_model = _open_model(model, settings, revision)
    if study_model.original.sha256 != sha256:
        raise CompressknowError(f"{model} is another model on this worker.", hint="Use storage that all workers share.")
    if text is not None and (calibration := cell.recipe.calibration):
        study_model.maker.use_text(calibration, text)
    with tempfile.TemporaryDirectory() as folder:
        study_model.evaluate_cell(cell, [probe], Path(folder), reference)
        answers = Path(folder) / study_model.name_folder(cell) / name_folder(probe.name)
        return {path.name: path.read_bytes() for path in (*sorted(answers.glob("*.parquet")), answers / RECORD)}


@cache
def _open_model(model: str, settings: Settings, revision: str | None) -> StudyModel:
    """Open the original, once per worker."""
    return StudyModel(model, settings, revision=revision, keep_in=Path(tempfile.gettempdir()))


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the answers first: a folder without its record counts as missing."""
    # An old record would not match the new answers.
    (folder / RECORD).unlink(missing_ok=True)
    for name, content in sorted(files.items(), key=lambda file: file[0] == RECORD):
        write_whole(folder / name, content)
