"""Where the cells of a study run: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compressknow.errors import CompressknowError, OutputError
from compressknow.probe.answers import Answers
from compressknow.probe.facts import Probe
from compressknow.probe.progress import Bar, staged
from compressknow.probe.tasks import Task
from compressknow.study.answering import Subject
from compressknow.study.grid import Cell
from compressknow.study.results import CellResult


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
    """Cells to ask: `folder` keeps their answers, `original` is the reference."""

    subject: Subject
    cells: Sequence[Cell]
    probes: Sequence[Probe | Task]
    folder: Path
    original: Answers


# Results as they come; what the folder holds already is not asked again.
Run = Callable[[Batch], Generator[CellResult]]


@contextmanager
def runner(ray: RayOptions | None, bar: Bar | None) -> Iterator[Run]:
    """What runs batches: here, one cell after the other, or on the cluster for as long as the context lasts.

    Raises CompressknowError where Ray is missing or the cluster does not answer.
    """
    if ray is None:
        yield lambda batch: (
            # The original has been asked before.
            _here(batch, cell, _numbered(bar, number, len(batch.cells) + 1))
            for number, cell in enumerate(batch.cells, start=2)
        )
        return
    from compressknow.study.cluster import connected

    with connected(ray) as run:
        yield run


def _numbered(bar: Bar | None, number: int, of: int) -> Bar | None:
    """A cell that comes alone is one of a search, whose number nobody knows."""
    return staged(bar, number=number, of=of) if of > 2 else bar


def _here(batch: Batch, cell: Cell, bar: Bar | None) -> CellResult:
    try:
        return CellResult(cell, batch.subject.ask_cell(cell, batch.probes, batch.folder, batch.original, bar))
    except OutputError:
        # A full disk, a folder that cannot be written: each cell would be evaluated in vain. The study resumes.
        raise
    except Exception as error:
        # Out of memory, or whatever a model's code raises: the other cells do not depend on it.
        return CellResult(cell, why=reason(error))


def reason(error: BaseException) -> str:
    """Why a cell failed, in one line."""
    if isinstance(error, CompressknowError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
