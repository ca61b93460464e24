"""A GGUF file and its record, of a run that is killed between the moves that put them in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressknow.base.errors import OutputError
from compressknow.compress.staging import clean, make_scratch
from compressknow.gguf.record import IMPORTANCE, OLD_RECORD, Place, finish

FILE, RECORD = "out.gguf", "out.gguf.json"


def killed(folder: Path, **left: str) -> Path:
    """What a dead run has left in its staging folder, by name with "_" for "."; its lock is gone."""
    staging = folder / f".{FILE}.compressknow-new-00000000"
    staging.mkdir()
    for name, content in left.items():
        (staging / name.replace("_", ".")).write_text(content)
    return staging


def after(folder: Path, importance: Path | None = None) -> dict[str, str]:
    """The files that are there once the next run has begun."""
    output = folder / FILE
    clean(output, lambda staging: finish(output, staging, importance))
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("old", [{}, {OLD_RECORD: "of the old one"}])
def test_a_file_that_was_moved_gets_its_record_and_matrix(tmp_path: Path, old: dict[str, str]) -> None:
    killed(tmp_path, out_gguf_json="new record", **{IMPORTANCE: "matrix"}, **old)
    (tmp_path / FILE).write_text("new")
    found = after(tmp_path, tmp_path / "i.gguf")
    assert found == {"i.gguf": "matrix", FILE: "new", RECORD: "new record"}


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


def test_a_file_that_cannot_be_moved_is_named_and_its_matrix_goes_too(tmp_path: Path) -> None:
    with Place(tmp_path / FILE, overwrite=False, source=tmp_path / "model", importance=tmp_path / "i.gguf") as place:
        place.write(IMPORTANCE, b"matrix")
        # The file to be moved is missing.
        with pytest.raises(OutputError, match=r"/out\.gguf cannot be written"):
            place.commit()
    assert list(tmp_path.iterdir()) == []
