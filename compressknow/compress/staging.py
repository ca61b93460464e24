"""An output folder that appears whole or not at all: written beside its final place, renamed at the end.

A run that dies leaves its staging folder behind, which holds no lock any more; the next run for the same output
removes it, and puts back what an interrupted `--overwrite` had moved aside.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from compressknow.compress.recipe import MANIFEST_NAME
from compressknow.errors import OutputError

LOCK_NAME = ".lock"


class Staging:
    """A folder to write an output into; `commit` moves it to its place.

    Raises
    ------
    OutputError : the output exists and may not be overwritten, or cannot be written where it should be.
    """

    def __init__(self, output: Path, *, overwrite: bool, source: Path) -> None:
        self.output = Path.cwd() / output
        self._overwrite = overwrite
        refuse_output(self.output, overwrite=overwrite, source=source)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            _clean(self.output)
            self.folder = Path(tempfile.mkdtemp(prefix=_prefix(self.output, "new"), dir=self.output.parent))
        except OSError as error:
            raise OutputError(f"{output} cannot be written: {error.strerror}.", hint="Choose another OUTPUT.") from None
        self._lock = os.open(self.folder / LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"No space left for {self.output}.",
                why="Nothing was left behind.",
                hint="Free space, or write elsewhere.",
            ) from None

    def commit(self) -> None:
        """Move the finished folder to its place; an old output there is removed only once the new one has taken it."""
        refuse_output(self.output, overwrite=self._overwrite, source=None)
        (self.folder / LOCK_NAME).unlink()
        # mkdtemp makes it private; the output is as open as the user's other files.
        mask = os.umask(0)
        os.umask(mask)
        self.folder.chmod(0o777 & ~mask)
        sync_folder(self.folder)
        aside = self.output.with_name(_prefix(self.output, "old") + self.folder.name.rpartition("-")[2])
        if self.output.exists():
            self.output.rename(aside)
        self.folder.rename(self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(aside, ignore_errors=True)


def refuse_output(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError where writing `output` would lose something of the user's."""
    if source is not None:
        here, there = output.resolve(), source.resolve()
        if here == there or there in here.parents or here in there.parents:
            relation = (
                "the input itself"
                if here == there
                else "inside the input"
                if there in here.parents
                else "around the input"
            )
            raise OutputError(f"OUTPUT {output} is {relation}.", hint="Choose a folder beside it.")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(f"{output} exists already.", hint="Choose another OUTPUT, or pass --overwrite to replace it.")
    if output.is_symlink() or not output.is_dir() or not _is_ours(output):
        raise OutputError(
            f"{output} was not written by compressknow (it has no {MANIFEST_NAME}): not overwritten.",
            hint="Remove it yourself, or choose another OUTPUT.",
        )


def _is_ours(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file() or not any(folder.iterdir())


def _prefix(output: Path, kind: str) -> str:
    return f".{output.name}.compressknow-{kind}-"


def _clean(output: Path) -> None:
    for old in output.parent.glob(glob.escape(_prefix(output, "old")) + "*"):
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(output)
    for new in output.parent.glob(glob.escape(_prefix(output, "new")) + "*"):
        if not _is_locked(new / LOCK_NAME):
            shutil.rmtree(new, ignore_errors=True)


def _is_locked(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> str:
    """Write a small file durably; returns its SHA-256 in hexadecimal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()
