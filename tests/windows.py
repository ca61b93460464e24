"""A stand-in for Windows, as far as files go: Linux without what only POSIX has, and with what only Windows forbids.

It is not Windows: it takes attributes away, gives Python's lock of Windows (`msvcrt`, here by locks of Linux that
behave the same), and refuses what Windows refuses. `python_of` makes any Python process, and those that it starts, run
so.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import struct
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Not os.fork and the like, which Python's own modules on Linux are built on.
_LACKING = {
    os: """
        O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_NOCTTY O_SYNC O_TMPFILE chown fchdir fchmod fchown fdatasync
        geteuid getgid getpgid getresuid lchown lockf mkfifo mknod posix_fadvise posix_fallocate posix_spawn
        posix_spawnp pread preadv pwrite pwritev readv sched_getaffinity sched_setaffinity sendfile setsid sync
        sysconf writev copy_file_range killpg getpgrp
    """,
    signal: """
        SIGALRM SIGCHLD SIGCONT SIGHUP SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 alarm pause
        pthread_sigmask setitimer sigwait siginterrupt
    """,
}
_MISSING = ("fcntl", "resource", "termios", "tty", "pty", "grp", "pwd", "syslog")
# Linux has no use for this bit: here it says that a file is opened for its bytes, as on Windows.
_BINARY = 0o100000
_NO_NAME = re.compile(r'[<>:"|?*\x00-\x1f\\]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
_PACKAGE = str(ROOT / "compressknow")


def python_of(folder: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a Python process that runs as if on Windows, and so do its children; `folder` is for that."""
    (folder / "sitecustomize.py").write_text("import tests.windows\ntests.windows.pretend()\n", encoding="utf-8")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def pretend() -> None:
    """Make this process what `python_of` says; before anything of compressknow is imported."""
    # It tells Windows by whether there is a module msvcrt; and psutil, which has a form for Windows, stands on POSIX.
    import subprocess  # noqa: F401

    import psutil  # noqa: F401

    lock = _msvcrt()
    for module, names in _LACKING.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in _MISSING:
        sys.modules[name] = None  # type: ignore[assignment]
    os.O_BINARY = _BINARY  # type: ignore[attr-defined, misc]
    os.supports_dir_fd.clear()
    os.supports_fd.discard(os.listdir)
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment, misc]
    sys.addaudithook(_refuse)
    # Other libraries would take the module for Windows itself.
    sys.modules["msvcrt"] = lock
    import compressknow.base.system  # noqa: F401

    del sys.modules["msvcrt"]


def _msvcrt() -> types.ModuleType:
    """Locks of one byte at a descriptor's position, each of an opened file, not of its process."""
    import fcntl

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert mode == module.LK_NBLCK
        region = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_CUR, 0, count, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, region)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None

    module: Any = types.ModuleType("msvcrt")
    module.locking, module.LK_NBLCK = locking, 2
    return module


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        _refuse_open(*arguments)
    elif event == "os.mkdir":
        _refuse_name(arguments[0])
    elif event == "os.remove":
        _refuse_in_use(arguments[0])
    elif event == "os.rename":
        _refuse_name(arguments[1])
        for path in arguments[:2]:
            _refuse_in_use(path)


def _refuse_open(path: Any, mode: str | None, flags: int) -> None:
    if path == "/proc/self/status":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if not isinstance(path, (str, bytes, os.PathLike)):
        return
    if flags & os.O_CREAT:
        _refuse_name(path)
    # By os.open, not by Python's open.
    if mode is None and os.fspath(path) != os.devnull:
        caller = sys._getframe(2)
        if not caller.f_code.co_filename.startswith(_PACKAGE):
            return
        if os.path.isdir(path):  # noqa: PTH112
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        assert flags & _BINARY, f"{caller.f_code.co_filename}:{caller.f_lineno} opens {path!r} as text"


def _refuse_name(path: Any) -> None:
    name = os.path.basename(os.fsdecode(path).rstrip("/"))  # noqa: PTH119
    if _NO_NAME.search(name):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)


def _refuse_in_use(path: Any) -> None:
    place = os.path.realpath(os.fsdecode(path))
    try:
        here = os.stat(place)  # noqa: PTH116
    except OSError:
        return
    inside = f"{place}/" if stat.S_ISDIR(here.st_mode) else None
    for name, found in _in_use():
        if os.path.samestat(found, here) if inside is None else name.startswith(inside):
            raise PermissionError(errno.EACCES, "It is used by a process", path)


def _in_use() -> Iterator[tuple[str, os.stat_result]]:
    """The files that any process of this user has open, or this one has mapped."""
    processes = [name for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    links = [f"/proc/{process}/fd/{number}" for process in processes for number in _names(f"/proc/{process}/fd")]
    links += [f"/proc/self/map_files/{name}" for name in _names("/proc/self/map_files")]
    for link in links:
        try:
            yield os.readlink(link), os.stat(link)  # noqa: PTH115, PTH116
        except OSError:
            continue


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return []
