"""Killed, out of disk space, or told to end, at any change to a file: nothing half-made, nothing lost, and it resumes.

These are samples; `make faults` disturbs every change.
"""

from __future__ import annotations

import random

import pytest

from tests.faults.disturb import SIGNALS, WAYS, changes_of, distinct, disturb
from tests.faults.scenes import SCENES, Stage
from tests.faults.watching import why_not
from tests.long import long

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
# What takes long is disturbed at fewer changes; a kill, which nothing can answer, at more than what can be.
SAMPLES = {"convert": 4, "overwrite": 4, "sweep": 1, "search": 1}


# Where a random moment falls depends on the machine.
CASES = [(scene, way) for scene in SCENES for way in WAYS if way != "moment"]
LONG = [
    *((scene, way) for scene in SCENES if scene != "convert" for way in WAYS),
    *(("convert", way) for way in tuple(SIGNALS)[1:]),
]


@pytest.mark.parametrize(
    ("scene", "way"), [pytest.param(*case, marks=[long] * (case in LONG), id="-".join(case)) for case in CASES]
)
def test_a_disturbed_command_loses_nothing_and_ends_as_if_undisturbed_when_run_again(
    stage: Stage, scene: str, way: str
) -> None:
    changes = distinct(changes_of(stage, scene))
    samples = SAMPLES.get(scene, 2) if way == "kill" else 1
    chosen = random.Random(f"{scene} {way}").sample(changes, min(samples, len(changes)))
    wrong = [line for number in sorted(chosen) for line in disturb(stage, scene, way, number)]
    assert not wrong, "\n".join([*wrong, f"One alone: python -m tests.faults disturb {scene} {way} NUMBER"])
