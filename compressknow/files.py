"""Files that appear whole or not at all, and locks that end with the process that holds them.

A lock is the operating system's: a process that is killed holds none, whatever becomes of its number. A file is written
under a temporary name beside its place, locked, and renamed when it is whole. So a temporary file that nobody has
locked is a dead run's, and the next run removes it.

What differs between systems lies here too, found by what Python offers on each: Windows has no fcntl, and neither
renames nor removes a file that is open; macOS reserves no room on a disk, and Windows has no reads at a position.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from compressknow.errors import OutputError

LOCK = ".lock"
_SUFFIX = ".compressknow-"
# Of a folder that other runs make and remove at the same time.
_ATTEMPTS = 100
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
_NO_FOLLOW, _BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)
# At most so many bytes at a time: one call takes no more than 2 GB on macOS and Windows.
_MOST_AT_ONCE = 1 << 30

if importlib.util.find_spec("fcntl"):
    fcntl: Any = importlib.import_module("fcntl")
    _OPEN_FILES_MOVE = True

    def _lock(descriptor: int, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
else:
    msvcrt: Any = importlib.import_module("msvcrt")
    # Windows neither renames nor removes a file that is open.
    _OPEN_FILES_MOVE = False
    # Beyond what a lock file holds: nobody else may read a byte that is locked.
    _LOCKED_BYTE = 1 << 30

    def _lock(descriptor: int, wait: bool) -> None:
        while True:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return
            except PermissionError:
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "locked by another process") from None
                time.sleep(0.1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)


# Virus scanners open what was just written; so long is waited until a file or folder can be moved.
_WAITS = () if _OPEN_FILES_MOVE else (0.05, 0.1, 0.2, 0.4, 0.8)

# A descriptor has one position, which threads share; where the system reads and writes only there, one at a time.
_seeking = threading.Lock()


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill `buffer` (bytes) from a file's byte `position` on; how many bytes there were before the file ended.

    Threads may share a descriptor, here and in `write_at`.
    """
    done = 0
    while piece := buffer[done : done + _MOST_AT_ONCE]:
        if (count := _read_some(descriptor, piece, position + done)) == 0:
            break
        done += count
    return done


