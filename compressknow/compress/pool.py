"""Threads that each work on a tensor of their own, with torch's own threads off: results do not depend on how many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from compressknow.system import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


class Map(Protocol):
    """Applies a task to items, results in their order."""

    def __call__(self, task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]: ...


def in_turn(task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]:
    """One item after the other, in the calling thread."""
    return [task(item) for item in items]


class Pool:
    """A thread pool whose first error stops the rest: long tasks call `check` between two blocks."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or available_cores()
        self._stopped = False
        self._torch_threads = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = error is not None
        self._executor.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def map(self, task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]:
        """Results in the order of `items`. Raises the first error, after the tasks under way have ended."""
        results: dict[int, Result] = {}
        # What ends is told by a queue. Waiting for futures takes their locks, and a signal that comes meanwhile leaves
        # them taken: their threads would wait for ever.
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def run(place: int, item: Item) -> None:
            try:
                results[place] = task(item)
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

        number = 0
        try:
            for number, item in enumerate(items, start=1):
                self._executor.submit(run, number, item)
            outcomes = (ended.get() for _ in range(number))
            error = next((outcome for outcome in outcomes if outcome is not None), None)
        except BaseException:
            self._stopped = True
            raise
        if error is not None:
            self._stopped = True
            self._executor.shutdown(cancel_futures=True)
            raise error
        return [results[place] for place in range(1, number + 1)]

    def check(self) -> None:
        """Raise Stopped where another task has failed or the user has interrupted."""
        if self._stopped:
            raise Stopped


class Stopped(Exception):
    """Ends a task whose result nobody waits for any more."""
