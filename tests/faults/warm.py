"""Runs of the command line as forks of a server that has imported everything, which start in milliseconds.

The server is a process without threads, so it can fork safely.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.watching import Watch, listen

# Of CPU time. The limit of the real time is higher, since the machine may be busy.
MAX_CPU_SECONDS, MAX_SECONDS = 20, 180.0
MAX_BYTES = 2 << 30
ROOT = Path(__file__).parents[2]
_MODULES = (
    *("pyarrow.parquet", "matplotlib.pyplot", "scipy.stats", "jinja2", "gguf", "tokenizers", "yaml"),
    # Importing release 0.16 loads the compiler of torch, which creates a file to find the temporary folder.
    "compressed_tensors.compressors",
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAMILIES = ("bert", "llama", "t5", "gpt2")


@dataclass(frozen=True)
class Request:
    """Run of `compressknow ARGS` in the folder `cwd`, and disturbances.

    kill_at, full_from : the change to a file at which it is killed, or from which on the disk is full.
    signal_at : a signal's number, and the change at which it is sent.
    signal_after : a signal's number, and the seconds after which it is sent.
    """

    args: Sequence[str]
    cwd: str
    kill_at: int | None = None
    full_from: int | None = None
    signal_at: tuple[int, int] | None = None
    signal_after: tuple[int, float] | None = None
    watch: bool = False
    seconds: float = MAX_SECONDS
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    code : the exit code, or minus the signal that killed it.
    peak : bytes of memory, without those of the imports.
    changes : changes to files, if it was watched.
    struck : the change at which it was disturbed.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    timed_out: bool = False
    changes: Sequence[str] = ()
    struck: str | None = None

    def find_problems(self) -> list[str]:
        """Return what no run may show, whatever the disturbance or the input."""
        text = self.out + self.err
        problems = []
        if self.timed_out:
            problems.append(f"waits for more than {MAX_SECONDS:.0f} s")
        elif self.code == -signal.SIGXCPU:
            problems.append(f"no end in {MAX_CPU_SECONDS} s of work")
        elif self.code not in (0, 1, 2, 3, 130, 143):
            problems.append(f"exit code {self.code}")
        if self.peak > MAX_BYTES:
            problems.append(f"{self.peak / 1e9:.1f} GB of memory")
        if "bug in compressknow" in text:
            problems.append("calls itself at fault")
        if "Traceback" in text:
            problems.append("a traceback")
        messages = len(re.findall("^Error: ", self.err, re.MULTILINE))
        if self.code in (1, 2) and messages != 1:
            problems.append(f"{messages} messages, not one")
        if controls := {c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160}:
            problems.append(f"control characters {controls}")
        return problems


class RunServer:
    """Client of a server of runs."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "tests.faults.warm", str(theirs.fileno())]
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, cwd=ROOT)
        theirs.close()
        self._channel = ours.makefile("rw")
        self.runs, self.slowest, self.largest = 0, 0.0, 0

    def run(self, args: Sequence[str], cwd: Path, **options: Any) -> Outcome:
        """Run `compressknow ARGS` in a folder; see `Request`."""
        print(json.dumps(asdict(Request(args, str(cwd), **options))), file=self._channel, flush=True)
        line = self._channel.readline()
        assert line, f"the server of runs has died ({self._server.wait()})"
        outcome = Outcome(**json.loads(line))
        self.runs += 1
        self.slowest, self.largest = max(self.slowest, outcome.seconds), max(self.largest, outcome.peak)
        return outcome

    def close(self) -> None:
        self._channel.close()
        self._server.wait()


@contextlib.contextmanager
def start_server() -> Iterator[RunServer]:
    server = RunServer()
    try:
        yield server
    finally:
        server.close()


def _import_everything() -> None:
    import compressknow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(compressknow.__path__, "compressknow."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        import torch
        from transformers import AutoModel, AutoTokenizer  # noqa: F401

        torch.set_num_threads(1)
        for name in (*_MODULES, *(f"transformers.models.{family}.modeling_{family}" for family in _FAMILIES)):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _serve(channel: socket.socket) -> None:
    _import_everything()
    gc.collect()
    gc.freeze()
    with channel.makefile("rw") as stream:
        for line in stream:
            print(json.dumps(asdict(_supervise(Request(**json.loads(line))))), file=stream, flush=True)


def _supervise(request: Request) -> Outcome:
    watch = Watch(Path(request.cwd), request.kill_at, request.full_from, request.signal_at)
    watched = request.watch or (request.kill_at, request.full_from, request.signal_at) != (None, None, None)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        ours, theirs = socket.socketpair()
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            ours.close()
            _execute(request, out.fileno(), err.fileno(), theirs, watched)
        theirs.close()
        resident, listeners, _, _ = socket.recv_fds(ours, 64, 1)
        ours.close()
        timed_out = _follow(process, next(iter(listeners), None), watch, request)
        _, status, usage = os.wait4(process, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        seconds = time.monotonic() - start
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode("utf-8", "surrogateescape") for file in (out, err)]
    code = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * 1024 - int(resident or b"0")
    return Outcome(code, *texts, seconds, peak, timed_out, watch.changes, watch.struck)


def _execute(request: Request, out: int, err: int, channel: socket.socket, watched: bool) -> None:
    """Run the command line in this process, and exit."""
    from compressknow.cli import main

    code = 70
    try:
        os.setsid()
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
            os.dup2(source, target)
        os.chdir(request.cwd)
        _set_environment(request)
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        limit = _measure_memory(0) + MAX_BYTES + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 5))
        sys.argv = ["compressknow", *request.args]
        listeners = [listen()] if watched else []
        socket.send_fds(channel, [b"%d" % _measure_memory(1)], listeners)
        for descriptor in (channel.detach(), *listeners):
            os.close(descriptor)
        try:
            code = main(list(request.args))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _set_environment(request: Request) -> None:
    """Let the run write caches and temporary files only below its folder."""
    home = Path(request.cwd, "home")
    for name, value in {"HOME": home, "XDG_CACHE_HOME": home / "cache", "TMPDIR": home / "tmp"}.items():
        os.environ[name] = str(value)
    os.environ.update(request.environment)
    tempfile.tempdir = None


def _follow(process: int, listener: int | None, watch: Watch, request: Request) -> bool:
    """Handle the changes of a run until it ends, and return whether it was killed at its deadline."""
    start = time.monotonic()
    number, moment = request.signal_after or (0, float("inf"))
    ending = os.pidfd_open(process)
    poll = select.poll()
    poll.register(ending, select.POLLIN)
    if listener is not None:
        poll.register(listener, select.POLLIN)
    try:
        while True:
            passed = time.monotonic() - start
            if passed >= moment:
                os.kill(process, number)
                moment = float("inf")
            events = dict(poll.poll(max(min(moment, request.seconds) - passed, 0) * 1000))
            if listener is not None and events.get(listener, 0) & select.POLLIN:
                watch.handle(listener, process)
            elif ending in events:
                return False
            elif not events and moment == float("inf"):
                os.killpg(process, signal.SIGKILL)
                return True
            elif listener in events:
                poll.unregister(listener)
    finally:
        for descriptor in (ending, listener):
            if descriptor is not None:
                os.close(descriptor)


def _measure_memory(column: int) -> int:
    """Return the bytes of virtual (0) or resident (1) memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[column]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
