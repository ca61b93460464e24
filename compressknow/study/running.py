"""Where the cells of a study run: in this process, or on a Ray cluster."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CompressknowError, OutputError, UnsupportedError
from compressknow.base.files import write_whole
from compressknow.base.progress import Listener, relabel_progress
from compressknow.evaluate.answers import RECORD, Answers
from compressknow.evaluate.handle import Settings
from compressknow.evaluate.sources import Opened
from compressknow.study.cells import StudyModel, folder_of
from compressknow.study.folder import CellResult
from compressknow.study.grid import Cell

if TYPE_CHECKING:
    from compressknow.compress.calibrate.text import CalibrationText
    from compressknow.compress.recipe import Recipe
    from compressknow.compress.steps import Calibration


@dataclass(frozen=True)
class RayOptions:
    """A Ray cluster for a study's cells.

    Attributes
    ----------
    address : of the cluster (``auto``, ``ray://HOST:10001``, ``HOST:6379``), or ``local`` for one on this machine.
    num_cpus, num_gpus : of each task; a task computes with as many threads.
    """

    address: str = "auto"
    num_cpus: float = 1
    num_gpus: float = 0


@dataclass(frozen=True)
class Batch:
    """Cells to evaluate: `folder` keeps their answers, `original` is the reference."""

    study_model: StudyModel
    cells: Sequence[Cell]
    probes: Sequence[Opened]
    folder: Path
    original: Answers


# Results as they come; what the folder holds already is not evaluated again.
Run = Callable[[Batch], Generator[CellResult]]


@contextmanager
def runner(ray: RayOptions | None, on_progress: Listener | None) -> Iterator[Run]:
    """What runs batches: here, one cell after the other, or on the cluster for as long as the context lasts.

    Raises CompressknowError where the cluster does not answer.
    """
    if ray is None:
        yield lambda batch: (
            # The original has been evaluated before.
            _here(batch, cell, relabel_progress(on_progress, number=number, of=len(batch.cells) + 1))
            for number, cell in enumerate(batch.cells, start=2)
        )
        return

    with connected(ray) as run:
        yield run


def _here(batch: Batch, cell: Cell, on_progress: Listener | None) -> CellResult:
    try:
        return CellResult(
            cell,
            batch.original,
            batch.study_model.evaluate_cell(cell, batch.probes, batch.folder, batch.original, on_progress),
        )
    except OutputError:
        # A full disk, a folder that cannot be written: each cell would be evaluated in vain. The study resumes.
        raise
    except Exception as error:
        # Out of memory, or whatever a model's code raises: the other cells do not depend on it.
        return _failed(batch, cell, error)


def _failed(batch: Batch, cell: Cell, error: BaseException) -> CellResult:
    return CellResult(cell, batch.original, why=reason(error), refused=isinstance(error, UnsupportedError))


def reason(error: BaseException) -> str:
    """Why a cell failed, in one line."""
    if isinstance(error, CompressknowError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


LOST_WORKERS = 4
SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class Job:
    """A cell, as a worker gets it."""

    model: str
    revision: str | None
    sha256: str
    cell: Cell
    settings: Settings
    threads: int


Files = dict[str, bytes]


@contextmanager
def connected(where: RayOptions) -> Iterator[Run]:
    """What runs batches on a cluster. Raises CompressknowError where no cluster answers."""
    ray = _connect(where)
    try:
        yield partial(_results, ray, where)
    finally:
        ray.shutdown()


def _results(ray: Any, where: RayOptions, batch: Batch) -> Generator[CellResult]:
    original = batch.original
    shared = {probe.name: (ray.put(probe), ray.put(_only(original, probe.name))) for probe in batch.probes}
    run = ray.remote(num_cpus=where.num_cpus, num_gpus=where.num_gpus, max_retries=LOST_WORKERS)(_run)
    texts = _Texts(ray, batch.study_model)
    pending: dict[Any, tuple[Cell, str]] = {}
    for cell in batch.cells:
        for probe in batch.probes:
            if not batch.study_model.is_answered(cell, probe, batch.folder, original):
                job = _job(batch.study_model, cell, where)
                pending[run.remote(job, *shared[probe.name], texts.of(cell.recipe))] = (cell, probe.name)
    yield from _collect(ray, batch, pending)


class _Texts:
    """Calibration texts for workers, each made once here and handed over."""

    def __init__(self, ray: Any, study_model: StudyModel) -> None:
        self._ray, self._maker = ray, study_model.maker
        self._shared: dict[Calibration, Any] = {}

    def of(self, recipe: Recipe) -> Any:
        """None where there is none; or where it cannot be made: the worker says why, and its cell alone fails."""
        calibration = recipe.calibration
        if calibration is not None and calibration not in self._shared:
            try:
                self._shared[calibration] = self._ray.put(self._maker.text(self._maker.plan(recipe)))
            except CompressknowError:
                return None
        return None if calibration is None else self._shared[calibration]


def _collect(ray: Any, batch: Batch, pending: dict[Any, tuple[Cell, str]]) -> Generator[CellResult]:
    """A cell's result once all of its probes are answered."""
    failed: dict[Cell, BaseException] = {}
    left = Counter(cell for cell, _ in pending.values())
    done = [cell for cell in batch.cells if not left[cell]]
    while done or pending:
        for cell in done:
            yield _result(batch, cell, failed.get(cell))
        done = []
        if pending:
            (ready, *_), _ = ray.wait(list(pending), num_returns=1)
            cell, probe = pending.pop(ready)
            try:
                _store(batch.folder / batch.study_model.folder_of(cell) / folder_of(probe), ray.get(ready))
            except Exception as error:
                failed.setdefault(cell, getattr(error, "cause", None) or error)
            left[cell] -= 1
            done = [] if left[cell] else [cell]


def _result(batch: Batch, cell: Cell, failed: BaseException | None) -> CellResult:
    if failed is not None:
        return _failed(batch, cell, failed)
    return CellResult(
        cell, batch.original, batch.study_model.evaluate_cell(cell, batch.probes, batch.folder, batch.original)
    )


def _connect(where: RayOptions) -> Any:
    import ray

    try:
        _knock(where.address)
        if where.address == "local":
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        else:
            ray.init(address=where.address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise _no_cluster(where, error) from error
    return ray


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()


def _no_cluster(where: RayOptions, error: Exception) -> CompressknowError:
    return CompressknowError(
        f"No Ray cluster answers at {where.address}.",
        why=reason(error),
        hint="Start one (ray start --head) and give its address, or leave out --ray.",
    )


def _job(study_model: StudyModel, cell: Cell, where: RayOptions) -> Job:
    located = study_model.original.located
    # A hub id is downloaded by the worker; a folder must be on storage that it shares.
    model = located.name if located.revision else str(located.path.resolve())
    threads = max(1, round(where.num_cpus))
    original = study_model.original
    return Job(model, located.revision, original.sha256, cell, original.settings, threads)


def _run(job: Job, probe: Opened, reference: Answers, text: CalibrationText | None) -> Files:
    """In a worker: the files of the answers folder."""
    import torch

    torch.set_num_threads(job.threads)
    study_model = _subject(job.model, job.settings, job.revision)
    if study_model.original.sha256 != job.sha256:
        raise CompressknowError(f"{job.model} is another model on this worker.", hint="Share one storage with all.")
    if text is not None and (calibration := job.cell.recipe.calibration):
        study_model.maker.take(calibration, text)
    with tempfile.TemporaryDirectory() as folder:
        study_model.evaluate_cell(job.cell, [probe], Path(folder), reference)
        answers = Path(folder) / study_model.folder_of(job.cell) / folder_of(probe.name)
        return {path.name: path.read_bytes() for path in (*sorted(answers.glob("*.parquet")), answers / RECORD)}


@cache
def _subject(model: str, settings: Settings, revision: str | None) -> StudyModel:
    """Opened once a worker."""
    return StudyModel(model, settings, revision=revision, keep_in=Path(tempfile.gettempdir()))


def _store(folder: Path, files: Files) -> None:
    """The answers first: without its record a folder counts as not there."""
    folder.mkdir(parents=True, exist_ok=True)
    # An old record would not be of the new answers.
    (folder / RECORD).unlink(missing_ok=True)
    for name, content in sorted(files.items(), key=lambda file: file[0] == RECORD):
        write_whole(folder / name, content)


def _only(answers: Answers, probe: str) -> Answers:
    return answers.only([probe])
