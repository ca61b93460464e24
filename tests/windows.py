"""Emulation of Windows on Linux, as far as files go.

It removes functions and modules that only POSIX has, provides `msvcrt.locking` by Linux locks that behave the same, and
forbids what Windows forbids. `windows_environment` does this to a Python process and its children.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Not os.fork and the like, which Python's own modules on Linux use.
_MISSING_NAMES = {
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
_MISSING_MODULES = ("fcntl", "resource", "termios", "tty", "pty", "grp", "pwd", "syslog")
# Linux ignores this bit.
_BINARY = 0o100000
_FORBIDDEN_NAME = re.compile(r'[<>:"|?*\x00-\x1f\\]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
_PACKAGE = str(ROOT / "compressknow")


def windows_environment(folder: Path) -> dict[str, str]:
    """Return the environment of Python processes that run as if on Windows; `folder` gets a sitecustomize.py."""
    (folder / "sitecustomize.py").write_text("import tests.windows\ntests.windows.emulate()\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def emulate() -> None:
    """Emulate Windows in this process, before compressknow is imported."""
    # These take a module msvcrt as a sign of Windows, and psutil needs POSIX: import them first.
    import subprocess  # noqa: F401

    import psutil  # noqa: F401

    lock = _msvcrt()
    for module, names in _MISSING_NAMES.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in _MISSING_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    os.O_BINARY = _BINARY  # type: ignore[attr-defined, misc]
    os.supports_dir_fd.clear()
    os.supports_fd.discard(os.listdir)
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment, misc]
    sys.addaudithook(_forbid)
    # For compressknow only: other libraries would conclude that this is Windows.
    sys.modules["msvcrt"] = lock
    import compressknow.base.system  # noqa: F401

    del sys.modules["msvcrt"]


def _msvcrt() -> types.ModuleType:
    """Return a module with locks at a descriptor's position, which belong to an open file, not to its process."""
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


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise the error of Windows, if there is one for this audit event."""
    if event == "open":
        _check_open(*arguments)
    elif event == "os.mkdir":
        _check_name(arguments[0])
    elif event == "os.remove":
        _check_not_in_use(arguments[0])
    elif event == "os.rename":
        _check_name(arguments[1])
        for path in arguments[:2]:
            _check_not_in_use(path)


def _check_open(path: Any, mode: str | None, flags: int) -> None:
    if path == "/proc/self/status":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if not isinstance(path, (str, bytes, os.PathLike)):
        return
    if flags & os.O_CREAT:
        _check_name(path)
    # os.open has no mode, open has.
    if mode is None and os.fspath(path) != os.devnull:
        caller = sys._getframe(2)
        if not caller.f_code.co_filename.startswith(_PACKAGE):
            return
        if os.path.isdir(path):  # noqa: PTH112
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        assert flags & _BINARY, f"{caller.f_code.co_filename}:{caller.f_lineno} opens {path!r} as text"


def _check_name(path: Any) -> None:
    name = os.path.basename(os.fsdecode(path).rstrip("/"))  # noqa: PTH119
    if _FORBIDDEN_NAME.search(name):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)


def _check_not_in_use(path: Any) -> None:
    real_path = os.path.realpath(os.fsdecode(path))
    try:
        status = os.stat(real_path)  # noqa: PTH116
    except OSError:
        return
    folder = f"{real_path}/" if stat.S_ISDIR(status.st_mode) else None
    for open_path, open_status in _find_open_files():
        if os.path.samestat(open_status, status) if folder is None else open_path.startswith(folder):
            raise PermissionError(errno.EACCES, "It is used by a process", path)


def _find_open_files() -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files that a process of this user has open, or that this process has mapped."""
    processes = [name for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    links = [f"/proc/{process}/fd/{number}" for process in processes for number in _list(f"/proc/{process}/fd")]
    links += [f"/proc/self/map_files/{name}" for name in _list("/proc/self/map_files")]
    for link in links:
        try:
            yield os.readlink(link), os.stat(link)  # noqa: PTH115, PTH116
        except OSError:
            continue


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return []
