"""Which tests `make test` leaves to `make test-all`: what takes long, and most of what is one check on many cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

long = pytest.mark.long


def one_in(number: int, cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrized test, of which all but each such one are long."""
    return [case if place % number == 0 else _long(case) for place, case in enumerate(cases)]


def _long(case: Any) -> Any:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, marks=[*case.marks, long], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=long)
