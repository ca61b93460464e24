"""Files that appear whole or not at all, and locks that end with the process that holds them.

A lock is the operating system's: a process that is killed holds none, even if its number is reused. A file is written
under a temporary name next to its place, and renamed when it is whole. Its lock is another file next to it, since
Windows renames nothing that is open. A temporary file whose lock nobody holds is a dead run's, and the next run removes
it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from compressknow.base.errors import OutputError
from compressknow.base.system import create, hold_signals, is_full, lock, lock_opened, move, remove_lock

LOCK = ".lock"
_SUFFIX = ".compressknow-"
# How often to recreate a folder that other runs remove at the same time.
_ATTEMPTS = 100


def find_cache_folder() -> Path:
    """Return the cache folder, ``$XDG_CACHE_HOME/compressknow``. Raise OutputError if that is not set and the user has
    no home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compressknow"
    except RuntimeError:
        raise OutputError(
            "There is no home folder to keep a cache in.", hint="Set HOME, or XDG_CACHE_HOME to a folder."
        ) from None


def expand_home(path: str | Path) -> Path:
    """Return a path with a user's home for its ``~``; as it stands where there is no such user, or no home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextlib.contextmanager
def lock_dead(path: Path) -> Iterator[bool]:
    """Take the lock of a file whose run has ended, and remove the file in the end; False if the run lives."""
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
    """Create a file of this run's own: its name begins with `prefix`, and closing the descriptor lets its lock go."""
    while True:
        path = folder / f"{prefix}{secrets.token_hex(4)}"
        descriptor = create(path)
        # A file system without locks: there its like is never taken for a dead run's.
        with contextlib.suppress(OSError):
            lock_opened(descriptor, wait=True)
        # Another run may have taken it for a dead one's before it was locked, and removed it.
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def claim_folder(folder: Path, *, wait: bool, worthless: Collection[str] = ()) -> Iterator[None]:
    """Hold a folder for this run alone, made where it is missing; what dead runs left half written in it is removed.

    If it then holds nothing but files named in `worthless`, these are removed, and so are the folders that were made.

    Raises OutputError if it cannot be made or locked, or where another run has it and `wait` is False.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        # Waiting for another run's lock can be interrupted; making the folder and its lock cannot.
        with contextlib.nullcontext() if wait else hold_signals():
            descriptor = _lock_folder(folder, wait)
        remove_strays(folder)
        yield
    finally:
        with hold_signals():
            if descriptor is not None:
                _leave(folder, descriptor, made, worthless)


def _leave(folder: Path, descriptor: int, made: Iterable[Path], worthless: Collection[str]) -> None:
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
        for path in made:
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
            # The run that made the folder has just removed it.
            time.sleep(0.01)
            continue
        except OSError as error:
            place = folder / LOCK
            if place.is_dir() or place.is_symlink():
                kind = "link" if place.is_symlink() else "folder"
                raise OutputError(f"{place} is a {kind}, where a run keeps its lock.", hint="Remove it.") from None
            raise explain_write_error(folder, error) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
                return descriptor
        # The run that held it has removed it, for nothing came of that run.
        os.close(descriptor)
    raise OutputError(f"{folder} disappears as soon as it is created.", hint="Choose another folder.")


def is_no_folder(path: Path) -> bool:
    """Tell whether something that is not a folder is there, in one call, since another run may be removing a folder."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def check_links(path: Path) -> None:
    """Raise OutputError if the path, or a folder above it, is a link that leads nowhere."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise OutputError(
                f"{place} is a link that leads nowhere.", hint="Remove it, make what it points to, or write elsewhere."
            )


def check_writable(path: Path) -> None:
    """Raise OutputError if no file can be made in the folder of `path`."""
    try:
        with _open_temporary(path):
            pass
    except OSError as error:
        raise explain_write_error(path, error) from error


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that replaces `path` when the context ends without an error. Parent folders are created.
    Raises OutputError, naming `path`, if it cannot be written (no space, no permission)."""
    _remove_dead(path.parent.glob(f"{glob.escape(make_prefix(path))}????????"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_temporary(path) as (temporary, file):
            yield file
            close_durably(file)
            move(temporary, path)
    except OSError as error:
        raise explain_write_error(path, error) from error


def close_durably(file: BinaryIO) -> None:
    """Close a file, all of it on the disk; one that is closed stays as it is. Raises OSError: the disk may be full."""
    if not file.closed:
        file.flush()
        os.fsync(file.fileno())
        file.close()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is whole. Raises OutputError if it cannot be written."""
    with open_whole(path) as file:
        file.write(content)


def remove_strays(folder: Path) -> None:
    """Remove the temporary files that dead runs have left in a folder."""
    _remove_dead(folder.glob(f".*{_SUFFIX}????????"))


def escape_name(words: str) -> str:
    r"""Return what the system gave as a name or an argument as a text that any file can hold: bytes that are not UTF-8
    become escapes.

    >>> escape_name("model\udcff")
    'model\\udcff'
    """
    with contextlib.suppress(UnicodeEncodeError):
        # In a locale of ASCII the bytes of every other character are escaped, although they are UTF-8.
        words = words.encode("ascii", "surrogateescape").decode("utf-8", "surrogateescape")
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


def explain_write_error(path: Path, error: OSError) -> OutputError:
    """Return the error of a file or folder that the system does not let us write, in our form."""
    full = is_full(error)
    why = "no space left" if full else error.strerror or str(error)
    is_cached = False
    with contextlib.suppress(OutputError):
        is_cached = path.is_relative_to(find_cache_folder())
    remedy = "set XDG_CACHE_HOME to another folder" if is_cached else "choose another place"
    hint = (
        f"Free some space, or {remedy}. Files that were complete before are unchanged."
        if full
        else f"Change its permissions, or {remedy}."
    )
    return OutputError(f"{path} cannot be written: {why}.", hint=hint)


@contextlib.contextmanager
def _open_temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Create a temporary file next to `path`, with a lock file; both are removed at the end, unless it was renamed."""
    locked = None
    try:
        with hold_signals():
            locked, descriptor = create_locked_file(path.parent, make_prefix(path))
        with _find_content(locked).open("xb") as file:
            yield _find_content(locked), file
    finally:
        with hold_signals():
            if locked:
                _find_content(locked).unlink(missing_ok=True)
                remove_lock(locked, descriptor)


def _find_content(locked: Path) -> Path:
    """Return the file whose writer holds the lock of the file `locked`."""
    return locked.with_name(f"{locked.name}.new")


def make_prefix(path: Path) -> str:
    """Return how names hidden next to a file or folder begin, and no other's; a whole name has at most 255 bytes."""
    name = path.name.encode("utf-8", "surrogateescape")
    short = f"{name[:180].decode('utf-8', 'ignore')}-{hashlib.sha256(name).hexdigest()[:16]}"
    return f".{path.name if len(name) <= 200 else short}{_SUFFIX}"


def _remove_dead(temporaries: Iterable[Path]) -> None:
    for temporary in temporaries:
        with lock_dead(temporary) as is_dead, contextlib.suppress(OSError):
            if is_dead:
                _find_content(temporary).unlink(missing_ok=True)


def walk_visible(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder, at any depth, by the path within it, in order; nothing hidden."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not any(part.startswith((".", "__pycache__")) for part in name.parts):
            yield name
