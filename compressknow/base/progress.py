"""Progress of long work in one form, and other libraries' noise kept away from the terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import threading
import time
import warnings
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

from compressknow.base.errors import UsageError, is_panic
from compressknow.base.format import clean


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence progress bars, the load report and all that is printed, by Rust too: what matters is raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    # compressed-tensors logs with loguru in some versions.
    loguru = importlib.import_module("loguru").logger if importlib.util.find_spec("loguru") else None
    if loguru:
        loguru.disable("compressed_tensors")
    try:
        with _disable_bars(), _silence(1), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if loguru:
            loguru.enable("compressed_tensors")


class PanicError(Exception):
    """Panic of Rust code, with its message."""


@contextlib.contextmanager
def translate_panics() -> Iterator[None]:
    """Raise a panic of tokenizers, which is not an Exception, as PanicError; what Rust prints of it is not seen."""
    try:
        with _silence(2):
            yield
    except BaseException as error:
        if is_panic(error):
            raise PanicError(str(error)) from error
        raise


@contextlib.contextmanager
def _silence(descriptor: int) -> Iterator[None]:
    """Drop what is written to standard output (1) or standard error (2) itself, not by way of Python."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        saved = os.dup(descriptor)
    except OSError:
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, descriptor)
    os.close(sink)
    try:
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


