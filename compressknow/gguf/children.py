"""Run work in child processes, whose crashes become messages, and which end with this process.

As a program (``children.py SCRIPT ARGS``, ``children.py -m MODULE ARGS``) it runs another one, which ends when its
parent process ends in any way: its standard input is then closed.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired

_POLL_SECONDS = 0.1
_TAIL_BYTES = 1 << 14
# Messages about a full disk, of the system and of numpy.
_FULL = re.compile(r"No space left|Disk quota exceeded|\d+ requested and \d+ written")
# A disk with less room than this is full: even a child's log did not fit.
_NO_ROOM_BYTES = 1 << 16


def run(
    command: Sequence[str | Path], log: Path, *, environment: Mapping[str, str], look: Callable[[], None] = lambda: None
) -> int:
    """Run a command and return its exit code. Its output goes to `log`; `look` is called from time to time. It is
    killed if this run is interrupted."""
    with log.open("wb") as output:
        child = Popen(list(map(str, command)), stdin=PIPE, stdout=output, stderr=STDOUT, env=dict(environment))
        try:
            while True:
                with suppress(TimeoutExpired):
                    return child.wait(_POLL_SECONDS)
                look()
        finally:
            child.kill()
            child.wait()
            assert child.stdin is not None
            child.stdin.close()


def build_python_command(*arguments: str | Path) -> list[str | Path]:
    """Return the command for a script, or ``-m`` and a module, with arguments. When `run`, it ends with this process,
    even if that is killed, and imports nothing from the working directory."""
    return [sys.executable, "-P", __file__, *arguments]


def put_first(*packages: Path) -> dict[str, str]:
    """Return the environment of a process that imports from these folders first."""
    paths = [*map(str, packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def read_tail(log: Path) -> str:
    """Return the end of a child's output."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL_BYTES, 0))
        return file.read().decode("utf-8", "replace").replace("\r", "\n")


def read_reason(log: Path, code: int) -> str:
    """Return why a child failed: the last error in its output."""
    lines = [line.strip() for line in read_tail(log).splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line or "failed" in line or "not supported" in line]
    last = (errors or lines or ["It printed nothing."])[-1]
    if last == "AssertionError":
        # Python prints the line of code above it.
        asserted = (line.partition("  #")[0] for line in reversed(lines) if line.startswith("assert "))
        last = next((f"{last}: {line}" for line in asserted), last)
    return last if code > 0 else f"It was ended by signal {-code}. {last}"


def check_exit(what: str, log: Path, code: int, hint: str | None) -> None:
    """Raise CompressknowError if a child has failed; OutputError if that was because the disk of its log is full."""
    # The program below imports nothing of ours.
    from compressknow.base.errors import CompressknowError, OutputError

    if code == 0:
        return
    if _FULL.search(read_tail(log)) or shutil.disk_usage(log.parent).free < _NO_ROOM_BYTES:
        raise OutputError(f"{what}: no space left.", "Nothing was left behind.", "Free some space, or write elsewhere.")
    raise CompressknowError(what + ".", read_reason(log, code), hint)


def _end_with_parent() -> None:
    # Not sys.stdin, whose lock Python would wait for when it exits.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    is_module = sys.argv[1] == "-m"
    del sys.argv[: 1 + is_module]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
