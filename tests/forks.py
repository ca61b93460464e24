"""Child processes as forks of a server that has imported torch and transformers, to save the seconds that this takes.

Apart from that, they run the same program in the same environment. The server has no threads, so it can fork safely.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
# Variables of llama.cpp's converter that Python and the libraries read only as they start.
_START_UP_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
_REQUEST_BYTES = 1 << 20


def popen(command: Sequence[str], **options: Any) -> Any:
    """Start a program like `subprocess.Popen`, but those of this Python as a fork."""
    return (
        ForkedProcess(command[1:], **options) if command[0] == sys.executable else subprocess.Popen(command, **options)
    )


class ForkedProcess:
    """Running program, with the part of `subprocess.Popen` that `compressknow.gguf.children` uses."""

    def __init__(self, args: Sequence[str], *, stdin: int, stdout: IO[bytes], stderr: int, env: Mapping[str, str]):
        assert (stdin, stderr) == (subprocess.PIPE, subprocess.STDOUT)
        self.args, self.returncode = args, None
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        request = json.dumps({"args": args, "environment": dict(env), "cwd": str(Path.cwd())}).encode()
        socket.send_fds(_server(), [request], [read, stdout.fileno(), theirs.fileno()])
        os.close(read)
        theirs.close()
        self.stdin = os.fdopen(write, "wb")
        self._replies = ours.makefile("rb")
        self.pid = int(self._replies.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._replies], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            self.returncode = int(self._replies.readline())
            # Wait for its supervisor too, which has the log open: the test may unmount the disk that the log is on.
            self._replies.read()
            self._replies.close()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


@cache
def _server() -> socket.socket:
    """Start the server, which ends with this process."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    environment = os.environ | _START_UP_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
    subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


def _serve(channel: socket.socket) -> None:
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(channel, _REQUEST_BYTES, 3)
        if not request:
            return
        if os.fork() == 0:
            channel.close()
            _supervise(json.loads(request), *files)
        for file in files:
            os.close(file)


def _supervise(request: Mapping[str, Any], stdin: int, stdout: int, replies: int) -> NoReturn:
    """Run a program, and reply with its process number and then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        os.close(replies)
        for target, source in ((0, stdin), (1, stdout), (2, stdout)):
            os.dup2(source, target)
        _execute(request)
    os.write(replies, b"%d\n" % process)
    _, status = os.waitpid(process, 0)
    os.write(replies, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _execute(request: Mapping[str, Any]) -> NoReturn:
    """Run a program in this process, as `python ARGS` would."""
    code = 1
    try:
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        first, *arguments = (word for word in request["args"] if word != "-P")
        sys.path[:0] = list(filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep)))
        if first == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *arguments]
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
