"""Intercept all system calls by which a process changes files below a folder.

Linux notifies a supervisor before chosen system calls (seccomp user notification), no matter whether Python, C++ code
or a thread makes them. The supervisor lets a call continue, fails it, or kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

# Numbers of system calls, by machine. Some machines lack some calls.
_NUMBERS = {
    "x86_64": {
        "write": 1, "pwrite": 18, "writev": 20, "pwritev": 296, "open": 2, "creat": 85, "openat": 257,
        "rename": 82, "renameat": 264, "renameat2": 316, "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266,
        "unlink": 87, "unlinkat": 263, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "truncate": 76, "ftruncate": 77,
        "fallocate": 285, "chmod": 90, "fchmod": 91, "fchmodat": 268, "fsync": 74, "fdatasync": 75,
        "copy_file_range": 326, "sendfile": 40,
    },
    "aarch64": {
        "write": 64, "pwrite": 68, "writev": 66, "pwritev": 70, "openat": 56, "renameat": 38, "renameat2": 276,
        "linkat": 37, "symlinkat": 36, "unlinkat": 35, "mkdirat": 34, "truncate": 45, "ftruncate": 46,
        "fallocate": 47, "fchmod": 52, "fchmodat": 53, "fsync": 82, "fdatasync": 83, "copy_file_range": 285,
        "sendfile": 71,
    },
}  # fmt: skip
NUMBERS = _NUMBERS.get(platform.machine(), {})
_NAMES = {number: name for name, number in NUMBERS.items()}
# Index of the argument that is a call's descriptor, or of its folder's descriptor (None: working folder) and its path.
_DESCRIPTOR = {"copy_file_range": 2} | dict.fromkeys(
    ("write", "pwrite", "writev", "pwritev", "ftruncate", "fallocate", "fchmod", "fsync", "fdatasync", "sendfile"), 0
)
_PATH: dict[str, tuple[int | None, int]] = (
    {"renameat": (2, 3), "renameat2": (2, 3), "linkat": (2, 3), "symlinkat": (1, 2)}
    | dict.fromkeys(("rename", "link", "symlink"), (None, 1))
    | dict.fromkeys(("openat", "unlinkat", "mkdirat", "fchmodat"), (0, 1))
    | dict.fromkeys(("open", "creat", "unlink", "mkdir", "rmdir", "truncate", "chmod"), (None, 0))
)
_FLAGS = {"open": 1, "openat": 2}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Calls that fail on a full disk. Removing and renaming work.
_TAKES_SPACE = {
    "write", "pwrite", "writev", "pwritev", "fallocate", "creat", "symlink", "symlinkat", "link",
    "linkat", "fsync", "fdatasync", "copy_file_range", "sendfile",
}  # fmt: skip

_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_NO_NEW_PRIVILEGES, _SET_FILTER, _NEW_LISTENER = 38, 1, 1 << 3
# Signals wait until the supervisor has answered (Linux 5.19): else they make calls fail, unlike on a real disk.
_SIGNALS_WAIT = 1 << 5
_SECCOMP = {"x86_64": 317, "aarch64": 277}.get(platform.machine())
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_AT_FDCWD = -100


@dataclass(frozen=True)
class Change:
    """System call of a thread that would change a file."""

    identity: int
    thread: int
    call: str
    arguments: tuple[int, ...]
    path: Path

    def __str__(self) -> str:
        return f"{self.call} {self.path.name}"


def find_obstacle() -> str | None:
    """Return why changes cannot be watched on this machine, or None."""
    if not NUMBERS or not hasattr(os, "pidfd_open"):
        return f"system calls are watched only on Linux (this is {platform.system()} on {platform.machine()})"
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    release = [int(part) for part in re.findall(r"\d+", platform.release())[:2]]
    if release < [5, 19] or not actions.is_file() or "user_notif" not in actions.read_text(encoding="utf-8").split():
        return "this kernel has no seccomp user notification (Linux 5.19)"
    return None


def listen() -> int:
    """Start the notifications for this process, and return the descriptor on which its supervisor reads them."""
    program = _build_filter()
    instructions = ctypes.create_string_buffer(b"".join(program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    descriptor = libc.syscall(_SECCOMP, _SET_FILTER, _NEW_LISTENER | _SIGNALS_WAIT, filter_)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "seccomp refuses to notify of system calls")
    return int(descriptor)


def _build_filter() -> list[bytes]:
    """Return the filter's instructions. Opening a file to read it is not a change."""

    def statement(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    load, equal, any_bit, ret = 0x20, 0x15, 0x45, 0x06
    program = [statement(load, 0)]
    for name, number in NUMBERS.items():
        if name in _FLAGS:
            program += [
                statement(equal, number, 0, 4),
                statement(load, 16 + 8 * _FLAGS[name]),
                statement(any_bit, _WRITING, 0, 1),
                statement(ret, _NOTIFY),
                statement(ret, _ALLOW),
            ]
        else:
            program += [statement(equal, number, 0, 1), statement(ret, _NOTIFY)]
    return [*program, statement(ret, _ALLOW)]


def read_change(listener: int) -> Change | None:
    """Return the call that waits for an answer, or None if its process is gone."""
    notification = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, notification)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    identity, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", notification)
    call = _NAMES[number]
    return Change(identity, thread, call, tuple(arguments), _find_path(thread, call, arguments))


