"""A disk that is really full, for what the injected errors leave out: where the space ends is the system's to say."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.scenes import COMPRESS, FACTS, Scene, Stage, differing, files_of
from tests.long import one_in

COMMANDS = {
    "convert": f"convert model disk/out {COMPRESS}",
    "probe": f"probe model -o disk/asked -p facts:{FACTS}",
    "compare": "compare model small -o disk/c.html -o disk/c.md -o disk/c.json",
    "sweep": f"sweep model -o disk/study --grid grid.toml -p facts:{FACTS}",
}
ENOUGH = "16m"


@pytest.fixture
def place(stage: Stage) -> Iterator[Path]:
    """A scene's folder with a file system of its own in `disk`."""
    root = stage.set(Scene("", ("small",)))
    (root / "disk").mkdir()
    if os.geteuid() or not shutil.which("mount") or mount(root / "disk", ENOUGH).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield root
    subprocess.run(["umount", str(root / "disk")], check=True)


def mount(folder: Path, size: str, how: str = "") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )


@pytest.mark.parametrize("share", one_in(3, [0.6, 0.2, 0.9]))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_message_and_the_command_resumes_once_there_is_space(
    stage: Stage, place: Path, command: str, share: float
) -> None:
    args, disk = COMMANDS[command].split(), place / "disk"
    assert stage.server.run(args, place).code == 0
    end, needed = files_of(disk), used(disk)
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(place / "home")
    (place / "home" / "tmp").mkdir(parents=True)
    assert mount(disk, f"{int(needed * share) // 1024}k", "remount,").returncode == 0
    outcome = stage.server.run(args, place)
    assert outcome.code == 1
    assert outcome.faults() == []
    assert "no space left" in outcome.err.lower()
    assert "disk/" in outcome.err
    for name, content in files_of(disk).items():
        whole = content == end.get(name) or name.endswith((".lock", "probe.json", "answers.parquet"))
        assert whole or ".parts" in name, f"{name} is half-made"
    mount(disk, ENOUGH, "remount,")
    assert stage.server.run(args, place).code == 0
    assert differing(files_of(disk), end) == []


def used(folder: Path) -> int:
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize
