"""Files that appear whole or not at all, and locks that end with the process that holds them.

Locks belong to the operating system, which releases them when a process dies, even if its number is reused. A file is
written under a temporary name in the same folder and renamed once it is complete. Its lock is a separate file, since
Windows cannot rename an open one. A temporary file whose lock is free is left from a dead run; the next run removes it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from compressknow.base.errors import OutputError
from compressknow.base.system import create, hold_signals, is_full, lock, lock_opened, move, remove_lock

LOCK = ".lock"
_SUFFIX = ".compressknow-"
# To lock a folder that other runs create and remove at the same time.
_ATTEMPTS = 100


def find_cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/compressknow``. Raise OutputError if that is not set and the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compressknow"
    except RuntimeError:
        raise OutputError(
            "There is no home folder to keep a cache in.", hint="Set HOME, or XDG_CACHE_HOME to a folder."
        ) from None


def expand_home(path: str | Path) -> Path:
    """Return a path with ``~`` expanded; unchanged if there is no such user, or no home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextlib.contextmanager
def lock_dead(path: Path) -> Iterator[bool]:
    """Lock a lock file that a dead run left, and remove it at the end; yield False if its run is alive."""
    try:
        descriptor = lock(path, wait=False, make=False)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            remove_lock(path, descriptor)


def create_locked_file(folder: Path, prefix: str) -> tuple[Path, int]:
    """Create and lock a file whose name begins with `prefix`; closing the descriptor releases the lock."""
    while True:
        path = folder / f"{prefix}{secrets.token_hex(4)}"
        descriptor = create(path)
        # On a file system without locks this fails, and no file there is ever taken for a dead run's.
        with contextlib.suppress(OSError):
            lock_opened(descriptor, wait=True)
        # Before it was locked, another run may have taken it for a dead run's, and removed it.
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def claim_folder(folder: Path, *, wait: bool, worthless: Collection[str] = ()) -> Iterator[None]:
    """Lock a folder for this run, creating it if it is missing, and remove incomplete files of dead runs from it. If it
    holds only files named in `worthless` at the end, remove these, and the folders that were created. Raises
    OutputError if it cannot be created or locked, or if another run has locked it and `wait` is False."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        # A signal may interrupt waiting for another run's lock, but not creating the folder and its lock.
        with contextlib.nullcontext() if wait else hold_signals():
            descriptor = _lock_folder(folder, wait)
        remove_strays(folder)
        yield
    finally:
        with hold_signals():
            if descriptor is not None:
                _release_folder(folder, descriptor, created, worthless)


def _release_folder(folder: Path, descriptor: int, created: Iterable[Path], worthless: Collection[str]) -> None:
    holds_more = True
    with contextlib.suppress(OSError):
        holds_more = any(path.name not in {LOCK, *worthless} for path in folder.iterdir())
    if holds_more:
        os.close(descriptor)
        return
    with contextlib.suppress(OSError):
        for name in worthless:
            (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        remove_lock(folder / LOCK, descriptor)
        for path in created:
            path.rmdir()


def _lock_folder(folder: Path, wait: bool) -> int:
    for _ in range(_ATTEMPTS):
        check_links(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock(folder / LOCK, wait=wait)
        except BlockingIOError:
            raise OutputError(
                f"{folder} is in use by another run.", hint="Wait for it, or choose another folder."
            ) from None
        except (FileNotFoundError, FileExistsError) as error:
            if is_no_folder(folder):
                raise explain_write_error(folder, error) from None
            # The run that created the folder has just removed it.
            time.sleep(0.01)
            continue
        except OSError as error:
            path = folder / LOCK
            if path.is_dir() or path.is_symlink():
                kind = "link" if path.is_symlink() else "folder"
                raise OutputError(f"The lock file {path} is a {kind}, not a file.", hint="Remove it.") from None
            raise explain_write_error(folder, error) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
                return descriptor
        # The run that held the lock has removed the file, since it had no results.
        os.close(descriptor)
    raise OutputError(f"{folder} disappears as soon as it is created.", hint="Choose another folder.")


def is_no_folder(path: Path) -> bool:
    """Return whether the path exists and is not a folder; in one call, since another run may be removing a folder."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def check_links(path: Path) -> None:
    """Raise OutputError if the path, or a folder above it, is a broken link."""
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise OutputError(
                f"{each} is a link that leads nowhere.", hint="Remove it, create its target, or choose another place."
            )


