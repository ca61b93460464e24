"""An output appears whole or not at all, and no file of the user is lost, however a run ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compressknow
from compressknow.base.errors import CompressknowError, OutputError
from compressknow.base.files import make_prefix
from compressknow.base.system import move
from compressknow.cli import main
from compressknow.compress import staging
from tests.long import one_in
from tests.models import edit_tensors, save_tiny

DEADLINE = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("bert", tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 270 MB, whose conversion by a slow norm takes long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("large") / "llama"
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=500)).save_pretrained(folder)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(source: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    """Start a conversion in a subprocess, and return when it is writing weights."""
    options = ["--prune", "0.3", "--prune-method", "ln-structured", "--norm", "2.5", "--quantize", "int8"]
    command = [
        sys.executable,
        "-m",
        "compressknow",
        "convert",
        str(source),
        str(output),
        "--threads",
        "1",
        *options,
        *more,
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + DEADLINE
    while not list(output.parent.glob(f".{output.name}.compressknow-new-*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


def list_staging_folders(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f".{output.name}.compressknow-new-*"))


@pytest.mark.parametrize(("number", "code"), one_in(2, [(signal.SIGINT, 130), (signal.SIGTERM, 143)]))
def test_an_interrupted_run_leaves_nothing(
    large_source: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(large_source, tmp_path / "out")
    process.send_signal(number)
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert (output, errors.strip()) == ("", "Interrupted. Nothing was written.")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_output_and_the_next_run_cleans_up(
    large_source: Path, source: Path, tmp_path: Path
) -> None:
    process = start(large_source, tmp_path / "out")
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert not (tmp_path / "out").exists()
    assert len(list_staging_folders(tmp_path / "out")) == 1
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    compressknow.verify(tmp_path / "out")


@pytest.mark.parametrize("number", one_in(2, [signal.SIGKILL, signal.SIGINT]))
def test_an_overwrite_that_does_not_finish_leaves_the_old_output(
    large_source: Path, source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    before = read_files(tmp_path / "out")
    process = start(large_source, tmp_path / "out", "--overwrite")
    process.send_signal(number)
    process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert read_files(tmp_path / "out") == before
    compressknow.verify(tmp_path / "out")


def test_the_first_of_two_runs_to_finish_writes_the_output(large_source: Path, source: Path, tmp_path: Path) -> None:
    process = start(large_source, tmp_path / "out")
    process.send_signal(signal.SIGSTOP)
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    before = read_files(tmp_path / "out")
    # The second run has not removed the folder of the first, which is alive.
    assert len(list_staging_folders(tmp_path / "out")) == 1
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "exists already" in errors
    assert read_files(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_staging_folder_of_a_running_conversion_stays(source: Path, tmp_path: Path) -> None:
    alive = tmp_path / ".out.compressknow-new-alive"
    alive.mkdir()
    with (tmp_path / ".out.compressknow-lock-alive").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compressknow.convert(source, tmp_path / "out", prune=0.2)
    assert alive.is_dir()


def test_an_output_that_a_running_conversion_moved_aside_stays(source: Path, tmp_path: Path) -> None:
    compressknow.convert(source, tmp_path / ".out.compressknow-old-alive", prune=0.2)
    alive = tmp_path / ".out.compressknow-new-alive"
    alive.mkdir()
    with (tmp_path / ".out.compressknow-lock-alive").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compressknow.convert(source, tmp_path / "out", prune=0.3)
    compressknow.verify(tmp_path / ".out.compressknow-old-alive")


@pytest.mark.parametrize("name", ["out", "out [1]"])
def test_the_old_output_of_an_interrupted_overwrite_is_put_back(source: Path, tmp_path: Path, name: str) -> None:
    compressknow.convert(source, tmp_path / name, prune=0.2)
    before = read_files(tmp_path / name)
    (tmp_path / name).rename(tmp_path / f".{name}.compressknow-old-abc")
    with pytest.raises(OutputError, match="exists already"):
        compressknow.convert(source, tmp_path / name, prune=0.3)
    assert read_files(tmp_path / name) == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_interrupted_removal_leaves_nothing_that_the_next_run_would_put_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressknow.convert(source, tmp_path / "out", prune=0.5)

    def interrupt(folder: Path) -> None:
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(staging.shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        staging.discard(tmp_path / "out")
    monkeypatch.undo()
    compressknow.convert(source, tmp_path / "out", prune=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_may_be_as_long_as_the_system_allows(source: Path, tmp_path: Path) -> None:
    name, other = "x" * 200 + "a" * 55, "x" * 200 + "b" * 55
    compressknow.convert(source, tmp_path / name, prune=0.2)
    before = read_files(tmp_path / name)
    (tmp_path / name).rename(tmp_path / f"{make_prefix(tmp_path / name)}old-abc")
    # The leftover belongs to `name`, although `other` begins alike.
    compressknow.convert(source, tmp_path / other, prune=0.3)
    with pytest.raises(OutputError, match="exists already"):
        compressknow.convert(source, tmp_path / name, prune=0.3)
    assert read_files(tmp_path / name) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, other]


def test_leftovers_of_a_run_that_died_at_its_end_are_removed_by_the_next(source: Path, tmp_path: Path) -> None:
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    before = read_files(tmp_path / "out")
    # The new output was in place, but the old one and the lock were not removed yet.
    compressknow.convert(source, tmp_path / ".out.compressknow-old-1", prune=0.3)
    (tmp_path / ".out.compressknow-lock-1").touch()
    # Of this one, only the lock could be removed.
    (tmp_path / ".out.compressknow-new-2").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        compressknow.convert(source, tmp_path / "out", prune=0.3)
    assert read_files(tmp_path) == {f"out/{name}": data for name, data in before.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("old", ["output", "empty folder"])
def test_overwrite_replaces_what_convert_wrote_and_an_empty_folder(source: Path, tmp_path: Path, old: str) -> None:
    if old == "output":
        compressknow.convert(source, tmp_path / "out", prune=0.2)
    else:
        (tmp_path / "out").mkdir()
    compressknow.convert(source, tmp_path / "out", prune=0.3, overwrite=True)
    compressknow.convert(source, tmp_path / "other", prune=0.3)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_an_overwrite_whose_last_rename_fails_puts_the_old_output_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    before = read_files(tmp_path / "out")

    def fail_for_the_new_one(path: Path, target: Path) -> None:
        if "compressknow-new" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        move(path, target)

    monkeypatch.setattr(staging, "move", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        compressknow.convert(source, tmp_path / "out", prune=0.3, overwrite=True)
    assert read_files(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_overwrite_does_not_change_the_old_output(source: Path, tmp_path: Path) -> None:
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    before = read_files(tmp_path / "out")
    damaged = save_damaged(tmp_path / "damaged")
    with pytest.raises(CompressknowError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight"):
        compressknow.convert(damaged, tmp_path / "out", prune=0.3, overwrite=True)
    assert read_files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "out"]


def test_parent_folders_are_made_and_removed_if_the_run_fails(source: Path, tmp_path: Path) -> None:
    (tmp_path / "existing").mkdir()
    damaged = save_damaged(tmp_path / "damaged")
    for parent in (tmp_path / "a" / "b", tmp_path / "existing", tmp_path / "existing" / "c"):
        with pytest.raises(CompressknowError, match="NaN"):
            compressknow.convert(damaged, parent / "out", prune=0.3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "existing"]
        assert list((tmp_path / "existing").iterdir()) == []
    compressknow.convert(source, tmp_path / "a" / "b" / "out", prune=0.2)
    compressknow.verify(tmp_path / "a" / "b" / "out")


def save_damaged(folder: Path) -> Path:
    """Write a tiny BERT with a NaN in one of its last weights."""
    name = "bert.encoder.layer.1.output.dense.weight"
    edit_tensors(save_tiny("bert", folder), lambda tensors: tensors[name][0, 10].fill_(torch.nan))
    return folder


@pytest.mark.parametrize("kind", ["folder of the user's", "file", "link to an output", "link to nowhere"])
def test_overwrite_never_replaces_what_convert_did_not_write(source: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("precious")
    elif kind == "folder of the user's":
        output.mkdir()
        (output / "precious").write_text("precious")
    else:
        if kind == "link to an output":
            compressknow.convert(source, tmp_path / "other", prune=0.3)
        output.symlink_to(tmp_path / "other")
    before = read_files(tmp_path)
    with pytest.raises(OutputError):
        compressknow.convert(source, output, prune=0.2, overwrite=True)
    assert read_files(tmp_path) == before
    assert output.is_symlink() == kind.startswith("link")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip() if done else 'not root'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_gives_one_message_and_leaves_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny("mixtral", small_disk.parent / "mixtral")
    assert (source / "model.safetensors").stat().st_size > 200_000
    capsys.readouterr()
    assert main(["convert", str(source), str(small_disk / "out"), "--prune", "0.2"]) == 1
    assert capsys.readouterr().err.startswith(f"Error: No space left for {small_disk / 'out'}.\n")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_after_the_weights_gives_one_message(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("bert", small_disk.parent / "bert")
    (folder / "tokenizer.json").write_bytes(bytes(200_000))
    capsys.readouterr()
    assert main(["convert", str(folder), str(small_disk / "new" / "out"), "--prune", "0.2"]) == 1
    assert capsys.readouterr().err.startswith(f"Error: No space left for {small_disk / 'new' / 'out'}.\n")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_output_has_the_permissions_of_the_users_umask(
    source: Path, tmp_path: Path, mask: int, request: pytest.FixtureRequest
) -> None:
    before = os.umask(mask)
    request.addfinalizer(lambda: os.umask(before))
    compressknow.convert(source, tmp_path / "out", prune=0.2)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode == (tmp_path / "file").stat().st_mode
