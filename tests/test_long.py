"""The list of long tests."""

from __future__ import annotations

from pathlib import Path

from tests.long import LISTED

ROOT = Path(__file__).resolve().parent.parent


def test_every_line_names_a_test() -> None:
    for line in LISTED:
        path, *_, name = line.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), line


def test_no_line_names_a_case_of_a_test_that_is_listed_as_a_whole() -> None:
    cases = {line for line in LISTED if "[" in line}
    assert {case for case in cases if case.partition("[")[0] in LISTED} == set()
