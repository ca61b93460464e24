"""Place of a GGUF file, which appears whole or not at all, and of its record beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compressknow.base.errors import CheckpointError, OutputError, UsageError
from compressknow.base.files import check_links, open_whole, write_whole
from compressknow.base.format import size
from compressknow.base.system import move, sync_folder, uninterrupted
from compressknow.compress.staging import Staging, check_overlap

# Names in the folder to work in: the importance matrix, and the record of the file that is overwritten.
IMPORTANCE, OLD_RECORD = "importance", "old"
SUFFIX = ".gguf"


def get_record_path(output: Path) -> Path:
    """Return where the record of a GGUF file lies."""
    return output.with_name(f"{output.name}.json")


def check_recorded(output: Path) -> None:
    """Raise CheckpointError where a GGUF file has no record beside it."""
    record = get_record_path(output)
    if not record.is_file():
        raise CheckpointError(
            f"{output} has no {record.name} beside it.", hint="Give a file that `compressknow export` wrote."
        )


class Place(Staging):
    """Folder beside a GGUF file to work in; `commit` moves the file named `self.output.name`, its record and, if it has
    a place, the importance matrix out of it to their places."""

    def __init__(self, output: Path, *, overwrite: bool, source: Path, importance: Path | None = None) -> None:
        self._importance = importance
        super().__init__(output, overwrite=overwrite, source=source, check=check_destination)

    @property
    def file(self) -> Path:
        """Return the path of the GGUF file before it is moved."""
        return self.folder / self.output.name

    def commit(self) -> None:
        """Move all to their places: the record last, so that what has one is whole, and none is of another file.

        Raises OutputError as `Staging.commit` does.
        """
        self._check(self.output, overwrite=self._overwrite, source=None)
        sync_folder(self.folder)
        with uninterrupted():
            try:
                with _place_importance(self._importance, self.folder):
                    self._move_file()
            finally:
                if self._committed:
                    move(get_record_path(self.file), get_record_path(self.output))
                    sync_folder(self.output.parent)

    def _move_file(self) -> None:
        try:
            if get_record_path(self.output).exists():
                move(get_record_path(self.output), self.folder / OLD_RECORD)
            move(self.file, self.output)
            self._committed = True
        except OSError:
            self.finish(self.folder)
            raise

    def finish(self, folder: Path) -> None:
        """Finish what a dead run had begun: see `finish`."""
        finish(self.output, folder, self._importance)


@contextmanager
def _place_importance(place: Path | None, folder: Path) -> Iterator[None]:
    """Put the importance matrix, on the disk already, at its place once the context ends without an error."""
    if place is None:
        yield
        return
    with open_whole(place) as file:
        file.write((folder / IMPORTANCE).read_bytes())
        file.flush()
        os.fsync(file.fileno())
        yield


def finish(output: Path, folder: Path, importance: Path | None) -> None:
    """End what a run that is dead was amid of: where it had moved its file to `output`, all else follows; where it had
    only taken the old file's record away, that is put back."""
    made, old, record = get_record_path(folder / output.name), folder / OLD_RECORD, get_record_path(output)
    if os.path.lexists(record) or not output.is_file():
        return
    if made.is_file() and not (folder / output.name).exists():
        if importance and (folder / IMPORTANCE).is_file():
            write_whole(importance, (folder / IMPORTANCE).read_bytes())
        move(made, record)
    elif old.is_file():
        move(old, record)


def check_destination(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError where writing a GGUF file would lose something of the user's, UsageError where its name is of
    no GGUF file."""
    if output.suffix != SUFFIX:
        raise UsageError(f"{output} is no name of a GGUF file.", hint=f"Name it {output.name}{SUFFIX}.")
    check_overlap(output, source)
    record = get_record_path(output)
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


def check_beside(
    path: Path, output: Path, option: str, what: str, is_ours: Callable[[Path], bool], *, overwrite: bool
) -> None:
    """Raise UsageError or OutputError, before any work, where what goes with a GGUF file, a ``Modelfile`` say, cannot
    be written at the path that an option names. `is_ours` tells whether what is there already is one."""
    if path.resolve() in (output.resolve(), get_record_path(output).resolve()):
        raise UsageError(f"{option} and OUTPUT have one name.", hint="Give each a name of its own.")
    check_links(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists already.", hint=f"Choose another {option}, or pass --overwrite.")
    if path.exists() and not is_ours(path):
        raise OutputError(
            f"{path} is no {what}: not overwritten.", hint=f"Remove it yourself, or choose another {option}."
        )
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder.", hint="Make it first, or choose another place.")


def check_room(output: Path, needed: int) -> None:
    """Raise OutputError where the disk of an output has less room than the work takes."""
    folder = next(path for path in (Path.cwd() / output).parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            f"{output} needs about {size(needed)} of disk while it is made, and {size(free)} are free.",
            "The weights are written as floats first, beside OUTPUT.",
            "Free some space, or write to another disk.",
        )