def check_writable(path: Path) -> None:
    """Raise OutputError if no file can be created in the folder of `path`."""
    try:
        with _open_temporary(path):
            pass
    except OSError as error:
        raise explain_write_error(path, error) from error


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path`, whose folders are created, when the context ends without an error.
    Raises OutputError if `path` cannot be written: no space, no permission."""
    _remove_dead(path.parent.glob(f"{glob.escape(make_prefix(path))}????????"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_temporary(path) as (temporary, file):
            yield file
            close_durably(file)
            if path.exists():
                # A file that only its owner may read stays so.
                shutil.copymode(path, temporary)
            move(temporary, path)
    except OSError as error:
        raise explain_write_error(path, error) from error


def close_durably(file: BinaryIO) -> None:
    """Sync a file to disk and close it, unless it is closed. Raises OSError, for example if the disk is full."""
    if not file.closed:
        file.flush()
        os.fsync(file.fileno())
        file.close()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only once it is complete. Raises OutputError if it cannot be written."""
    with open_whole(path) as file:
        file.write(content)


def remove_strays(folder: Path) -> None:
    """Remove the temporary files of dead runs from a folder."""
    _remove_dead(folder.glob(f".*{_SUFFIX}????????"))


def escape_name(name: str) -> str:
    r"""Return a file name or argument from the system as valid text: bytes that are not UTF-8 are escaped.

    >>> escape_name("model\udcff")
    'model\\udcff'
    """
    with contextlib.suppress(UnicodeEncodeError):
        # In an ASCII locale, Python escapes the bytes of UTF-8 characters too.
        name = name.encode("ascii", "surrogateescape").decode("utf-8", "surrogateescape")
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def explain_write_error(path: Path, error: OSError) -> OutputError:
    """Return an OutputError for a file or folder that cannot be written because of `error`."""
    full = is_full(error)
    why = "no space left" if full else error.strerror or str(error)
    is_cached = False
    with contextlib.suppress(OutputError):
        is_cached = path.is_relative_to(find_cache_folder())
    remedy = "set XDG_CACHE_HOME to another folder" if is_cached else "choose another place"
    hint = (
        f"Free some space, or {remedy}. Files that were complete before are unchanged."
        if full
        else f"Make it writable, or {remedy}."
    )
    return OutputError(f"{path} cannot be written: {why}.", hint=hint)


@contextlib.contextmanager
def _open_temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Create a temporary file and its lock file next to `path`; both are removed at the end unless renamed."""
    lock_file = None
    try:
        with hold_signals():
            lock_file, descriptor = create_locked_file(path.parent, make_prefix(path))
        with _find_content(lock_file).open("xb") as file:
            yield _find_content(lock_file), file
    finally:
        with hold_signals():
            if lock_file:
                _find_content(lock_file).unlink(missing_ok=True)
                remove_lock(lock_file, descriptor)


def _find_content(lock_file: Path) -> Path:
    """Return the temporary file that a lock file belongs to."""
    return lock_file.with_name(f"{lock_file.name}.new")


def make_prefix(path: Path) -> str:
    """Return the prefix of the hidden names that belong to a file or folder, short enough for names of 255 bytes."""
    name = path.name.encode("utf-8", "surrogateescape")
    short = f"{name[:180].decode('utf-8', 'ignore')}-{hashlib.sha256(name).hexdigest()[:16]}"
    return f".{path.name if len(name) <= 200 else short}{_SUFFIX}"


def _remove_dead(lock_files: Iterable[Path]) -> None:
    for lock_file in lock_files:
        with lock_dead(lock_file) as is_dead, contextlib.suppress(OSError):
            if is_dead:
                _find_content(lock_file).unlink(missing_ok=True)


def walk_visible(folder: Path) -> Iterator[Path]:
    """Yield the relative paths of a folder's files and folders at any depth, sorted; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not any(part.startswith((".", "__pycache__")) for part in relative.parts):
            yield relative
