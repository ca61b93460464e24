"""Runs something hostile, and bounds what it may take: 20 seconds and 2 GB."""

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


class Hangs(BaseException):
    """Not an Exception: no handler of the code under test may swallow it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes more than 20 seconds (it is interrupted), or raises this process's memory by more than 2 GB."""
    signal.signal(signal.SIGALRM, _interrupt)
    signal.alarm(MOST_SECONDS)
    before = _reset_peak()
    try:
        yield
    finally:
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
    assert "fault of compressknow" not in printed.err, printed.err
    assert "Traceback" not in printed.err, printed.err
    return printed.err


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Hangs(f"more than {MOST_SECONDS} s")


def _reset_peak() -> int:
    """Resident bytes now; the peak counts from here on. Where the system keeps no such count, 0 for ever."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    match = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(match[1]) if match else 0
