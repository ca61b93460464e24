"""Helpers that run the command line in the test's process."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from compressknow.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line in an empty folder; ``{models}`` is the folder of models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument).replace("{models}", str(models)) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


def check_refused(result: Result, code: int, *words: str) -> None:
    """Check that a command printed nothing but one message with these words on stderr."""
    assert result.code == code, result.err
    assert result.out == ""
    assert len(re.findall(r"^Error: ", result.err, re.MULTILINE)) == 1
    assert "Traceback" not in result.err
    assert "bug in compressknow" not in result.err
    for word in words:
        assert word in result.err
