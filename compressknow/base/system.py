"""Differences between systems, found by what Python offers on each.

Windows has no fcntl and no reads at a position, and neither renames nor removes a file that is open; macOS reserves no
room on a disk.
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
# At most so many bytes at a time: one call takes no more than 2 GB on macOS and Windows.
_MOST_AT_ONCE = 1 << 30

if importlib.util.find_spec("fcntl"):
    fcntl: Any = importlib.import_module("fcntl")
    OPEN_FILES_MOVE = True

    def lock_opened(descriptor: int, wait: bool) -> None:
        """Lock a file by a descriptor of it, until that is closed. Raises as `lock` does."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
else:
    msvcrt: Any = importlib.import_module("msvcrt")
    # Windows neither renames nor removes a file that is open.
    OPEN_FILES_MOVE = False
    # Beyond what a lock file holds: nobody else may read a byte that is locked.
    _LOCKED_BYTE = 1 << 30

    def lock_opened(descriptor: int, wait: bool) -> None:
        """Lock a file by a descriptor of it, until that is closed. Raises as `lock` does."""
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
_WAITS = () if OPEN_FILES_MOVE else (0.05, 0.1, 0.2, 0.4, 0.8)

# A descriptor has one position, which threads share; where the system reads and writes only there, one at a time.
_seeking = threading.Lock()


def lock(path: Path, *, wait: bool, make: bool = True) -> int:
    """Lock a file, and return the descriptor to close; `make` the file if it is missing. Raises BlockingIOError if
    another process holds it and `wait` is False, OSError if it cannot be locked."""
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
    """Remove a lock's file and let the lock go, in this order where the system can: nobody is to lock what vanishes."""
    if not OPEN_FILES_MOVE:
        os.close(descriptor)
        # Another process that has it open removes it.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        return
    try:
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def open_to_read(path: Path) -> int:
    """Open a file for `read_at`, as a descriptor. Raises OSError."""
    return os.open(path, os.O_RDONLY | _BINARY)


def create(path: Path) -> int:
    """Create an empty file, as a descriptor. Raises OSError: it exists already (FileExistsError), for one."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o666)


def create_file(path: Path, size: int) -> int:
    """Create a file of `size` bytes, for `read_at` and `write_at`, reserving the space. Raises OSError if it exists
    (FileExistsError) or the disk is full (see `is_full`)."""
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
            # Some file systems reserve nothing, and some C libraries do not do it in their stead.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.ftruncate(descriptor, size)


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill `buffer` (bytes) from a file's byte `position` on; return how many bytes there were before the end. Threads
    may share a descriptor, here and in `write_at`."""
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


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file of that name. Raises OSError. Windows refuses while someone has it
    open, so it is retried there for a while."""
    for seconds in _WAITS:
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(seconds)
    source.replace(target)


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
    """Return whether a disk is full, or a file larger than the system or the user's quota allows."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Delay signals that end the run until the context ends, so that nothing is left half done. In other threads than
    the main one, which alone gets Python's signals, this does nothing."""
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


def count_cores() -> int:
    """Count the cores that this process may use, or the machine's, where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; its size now, if no system records it."""
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


def trim_heap() -> None:
    """Return freed memory to the system. glibc keeps a heap for each thread, with a GB of freed memory for thirty
    passes of a model; other systems have no such call."""
    if (trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None)) is not None:
        trim(0)