def allow(listener: int, change: Change) -> None:
    _answer(listener, struct.pack("QqiI", change.identity, 0, 0, _CONTINUE))


def fail(listener: int, change: Change, number: int) -> None:
    """Make a call return this error number, without executing it."""
    _answer(listener, struct.pack("QqiI", change.identity, 0, -number, 0))


def takes_space(change: Change) -> bool:
    """Return whether this change fails on a full disk."""
    if change.call in (*_FLAGS, "mkdir", "mkdirat"):
        return not change.path.exists()
    # Syncing a folder's entries works.
    return change.call in _TAKES_SPACE and not (change.call == "fsync" and change.path.is_dir())


def tear(change: Change) -> None:
    """Write half of the bytes of a call, as when a machine stops in the middle of a write."""
    if change.call not in ("write", "pwrite"):
        return
    descriptor, address, size = change.arguments[0], change.arguments[1], change.arguments[2] // 2
    proc = Path(f"/proc/{change.thread}")
    position = change.arguments[3]
    if change.call == "write":
        state = dict(line.split(":", 1) for line in (proc / f"fdinfo/{descriptor}").read_text().splitlines())
        appends = int(state["flags"], 8) & os.O_APPEND
        position = change.path.stat().st_size if appends else int(state["pos"])
    file = os.open(proc / f"fd/{descriptor}", os.O_WRONLY)
    try:
        os.pwrite(file, _read_memory(change.thread, address, size), position)
    finally:
        os.close(file)


def _answer(listener: int, answer: bytes) -> None:
    try:
        fcntl.ioctl(listener, _SEND, answer)
    except OSError as error:
        # A signal interrupted the call; the process repeats it.
        if error.errno != errno.ENOENT:
            raise


def _find_path(thread: int, call: str, arguments: list[int]) -> Path:
    """Return the path of the file that a call changes, or an empty one if the process is gone."""
    try:
        if call in _DESCRIPTOR:
            return Path(f"/proc/{thread}/fd/{arguments[_DESCRIPTOR[call]]}").readlink()
        at, name = _PATH[call]
        folder = _AT_FDCWD if at is None else ctypes.c_int(arguments[at] & 0xFFFFFFFF).value
        base = Path(f"/proc/{thread}", "cwd" if folder == _AT_FDCWD else f"fd/{folder}").readlink()
        return Path(base, os.fsdecode(_read_memory(thread, arguments[name], 4096).split(b"\0", 1)[0]))
    except OSError:
        return Path()


def _read_memory(thread: int, address: int, size: int) -> bytes:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        # Read page by page: the page after the end of the text may not exist.
        parts = b""
        while size:
            step = min(size, 4096 - address % 4096)
            memory.seek(address)
            try:
                parts += memory.read(step)
            except OSError:
                break
            address, size = address + step, size - step
        return parts


class Watch:
    """Handles the changes below a folder, numbered from 0.

    Parameters
    ----------
    root : changes elsewhere are allowed and not counted.
    kill_at : the change at which the process is killed, after half of a write.
    full_from : the change from which on the disk is full.
    signal_at : a signal's number, and the change at which it is sent.
    """

    def __init__(
        self,
        root: Path,
        kill_at: int | None = None,
        full_from: int | None = None,
        signal_at: tuple[int, int] | None = None,
    ) -> None:
        self.root, self.kill_at, self.full_from, self.signal_at = root, kill_at, full_from, signal_at
        self.changes: list[str] = []
        self.struck: str | None = None

    def handle(self, listener: int, process: int) -> None:
        """Answer the call that waits."""
        change = read_change(listener)
        if change is None:
            return
        if not change.path.is_relative_to(self.root):
            allow(listener, change)
            return
        number = len(self.changes)
        self.changes.append(f"{change.call} {change.path.relative_to(self.root)}")
        if number == self.kill_at:
            self.struck = self.changes[-1]
            tear(change)
            os.kill(process, signal.SIGKILL)
        elif self.full_from is not None and number >= self.full_from and takes_space(change):
            self.struck = self.struck or self.changes[-1]
            fail(listener, change, errno.ENOSPC)
        else:
            if self.signal_at and number == self.signal_at[1] and not self.struck:
                self.struck = self.changes[-1]
                os.kill(process, self.signal_at[0])
            allow(listener, change)
