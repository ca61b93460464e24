"""A pool runs tasks in order and passes on their errors; an interruption at any moment ends it."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest
import torch

from compressknow.base.errors import UsageError
from compressknow.compress.blocks import Pool, TaskStopped
from tests.test_repeating import run_script

INTERRUPTED_OFTEN = """
import signal, sys, time
import torch
from compressknow.compress.blocks import Pool

class Alarm(Exception):
    pass

def ring(*_):
    raise Alarm

signal.signal(signal.SIGALRM, ring)
torch.set_num_threads(3)
ended = 0
for number in range(int(sys.argv[1])):
    try:
        with Pool(2) as pool:
            signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]) * (number + 1))
            pool.map(lambda item: time.sleep(0.0002), range(int(sys.argv[3])))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        ended += 1
    assert torch.get_num_threads() == 3, number
print(ended)
"""

INTERRUPTED_TWICE = """
import signal, time
from compressknow.compress.blocks import Pool

begun, ended, rings = [], [], []

def ring(*_):
    rings.append(None)
    if len(rings) < 3:
        raise KeyboardInterrupt

def task(item):
    begun.append(item)
    time.sleep(0.5)
    ended.append(item)

signal.signal(signal.SIGALRM, ring)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
try:
    with Pool(2) as pool:
        pool.map(task, range(10))
except KeyboardInterrupt:
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(len(rings) > 2, len(begun), len(ended))
"""


def test_results_have_the_order_of_the_items() -> None:
    with Pool(3) as pool:
        assert pool.map(lambda item: item * item, range(50)) == [item * item for item in range(50)]
        assert pool.map(str, []) == []


@pytest.mark.parametrize("threads", [0, -1, "2", 2.5])
def test_threads_that_are_no_whole_number_of_at_least_one_are_refused(threads: Any) -> None:
    with pytest.raises(UsageError, match=f"threads must be a whole number of at least 1: {threads!r}"):
        Pool(threads)


def test_tasks_start_in_order() -> None:
    started: list[int] = []
    both = threading.Barrier(2)

    def task(item: int) -> None:
        started.append(item)
        if item < 2:
            both.wait(timeout=60)

    with Pool(2) as pool:
        pool.map(task, range(20))
    assert sorted(started[:2]) == [0, 1]
    assert sorted(started) == list(range(20))


def test_tasks_compute_with_one_thread_each() -> None:
    before = torch.get_num_threads()
    with Pool(2) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(4))) == {1}
    assert torch.get_num_threads() == before


def test_the_error_of_a_task_is_raised() -> None:
    with Pool(2) as pool, pytest.raises(ZeroDivisionError):
        pool.map(lambda item: 1 // item, [1, 0, 1])


def test_an_error_stops_running_and_waiting_tasks() -> None:
    started: list[int] = []
    waiting = threading.Event()

    def task(item: int) -> None:
        started.append(item)
        if item:
            waiting.set()
            while True:
                pool.check()
                time.sleep(0.001)
        assert waiting.wait(timeout=60)
        raise ZeroDivisionError

    with Pool(2) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.map(task, range(10))
        with pytest.raises(TaskStopped):
            pool.map(task, range(10))
    assert len(started) <= 3


def test_an_error_of_the_iterator_is_raised() -> None:
    with Pool(2) as pool, pytest.raises(ZeroDivisionError):
        pool.map(str, (1 // item for item in (1, 0)))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
@pytest.mark.parametrize(
    ("rounds", "step", "items"),
    [(60, 0.0007, 600), (400, 0.00001, 5)],
    ids=["while tasks run", "while threads start and end"],
)
def test_an_interruption_at_any_moment_ends_the_run(rounds: int, step: float, items: int) -> None:
    assert int(run_script(INTERRUPTED_OFTEN, rounds, step, items)) > rounds // 20


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
def test_interrupting_twice_leaves_no_task_running() -> None:
    assert run_script(INTERRUPTED_TWICE) == "True 2 2\n"
