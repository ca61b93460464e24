"""The folder of a study: of one model and one version, and in use by one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from compressknow import __version__, reading
from compressknow.errors import OutputError
from compressknow.files import LOCK, own_folder, write_whole
from compressknow.forms import misfit
from compressknow.probe.run import Respondent

RECORD = "sweep.json"
ORIGINAL, CELLS, MODELS = "original", "cells", "models"
SCHEMA_VERSION = 1
RECORD_FORM = {"schema": int, "version": str, "model": str, "sha256": str}


def refuse_foreign(folder: Path) -> None:
    """Raise OutputError where a folder is a file, or holds something that is no study."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", hint="A study is kept in a folder; choose another name.")
    if _foreign(folder):
        raise OutputError(f"{folder} exists already, and is no study.", hint="Choose a new folder for the study.")


@contextmanager
def claim(folder: Path, original: Respondent) -> Iterator[None]:
    """Take a folder for a study of this model: a new one, or one that holds such a study already.

    Raises OutputError where it is a file, holds something else, a study of another model or version, or is in use.
    """
    refuse_foreign(folder)
    record = folder / RECORD
    with own_folder(folder, wait=False, worthless=(RECORD,)):
        said = {"schema": SCHEMA_VERSION, "version": __version__, **_identity(original)}
        if record.is_file():
            _refuse_other(record, said)
        else:
            write_whole(record, (json.dumps(said, indent=1) + "\n").encode())
        yield


def _foreign(folder: Path) -> bool:
    """Whether a folder is neither a study nor what is left of a run that was killed before it wrote its record."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return RECORD not in names and any(name != LOCK and not name.startswith(f".{RECORD}.") for name in names)


def _identity(original: Respondent) -> dict[str, str]:
    return {"model": original.located.name, "sha256": original.sha256}


def _refuse_other(record: Path, said: Mapping[str, object]) -> None:
    try:
        found = reading.read_json(record, reading.RECORD)
    except (OSError, ValueError) as error:
        raise OutputError(f"{record} cannot be read: {error}.", hint="Choose a new folder for the study.") from None
    if wrong := misfit(found, RECORD_FORM):
        raise OutputError(f"{record} is damaged: {wrong}.", hint="Choose a new folder for the study.")
    differs = next((key for key in ("sha256", "version", "schema") if found[key] != said[key]), None)
    if differs == "sha256":
        raise OutputError(
            f"{record.parent} is a study of another model ({found.get('model')}).",
            why="Or of this one before its files changed.",
            hint="Choose a new folder for the study.",
        )
    if differs:
        raise OutputError(
            f"{record.parent} is a study by another version ({found['version']}, this is {said['version']}).",
            why="Cells of two versions could not be compared.",
            hint="Choose a new folder for the study, or go on with that version.",
        )
