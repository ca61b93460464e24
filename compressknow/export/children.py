"""Work that runs in a process of its own: what crashes or hangs there is a message here, and ends with this run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired

from compressknow.errors import CompressknowError, OutputError

_POLL_SECONDS = 0.1
_TAIL_BYTES = 1 << 14


def run(
    command: Sequence[str | Path],
    log: Path,
    *,
    environment: Mapping[str, str],
    look: Callable[[], None] = lambda: None,
) -> int:
    """Run a command to its end; its exit code.

    Parameters
    ----------
    log : where all goes that it prints.
    look : called now and then meanwhile.

    It is killed where this run is interrupted. Its standard input ends with this process, so that a child of ours that
    waits for that ends too.
    """
    with log.open("wb") as output:
        words = [str(word) for word in command]
        child = Popen(words, stdin=PIPE, stdout=output, stderr=STDOUT, env=dict(environment))
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


def tail(log: Path) -> str:
    """The end of what a child has printed."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL_BYTES, 0))
        return file.read().decode("utf-8", "replace").replace("\r", "\n")


def reason(log: Path, code: int) -> str:
    """Why a child has failed, in its own last words."""
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "failed" in line or "not supported" in line]
    words = (telling or lines or ["It printed nothing."])[-1]
    return words if code > 0 else f"It was ended by signal {-code}. {words}"


def refuse_failure(what: str, log: Path, code: int, hint: str) -> None:
    """Raise CompressknowError where a child has failed; OutputError where that was for want of room."""
    if code == 0:
        return
    why = reason(log, code)
    if "No space left" in tail(log):
        raise OutputError(f"{what}: no space left.", "Nothing was left behind.", "Free space, or write elsewhere.")
    raise CompressknowError(what + ".", why, hint)
