"""A thread that repeats a task, and can be ended whenever a signal interrupts the main thread."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from itertools import repeat
from queue import SimpleQueue

import pytest

from compressknow.base.progress import RepeatingThread

# Interrupts the main thread where a signal would leave a lock taken.
INTERRUPT_LOCKS = """
from threading import Condition, get_ident, main_thread

enter = Condition.__enter__

def interrupted(self):
    enter(self)
    if get_ident() == main_thread().ident:
        raise KeyboardInterrupt

Condition.__enter__ = interrupted
"""
# Imports before the interruption, and code that uses threads.
USES = {
    "weight files": (
        """
import sys
from pathlib import Path
from compressknow.compress.output import FileLayout
from compressknow.compress.output import OutputFiles
from compressknow.compress.blocks import Pool
""",
        """
with Pool(1) as pool:
    outputs = OutputFiles(Path(sys.argv[1]), FileLayout({"a.safetensors": b"header"}, {"a.safetensors": 99}, {}, None))
    outputs.complete(pool, {})
    outputs.close()
print((Path(sys.argv[1]) / "a.safetensors").read_bytes()[:6].decode())
""",
    ),
    "a pool of threads": (
        "from compressknow.compress.blocks import Pool\n",
        """
with Pool(2) as pool:
    assert [sum(pool.map(int, range(1000))) for _ in range(2)] == [499500, 499500]
print("header")
""",
    ),
    "a line of progress": (
        "from compressknow.base.progress import Stage\nfrom compressknow.cli.terminal import ProgressLine\n",
        """
line = ProgressLine(Stage("convert", "llama"), 0.0)
line.start()
print("header")
line.end()
""",
    ),
}
INTERRUPTED_OFTEN = """
import signal, sys, time
from itertools import repeat
from compressknow.base.progress import RepeatingThread

class Alarm(Exception):
    pass

def ring(*_):
    # Once a round: the signal of a round may come to a thread that the system wakes in the next one.
    global is_armed
    if is_armed:
        is_armed = False
        raise Alarm

signal.signal(signal.SIGALRM, ring)
interrupted, is_armed = 0, False
for number in range(600):
    repeating = None
    try:
        # In several rounds, as the moments within a round that come too late depend on the machine.
        is_armed = True
        signal.setitimer(signal.ITIMER_REAL, 0.000002 * (number % 200 + 1))
        repeating = RepeatingThread(lambda: None, repeat(0.00005))
        time.sleep(0.0001)
        repeating.end()
        repeating.wait()
        is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        interrupted += 1
        if repeating:
            repeating.end()
            repeating.wait()
print(interrupted)
"""


def run_script(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_task_is_repeated_until_the_end() -> None:
    done: list[int] = []
    repeating = RepeatingThread(lambda: done.append(1), repeat(0.001))
    while len(done) < 3:
        time.sleep(0.001)
    repeating.end()
    repeating.wait()
    before = len(done)
    time.sleep(0.02)
    assert len(done) == before
    repeating.wait()


def test_thread_ends_after_the_last_interval() -> None:
    done: list[int] = []
    RepeatingThread(lambda: done.append(1), [0.001, 0.001]).wait()
    assert len(done) == 2


def test_error_of_the_task_ends_the_thread_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: SimpleQueue[type[BaseException]] = SimpleQueue()
    monkeypatch.setattr(sys, "unraisablehook", lambda error: errors.put(error.exc_type))
    RepeatingThread(lambda: 1 // 0, repeat(0.001)).wait()
    assert errors.get(timeout=60) is ZeroDivisionError


@pytest.mark.parametrize("use", USES)
def test_main_thread_takes_no_lock_that_a_signal_could_leave_taken(use: str, tmp_path: object) -> None:
    imports, code = USES[use]
    assert run_script(imports + INTERRUPT_LOCKS + code, tmp_path) == "header\n"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
def test_thread_can_be_ended_after_an_interruption_at_any_moment() -> None:
    assert int(run_script(INTERRUPTED_OFTEN)) > 100
