"""An answers folder while a run writes it: locked, and with the parts of what is being asked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from compressknow.errors import OutputError
from compressknow.probe.answers import RECORD, TABLE, Answer, read_table, write_table

PARTS, LOCK = ".parts", ".lock"
# Beside these, what a killed run leaves: files that were being written.
_UNFINISHED = (f".{TABLE}.", f".{RECORD}.")


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """The folder, made where it is missing, for this run alone; an error leaves none behind that holds nothing.

    Raises OutputError where it is a file, holds something else, or is in use and `wait` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", hint="Answers are kept in a folder; choose another name.")
    if _foreign(folder):
        raise OutputError(
            f"{folder} exists already, and is no answers folder.", hint="Choose a new folder for the answers."
        )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = take(folder, wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        os.close(lock)


def tidy(folder: Path) -> None:
    """Remove what is of no use once all is answered: parts, and what killed runs have left."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for path in folder.iterdir():
        if path.name.startswith(_UNFINISHED):
            path.unlink(missing_ok=True)


def stored(folder: Path) -> list[Answer]:
    """All answers that the folder holds."""
    return read_table(folder / TABLE) if (folder / TABLE).is_file() else []


def parts_of(folder: Path, key: str) -> Path:
    """Where the answers to one probe are kept until all of them are there."""
    return folder / PARTS / key[:16]


def write_part(parts: Path, answers: Sequence[Answer]) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    write_table(parts / f"{len(list(parts.glob('*.parquet'))):05}.parquet", answers)


def stored_parts(parts: Path) -> list[Answer]:
    return [answer for path in sorted(parts.glob("*.parquet")) for answer in read_table(path)]


def take(folder: Path, wait: bool) -> int:
    """The lock of the folder, as a file descriptor that lets it go when it is closed.

    Raises OutputError where another run has it and `wait` is False.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, FileExistsError):
            # The run that made the folder has just removed it.
            if folder.exists() and not folder.is_dir():
                raise
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(lock)
            raise OutputError(
                f"{folder} is in use: another run writes its answers there.",
                hint="Wait for it, or choose another folder.",
            ) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                return lock
        # The run that held it has removed it, for nothing was answered.
        os.close(lock)


def _foreign(folder: Path) -> bool:
    """Whether a folder holds anything beside answers or what a run that was cut short leaves."""
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return False
    ours = {LOCK, PARTS, TABLE} if LOCK in names else {PARTS}
    return RECORD not in names and any(name not in ours and not name.startswith(_UNFINISHED) for name in names)
