"""Runs something hostile, and bounds what it may take: 20 seconds of work, 2 GB, and no waiting forever."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from compressknow.cli import main

MOST_SECONDS, MOST_BYTES = 20, 2 << 30
# Of the clock on the wall: a machine that does other work beside the tests is not a hang.
LONGEST_WAIT = 180


class Hangs(BaseException):
    """Not an Exception: no handler of the code under test may swallow it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what computes for over 20 seconds or waits for minutes (it is interrupted), or takes 2 GB more memory."""
    signal.signal(signal.SIGPROF, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    signal.alarm(LONGEST_WAIT)
    before = _reset_peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    assert _status("VmHWM") - before < MOST_BYTES, f"{_status('VmHWM') - before:,} bytes more"


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """What the command line says on stderr: it must refuse in one message, within the bounds."""
    capsys.readouterr()
    with bounded():
        code = main(list(map(str, args)))
    printed = capsys.readouterr()
    assert code in (1, 2), printed
    assert printed.err.count("Error: ") == 1, printed.err
    assert "bug in compressknow" not in printed.err, printed.err
    assert "Traceback" not in printed.err, printed.err
    return printed.err


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Hangs(f"more than {MOST_SECONDS} s" if number == signal.SIGPROF else f"waits for more than {LONGEST_WAIT} s")


def _reset_peak() -> int:
    """Resident bytes now; the peak counts from here on. Where the system keeps no such count, 0 forever."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    match = re.search(rf"{key}:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return 1024 * int(match[1]) if match else 0
