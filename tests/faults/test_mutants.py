"""Damaged files give one message or a right result, never a crash, a hang or a wrong result.

These are a few seeds per kind of file; `make faults` runs 20,000.
"""

from __future__ import annotations

import pytest

from tests.faults.targets import TARGETS, Bench

SEEDS = range(5)


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_file_is_one_message_or_changes_nothing(bench: Bench, kind: str) -> None:
    problems = [line for seed in SEEDS for line in bench.run(kind, seed)]
    assert not problems, "\n".join([*problems, f"Repeat one: python -m tests.faults mutants {kind} SEED"])
