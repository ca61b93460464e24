"""What tests of bad input share: convert must refuse, in one message, and change nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from compressknow.cli import main

Refused = Callable[..., str]


def state(folder: Path) -> dict[str, str]:
    """Everything in a folder, hidden files and links included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        key = str(path.relative_to(folder))
        if path.is_symlink():
            found[key] = f"-> {path.readlink()}"
        else:
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run convert, and give its message: it must refuse, in one message, and change nothing."""

    def run(model: Path | str, *options: str, output: Path | None = None, code: int = 1) -> str:
        before = state(tmp_path)
        assert main(["convert", str(model), str(output or tmp_path / "out"), *options]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("Error: ") == 1
        # What is wrong, and what to try (or how the command is used).
        assert len(printed.err.splitlines()) > 1 or code == 2
        assert "Traceback" not in printed.err
        assert state(tmp_path) == before
        return printed.err

    return run
