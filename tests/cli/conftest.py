"""What tests of the command line share: how it is run, and what a refusal is."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from compressknow.cli import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in an empty folder; ``{place}`` stands for the folder of models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument).replace("{place}", str(place)) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


def refused(ended: Ended, code: int, *words: str) -> None:
    """One message on stderr, without a traceback, that says these words; nothing on stdout."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert len(re.findall(r"^Error: ", ended.err, re.MULTILINE)) == 1
    assert "Traceback" not in ended.err
    assert "bug in compressknow" not in ended.err
    for word in words:
        assert word in ended.err
