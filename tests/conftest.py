"""Settings and fixtures of all tests: no network unless a test is marked for it, one thread per worker."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.long import LISTED, long

# Before huggingface_hub and torch are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes depends on how busy the machine is.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {item.nodeid, item.nodeid.partition("[")[0]} & LISTED:
            item.add_marker(long)


def pytest_collection_finish() -> None:
    # The libraries' objects stay: a full collection, which would visit them all, takes 0.3 s instead of a few ms.
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the demo's checkpoint."""
    from tests.demo import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture(scope="session")
def converter() -> Iterator[Path]:
    """Fetch llama.cpp's converter as `export` does, or skip the test."""
    from compressknow.base.errors import NotInstalled
    from compressknow.gguf.converter import VARIABLE, find_converter

    try:
        script = find_converter(fetch=True)
    except NotInstalled as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        # Some tests change the home folder, where the converter is cached.
        patch.setenv(VARIABLE, str(script))
        yield script


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in a folder with a script named like a module of Python, and child processes as new interpreters."""
    from compressknow.gguf import children

    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "warnings.py").write_text("raise SystemExit('this script was run')")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(children, "Popen", subprocess.Popen)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the checkpoints that are loaded, in order."""
    from compressknow.evaluate import handle

    load, paths = handle.load_language_model, []

    def record(path: Path, **options: object) -> object:
        paths.append(path)
        return load(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(handle, "load_language_model", record)
    return paths


@pytest.fixture(scope="session", autouse=True)
def _children_are_forks() -> Iterator[None]:
    """Fork child processes: most of a small export's time goes into importing torch and transformers."""
    from compressknow.gguf import children
    from tests import forks

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(os, "fork"):
            patch.setattr(children, "Popen", forks.popen)
        yield
