"""The list of tests that take long names tests that exist."""

from __future__ import annotations

from pathlib import Path

from tests.long import MEASURED

ROOT = Path(__file__).resolve().parent.parent


def test_every_line_of_the_list_names_a_test() -> None:
    for line in MEASURED:
        path, *_, name = line.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), line


def test_no_line_names_a_case_of_a_test_that_is_long_as_a_whole() -> None:
    """Else who takes one of the two out leaves the other."""
    cases = {line for line in MEASURED if "[" in line}
    assert {case for case in cases if case.partition("[")[0] in MEASURED} == set()
