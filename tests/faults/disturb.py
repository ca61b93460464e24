"""Disturb a command (kill it, fill its disk, send it a signal), and check what it leaves."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.scenes import SCENES, UNFINISHED, Stage, find_differences, read_files
from tests.faults.warm import Outcome

SIGNALS = {"SIGINT": int(signal.SIGINT), "SIGTERM": int(signal.SIGTERM)}
# Each at a change to a file, except "moment": a random signal at a random time, with the number as the seed.
WAYS = ("kill", "full", *SIGNALS, "moment")


def list_changes(stage: Stage, scene: str) -> Sequence[str]:
    """Return the changes to files of an undisturbed run."""
    root = stage.set_up(SCENES[scene])
    changes = stage.server.run(SCENES[scene].args, root, watch=True).changes
    shutil.rmtree(root)
    return changes


def select_distinct(changes: Sequence[str]) -> list[int]:
    """Return the numbers of the changes; of a row of equal changes only the first, the middle and the last one."""
    rows: list[list[int]] = []
    for number, change in enumerate(changes):
        if rows and change == changes[rows[-1][-1]]:
            rows[-1].append(number)
        else:
            rows.append([number])
    return [number for row in rows for number in sorted({row[0], row[len(row) // 2], row[-1]})]


def disturb(stage: Stage, scene: str, way: str, number: int) -> list[str]:
    """Disturb a scene's command at a change, then run it again, and return the problems."""
    args, root, expected = SCENES[scene].args, stage.set_up(SCENES[scene]), stage.read_results(scene)
    before = read_files(root)
    outcome = stage.server.run(args, root, **_choose_disturbance(stage, scene, way, number))
    problems = _check_message(outcome, way)
    if outcome.code:
        problems += _check_files(before, read_files(root), expected, killed=way == "kill")
    second = stage.server.run(args, root)
    problems += second.find_problems()
    # An output that was complete when the signal came is not overwritten.
    finished = "exists already" in second.err and not find_differences(read_files(root), expected)
    if second.code and not finished:
        problems.append(f"run again: exit code {second.code}: {second.err}")
    elif differences := find_differences(read_files(root), expected):
        problems.append(f"run again: not as undisturbed: {differences}")
    shutil.rmtree(root)
    return [f"{scene} {way} {number} ({outcome.struck}): {line}\n{outcome.err[-1500:]}" for line in problems]


def _choose_disturbance(stage: Stage, scene: str, way: str, number: int) -> dict[str, object]:
    """Return the arguments of a `Request` for a disturbance."""
    if way == "kill":
        return {"kill_at": number}
    if way == "full":
        return {"full_from": number}
    if way in SIGNALS:
        return {"signal_at": (SIGNALS[way], number)}
    rng = random.Random(f"{scene} {number}")
    return {"signal_after": (rng.choice([*SIGNALS.values()]), rng.uniform(0.01, stage.seconds[scene]))}


def _check_message(outcome: Outcome, way: str) -> list[str]:
    """Return the problems with the exit code and the message of a disturbed run."""
    if way == "kill":
        killed = outcome.struck is None or outcome.code == -signal.SIGKILL
        return [] if killed else [f"killed, yet it ended with {outcome.code}"]
    problems = outcome.find_problems()
    if way == "full" and outcome.code:
        if "no space left" not in outcome.err.lower():
            problems.append(f"says nothing of the full disk: {outcome.err}")
        if not any(name in outcome.err for name in _list_names(outcome)):
            problems.append(f"does not name the file: {outcome.err}")
    if outcome.code not in ((0, 1) if way == "full" else (0, 130, 143)):
        problems.append(f"exit code {outcome.code}: {outcome.err}")
    return problems


def _list_names(outcome: Outcome) -> list[str]:
    """Return the names of the file that did not fit and of its folders, without those of temporary files."""
    parts = Path((outcome.struck or "").split(" ", 1)[1]).parts
    return [part.removeprefix(".").split(".compressknow-")[0] for part in parts]


def _check_files(
    before: Mapping[str, bytes], after: Mapping[str, bytes], expected: Mapping[str, bytes], *, killed: bool
) -> list[str]:
    """Return the problems with the files after a disturbed run: lost, changed, incomplete or left behind."""
    problems = []
    for name, content in before.items():
        if name not in after and not (killed and _is_moved_aside(name, after)):
            problems.append(f"{name} is gone")
        elif after.get(name, content) not in (content, expected.get(name)) and Path(name).name not in UNFINISHED:
            problems.append(f"{name} is neither as it was nor as it becomes")
    for name in after.keys() - before.keys():
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if name not in expected and not hidden:
            problems.append(f"{name} is left behind")
        elif name not in expected and not killed and ".parts" not in name:
            problems.append(f"{name} is left behind by a run that could remove it")
        elif name in expected and after[name] != expected[name] and Path(name).name not in UNFINISHED:
            problems.append(f"{name} is half-made")
    return problems


def _is_moved_aside(name: str, after: Mapping[str, bytes]) -> bool:
    """Return whether a file of the old output has a hidden name, as between the two renames of an overwrite."""
    top, _, path = name.partition("/")
    return any(other.startswith(f".{top}.") and other.partition("/")[2] == path for other in after)
