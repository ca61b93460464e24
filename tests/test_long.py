"""The list of tests that take long names tests that exist."""

from __future__ import annotations

from pathlib import Path

from tests.long import MEASURED

ROOT = Path(__file__).resolve().parent.parent


def test_every_line_of_the_list_names_a_test() -> None:
    for line in MEASURED:
        path, *_, name = line.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), line
