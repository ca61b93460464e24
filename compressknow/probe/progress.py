"""What whoever waits is told: which model of how many is asked what, how many facts are answered, the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol


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
