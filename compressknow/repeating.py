"""A thread that does something again and again beside the main one, which may be interrupted at any moment."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue


class Repeating:
    """Calls `task` after each of the `waits` (seconds) until it is told to end.

    A signal may raise between any two steps of the main thread, and a lock that is written in Python (that of an Event,
    or of a thread that starts) would stay taken: who needs it next would wait for ever. So there is none, only queues
    that are written in C.
    """

    def __init__(self, task: Callable[[], object], waits: Iterable[float]) -> None:
        self._task, self._waits = task, waits
        self._told: SimpleQueue[None] = SimpleQueue()
        self._gone: SimpleQueue[None] = SimpleQueue()
        self._over = False
        start_new_thread(self._run, ())

    def end(self) -> None:
        """Let it end; the task is not called again after one that is under way."""
        self._told.put(None)

    def wait(self) -> None:
        """Until it has ended, told to by `end`."""
        # A signal may come after the message was taken and before it was seen: the attribute says it too.
        while not self._over:
            self._gone.get()

    def _run(self) -> None:
        try:
            for seconds in self._waits:
                try:
                    return self._told.get(timeout=seconds)
                except Empty:
                    self._task()
        finally:
            self._over = True
            self._gone.put(None)
