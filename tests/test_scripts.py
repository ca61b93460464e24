"""The scripts in examples/, tools/ and benchmarks/: they show help without doing any work, and their imports exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_missing_libraries import HIDE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("examples", "tools", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown_and_nothing_written(script: str, tmp_path: Path) -> None:
    before = read_times()
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {Path(script).name}")
    assert list(tmp_path.iterdir()) == []
    assert read_times() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_from_the_package_exist(script: str) -> None:
    """Check imports inside functions too: most of them are run only by hand."""
    for each in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(each, ast.ImportFrom) and str(each.module).partition(".")[0] in ("compressknow", "tests"):
            exec(compile(ast.Module([each], []), script, "exec"), {})


def test_missing_model_is_one_message(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/frontier.py"), str(tmp_path / "nowhere"), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 1
    assert f"Error: {tmp_path / 'nowhere'}: no such folder." in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_library_is_reported_before_the_model_is_fetched(tmp_path: Path) -> None:
    code = f"{HIDE}\nimport runpy; runpy.run_path({str(ROOT / 'examples/smollm2.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, "gguf", str(tmp_path / "smollm2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "pip install '.[gguf]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_scripts_are_found() -> None:
    assert "examples/complete.py" in SCRIPTS
    assert "tools/golden.py" in SCRIPTS


def read_times() -> dict[Path, int]:
    """Return the modification times of the project's files that scripts write."""
    folders = (ROOT / "compressknow" / "evaluate" / "atlas", ROOT / "tests" / "data", ROOT / "tests" / "pages")
    paths = (path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
