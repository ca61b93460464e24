"""Runs of the command line in processes forked from one that has imported everything: a start takes milliseconds.

The server is a process of its own, without threads, so that a fork of it is whole.
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

# Of work, by the clock of the processor: a machine that does other work beside is not a hang. The longest wait is by
# the clock on the wall.
SECONDS, LONGEST_WAIT = 20, 180.0
BYTES = 2 << 30
ROOT = Path(__file__).parents[2]
_MORE = (
    *("pyarrow.parquet", "matplotlib.pyplot", "scipy.stats", "jinja2", "gguf", "tokenizers", "yaml"),
    # Importing release 0.16 loads the compiler of torch, which asks where temporary files lie: that makes a file.
    "compressed_tensors.compressors",
)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAMILIES = ("bert", "llama", "t5", "gpt2")


@dataclass(frozen=True)
class Request:
    """A run: `args` of `compressknow` in the folder `cwd`, and what happens to it at which of its changes to files.

    `signal_at` is a signal's number and a change, `signal_after` a signal's number and seconds after its start.
    """

    args: Sequence[str]
    cwd: str
    kill_at: int | None = None
    full_from: int | None = None
    signal_at: tuple[int, int] | None = None
    signal_after: tuple[int, float] | None = None
    watch: bool = False
    seconds: float = LONGEST_WAIT
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    `code` is the exit code, or minus the signal that killed it; `peak` the bytes of memory that it took above the
    imports; `changes` what it did to files (where it was watched), and `struck` that of them at which it was disturbed.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    timed_out: bool = False
    changes: Sequence[str] = ()
    struck: str | None = None

    def faults(self) -> list[str]:
        """What no run may show, whatever was done to it or to its input."""
        text = self.out + self.err
        found = []
        if self.timed_out:
            found.append(f"waits for more than {LONGEST_WAIT:.0f} s")
        elif self.code == -signal.SIGXCPU:
            found.append(f"no end in {SECONDS} s of work")
        elif self.code not in (0, 1, 2, 3, 130, 143):
            found.append(f"exit code {self.code}")
        if self.peak > BYTES:
            found.append(f"{self.peak / 1e9:.1f} GB of memory")
        if "bug in compressknow" in text:
            found.append("calls itself at fault")
        if "Traceback" in text:
            found.append("a traceback")
        messages = len(re.findall("^Error: ", self.err, re.MULTILINE))
        if self.code in (1, 2) and messages != 1:
            found.append(f"{messages} messages, not one")
        if controls := {c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160}:
            found.append(f"control characters {controls}")
        return found


class Warm:
    """The client of a server of runs."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "tests.faults.warm", str(there.fileno())]
        self._server = subprocess.Popen(command, pass_fds=[there.fileno()], env=environment, cwd=ROOT)
        there.close()
        self._channel = here.makefile("rw")
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
def warm() -> Iterator[Warm]:
    server = Warm()
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
        for name in (*_MORE, *(f"transformers.models.{family}.modeling_{family}" for family in _FAMILIES)):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _serve(channel: socket.socket) -> None:
    _import_everything()
    gc.collect()
    gc.freeze()
    with channel.makefile("rw") as stream:
        for line in stream:
            print(json.dumps(asdict(_supervised(Request(**json.loads(line))))), file=stream, flush=True)


def _supervised(request: Request) -> Outcome:
    watch = Watch(Path(request.cwd), request.kill_at, request.full_from, request.signal_at)
    watched = request.watch or (request.kill_at, request.full_from, request.signal_at) != (None, None, None)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        here, there = socket.socketpair()
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            here.close()
            _child(request, out.fileno(), err.fileno(), there, watched)
        there.close()
        started, listeners, _, _ = socket.recv_fds(here, 64, 1)
        here.close()
        timed_out = _follow(process, next(iter(listeners), None), watch, request)
        _, status, usage = os.wait4(process, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        seconds = time.monotonic() - start
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode("utf-8", "surrogateescape") for file in (out, err)]
    code = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * 1024 - int(started or b"0")
    return Outcome(code, *texts, seconds, peak, timed_out, watch.changes, watch.struck)


def _child(request: Request, out: int, err: int, channel: socket.socket, watched: bool) -> None:
    """Become a run of the command line; never returns."""
    from compressknow.cli import main

    code = 70
    try:
        os.setsid()
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
            os.dup2(source, target)
        os.chdir(request.cwd)
        _set_environment(request)
        for number in _ENDING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        limit = _virtual() + BYTES + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        sys.argv = ["compressknow", *request.args]
        listeners = [listen()] if watched else []
        socket.send_fds(channel, [b"%d" % _resident()], listeners)
        for descriptor in (channel.detach(), *listeners):
            os.close(descriptor)
        try:
            code = main(list(request.args))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _set_environment(request: Request) -> None:
    """Whatever a run keeps, it keeps below its folder."""
    home = Path(request.cwd, "home")
    for name, value in {"HOME": home, "XDG_CACHE_HOME": home / "cache", "TMPDIR": home / "tmp"}.items():
        os.environ[name] = str(value)
    os.environ.update(request.environment)
    tempfile.tempdir = None


def _follow(process: int, listener: int | None, watch: Watch, request: Request) -> bool:
    """Wait for the end of a run, dealing with its changes; True where it was ended at its deadline."""
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


def _pages(column: int) -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[column]) * os.sysconf("SC_PAGE_SIZE")


def _virtual() -> int:
    return _pages(0)


def _resident() -> int:
    return _pages(1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