@contextlib.contextmanager
def _disable_bars() -> Iterator[None]:
    """Disable the bars of tqdm: those of compressed-tensors have no switch of their own."""
    from tqdm import tqdm

    init = tqdm.__init__

    def disabled(bar: tqdm, *args: Any, **kwargs: Any) -> None:
        init(bar, *args, **kwargs | {"disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = init


_Export = Literal["fetch", "unpack", "gather", "export", "quantize", "round"]
_Measure = Literal["evaluate", "noise", "runtime", "read", "time", "sensitivity"]
Work = Literal["convert", "sample", "text", "choose", "calibrate", "verify", "hash", "compare", _Measure, _Export]
# All else counts bytes.
UNITS = {
    **dict.fromkeys(("evaluate", "noise", "runtime"), "facts"),
    **dict.fromkeys(("sample", "text"), "tokens"),
    **dict.fromkeys(("choose", "calibrate", "gather", "sensitivity", "round"), "blocks"),
    **{"read": "chunks", "quantize": "tensors"},
}


@dataclass(frozen=True)
class Stage:
    """Part of a run: one kind of work on one model.

    Attributes
    ----------
    work : ``evaluate`` (a model on the facts of a probe), ``noise`` (the same in another precision), ``runtime`` (the
        same in another runtime), ``read`` (a running text), ``time`` (how fast it is), ``sensitivity`` (to the rounding
        of each weight), ``convert``, ``sample`` (the model writes the text to calibrate on) or ``text`` (which is
        read), ``choose`` (the blocks and neurons to drop), ``calibrate`` (convert block by block), ``verify``,
        ``hash``, ``compare``; of an export ``fetch`` (llama.cpp's converter), ``unpack`` (to floats), ``gather`` (what
        layers read), ``export`` (to GGUF),
        ``quantize`` and ``round`` (by GPTQ).
    model : what the model is called; of ``fetch`` the folder to fetch into.
    probe : what it is evaluated on; nothing for other work.
    facts : of all probes that this model is evaluated on; each of the others is evaluated on the same.
    device : where it computes.
    number, of : which model it is of how many that are evaluated, from 1.
    again : the original, whose answers are known, once more for its distributions alone.
    """

    work: Work
    model: str
    probe: str = ""
    facts: int = 0
    device: str = "cpu"
    number: int = 1
    of: int = 1
    again: bool = False

    @property
    def unit(self) -> str:
        """Return what is counted."""
        return UNITS.get(self.work, "bytes")


@dataclass(frozen=True)
class Progress:
    """Position of a run: what `on_progress` is called with.

    Of each stage one comes with ``begins``, some with ``advances``, and one with ``ends``, also where it fails.

    Attributes
    ----------
    stage : the part of the run.
    done, total : facts, bytes, tokens or blocks, as `Stage.unit` says; both 0 until the total is known.
    left : seconds until the stage ends, if already known.

    Examples
    --------
    >>> print(Progress(Stage("evaluate", "smollm2", "atlas"), "advances", 2000, 4002, 50.0))
    evaluate smollm2 on atlas: 2,000 of 4,002 facts, 50 s left
    """

    stage: Stage
    state: Literal["begins", "advances", "ends"]
    done: int = 0
    total: int = 0
    left: float | None = None

    def __str__(self) -> str:
        far = f"{self.done:,} of {self.total:,} {self.stage.unit}" if self.total else self.state
        left = f", {self.left:.0f} s left" if self.left else ""
        return f"{self.stage.work} {name_stage(self.stage)}: {far}{left}"


def name_stage(stage: Stage) -> str:
    """Return which model, and what it is evaluated on, fit to be shown."""
    return clean(stage.model, 40) + (f" on {clean(stage.probe, 40)}" if stage.probe else "")


Listener = Callable[[Progress], None]
# What public functions take: a function, or "bar" for the bars of tqdm.
OnProgress = Listener | Literal["bar"]


def resolve_progress(on_progress: OnProgress | None) -> Listener | None:
    """Return the function that is called with each `Progress`. Raises UsageError for what cannot give one."""
    if isinstance(on_progress, str) and on_progress == "bar":
        return Bars()
    if on_progress is None or callable(on_progress):
        return on_progress
    raise UsageError(f"on_progress cannot be {on_progress!r}.", hint='Give a function of one argument, or "bar".')


class Bars:
    """Bars of tqdm, one for each stage: a widget in a notebook, a line at a terminal."""

    def __init__(self) -> None:
        self._bars: dict[Stage, Any] = {}

    def __call__(self, progress: Progress) -> None:
        stage = progress.stage
        if progress.state == "begins":
            self._bars[stage] = _make_bar(stage)
        bar = self._bars[stage]
        if progress.total and bar.total != progress.total:
            bar.reset(progress.total)
            # The work of an earlier run must not count towards the pace.
            bar.n = bar.initial = progress.done
        bar.update(progress.done - bar.n)
        if progress.state == "ends":
            self._bars.pop(stage).close()


def _make_bar(stage: Stage) -> Any:
    with warnings.catch_warnings():
        # In a notebook without ipywidgets it is a line of text, which is what there is.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    name = f"{stage.work} {name_stage(stage)}"
    if stage.unit == "bytes":
        return tqdm(desc=name, unit="B", unit_scale=True)
    return tqdm(desc=name, unit=f" {stage.unit}")


class Advance(Protocol):
    """Function that takes how much of how much is done, and the seconds left, if already known."""

    def __call__(self, done: int, total: int, left: float | None = None, /) -> None: ...


def ignore_advance(done: int, total: int, left: float | None = None) -> None:
    """Take how far a stage is that is reported to nobody."""


@contextlib.contextmanager
def report_progress(listener: Listener | None, stage: Stage) -> Iterator[Advance]:
    """Report that a stage begins and, even after an error, ends; yields the function that reports its progress."""
    if listener is None:
        yield ignore_advance
        return
    last = Progress(stage, "begins")
    listener(last)

    def advance(done: int, total: int, left: float | None = None) -> None:
        nonlocal last
        last = Progress(stage, "advances", done, total, left)
        listener(last)

    try:
        yield advance
    finally:
        listener(replace(last, state="ends"))


# Begins a stage of a kind of work on what the caller works on: see `report_progress`.
Begin = Callable[[Work], contextlib.AbstractContextManager[Advance]]


def begin_stages(listener: Listener | None, model: object) -> Begin:
    """Return what begins a stage of any work on a model, whose name or path it is."""
    return lambda work: report_progress(listener, Stage(work, str(model)))


# Begins stages that are reported to nobody.
ignore_progress = begin_stages(None, "")


def relabel_progress(listener: Listener | None, **changes: Any) -> Listener | None:
    """Return the listener for stages that know nothing of the run around them: `changes` are fields of `Stage`."""
    if listener is None:
        return None
    return lambda progress: listener(replace(progress, stage=replace(progress.stage, **changes)))


def count_progress(advance: Advance, total: int) -> Callable[[int], None]:
    """Return a function that adds each piece that is done, from any thread; `advance` gets their sum, and the total."""
    done, lock = 0, threading.Lock()

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done = min(done + count, total)
            advance(done, total)

    return add


class Pace:
    """Time left, from the work that is done: seconds per token.

    Parameters
    ----------
    work : tokens to read in all.
    sample, seconds : tokens of a few facts that were asked before, and the time that they took: all that is known until
        the first batch is done, and counted with it after that. Without them the first batch tells nothing: it prepares
        much that later ones find done.
    """

    def __init__(self, work: int, sample: int = 0, seconds: float = 0) -> None:
        self._left, self._measured = work, sample
        self._prepared = sample > 0
        self._start = time.monotonic() - seconds

    def add(self, work: int) -> None:
        """Count work as done."""
        self._left -= work
        if self._prepared:
            self._measured += work
        else:
            self._prepared, self._start = True, time.monotonic()

    @property
    def left(self) -> float | None:
        """Return the seconds left; None while nothing is measured."""
        return (time.monotonic() - self._start) / self._measured * self._left if self._measured else None


class RepeatingThread:
    """Thread that calls `task` after each of the `waits` (seconds) until `end` is called.

    A signal may raise between any two steps of the main thread, and a lock that is written in Python (that of an Event,
    or of a thread that starts) would stay taken: who needs it next would wait forever. So there is none, only queues
    that are written in C.
    """

    def __init__(self, task: Callable[[], object], waits: Iterable[float]) -> None:
        self._task, self._waits = task, waits
        self._ending: SimpleQueue[None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._over = False
        start_new_thread(self._run, ())

    def end(self) -> None:
        """Let it end; the task is not called again after one that is under way."""
        self._ending.put(None)

    def wait(self) -> None:
        """Wait until it has ended, as `end` lets it."""
        # A signal may come after the message was taken and before it was seen: the attribute says it too.
        while not self._over:
            self._ended.get()

    def _run(self) -> None:
        try:
            for seconds in self._waits:
                try:
                    return self._ending.get(timeout=seconds)
                except Empty:
                    self._task()
        finally:
            self._over = True
            self._ended.put(None)
