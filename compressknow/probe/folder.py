"""An answers folder while a run writes it: locked, and with the parts of what is being asked."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from compressknow.errors import OutputError
from compressknow.files import LOCK, own_folder
from compressknow.probe.answers import RECORD, TABLE, Answer, read_table, write_table

PARTS = ".parts"
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
    with own_folder(folder, wait=wait):
        yield


def tidy(folder: Path) -> None:
    """Remove what is of no use once all is answered: the parts."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


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


def _foreign(folder: Path) -> bool:
    """Whether a folder holds anything beside answers or what a run that was cut short leaves."""
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return False
    ours = {LOCK, PARTS, TABLE} if LOCK in names else {PARTS}
    return RECORD not in names and any(name not in ours and not name.startswith(_UNFINISHED) for name in names)
