"""Which tests only `make test-all` runs.

Marked by hand, with `long` and `one_in`: campaigns, and most cases of tests with many cases. Listed in long.txt: tests
and cases that take more than half a second, except those that cover a whole command or a promise of the README.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

long = pytest.mark.long
LISTED = frozenset((Path(__file__).parent / "long.txt").read_text("utf-8").splitlines())


def one_in(number: int, cases: Iterable[Any]) -> list[Any]:
    """Mark all cases of a parametrized test as long, except one in so many."""
    return [case if index % number == 0 else _mark_long(case) for index, case in enumerate(cases)]


def _mark_long(case: Any) -> Any:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, marks=[*case.marks, long], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=long)
