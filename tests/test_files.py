"""Files appear whole or not at all, locks end with their process, and only temporary files of dead runs are removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from compressknow.base import system
from compressknow.base.errors import OutputError
from compressknow.base.files import (
    LOCK,
    claim_folder,
    find_cache_folder,
    is_no_folder,
    open_whole,
    remove_strays,
    write_whole,
)
from compressknow.base.system import (
    count_cores,
    create_file,
    is_full,
    measure_peak_memory,
    open_to_read,
    read_at,
    write_at,
)

DEADLINE = 20
FULL = "No space left|File too large"


def start_child(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # PYTHONPATH may have the folder that emulates Windows (tests/windows.py).
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


WRITER = """
import sys, time
from pathlib import Path
from compressknow.base.files import open_whole
with open_whole(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@contextmanager
def write_half(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run another process, which has written half of a file."""
    with start_child(WRITER, path) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n", process.communicate()
            yield process
        finally:
            process.kill()


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def list_strays(folder: Path) -> list[str]:
    return [name for name in list_names(folder) if ".compressknow-" in name]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), open_whole(tmp_path / "a") as file:
        file.write(b"new" * (1 // 0))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert list_names(tmp_path) == ["a"]


def test_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    (tmp_path / "a").chmod(0o600)
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["a" * 255, "x" + "ä" * 127, "b" * 200, "b" * 201])
def test_file_names_may_be_as_long_as_the_system_allows(tmp_path: Path, name: str) -> None:
    with write_half(tmp_path / name) as process:
        write_whole(tmp_path / name, b"old")
        process.kill()
        process.wait(DEADLINE)
    assert list_strays(tmp_path)
    write_whole(tmp_path / name, b"whole")
    assert list_names(tmp_path) == [name]


def test_next_write_of_a_file_removes_temporary_files_of_a_killed_process(tmp_path: Path) -> None:
    with write_half(tmp_path / "a") as process:
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE)
    before = list_strays(tmp_path)
    assert before
    write_whole(tmp_path / "b", b"another file")
    assert list_strays(tmp_path) == before
    write_whole(tmp_path / "a", b"whole")
    assert list_names(tmp_path) == ["a", "b"]


INTERRUPTED = """
import signal, sys
from pathlib import Path
from compressknow.base.files import write_whole

def interrupt(event, args):
    if event == "os.remove":
        signal.raise_signal(signal.SIGINT)

sys.addaudithook(interrupt)
write_whole(Path(sys.argv[1]), b"whole")
"""


def test_signal_during_removal_leaves_no_temporary_file(tmp_path: Path) -> None:
    with start_child(INTERRUPTED, tmp_path / "a") as process:
        assert process.wait(DEADLINE)
    assert list_names(tmp_path) == ["a"]


def test_signals_have_their_handlers_again_after_a_write(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, handler := lambda *_: None)
    try:
        write_whole(tmp_path / "a", b"whole")
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_file_is_written_in_any_thread(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(write_whole, tmp_path / "a", b"whole").result()
    assert list_names(tmp_path) == ["a"]


def test_temporary_files_of_a_running_process_are_kept(tmp_path: Path) -> None:
    with write_half(tmp_path / "a"):
        theirs = list_strays(tmp_path)
        assert theirs
        write_whole(tmp_path / "a", b"whole")
        remove_strays(tmp_path)
        assert list_names(tmp_path) == [*theirs, "a"]


def test_user_files_with_similar_names_are_kept(tmp_path: Path) -> None:
    similar = [".a.compressknow-new", "a.compressknow-0123abcd", ".a.compressknow-", ".a.4711"]
    for name in similar:
        (tmp_path / name).touch()
    write_whole(tmp_path / "a", b"whole")
    remove_strays(tmp_path)
    assert list_names(tmp_path) == sorted(["a", *similar])


def test_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"folder cannot be written: Is a directory"):
        write_whole(tmp_path / "folder", b"whole")
    assert list_names(tmp_path) == ["folder"]


@pytest.mark.skipif(os.name == "nt", reason="Windows finds the home folder differently")
def test_error_without_a_home_folder_names_the_variables_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # The user is not in the password database either.
    monkeypatch.setitem(sys.modules, "pwd", None)
    with pytest.raises(OutputError, match=r"no home folder.*\nSet HOME, or XDG_CACHE_HOME"):
        find_cache_folder()
    (tmp_path / "file").write_bytes(b"")
    # Other errors do not need a home folder.
    with pytest.raises(OutputError, match="cannot be written"):
        write_whole(tmp_path / "file" / "a", b"whole")


def test_error_of_an_unwritable_cache_names_the_variable_that_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_whole(find_cache_folder() / "texts" / "a", b"whole")
    assert "set XDG_CACHE_HOME to another folder" in str(caught.value)


@pytest.mark.parametrize("name", ["link", "link/deeper", "folder"])
def test_dangling_link_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / LOCK).symlink_to(tmp_path / "gone" / "lock")
    start = time.monotonic()
    message = r"link that leads nowhere|lock file \S+folder/\.lock is a link"
    with pytest.raises(OutputError, match=message), claim_folder(tmp_path / name, wait=True):
        pass
    assert time.monotonic() - start < DEADLINE
    assert not (tmp_path / "gone").exists()


def test_folder_may_be_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with claim_folder(tmp_path / "link" / "deeper", wait=False):
        write_whole(tmp_path / "link" / "deeper" / "a", b"whole")
    assert list_names(tmp_path / "real" / "deeper") == [LOCK, "a"]


def test_claimed_folder_is_locked_and_rid_of_temporary_files(tmp_path: Path) -> None:
    (tmp_path / ".a.compressknow-0123abcd").touch()
    with claim_folder(tmp_path, wait=False):
        write_whole(tmp_path / "b", b"")
        assert list_names(tmp_path) == [LOCK, "b"]
        with pytest.raises(OutputError, match="in use by another run"), claim_folder(tmp_path, wait=False):
            pass
    with claim_folder(tmp_path, wait=False):
        pass


def test_claimed_folder_with_only_worthless_files_is_removed(tmp_path: Path) -> None:
    with claim_folder(tmp_path / "a" / "b", wait=False, worthless=("record",)):
        write_whole(tmp_path / "a" / "b" / "record", b"")
    assert list_names(tmp_path) == []


def test_threads_read_and_write_one_file_at_different_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of systems that reject calls of more than some bytes.
    monkeypatch.setattr(system, "_MOST_AT_ONCE", 4_000)
    pieces = [bytes([number]) * 10_007 for number in range(200)]
    offsets = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    writing, buffers = create_file(tmp_path / "a", sum(map(len, pieces))), [bytearray(10_007) for _ in pieces]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece, offset: write_at(writing, memoryview(piece), offset), pieces, offsets))
        os.close(writing)
        reading = open_to_read(tmp_path / "a")
        counts = list(pool.map(lambda buffer, offset: read_at(reading, memoryview(buffer), offset), buffers, offsets))
    assert counts == [10_007] * 200
    assert buffers == pieces
    assert (tmp_path / "a").read_bytes() == b"".join(pieces)
    # A read ends at the end of the file.
    assert read_at(reading, memoryview(buffers[0]), offsets[-1] + 10_000) == 7
    os.close(reading)


def test_new_file_has_its_size_or_fails_at_once_without_room(tmp_path: Path) -> None:
    os.close(create_file(tmp_path / "a", 12_345))
    assert (tmp_path / "a").read_bytes() == bytes(12_345)
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "a", 1)
    with pytest.raises(OSError, match=FULL) as error:
        create_file(tmp_path / "b", 1 << 60)
    assert is_full(error.value)


def test_available_cores_and_peak_memory_are_plausible() -> None:
    assert 1 <= count_cores() <= (os.cpu_count() or 1)
    memory = bytearray(64 << 20)
    memory[:: 1 << 12] = b"x" * len(memory[:: 1 << 12])
    assert len(memory) < measure_peak_memory() < 64 * len(memory)


def test_folder_that_is_being_removed_is_not_taken_for_a_file(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    file.touch()
    assert [is_no_folder(path) for path in (file, folder, tmp_path, file / "below")] == [True, False, False, False]
    stop = threading.Event()

    def create_and_remove() -> None:
        while not stop.is_set():
            folder.mkdir()
            folder.rmdir()

    other = threading.Thread(target=create_and_remove)
    other.start()
    try:
        assert not any(is_no_folder(folder) for _ in range(3000))
    finally:
        stop.set()
        other.join()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_without_reservation_is_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*arguments: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    os.close(create_file(tmp_path / "a", 12_345))
    assert (tmp_path / "a").read_bytes() == bytes(12_345)
    with pytest.raises(OSError, match=FULL) as error:
        create_file(tmp_path / "b", 1 << 60)
    assert is_full(error.value)


def test_error_names_a_folder_in_the_place_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OutputError, match=r"/\.lock is a folder, not a file\."), claim_folder(tmp_path, wait=False):
        pass
