"""Other libraries' noise kept away from the terminal, and the one form in which long work tells how far it is."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from compressknow.errors import is_panic


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no load report, nothing printed, be it by Rust: what matters in it is checked and raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _no_bars(), _silent(1), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


class PanicError(Exception):
    """Rust code has panicked, with the panic's message."""


@contextlib.contextmanager
def no_panics() -> Iterator[None]:
    """A panic of tokenizers, which is no Exception, as PanicError; the pages that Rust prints of it are not seen."""
    try:
        with _silent(2):
            yield
    except BaseException as error:
        if is_panic(error):
            raise PanicError(str(error)) from error
        raise


@contextlib.contextmanager
def _silent(descriptor: int) -> Iterator[None]:
    """What is written to standard output (1) or standard error (2) itself, not by way of Python, goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        kept = os.dup(descriptor)
    except OSError:
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, descriptor)
    os.close(sink)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Bars of compressed-tensors have no switch of their own, and tqdm has none for a stretch of code."""
    from tqdm import tqdm

    init = tqdm.__init__

    def disabled(bar: tqdm, *args: Any, **kwargs: Any) -> None:
        init(bar, *args, **kwargs | {"disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = init


def counted(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A function to tell each piece that is done; `progress` is told what is done so far, and the total."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return report


class Progress(Protocol):
    """Told how many facts of how many are answered, and the seconds left, as far as that can be told already."""

    def __call__(self, done: int, total: int, left: float | None = None) -> None: ...


@dataclass(frozen=True)
class Stage:
    """A part of a run: one model is asked one probe.

    Attributes
    ----------
    number, of : which model it is of how many that are asked, from 1.
    facts : of all probes that this model is asked; each of the others is asked the same.
    again : the original, whose answers are known, once more for its distributions alone.
    """

    probe: str
    model: str
    facts: int
    device: str = "cpu"
    number: int = 1
    of: int = 1
    again: bool = False


# Told the stage that begins; gives what is told of its progress.
Bar = Callable[[Stage], AbstractContextManager[Progress | None]]


def staged(bar: Bar | None, **changes: Any) -> Bar | None:
    """The same, for stages that know nothing of the run around them: `changes` are fields of `Stage`."""
    return (lambda stage: bar(replace(stage, **changes))) if bar else None


class Pace:
    """The time left, from the work that is done: seconds a token.

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
        """So much of it is done."""
        self._left -= work
        if self._prepared:
            self._measured += work
        else:
            self._prepared, self._start = True, time.monotonic()

    @property
    def left(self) -> float | None:
        """Seconds; None while nothing is measured."""
        return (time.monotonic() - self._start) / self._measured * self._left if self._measured else None
