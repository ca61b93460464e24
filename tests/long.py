"""Which tests `make test` leaves to `make test-all`.

By hand, with `long` and `one_in`: campaigns, and most of what is one check on many cases. By measure, in long.txt:
tests and cases that take more than half a second, but for those that stand for a whole command or for what the README
promises.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

long = pytest.mark.long
MEASURED = frozenset((Path(__file__).parent / "long.txt").read_text("utf-8").splitlines())


def one_in(number: int, cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrized test, of which all but each such one are long."""
    return [case if place % number == 0 else _long(case) for place, case in enumerate(cases)]


def _long(case: Any) -> Any:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, marks=[*case.marks, long], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=long)
