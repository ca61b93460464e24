"""Commands that are killed, run out of disk space or get a signal lose nothing, leave nothing half-made, and resume.

These are samples; `make faults` disturbs every change to a file.
"""

from __future__ import annotations

import random

import pytest

from tests.faults.disturb import SIGNALS, WAYS, disturb, list_changes, select_distinct
from tests.faults.scenes import SCENES, Stage
from tests.faults.watching import find_obstacle
from tests.long import long

pytestmark = pytest.mark.skipif(bool(find_obstacle()), reason=str(find_obstacle()))
# The number of kills, 2 by default; there is one of each other disturbance.
SAMPLES = {"convert": 4, "overwrite": 4, "sweep": 1, "search": 1}


# A random moment is not repeatable: it depends on the machine.
CASES = [(scene, way) for scene in SCENES for way in WAYS if way != "moment"]
LONG = [
    *((scene, way) for scene in SCENES if scene != "convert" for way in WAYS),
    *(("convert", way) for way in tuple(SIGNALS)[1:]),
]


@pytest.mark.parametrize(
    ("scene", "way"), [pytest.param(*case, marks=[long] * (case in LONG), id="-".join(case)) for case in CASES]
)
def test_disturbed_command_loses_nothing_and_completes_when_run_again(stage: Stage, scene: str, way: str) -> None:
    changes = select_distinct(list_changes(stage, scene))
    samples = SAMPLES.get(scene, 2) if way == "kill" else 1
    numbers = random.Random(f"{scene} {way}").sample(changes, min(samples, len(changes)))
    problems = [line for number in sorted(numbers) for line in disturb(stage, scene, way, number)]
    assert not problems, "\n".join([*problems, f"Repeat one: python -m tests.faults disturb {scene} {way} NUMBER"])