def _read_some(descriptor: int, buffer: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return int(os.preadv(descriptor, [buffer], position))
    with _seeking:
        os.lseek(descriptor, position, os.SEEK_SET)
        piece = os.read(descriptor, len(buffer))
    buffer[: len(piece)] = piece
    return len(piece)


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data` (bytes) to a file, from its byte `position` on. Raises OSError."""
    done = 0
    while piece := data[done : done + _MOST_AT_ONCE]:
        done += _write_some(descriptor, piece, position + done)


def _write_some(descriptor: int, data: memoryview, position: int) -> int:
    if hasattr(os, "pwrite"):
        return int(os.pwrite(descriptor, data, position))
    with _seeking:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data)


def open_to_read(path: Path) -> int:
    """A descriptor of a file's bytes, for `read_at`. Raises OSError."""
    return os.open(path, os.O_RDONLY | _BINARY)


def new_file(path: Path, size: int) -> int:
    """A new file of `size` bytes, for `read_at` and `write_at`: where the disk has no room for it, it fails now.

    Raises OSError: it exists (FileExistsError), or the disk is full (see `is_full`).
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o666)
    try:
        _reserve(path, descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _reserve(path: Path, descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            # Some file systems reserve nothing, and some C libraries do not do it in their stead.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.ftruncate(descriptor, size)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, in place of a file of that name. Raises OSError.

    Windows refuses that while anybody has it open: there it is tried for a while.
    """
    for seconds in _WAITS:
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(seconds)
    source.replace(target)


def available_cores() -> int:
    """How many cores this process may use, or has, where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; its size now, where the system keeps no record of it."""
    # Better than getrusage, by which a new process starts at the size of the one that has started it.
    with contextlib.suppress(OSError):
        if match := re.search(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes()):
            return 1024 * int(match[1])
    if importlib.util.find_spec("resource"):
        resource: Any = importlib.import_module("resource")
        unit = 1 if sys.platform == "darwin" else 1024
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
    memory: Any = importlib.import_module("psutil").Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def lock(path: Path, *, wait: bool, make: bool = True) -> int:
    """The lock that a file stands for, as a descriptor that lets it go when it is closed; `make` the file if missing.

    Raises BlockingIOError where another process holds it and `wait` is False, OSError where there can be no lock.
    """
    if not _NO_FOLLOW and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    descriptor = os.open(path, (os.O_CREAT if make else 0) | os.O_RDWR | _NO_FOLLOW | _BINARY, 0o666)
    try:
        _lock(descriptor, wait)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_lock(path: Path, descriptor: int) -> None:
    """Remove a lock's file and let the lock go, in this order where the system can: nobody is to lock what vanishes."""
    if not _OPEN_FILES_MOVE:
        os.close(descriptor)
        # Who has it open by now removes it.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        return
    try:
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that end the run wait until the context ends, so that nothing is made that nobody knows of.

    Python hands signals to its main thread alone: in another one there is nothing to wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        waiting.append(number)

    handlers = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in handlers.items():
        if handler is not None and handler != signal.SIG_IGN:
            signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)


@contextlib.contextmanager
def dead(path: Path) -> Iterator[bool]:
    """Whether the run that made a locked file has ended; if so, the context has its lock, and its end removes it."""
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


def new_locked_file(folder: Path, prefix: str) -> tuple[Path, int]:
    """A new file of this run's own: its name begins with `prefix`, and closing the descriptor lets its lock go."""
    while True:
        path = folder / f"{prefix}{secrets.token_hex(4)}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o666)
        # A file system without locks: there its like is never taken for a dead run's.
        with contextlib.suppress(OSError):
            _lock(descriptor, wait=True)
        # Another run may have taken it for a dead one's before it was locked, and removed it.
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def own_folder(folder: Path, *, wait: bool, worthless: Collection[str] = ()) -> Iterator[None]:
    """A folder for this run alone, made where it is missing; what dead runs left half written in it is removed.

    If it then holds nothing but files named in `worthless`, these are removed, and so are the folders that were made.

    Raises OutputError where it cannot be made or locked, or where another run has it and `wait` is False.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        # Waiting for another run's lock can be interrupted; making the folder and its lock cannot.
        with contextlib.nullcontext() if wait else uninterrupted():
            descriptor = _lock_folder(folder, wait)
        remove_strays(folder)
        yield
    finally:
        with uninterrupted():
            if descriptor is not None:
                _leave(folder, descriptor, made, worthless)


def _leave(folder: Path, descriptor: int, made: Iterable[Path], worthless: Collection[str]) -> None:
    if not _holds_only(folder, {LOCK, *worthless}):
        os.close(descriptor)
        return
    with contextlib.suppress(OSError):
        for name in worthless:
            (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        remove_lock(folder / LOCK, descriptor)
        for path in made:
            path.rmdir()


def _holds_only(folder: Path, names: Collection[str]) -> bool:
    try:
        return all(path.name in names for path in folder.iterdir())
    except OSError:
        return False


def _lock_folder(folder: Path, wait: bool) -> int:
    for _ in range(_ATTEMPTS):
        refuse_broken_links(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock(folder / LOCK, wait=wait)
        except BlockingIOError:
            raise OutputError(
                f"{folder} is in use by another run.", hint="Wait for it, or choose another folder."
            ) from None
        except (FileNotFoundError, FileExistsError) as error:
            if folder.exists() and not folder.is_dir():
                raise cannot_write(folder, error) from None
            # The run that made the folder has just removed it.
            time.sleep(0.01)
            continue
        except OSError as error:
            raise cannot_write(folder, error) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
                return descriptor
        # The run that held it has removed it, for nothing came of that run.
        os.close(descriptor)
    raise OutputError(f"{folder} vanishes as soon as it is made.", hint="Choose another folder.")


def refuse_broken_links(path: Path) -> None:
    """Raise OutputError where the path, or a folder above it, is a link that leads nowhere."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise OutputError(
                f"{place} is a link that leads nowhere.", hint="Remove it, make what it points to, or write elsewhere."
            )


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write. It takes the place of `path` once the context ends without an error, and else never.

    Raises OutputError, which names `path`, where it cannot be written: no space, no permission.
    """
    _remove_dead(_temporaries(path))
    with _named(path), _temporary(path) as (temporary, file):
        yield file
        _finish(file)
        move(temporary, path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is whole. Raises OutputError where it cannot be written."""
    with written(path) as file:
        file.write(content)


def write_together(contents: Mapping[Path, bytes], *, overwrite: bool) -> None:
    """Write several files of which either all appear or none.

    Each is linked to its name while its temporary name stays, until all have theirs: if a run is killed in between,
    `interrupted` recognises what it left, and this replaces it.

    Raises OutputError where one cannot be written, or is there already and `overwrite` is False.
    """
    unfinished = interrupted(contents)
    placed: list[Path] = []
    with contextlib.ExitStack() as stack:
        temporaries = {path: stack.enter_context(_whole(path, content)) for path, content in contents.items()}
        with uninterrupted():
            try:
                for path in unfinished:
                    path.unlink(missing_ok=True)
                for path, temporary in temporaries.items():
                    with _named(path):
                        _place(temporary, path, overwrite)
                    placed.append(path)
            except BaseException:
                for path in () if overwrite else placed:
                    path.unlink(missing_ok=True)
                raise
    for path in contents:
        _remove_dead(_temporaries(path))


@contextlib.contextmanager
def _whole(path: Path, content: bytes) -> Iterator[Path]:
    with _named(path), _temporary(path) as (temporary, file):
        file.write(content)
        _finish(file)
        yield temporary


def _place(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        move(temporary, path)
        return
    try:
        if os.path.lexists(path):
            raise FileExistsError
        path.hardlink_to(temporary)
    except FileExistsError:
        raise OutputError(f"{path} exists already.", hint="Choose another name, or pass --overwrite.") from None
    except (OSError, NotImplementedError):
        # A file system, or a system, without hard links.
        move(temporary, path)


def interrupted(paths: Collection[Path]) -> list[Path]:
    """Of files that appear together, those that a run put there and was killed before the last.

    If all are there, it was killed after that: they are whole, and their temporary names are removed.
    """
    if all(path.is_file() for path in paths):
        for path in paths:
            _remove_dead(_temporaries(path))
    return [path for path in paths if any(_is_left(path, t) for t in _temporaries(path))]


def remove_strays(folder: Path) -> None:
    """Remove the temporary files that dead runs have left in a folder."""
    _remove_dead(folder.glob(f".*{_SUFFIX}????????"))


def name_of(path: Path) -> str:
    """The name of a file or folder as a text that any file can hold: bytes that are no UTF-8 become escapes."""
    return as_text(path.name)


def as_text(words: str) -> str:
    r"""What the system gave as a name or an argument, with an escape for what is no character.

    >>> as_text("model\udcff")
    'model\\udcff'
    """
    with contextlib.suppress(UnicodeEncodeError):
        # In a locale of ASCII the bytes of every other character are escaped, although they are UTF-8.
        words = words.encode("ascii", "surrogateescape").decode("utf-8", "surrogateescape")
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files alone.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether a disk is full, or a file larger than the system or the user's quota allows."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error of a file or folder that the system does not let us write, in our form."""
    full = is_full(error)
    why = "no space left" if full else error.strerror or str(error)
    hint = (
        "Free some space, or choose another place. Files that were complete before are unchanged."
        if full
        else "Choose another place, or change its permissions."
    )
    return OutputError(f"{path} cannot be written: {why}.", hint=hint)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `path`, locked while it is written, and removed at the end unless it was renamed.

    Where a file that is open cannot be renamed, the lock is a file of its own, held until the other has its name.
    """
    locked = None
    try:
        with uninterrupted():
            locked, descriptor = new_locked_file(path.parent, _prefix(path))
        with os.fdopen(descriptor, "wb") if _OPEN_FILES_MOVE else _content_of(locked).open("xb") as file:
            yield _content_of(locked), file
    finally:
        if locked:
            _content_of(locked).unlink(missing_ok=True)
            if not _OPEN_FILES_MOVE:
                remove_lock(locked, descriptor)


def _content_of(locked: Path) -> Path:
    """The file whose writer holds the lock of the file `locked`: itself where the system can rename what is open."""
    return locked if _OPEN_FILES_MOVE else locked.with_name(f"{locked.name}.new")


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    if not _OPEN_FILES_MOVE:
        file.close()


def _prefix(path: Path) -> str:
    """What the names of temporary files of a file begin with. A name has at most 255 bytes, and they are longer."""
    beginning = path.name.encode("utf-8", "surrogateescape")
    return f".{path.name if len(beginning) <= 200 else beginning[:200].decode('utf-8', 'ignore')}{_SUFFIX}"


def _temporaries(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{glob.escape(_prefix(path))}????????"))


def _is_left(path: Path, temporary: Path) -> bool:
    """Whether a run that is dead has linked a temporary file to its name, and the name is still of that file."""
    try:
        os.close(lock(temporary, wait=False, make=False))
        return path.samefile(_content_of(temporary))
    except OSError:
        return False


def _remove_dead(temporaries: Iterable[Path]) -> None:
    for temporary in temporaries:
        with dead(temporary) as ended, contextlib.suppress(OSError):
            if ended and not _OPEN_FILES_MOVE:
                _content_of(temporary).unlink(missing_ok=True)
