"""A disk that is really full: the system decides which write fails, unlike with injected errors."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.scenes import COMPRESS, FACTS, Scene, Stage, find_differences, read_files
from tests.long import one_in

COMMANDS = {
    "convert": f"convert model disk/out {COMPRESS}",
    "probe": f"probe model -o disk/asked -p facts:{FACTS}",
    "compare": "compare model small -o disk/c.html -o disk/c.md -o disk/c.json",
    "sweep": f"sweep model -o disk/study --grid grid.toml -p facts:{FACTS}",
}
ENOUGH = "16m"


@pytest.fixture
def folder(stage: Stage) -> Iterator[Path]:
    """Make a scene's folder with another file system in `disk`."""
    root = stage.set_up(Scene("", ("small",)))
    (root / "disk").mkdir()
    if os.geteuid() or not shutil.which("mount") or mount(root / "disk", ENOUGH).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield root
    subprocess.run(["umount", str(root / "disk")], check=True)


def mount(folder: Path, size: str, options: str = "") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )


@pytest.mark.parametrize("share", one_in(3, [0.6, 0.2, 0.9]))
@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk_is_one_message_and_the_command_resumes_once_there_is_space(
    stage: Stage, folder: Path, command: str, share: float
) -> None:
    args, disk = COMMANDS[command].split(), folder / "disk"
    assert stage.server.run(args, folder).code == 0
    expected, needed = read_files(disk), measure_used_bytes(disk)
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / "home")
    (folder / "home" / "tmp").mkdir(parents=True)
    assert mount(disk, f"{int(needed * share) // 1024}k", "remount,").returncode == 0
    outcome = stage.server.run(args, folder)
    assert outcome.code == 1
    assert outcome.find_problems() == []
    assert "no space left" in outcome.err.lower()
    assert "disk/" in outcome.err
    for name, content in read_files(disk).items():
        whole = content == expected.get(name) or name.endswith((".lock", "probe.json", "answers.parquet"))
        assert whole or ".parts" in name, f"{name} is half-made"
    mount(disk, ENOUGH, "remount,")
    assert stage.server.run(args, folder).code == 0
    assert find_differences(read_files(disk), expected) == []


def measure_used_bytes(folder: Path) -> int:
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize
