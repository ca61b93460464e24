"""Progress of long-running work, and silencing the output of other libraries."""

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

_LOG_DISABLED = "COMPRESSED_TENSORS_LOG_DISABLED"


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence progress bars, the load report and everything printed, from Rust too: errors are raised anyway."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    # compressed-tensors logs with it; its versions without loguru log nothing.
    loguru = importlib.import_module("loguru").logger if importlib.util.find_spec("loguru") else None
    is_set = _LOG_DISABLED in os.environ
    if loguru:
        loguru.disable("compressed_tensors")
        # Otherwise its first import would enable it.
        os.environ.setdefault(_LOG_DISABLED, "1")
    try:
        with disable_bars(), _silence(1), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if loguru:
            loguru.enable("compressed_tensors")
            if not is_set:
                os.environ.pop(_LOG_DISABLED, None)


class PanicError(Exception):
    """Panic of Rust code, with its message."""


@contextlib.contextmanager
def translate_panics() -> Iterator[None]:
    """Raise a panic of tokenizers, which is not an Exception, as PanicError, and hide what Rust prints about it."""
    try:
        with _silence(2):
            yield
    except BaseException as error:
        if is_panic(error):
            raise PanicError(str(error)) from error
        raise


@contextlib.contextmanager
def _silence(descriptor: int) -> Iterator[None]:
    """Drop what code other than Python writes to standard output (1) or standard error (2)."""
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
def disable_bars() -> Iterator[None]:
    """Disable tqdm itself, and so the bars of all libraries: some have no option to hide them."""
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
# Work that is not listed counts bytes.
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
        same in another runtime), ``read`` (a running text), ``time`` (speed), ``sensitivity`` (to the rounding of each
        weight), ``convert``, ``sample`` (the model writes the calibration text) or ``text`` (it is read from files),
        ``choose`` (the blocks and neurons to drop), ``calibrate`` (convert block by block), ``verify``, ``hash``,
        ``compare``; for an export ``fetch`` (llama.cpp's converter), ``unpack`` (to floats), ``gather`` (the inputs of
        layers), ``export`` (to GGUF), ``quantize`` and ``round`` (by GPTQ).
    model : name of the model; for ``fetch`` the folder to fetch into.
    probe : probe that it is evaluated on; empty for other work.
    facts : number of facts in all probes of the run, which is the same for every model.
    device : device that computes.
    number, of : number of this model, from 1, and of all that are evaluated.
    again : whether the original, whose answers are known, is evaluated again only for its distributions.
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
        """Return the unit of the counts."""
        return UNITS.get(self.work, "bytes")


