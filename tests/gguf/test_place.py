"""The next run completes or undoes one that was killed while it moved a GGUF file and its record into place."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressknow.base.errors import OutputError, UsageError
from compressknow.base.system import move
from compressknow.compress.staging import clean, make_scratch
from compressknow.gguf.record import IMPORTANCE, MODELFILE, OLD_RECORD, NewFile, check_destination, check_extra, finish

FILE, RECORD = "out.gguf", "out.gguf.json"


def leave_staging_folder(folder: Path, **files: str) -> Path:
    """Write the staging folder of a dead run without its lock; in the names of files, "_" stands for "."."""
    staging = folder / f".{FILE}.compressknow-new-00000000"
    staging.mkdir()
    for name, content in files.items():
        (staging / name.replace("_", ".")).write_text(content)
    return staging


def start_next_run(folder: Path, **extras: Path) -> dict[str, str]:
    """Clean up as the next run does; return all files."""
    output = folder / FILE
    clean(output, lambda staging: finish(output, staging, extras))
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("old", [{}, {OLD_RECORD: "of the old one"}])
def test_a_moved_file_gets_its_record_and_extra_files(tmp_path: Path, old: dict[str, str]) -> None:
    leave_staging_folder(tmp_path, out_gguf_json="new record", **{IMPORTANCE: "matrix", MODELFILE: "FROM"}, **old)
    (tmp_path / FILE).write_text("new")
    files = start_next_run(tmp_path, **{IMPORTANCE: tmp_path / "i.gguf", MODELFILE: tmp_path / "Modelfile"})
    assert files == {"Modelfile": "FROM", "i.gguf": "matrix", FILE: "new", RECORD: "new record"}


def test_an_extra_file_replaces_no_file_of_the_user(tmp_path: Path) -> None:
    leave_staging_folder(tmp_path, out_gguf_json="new record", **{MODELFILE: "FROM"})
    (tmp_path / FILE).write_text("new")
    (tmp_path / "notes").write_text("the user's")
    assert start_next_run(tmp_path, **{MODELFILE: tmp_path / "notes"}) == {
        FILE: "new",
        RECORD: "new record",
        "notes": "the user's",
    }


def test_the_old_record_is_put_back(tmp_path: Path) -> None:
    leave_staging_folder(tmp_path, out_gguf="new", out_gguf_json="new record", **{OLD_RECORD: "old record"})
    (tmp_path / FILE).write_text("old")
    assert start_next_run(tmp_path) == {FILE: "old", RECORD: "old record"}


def test_an_unmoved_file_is_removed_and_a_file_of_the_user_stays(tmp_path: Path) -> None:
    leave_staging_folder(tmp_path, out_gguf="new", out_gguf_json="new record")
    (tmp_path / FILE).write_text("the user's")
    assert start_next_run(tmp_path) == {FILE: "the user's"}


def test_a_record_is_not_put_where_its_file_is_gone(tmp_path: Path) -> None:
    leave_staging_folder(tmp_path, out_gguf_json="new record")
    assert start_next_run(tmp_path) == {}


def test_the_record_of_a_replaced_file_does_not_return(tmp_path: Path) -> None:
    """The run was killed after it had moved everything."""
    leave_staging_folder(tmp_path, **{OLD_RECORD: "old record"})
    (tmp_path / FILE).write_text("new")
    (tmp_path / RECORD).write_text("new record")
    assert start_next_run(tmp_path) == {FILE: "new", RECORD: "new record"}


def test_an_extra_file_that_the_dead_run_did_not_make_is_left_to_this_run(tmp_path: Path) -> None:
    leave_staging_folder(tmp_path, out_gguf_json="new record")
    (tmp_path / FILE).write_text("new")
    assert start_next_run(tmp_path, **{MODELFILE: tmp_path / "Modelfile"}) == {FILE: "new", RECORD: "new record"}


def test_a_new_file_is_never_next_to_an_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run that is killed between its moves would leave a file that does not match its record."""
    moved = []

    def move_and_look(source: Path, target: Path) -> None:
        move(source, target)
        moved.append((target.name, (tmp_path / RECORD).exists()))

    monkeypatch.setattr("compressknow.gguf.record.move", move_and_look)
    (tmp_path / FILE).write_text("old")
    (tmp_path / RECORD).write_text("old record")
    with NewFile(tmp_path / FILE, overwrite=True, source=tmp_path / "model", extras={}) as output:
        output.write(FILE, b"new")
        output.write(RECORD, b"new record")
        output.commit()
    assert moved == [(OLD_RECORD, False), (FILE, False), (RECORD, True)]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {FILE: "new", RECORD: "new record"}


def test_the_staging_folder_of_a_dead_run_is_removed(tmp_path: Path) -> None:
    staging = leave_staging_folder(tmp_path, out_gguf="gigabytes")
    with make_scratch(tmp_path / FILE) as folder:
        assert not staging.exists()
        (folder / "more").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_moved_is_named_and_extra_files_are_removed(tmp_path: Path) -> None:
    extras = {IMPORTANCE: tmp_path / "i.gguf", MODELFILE: tmp_path / "Modelfile"}
    with NewFile(tmp_path / FILE, overwrite=False, source=tmp_path / "model", extras=extras) as output:
        for name in extras:
            output.write(name, b"content")
        # The file to move does not exist.
        with pytest.raises(OutputError, match=r"/out\.gguf cannot be written"):
            output.commit()
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_keeps_its_record_if_the_new_one_cannot_be_moved(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("old")
    (tmp_path / RECORD).write_text("old record")
    with (
        NewFile(tmp_path / FILE, overwrite=True, source=tmp_path / "model", extras={}) as output,
        pytest.raises(OutputError, match=r"/out\.gguf cannot be written"),
    ):
        output.commit()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {FILE: "old", RECORD: "old record"}


def test_a_file_that_appears_during_the_run_is_not_overwritten(tmp_path: Path) -> None:
    with NewFile(tmp_path / FILE, overwrite=False, source=tmp_path / "model", extras={}) as output:
        output.write(FILE, b"new")
        output.write(RECORD, b"record")
        (tmp_path / FILE).write_text("of another program")
        with pytest.raises(OutputError, match="exists already"):
            output.commit()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {FILE: "of another program"}


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_is_not_a_file_of_an_export_is_not_overwritten(kind: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("record")
    with pytest.raises(OutputError, match=r"out\.gguf\.json exists already"):
        check_destination(tmp_path / FILE, overwrite=False, source=None)
    check_destination(tmp_path / FILE, overwrite=True, source=None)
    if kind == "link":
        (tmp_path / "other").touch()
        (tmp_path / FILE).symlink_to("other")
    else:
        (tmp_path / FILE).mkdir()
    with pytest.raises(OutputError, match="not overwritten"):
        check_destination(tmp_path / FILE, overwrite=True, source=None)


def test_an_extra_file_has_a_place_of_its_own(tmp_path: Path) -> None:
    def check(path: Path) -> None:
        check_extra(path, tmp_path / FILE, "--modelfile", "a Modelfile", lambda _: True, overwrite=True)

    for name in (FILE, RECORD, f"../{tmp_path.name}/{RECORD}"):
        with pytest.raises(UsageError, match="have the same name"):
            check(tmp_path / name)
    with pytest.raises(OutputError, match="exists already"):
        check(tmp_path)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no folder that nobody can write to")
def test_an_extra_file_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    place = Path("/proc/Modelfile")
    with pytest.raises(OutputError, match="/proc/Modelfile cannot be written"):
        check_extra(place, tmp_path / FILE, "--modelfile", "a Modelfile", lambda _: True, overwrite=False)
