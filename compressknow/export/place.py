"""Where a GGUF file appears, whole or not at all, and its record beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from compressknow.compress.staging import Staging, refuse_overlap
from compressknow.errors import CheckpointError, OutputError, UsageError
from compressknow.format import size
from compressknow.system import move, sync_folder, uninterrupted

SUFFIX = ".gguf"
# The record of a file is called as the file, with this behind.
RECORD = ".json"


def record_of(output: Path) -> Path:
    """Where the record of a GGUF file lies."""
    return output.with_name(output.name + RECORD)


def refuse_no_record(output: Path) -> None:
    """Raise CheckpointError where a GGUF file has no record beside it."""
    record = record_of(output)
    if not record.is_file():
        raise CheckpointError(
            f"{output} has no {record.name} beside it.", hint="Give a file that `compressknow export` wrote."
        )


class Place(Staging):
    """A folder beside a GGUF file to work in; `commit` moves the file named `self.output.name`, and its record, out of
    it to their places."""

    def __init__(self, output: Path, *, overwrite: bool, source: Path) -> None:
        super().__init__(output, overwrite=overwrite, source=source, refuse=refuse_file)

    @property
    def file(self) -> Path:
        """The GGUF file before it is moved."""
        return self.folder / self.output.name

    def commit(self) -> None:
        """Move both to their places: the file first, so that one without a record is whole, and no record is of another
        file. Raises OutputError as `Staging.commit` does."""
        self._refuse(self.output, overwrite=self._overwrite, source=None)
        self._refuse_losses()
        sync_folder(self.folder)
        with uninterrupted():
            record_of(self.output).unlink(missing_ok=True)
            move(self.file, self.output)
            move(record_of(self.file), record_of(self.output))
            sync_folder(self.output.parent)


def refuse_file(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError where writing a GGUF file would lose something of the user's, UsageError where its name is of
    no GGUF file."""
    if output.suffix != SUFFIX:
        raise UsageError(f"{output} is no name of a GGUF file.", hint=f"Name it {output.name}{SUFFIX}.")
    refuse_overlap(output, source)
    record = record_of(output)
    if not os.path.lexists(output):
        if os.path.lexists(record) and not overwrite:
            raise OutputError(f"{record} exists already.", hint="Choose another OUTPUT, or pass --overwrite.")
        return
    if not overwrite:
        raise OutputError(f"{output} exists already.", hint="Choose another OUTPUT, or pass --overwrite to replace it.")
    if output.is_symlink() or not output.is_file() or not record.is_file():
        raise OutputError(
            f"{output} was not written by compressknow (it has no {record.name} beside it): not overwritten.",
            hint="Remove it yourself, or choose another OUTPUT.",
        )


def refuse_no_room(output: Path, needed: int) -> None:
    """Raise OutputError where the disk of an output has less room than the work takes."""
    folder = next(path for path in (Path.cwd() / output).parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            f"{output} needs about {size(needed)} of disk while it is made, and {size(free)} are free.",
            "The weights are written as floats first, beside OUTPUT.",
            "Free some space, or write to another disk.",
        )
