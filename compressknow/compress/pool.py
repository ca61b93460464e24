"""Threads that each work on a tensor of their own, with torch's own threads off: results do not depend on how many."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable, Iterable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Protocol, TypeVar
from weakref import finalize

import torch

from compressknow.base.system import available_cores

# More than any machine has cores.
MOST_THREADS = 1024
Item = TypeVar("Item")
Result = TypeVar("Result")


class Map(Protocol):
    """Function that applies a task to items and returns the results in their order."""

    def __call__(self, task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]: ...


def in_turn(task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]:
    """Apply a task to one item after the other, in the calling thread."""
    return [task(item) for item in items]


class Pool:
    """Thread pool whose first error stops the rest: long tasks call `check` between two blocks.

    A signal may raise between any two steps of the main thread, and a lock that is written in Python would stay taken:
    who needs it next would wait for ever. So the main thread touches no such lock, only queues that are written in C.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = min(threads or available_cores(), MOST_THREADS)
        self._stopped = False
        self._torch_threads = torch.get_num_threads()
        self._workers = _Workers(self.threads)
        # For a signal that comes before the first step of `__exit__`.
        finalize(self, self._workers.dismiss)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end()
        finally:
            torch.set_num_threads(self._torch_threads)

    def map(self, task: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]:
        """Return results in the order of `items`; a task begins after those before it have begun.

        Raises the first error, after the tasks under way have ended; then the pool is of no more use.
        """
        self.check()
        results: dict[int, Result] = {}

        def run(place: int, item: Item) -> None:
            self.check()
            results[place] = task(item)

        try:
            jobs = [partial(run, place, item) for place, item in enumerate(items)]
            self._workers.work(jobs)
        except BaseException:
            self._end()
            raise
        return [results[place] for place in range(len(jobs))]

    def check(self) -> None:
        """Raise Stopped where another task has failed or the user has interrupted."""
        if self._stopped:
            raise Stopped

    def _end(self) -> None:
        self._stopped = True
        self._workers.dismiss()
        self._workers.wait()


class Stopped(Exception):
    """End of a task whose result nobody waits for any more."""


class _Workers:
    """Worker threads, and one that starts them: `Thread.start` waits for a lock that is written in Python."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # What the main thread waits for: a job has ended (None), or will not (an error).
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._starters: list[int] = []
        self._threads_started: list[Thread] = []
        self._all_ended = False

    def work(self, jobs: list[partial[None]]) -> None:
        """Do the jobs. Raises the first error, while others are under way."""
        if jobs and not self._starters:
            # Begun and listed in one step, between whose halves no signal comes.
            self._starters.extend(map(start_new_thread, (self._start_workers,), ((),)))
        for job in jobs:
            self._jobs.put(job)
        for _ in jobs:
            error = self._outcomes.get()
            if error is not None:
                raise error

    def dismiss(self) -> None:
        """Let the workers go when they have come to the end of the jobs."""
        self._jobs.put(None)

    def wait(self) -> None:
        """Wait until all workers that were dismissed have ended."""
        # A signal may come after a message was taken and before it was seen: the attribute says it too.
        while self._starters and not self._all_ended:
            self._outcomes.get()
        for worker in self._threads_started:
            worker.join()

    def _start_workers(self) -> None:
        try:
            for _ in range(self._threads):
                worker = Thread(target=self._work, daemon=True)
                worker.start()
                self._threads_started.append(worker)
        except BaseException as error:
            self._outcomes.put(error)
        for _ in self._threads_started:
            self._ended.get()
        self._all_ended = True
        self._outcomes.put(Stopped())

    def _work(self) -> None:
        try:
            torch.set_num_threads(1)
            for job in iter(self._jobs.get, None):
                self._outcomes.put(_run_job(job))
                # Not kept, with all that it holds, until the next one comes.
                del job
        finally:
            self._jobs.put(None)
            self._ended.put(None)


def _run_job(job: Callable[[], None]) -> BaseException | None:
    try:
        job()
    except BaseException as error:
        return error
    return None
