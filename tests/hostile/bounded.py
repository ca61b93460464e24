"""Limits for reading hostile files: 20 seconds of CPU time, 2 GB of memory, and no endless wait."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from compressknow.cli import main

MAX_CPU_SECONDS, MAX_BYTES = 20, 2 << 30
# The limit of the real time is higher, since the machine may be busy.
MAX_SECONDS = 180


class Hangs(BaseException):
    """Error that handlers of `Exception` in the tested code do not catch."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise `Hangs` after 20 seconds of CPU time or 3 minutes, and fail if more than 2 GB of memory were used."""
    signal.signal(signal.SIGPROF, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    signal.alarm(MAX_SECONDS)
    before = _reset_peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    assert _read_status("VmHWM") - before < MAX_BYTES, f"{_read_status('VmHWM') - before:,} bytes more"


def run_refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """Run a command that fails with one message within the limits, and return its stderr."""
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
    raise Hangs(
        f"more than {MAX_CPU_SECONDS} s" if number == signal.SIGPROF else f"waits for more than {MAX_SECONDS} s"
    )


def _reset_peak() -> int:
    """Restart the count of peak memory, and return the resident bytes; 0 if the system does not count."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="utf-8")
    return _read_status("VmRSS")


def _read_status(key: str) -> int:
    status = Path("/proc/self/status")
    match = re.search(rf"{key}:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return 1024 * int(match[1]) if match else 0
