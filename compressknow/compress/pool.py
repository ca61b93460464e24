"""Threads that each work on a tensor of their own, with torch's own threads off: results do not depend on how many."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TypeVar

import torch

from compressknow.base.system import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """End of a task whose result nobody waits for any more."""


class Pool:
    """Thread pool whose first error stops the rest: long tasks call `check` between two blocks.

    A signal may raise between any two steps of the main thread, and a lock that is written in Python would stay taken:
    who needs it next would wait for ever (`concurrent.futures` does, once in some hundred interruptions). So the main
    thread touches no such lock, only a queue that is written in C.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or available_cores()
        self._stopped = False
        self._torch_threads = torch.get_num_threads()
        self._started, self._ended = list[int](), list[bool]()
        self._wake: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        # A second signal may have ended the wait of `map`.
        self._stopped = True
        try:
            self._wait()
        finally:
            torch.set_num_threads(self._torch_threads)

    def map(self, task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]:
        """Return results in the order of `items`; a task begins after those before it have begun.

        Raises the first error, after the tasks under way have ended; then the pool is of no more use.
        """
        self.check()
        jobs = list(items)
        numbered, results = enumerate(jobs), dict[int, Result]()
        errors = list[BaseException]()

        def work() -> None:
            try:
                torch.set_num_threads(1)
                for place, item in numbered:
                    self.check()
                    results[place] = task(item)
            except BaseException as error:
                errors.append(error)
                self._stopped = True
            self._ended.append(True)
            self._wake.put(None)

        threads = min(self.threads, len(jobs))
        try:
            # In one step, between whose halves no signal comes.
            self._started.extend(map(start_new_thread, [work] * threads, [()] * threads))
            self._wait()
        except BaseException:
            self._stopped = True
            self._wait()
            raise
        if errors:
            raise errors[0]
        return [results[place] for place in range(len(jobs))]

    def _wait(self) -> None:
        while len(self._ended) < len(self._started):
            self._wake.get()

    def check(self) -> None:
        """Raise Stopped where another task has failed or the user has interrupted."""
        if self._stopped:
            raise Stopped
