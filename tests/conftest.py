"""What holds for every test: no network but where a test is marked for it, one thread a worker."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.long import MEASURED, long

# Set before anything imports huggingface_hub or torch, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {item.nodeid, item.nodeid.partition("[")[0]} & MEASURED:
            item.add_marker(long)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's checkpoint."""
    from tests.demo import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture(scope="session")
def converter() -> Iterator[Path]:
    """llama.cpp's converter, fetched as `export` does; where it cannot be, the test is skipped and says why."""
    from compressknow.base.errors import NotInstalled
    from compressknow.gguf.converter import VARIABLE, find_converter

    try:
        script = find_converter(fetch=True)
    except NotInstalled as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        # Tests have homes of their own.
        patch.setenv(VARIABLE, str(script))
        yield script


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of someone who has a script there that is named as a module of Python's; what runs in a
    process of its own begins anew in it."""
    from compressknow.gguf import children

    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "warnings.py").write_text("raise SystemExit('this script was run')")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(children, "Popen", subprocess.Popen)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that are loaded from here on, in order."""
    from compressknow.evaluate import handle

    load, loaded = handle.load_language_model, []

    def counted(path: Path, **options: object) -> object:
        loaded.append(path)
        return load(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(handle, "load_language_model", counted)
    return loaded


@pytest.fixture(scope="session", autouse=True)
def _children_are_forks() -> Iterator[None]:
    """Importing torch and transformers takes most of a small export's time."""
    from compressknow.gguf import children
    from tests import forks

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(os, "fork"):
            patch.setattr(children, "Popen", forks.popen)
        yield
