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
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from compressknow.compress.recipe import MANIFEST_NAME
from compressknow.errors import CheckpointError, OutputError

LOCK_NAME = ".lock"
COPY_BYTES = 1 << 20


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
        self._made: list[Path] = []
        try:
            self._made = [parent for parent in self.output.parents if not parent.exists()]
            self.output.parent.mkdir(parents=True, exist_ok=True)
            _clean(self.output)
            # An interrupted run's old output may have been put back just now.
            refuse_output(self.output, overwrite=overwrite, source=source)
            self.folder, self._lock = _locked_folder(self.output)
        except OSError as error:
            self._remove_made_parents()
            raise OutputError(f"{output} cannot be written: {error.strerror}.", hint="Choose another OUTPUT.") from None

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        if error is not None:
            self._remove_made_parents()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"No space left for {self.output}.",
                why="Nothing was left behind.",
                hint="Free space, or write elsewhere.",
            ) from None

    def commit(self) -> None:
        """Move the finished folder to its place; an old output there is removed only once the new one has taken it."""
        refuse_output(self.output, overwrite=self._overwrite, source=None)
        # mkdtemp makes it private; the output is as open as the user's other files.
        mask = os.umask(0)
        os.umask(mask)
        self.folder.chmod(0o777 & ~mask)
        sync_folder(self.folder)
        aside = _twin(self.output, self.folder, "old")
        try:
            if self.output.exists():
                self.output.rename(aside)
            self.folder.rename(self.output)
        except BaseException:
            if aside.exists() and not self.output.exists():
                aside.rename(self.output)
            raise
        # Without its lock it would have looked like a dead run's while it still was on its way.
        (self.output / LOCK_NAME).unlink()
        sync_folder(self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def _remove_made_parents(self) -> None:
        for parent in self._made:
            with suppress(OSError):
                parent.rmdir()


def refuse_output(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError where writing `output` would lose something of the user's. A `source` that is no folder here
    (a hub id) is in nobody's way."""
    if source is not None and source.exists():
        here, there = output.resolve(), source.resolve()
        overlaps = {
            "is the input itself": here == there,
            "lies inside the input": there in here.parents,
            "contains the input": here in there.parents,
        }
        if relation := next((words for words, holds in overlaps.items() if holds), None):
            raise OutputError(f"OUTPUT {output} {relation}.", hint="Choose a folder beside it.")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(f"{output} exists already.", hint="Choose another OUTPUT, or pass --overwrite to replace it.")
    if output.is_symlink():
        raise OutputError(
            f"{output} is a link: not overwritten.", hint="Give the folder that it leads to, or remove it."
        )
    if not output.is_dir() or not _is_ours(output):
        raise OutputError(
            f"{output} was not written by compressknow (it has no {MANIFEST_NAME}): not overwritten.",
            hint="Remove it yourself, or choose another OUTPUT.",
        )


def refuse_unconverted(folder: Path) -> None:
    """Raise CheckpointError where a folder has no manifest."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.", hint="Give one that `compressknow convert` wrote.")
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}.", hint="verify takes a folder that `compressknow convert` wrote."
        )


def _is_ours(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file() or not any(folder.iterdir())


def _prefix(output: Path, kind: str) -> str:
    return f".{output.name}.compressknow-{kind}-"


def _twin(output: Path, folder: Path, kind: str) -> Path:
    """The folder of another kind that belongs to the same run: the old output moved aside by a new one."""
    return output.with_name(_prefix(output, kind) + folder.name.rpartition("-")[2])


def _locked_folder(output: Path) -> tuple[Path, int]:
    """A new staging folder, and the descriptor of the lock that marks it as a live run's."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(output, "new"), dir=output.parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder / LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another run may have taken it for a dead one before it was locked, and removed it.
            if os.fstat(lock).st_nlink:
                return folder, lock
            os.close(lock)


def _clean(output: Path) -> None:
    """Remove what dead runs for the same output left, and put back what one of them had moved aside."""
    for old in output.parent.glob(glob.escape(_prefix(output, "old")) + "*"):
        if _is_alive(_twin(output, old, "new")):
            continue
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(output)
    for new in output.parent.glob(glob.escape(_prefix(output, "new")) + "*"):
        lock = _try_lock(new)
        if lock is not None:
            shutil.rmtree(new, ignore_errors=True)
            os.close(lock)


def _is_alive(folder: Path) -> bool:
    lock = _try_lock(folder)
    if lock is None:
        return folder.exists()
    os.close(lock)
    return False


def _try_lock(folder: Path) -> int | None:
    """The lock of a staging folder; None where another run holds it, or nobody can (it is gone, or not ours)."""
    try:
        lock = os.open(folder / LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


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


def copy_file(source: Path, target: Path) -> str:
    """Copy a file durably; returns its SHA-256 in hexadecimal."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as original, target.open("xb") as copy:
        while piece := original.read(COPY_BYTES):
            digest.update(piece)
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()
