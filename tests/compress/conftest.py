"""A fixture for tests of bad input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from compressknow.cli import main

Refusal = Callable[..., str]


def hash_files(folder: Path) -> dict[str, str]:
    """Return the content of a folder by name, as hashes and link targets, hidden files included."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            hashes[name] = f"-> {path.readlink()}"
        else:
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return hashes


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs convert and returns its error: it must fail with one message and change no file."""

    def convert_and_fail(model: Path | str, *options: str, output: Path | None = None, code: int = 1) -> str:
        before = hash_files(tmp_path)
        assert main(["convert", str(model), str(output or tmp_path / "out"), *options]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("Error: ") == 1
        # A second line says what to try; a usage error (code 2) may do without.
        assert len(printed.err.splitlines()) > 1 or code == 2
        assert "Traceback" not in printed.err
        assert hash_files(tmp_path) == before
        return printed.err

    return convert_and_fail
