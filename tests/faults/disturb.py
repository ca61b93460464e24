"""What must hold when a command is disturbed: killed, out of disk space, or told to end."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.scenes import ON_THE_WAY, SCENES, Stage, differing, files_of
from tests.faults.warm import Outcome

SIGNALS = {"SIGINT": int(signal.SIGINT), "SIGTERM": int(signal.SIGTERM)}
# At a change to a file; of "moment" the number is the seed of a signal and of when it comes.
WAYS = ("kill", "full", *SIGNALS, "moment")


def changes_of(stage: Stage, scene: str) -> Sequence[str]:
    """The changes to files that an undisturbed run makes."""
    root = stage.set(SCENES[scene])
    changes = stage.server.run(SCENES[scene].args, root, watch=True).changes
    shutil.rmtree(root)
    return changes


def distinct(changes: Sequence[str]) -> list[int]:
    """Numbers of the changes; of a row of writes to one file, only the first, one amid, and the last."""
    rows: list[list[int]] = []
    for number, change in enumerate(changes):
        if rows and change == changes[rows[-1][-1]]:
            rows[-1].append(number)
        else:
            rows.append([number])
    return [number for row in rows for number in sorted({row[0], row[len(row) // 2], row[-1]})]


def disturb(stage: Stage, scene: str, way: str, number: int) -> list[str]:
    """Disturb a scene's command at a change, then run it again; what was wrong, each with where it was disturbed."""
    args, root, end = SCENES[scene].args, stage.set(SCENES[scene]), stage.end_of(scene)
    before = files_of(root)
    outcome = stage.server.run(args, root, **_how(stage, scene, way, number))
    wrong = _message(outcome, way)
    if outcome.code:
        wrong += _half_made(before, files_of(root), end, killed=way == "kill")
    again = stage.server.run(args, root)
    wrong += again.faults()
    # What was whole before a signal came stands there already, and is not overwritten.
    finished = "exists already" in again.err and not differing(files_of(root), end)
    if again.code and not finished:
        wrong.append(f"run again: exit code {again.code}: {again.err}")
    elif different := differing(files_of(root), end):
        wrong.append(f"run again: not as undisturbed: {different}")
    shutil.rmtree(root)
    return [f"{scene} {way} {number} ({outcome.struck}): {line}\n{outcome.err[-1500:]}" for line in wrong]


def _how(stage: Stage, scene: str, way: str, number: int) -> dict[str, object]:
    """What of a `Request` disturbs it so."""
    if way == "kill":
        return {"kill_at": number}
    if way == "full":
        return {"full_from": number}
    if way in SIGNALS:
        return {"signal_at": (SIGNALS[way], number)}
    rng = random.Random(f"{scene} {number}")
    stage.end_of(scene)
    return {"signal_after": (rng.choice([*SIGNALS.values()]), rng.uniform(0.01, stage.seconds[scene]))}


def _message(outcome: Outcome, way: str) -> list[str]:
    """What is wrong with how a disturbed run ended, and with what it said."""
    if way == "kill":
        killed = outcome.struck is None or outcome.code == -signal.SIGKILL
        return [] if killed else [f"killed, yet it ended with {outcome.code}"]
    wrong = outcome.faults()
    if way == "full" and outcome.code:
        if "no space left" not in outcome.err.lower():
            wrong.append(f"says nothing of the full disk: {outcome.err}")
        if not any(name in outcome.err for name in _names(outcome)):
            wrong.append(f"does not name the file: {outcome.err}")
    if outcome.code not in ((0, 1) if way == "full" else (0, 130, 143)):
        wrong.append(f"exit code {outcome.code}: {outcome.err}")
    return wrong


def _names(outcome: Outcome) -> list[str]:
    """What the user calls the file that did not fit, and the folders that it is in."""
    parts = Path((outcome.struck or "").split(" ", 1)[1]).parts
    return [part.removeprefix(".").split(".compressknow-")[0] for part in parts]


def _half_made(
    before: Mapping[str, bytes], after: Mapping[str, bytes], end: Mapping[str, bytes], *, killed: bool
) -> list[str]:
    """Files that a disturbed run must not leave: anything of the user's changed or gone, anything half-made."""
    wrong = []
    for name, content in before.items():
        if name not in after and not (killed and _moved_aside(name, after)):
            wrong.append(f"{name} is gone")
        elif after.get(name, content) not in (content, end.get(name)) and Path(name).name not in ON_THE_WAY:
            wrong.append(f"{name} is neither as it was nor as it becomes")
    for name in after.keys() - before.keys():
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if name not in end and not hidden:
            wrong.append(f"{name} is left behind")
        elif name not in end and not killed and ".parts" not in name:
            wrong.append(f"{name} is left behind by a run that could remove it")
        elif name in end and after[name] != end[name] and Path(name).name not in ON_THE_WAY:
            wrong.append(f"{name} is half-made")
    return wrong


def _moved_aside(name: str, after: Mapping[str, bytes]) -> bool:
    """Between the two renames of an overwrite the old output has a hidden name."""
    top, _, rest = name.partition("/")
    return any(other.startswith(f".{top}.") and other.partition("/")[2] == rest for other in after)
