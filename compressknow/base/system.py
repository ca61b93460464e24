"""Differences between operating systems, detected by what Python offers on each.

Windows has neither fcntl nor positioned reads, and cannot rename or remove an open file; macOS cannot reserve disk
space.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
_NO_FOLLOW, _BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)
# Bytes per call: macOS and Windows reject calls of more than 2 GB.
_MOST_AT_ONCE = 1 << 30

if importlib.util.find_spec("fcntl"):
    fcntl: Any = importlib.import_module("fcntl")
    OPEN_FILES_MOVE = True

    def lock_opened(descriptor: int, wait: bool) -> None:
        """Lock an open file until its descriptor is closed. Raises as `lock` does."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
else:
    msvcrt: Any = importlib.import_module("msvcrt")
    # Windows cannot rename or remove an open file.
    OPEN_FILES_MOVE = False
    # Beyond the end of any lock file: other processes cannot read a locked byte.
    _LOCKED_BYTE = 1 << 30

    def lock_opened(descriptor: int, wait: bool) -> None:
        """Lock an open file until its descriptor is closed. Raises as `lock` does."""
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


# Seconds between attempts to move a file or folder, which a virus scanner may hold open after it was written.
_WAITS = () if OPEN_FILES_MOVE else (0.05, 0.1, 0.2, 0.4, 0.8)

# Threads share the position of a descriptor; without positioned reads and writes they must take turns.
_seeking = threading.Lock()


def lock(path: Path, *, wait: bool, make: bool = True) -> int:
    """Lock a file and return its descriptor, which releases the lock when closed; `make` the file if it is missing.
    Raises BlockingIOError if another process holds the lock and `wait` is False, OSError if it cannot be locked."""
    if not _NO_FOLLOW and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    descriptor = os.open(path, (os.O_CREAT if make else 0) | os.O_RDWR | _NO_FOLLOW | _BINARY, 0o666)
    try:
        lock_opened(descriptor, wait)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_lock(path: Path, descriptor: int) -> None:
    """Remove a lock file and release the lock, in this order if the system can: nobody must lock a vanishing file."""
    if not OPEN_FILES_MOVE:
        os.close(descriptor)
        # If another process has opened it since, that process removes it.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        return
    try:
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def open_to_read(path: Path) -> int:
    """Open a file for `read_at` and return its descriptor. Raises OSError."""
    return os.open(path, os.O_RDONLY | _BINARY)


def create(path: Path) -> int:
    """Create an empty file and return its descriptor. Raises OSError, such as FileExistsError."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o666)


def create_file(path: Path, size: int) -> int:
    """Create a file of `size` bytes for `read_at` and `write_at`, with its disk space reserved; return its descriptor.
    Raises OSError: it exists (FileExistsError), or the disk is full (see `is_full`)."""
    descriptor = create(path)
    try:
        _reserve_room(path, descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _reserve_room(path: Path, descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            # Some file systems cannot reserve space, and not every C library emulates it.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.ftruncate(descriptor, size)


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill `buffer` from byte `position` of a file that threads may share; return the bytes read, fewer at its end."""
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
    """Write all of `data` (bytes) to a file at byte `position`. Raises OSError."""
    done = 0
    while piece := data[done : done + _MOST_AT_ONCE]:
        done += _write_some(descriptor, piece, position + done)


def _write_some(descriptor: int, data: memoryview, position: int) -> int:
    if hasattr(os, "pwrite"):
        return int(os.pwrite(descriptor, data, position))
    with _seeking:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing any file of that name; on Windows, retry for a while. Raises OSError."""
    for seconds in _WAITS:
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(seconds)
    source.replace(target)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, if the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can only sync files.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Return whether the disk is full, or a file exceeds the limit of the file system or the user's quota."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Defer signals that end the run until the context ends, so that no file is created without being recorded.

    Python delivers signals only to its main thread: in any other there is nothing to defer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        deferred.append(number)

    handlers = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in handlers.items():
        if handler is not None and handler != signal.SIG_IGN:
            signal.signal(number, defer)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in deferred:
            signal.raise_signal(number)


def count_cores() -> int:
    """Count the cores that this process may use, or all of the machine's if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_peak_memory() -> int:
    """Return the peak resident size of this process in bytes, or its current size if the system records no peak."""
    # Preferred to getrusage, whose peak a new process inherits from its parent.
    with contextlib.suppress(OSError):
        if match := re.search(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes()):
            return 1024 * int(match[1])
    if importlib.util.find_spec("resource"):
        resource: Any = importlib.import_module("resource")
        unit = 1 if sys.platform == "darwin" else 1024
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
    memory: Any = importlib.import_module("psutil").Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def trim_heap() -> None:
    """Return freed memory to the system: glibc keeps it, per thread, about 1 GB after thirty passes of a model."""
    if (trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None)) is not None:
        trim(0)