@dataclass(frozen=True)
class Progress:
    """Position of a run: the argument of `on_progress`.

    Each stage reports ``begins`` once, ``advances`` any number of times, and ``ends`` once, even if it fails.

    Attributes
    ----------
    stage : the part of the run.
    done, total : counts in `Stage.unit`, such as facts or bytes; both 0 until the total is known.
    left : estimated seconds until the stage ends; None if there is no estimate yet.

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
        position = f"{self.done:,} of {self.total:,} {self.stage.unit}" if self.total else self.state
        left = f", {self.left:.0f} s left" if self.left else ""
        return f"{self.stage.work} {name_stage(self.stage)}: {position}{left}"


def name_stage(stage: Stage) -> str:
    """Return the name of the model, and the probe if there is one, for display."""
    return clean(stage.model, 40) + (f" on {clean(stage.probe, 40)}" if stage.probe else "")


Listener = Callable[[Progress], None]
# Argument of the public functions: a callback, or "bar" for tqdm bars in a terminal or notebook.
OnProgress = Listener | Literal["bar"]


def resolve_progress(on_progress: OnProgress | None) -> Listener | None:
    """Return the function to call with each `Progress`. Raises UsageError for an invalid `on_progress`."""
    if isinstance(on_progress, str) and on_progress == "bar":
        return Bars()
    if on_progress is None or callable(on_progress):
        return on_progress
    raise UsageError(f"on_progress cannot be {on_progress!r}.", hint='Give a function of one argument, or "bar".')


class Bars:
    """Bars of tqdm, one per stage: widgets in a notebook, lines in a terminal."""

    def __init__(self) -> None:
        self._bars: dict[Stage, Any] = {}

    def __call__(self, progress: Progress) -> None:
        stage = progress.stage
        if progress.state == "begins":
            self._bars[stage] = _make_bar(stage)
        bar = self._bars[stage]
        if progress.total and bar.total != progress.total:
            bar.reset(progress.total)
            # Work of an earlier run must not count for the pace.
            bar.n = bar.initial = progress.done
        bar.update(progress.done - bar.n)
        if progress.state == "ends":
            self._bars.pop(stage).close()


def _make_bar(stage: Stage) -> Any:
    with warnings.catch_warnings():
        # tqdm warns that it shows plain text in a notebook without ipywidgets.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    name = f"{stage.work} {name_stage(stage)}"
    if stage.unit == "bytes":
        return tqdm(desc=name, unit="B", unit_scale=True)
    return tqdm(desc=name, unit=f" {stage.unit}")


class Advance(Protocol):
    """Function that takes the amount done, the total, and the seconds left if there is an estimate."""

    def __call__(self, done: int, total: int, left: float | None = None, /) -> None: ...


def ignore_advance(done: int, total: int, left: float | None = None) -> None:
    """Ignore the progress of a stage that has no listener."""


@contextlib.contextmanager
def report_progress(listener: Listener | None, stage: Stage) -> Iterator[Advance]:
    """Report that a stage begins and, even if it fails, that it ends; yield the function that reports its progress."""
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


# Begins a stage of some work on the caller's model, as `report_progress` does.
Begin = Callable[[Work], contextlib.AbstractContextManager[Advance]]


def begin_stages(listener: Listener | None, model: object) -> Begin:
    """Return a function that begins a stage of any work on a model, given by its name or path."""
    return lambda work: report_progress(listener, Stage(work, str(model)))


# Begins stages that are not reported.
ignore_progress = begin_stages(None, "")


def relabel_progress(listener: Listener | None, **changes: Any) -> Listener | None:
    """Return a listener that changes these fields of each `Stage`, which the stage's code does not know."""
    if listener is None:
        return None
    return lambda progress: listener(replace(progress, stage=replace(progress.stage, **changes)))


def count_progress(advance: Advance, total: int) -> Callable[[int], None]:
    """Return a function that any thread calls with the amount it has done; `advance` gets the sum and the total."""
    done, lock = 0, threading.Lock()

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done = min(done + count, total)
            advance(done, total)

    return add


class Pace:
    """Estimate of the time left for `work` tokens, from the seconds per token so far; until a batch is measured, from
    the `predicted` seconds for all. The first batch is not measured, since it also warms up."""

    def __init__(self, work: int, predicted: float | None = None) -> None:
        self._work = self._left = work
        self._predicted, self._measured = predicted, 0
        self._start: float | None = None

    def add(self, work: int) -> None:
        """Count work as done."""
        self._left -= work
        if self._start is None:
            self._start = time.monotonic()
        else:
            self._measured += work

    @property
    def left(self) -> float | None:
        """Return the estimated seconds left; None until something is measured or predicted."""
        if self._start is not None and self._measured:
            return (time.monotonic() - self._start) / self._measured * self._left
        return None if self._predicted is None else self._predicted * self._left / self._work


class RepeatingThread:
    """Thread that calls `task` after each of the `waits` (seconds) until `end` is called.

    A signal may raise between any two steps of the main thread, which could leave a lock written in Python (as in an
    Event, or in starting a Thread) locked for ever. So this class uses only queues, which are written in C.
    """

    def __init__(self, task: Callable[[], object], waits: Iterable[float]) -> None:
        self._task, self._waits = task, waits
        self._ending: SimpleQueue[None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._over = False
        start_new_thread(self._run, ())

    def end(self) -> None:
        """Tell the thread to end; a call of the task that is under way is the last."""
        self._ending.put(None)

    def wait(self) -> None:
        """Wait until the thread has ended, after `end`."""
        # A signal may interrupt `get` after it has taken the message, so an attribute records the end too.
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
