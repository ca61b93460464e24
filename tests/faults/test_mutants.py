"""Damaged files: one clear message or a right result, never a crash, a hang, or a result that is wrong.

These are a few seeds of each kind of file; `make faults` runs 20,000.
"""

from __future__ import annotations

import pytest

from tests.faults.targets import TARGETS, Bench

SEEDS = range(5)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_damaged_file_is_one_message_or_changes_nothing(bench: Bench, kind: str) -> None:
    wrong = [line for seed in SEEDS for line in bench.run(kind, seed)]
    assert not wrong, "\n".join([*wrong, f"One alone: python -m tests.faults mutants {kind} SEED"])
