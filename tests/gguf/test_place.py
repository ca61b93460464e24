"""A GGUF file and its record, of a run that is killed between the moves that put them in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressknow.base.errors import OutputError
from compressknow.compress.staging import clean, make_scratch
from compressknow.gguf.record import IMPORTANCE, MODELFILE, OLD_RECORD, NewFile, check_extra, finish

FILE, RECORD = "out.gguf", "out.gguf.json"


def killed(folder: Path, **left: str) -> Path:
    """What a dead run has left in its staging folder, by name with "_" for "."; its lock is gone."""
    staging = folder / f".{FILE}.compressknow-new-00000000"
    staging.mkdir()
    for name, content in left.items():
        (staging / name.replace("_", ".")).write_text(content)
    return staging


def after(folder: Path, **beside: Path) -> dict[str, str]:
    """The files that are there once the next run has begun."""
    output = folder / FILE
    clean(output, lambda staging: finish(output, staging, beside))
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("old", [{}, {OLD_RECORD: "of the old one"}])
def test_a_file_that_was_moved_gets_its_record_and_what_goes_with_it(tmp_path: Path, old: dict[str, str]) -> None:
    killed(tmp_path, out_gguf_json="new record", **{IMPORTANCE: "matrix", MODELFILE: "FROM"}, **old)
    (tmp_path / FILE).write_text("new")
    found = after(tmp_path, **{IMPORTANCE: tmp_path / "i.gguf", MODELFILE: tmp_path / "Modelfile"})
    assert found == {"Modelfile": "FROM", "i.gguf": "matrix", FILE: "new", RECORD: "new record"}


def test_what_went_with_a_file_takes_the_place_of_nothing(tmp_path: Path) -> None:
    killed(tmp_path, out_gguf_json="new record", **{MODELFILE: "FROM"})
    (tmp_path / FILE).write_text("new")
    (tmp_path / "notes").write_text("the user's")
    assert after(tmp_path, **{MODELFILE: tmp_path / "notes"}) == {
        FILE: "new",
        RECORD: "new record",
        "notes": "the user's",
    }


def test_a_record_that_was_taken_away_comes_back(tmp_path: Path) -> None:
    killed(tmp_path, out_gguf="new", out_gguf_json="new record", **{OLD_RECORD: "old record"})
    (tmp_path / FILE).write_text("old")
    assert after(tmp_path) == {FILE: "old", RECORD: "old record"}


def test_what_was_not_moved_goes_and_a_file_of_the_users_stays_as_it_is(tmp_path: Path) -> None:
    killed(tmp_path, out_gguf="new", out_gguf_json="new record")
    (tmp_path / FILE).write_text("the user's")
    assert after(tmp_path) == {FILE: "the user's"}


def test_what_a_dead_run_worked_in_is_removed(tmp_path: Path) -> None:
    dead = killed(tmp_path, out_gguf="gigabytes")
    with make_scratch(tmp_path / FILE) as folder:
        assert not dead.exists()
        (folder / "more").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_moved_is_named_and_what_goes_with_it_goes_too(tmp_path: Path) -> None:
    beside = {IMPORTANCE: tmp_path / "i.gguf", MODELFILE: tmp_path / "Modelfile"}
    with NewFile(tmp_path / FILE, overwrite=False, source=tmp_path / "model", extras=beside) as place:
        for name in beside:
            place.write(name, b"content")
        # The file to be moved is missing.
        with pytest.raises(OutputError, match=r"/out\.gguf cannot be written"):
            place.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no folder that nobody may write to")
def test_a_place_that_cannot_be_written_is_found_before_any_work(tmp_path: Path) -> None:
    place = Path("/proc/Modelfile")
    with pytest.raises(OutputError, match="/proc/Modelfile cannot be written"):
        check_extra(place, tmp_path / FILE, "--modelfile", "a Modelfile", lambda _: True, overwrite=False)
