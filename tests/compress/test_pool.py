"""Threads that work on tensors: an interrupted run ends, wherever the signal comes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from compressknow.compress.pool import Pool

INTERRUPTED_OFTEN = """
import signal, time
from compressknow.compress.pool import Pool

class Alarm(Exception):
    pass

def ring(*_):
    raise Alarm

signal.signal(signal.SIGALRM, ring)
ended = 0
for number in range(60):
    try:
        with Pool(2) as pool:
            signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0007 * number)
            pool.map(lambda item: time.sleep(0.0002), range(600))
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        ended += 1
print(ended)
"""

# A signal that comes while `concurrent.futures.wait` holds the locks of futures.
INTERRUPTED_IN_WAIT = """
from concurrent.futures import _base
from compressknow.compress.pool import Pool

enter = _base._AcquireFutures.__enter__

def interrupted(self):
    enter(self)
    raise KeyboardInterrupt

_base._AcquireFutures.__enter__ = interrupted
with Pool(2) as pool:
    print(sum(pool.map(int, range(1000))))
"""


def test_results_come_in_the_order_of_the_items() -> None:
    with Pool(3) as pool:
        assert pool.map(lambda item: item * item, range(50)) == [item * item for item in range(50)]
        assert pool.map(str, []) == []


def test_the_error_of_a_task_is_raised() -> None:
    with Pool(2) as pool, pytest.raises(ZeroDivisionError):
        pool.map(lambda item: 1 // item, [1, 0, 1])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
def test_an_interruption_at_any_moment_ends_the_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_OFTEN], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) > 30


def test_no_lock_is_held_that_a_signal_could_leave_taken() -> None:
    command = [sys.executable, "-c", INTERRUPTED_IN_WAIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "499500\n"
