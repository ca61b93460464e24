"""Output folder that appears whole or not at all: written next to its place, renamed at the end.

A run that dies leaves its staging folder behind, and next to it a lock that nobody holds any more; the next run for the
same output removes both, and puts back what an interrupted `--overwrite` had moved aside.
"""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from compressknow.base.errors import OutputError
from compressknow.base.files import (
    check_links,
    close_durably,
    create_locked_file,
    explain_write_error,
    lock_dead,
    make_prefix,
)
from compressknow.base.reading import COPY_BYTES, open_regular
from compressknow.base.system import hold_signals, is_full, move, remove_lock, sync_folder
from compressknow.model.manifest import MANIFEST_NAME


class Staging:
    """Folder to write an output into; `commit` moves it to its place. `check` raises if it must not be overwritten.

    Raises OutputError if the output exists and may not be overwritten, or if it cannot be written there.
    """

    def __init__(
        self, output: Path, *, overwrite: bool, source: Path, check: Callable[..., None] | None = None
    ) -> None:
        self.output = Path.cwd() / output
        self._overwrite, self._check = overwrite, check or check_output
        self._committed = False
        self._made = [parent for parent in self.output.parents if not parent.exists()]
        self._locked: tuple[Path, int] | None = None
        check_links(self.output.parent)
        try:
            # This may put back the old output of an interrupted run.
            clean(self.output, self.finish)
            self._check(self.output, overwrite=overwrite, source=source)
            with hold_signals():
                self.output.parent.mkdir(parents=True, exist_ok=True)
                self._locked = create_locked_file(self.output.parent, _make_prefix(self.output, "lock"))
                self.folder = _find_twin(self.output, self._locked[0], "new")
                self.folder.mkdir()
        except OSError as error:
            self._remove()
            raise explain_write_error(output, error) from None
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._remove()
        if isinstance(error, OSError) and is_full(error):
            raise OutputError(
                f"No space left for {self.output}.",
                why="Nothing was left behind.",
                hint="Free space, or write elsewhere.",
            ) from None

    def write(self, name: str, content: bytes) -> str:
        """Write a small file durably; return its SHA-256 in hexadecimal."""
        with self._new(name).open("xb") as file:
            file.write(content)
            close_durably(file)
        return hashlib.sha256(content).hexdigest()

    def copy(self, source: Path, name: str) -> str:
        """Copy a file durably; return its SHA-256 in hexadecimal."""
        digest = hashlib.sha256()
        with open_regular(source) as original, self._new(name).open("xb") as copy:
            while piece := original.read(COPY_BYTES):
                digest.update(piece)
                copy.write(piece)
            close_durably(copy)
        return digest.hexdigest()

    def _new(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self) -> None:
        """Move the finished folder to its place, and then remove the old output. Raises OutputError if an output has
        appeared there meanwhile."""
        self._check(self.output, overwrite=self._overwrite, source=None)
        sync_folder(self.folder)
        aside = _find_twin(self.output, self.folder, "old")
        try:
            with hold_signals():
                try:
                    if self.output.exists():
                        move(self.output, aside)
                    move(self.folder, self.output)
                    self._committed = True
                    sync_folder(self.output.parent)
                finally:
                    if aside.exists() and not self.output.exists():
                        move(aside, self.output)
                    shutil.rmtree(aside, ignore_errors=True)
        except (KeyboardInterrupt, SystemExit) as stop:
            if not self.folder.exists():
                stop.add_note(f"{self.output} is whole.")
            raise

    def finish(self, folder: Path) -> None:
        """Complete a commit that a dead run left in this staging folder, before it is removed; a single rename needs no
        completion."""

    def _remove(self) -> None:
        """Remove everything that was created except the output; without an output, also the new folders above it."""
        with hold_signals():
            if self._locked:
                shutil.rmtree(self.folder, ignore_errors=True)
                remove_lock(*self._locked)
            for parent in () if self._committed else self._made:
                with suppress(OSError):
                    parent.rmdir()


def check_overlap(output: Path, source: Path | None) -> None:
    """Raise OutputError if an output is, is inside or contains its source, unless that is a hub id."""
    if source is not None and source.exists():
        target, origin = output.resolve(), source.resolve()
        overlaps = {
            "is the input itself": target == origin,
            "lies inside the input": origin in target.parents,
            "contains the input": target in origin.parents,
        }
        if relation := next((text for text, is_true in overlaps.items() if is_true), None):
            raise OutputError(f"OUTPUT {output} {relation}.", hint="Choose a folder next to it.")


def check_output(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError if `output` overlaps its source, or if writing it would destroy a user's files."""
    check_overlap(output, source)
    if not os.path.lexists(output):
        return
    if output.is_symlink():
        raise OutputError(f"{output} is a link: not overwritten.", hint="Remove it yourself, or choose another OUTPUT.")
    is_replaceable = output.is_dir() and ((output / MANIFEST_NAME).is_file() or not any(output.iterdir()))
    if not is_replaceable:
        raise OutputError(
            f"{output} exists already, and was not written by compressknow (it has no {MANIFEST_NAME}): "
            "not overwritten.",
            hint="Remove it yourself, or choose another OUTPUT.",
        )
    if not overwrite:
        raise OutputError(f"{output} exists already.", hint="Choose another OUTPUT, or pass --overwrite to replace it.")


def _make_prefix(output: Path, kind: str) -> str:
    return f"{make_prefix(output)}{kind}-"


def _find_twin(output: Path, path: Path, kind: str) -> Path:
    """Return another path of the same run by its kind: its lock, its new folder, or the old output moved aside."""
    return output.with_name(_make_prefix(output, kind) + path.name.rpartition("-")[2])


def _find_kind(output: Path, kind: str) -> list[Path]:
    return list(output.parent.glob(glob.escape(_make_prefix(output, kind)) + "*"))


def clean(output: Path, finish: Callable[[Path], None] | None = None) -> None:
    """Remove what dead runs for the same output left, after `finish` was called with each staging folder, and put back
    what one of them had moved aside."""
    for lock_file in _find_kind(output, "lock"):
        with lock_dead(lock_file) as ended:
            if ended:
                _clean_one(output, lock_file, finish)
    for path in (*_find_kind(output, "old"), *_find_kind(output, "new")):
        # A run takes its lock first and removes it last: without a lock, it has ended.
        if not _find_twin(output, path, "lock").exists():
            _clean_one(output, path, finish)


@contextmanager
def make_scratch(place: Path) -> Iterator[Path]:
    """Make a temporary folder next to `place`, and remove those that dead runs left. Raises OutputError as
    `Staging`."""
    with Staging(place, overwrite=False, source=place, check=lambda *_, **__: None) as staging:
        yield staging.folder


def discard(output: Path) -> None:
    """Remove an output that convert wrote, all of it or nothing, even if the process dies in between."""
    # Under a name that the next run removes, and does not put back.
    aside = output.with_name(f"{_make_prefix(output, 'new')}{secrets.token_hex(4)}")
    move(output, aside)
    shutil.rmtree(aside)


def _clean_one(output: Path, path: Path, finish: Callable[[Path], None] | None) -> None:
    old, new = _find_twin(output, path, "old"), _find_twin(output, path, "new")
    if old.exists() and not output.exists():
        move(old, output)
    if finish and new.is_dir():
        finish(new)
    for folder in (old, new):
        shutil.rmtree(folder, ignore_errors=True)
