"""The records of a comparison of two checkpoints, from what is known of each and what was found to differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressknow._version import __version__
from compressknow.diff.records import Difference
from compressknow.report.diff.records import Behaviour, Checkpoint, CheckpointComparison
from compressknow.report.diff.verdict import comparison_verdict, comparison_warnings, names_of


def checkpoint_of(described: Mapping[str, Any], sha256: str) -> Checkpoint:
    """`described` : by `compressknow.engine.identity.describe`."""
    known: dict[str, Any] = {key: described.get(key) for key in Checkpoint.__dataclass_fields__}
    return Checkpoint(**known | {"sha256": sha256})


def make_comparison(
    a: Checkpoint,
    b: Checkpoint,
    difference: Difference | None,
    behaviour: Behaviour | None,
    *,
    files: Sequence[str] = (),
    show_facts: bool = True,
    command: str | None = None,
) -> CheckpointComparison:
    """The whole comparison, with its verdict and its warnings.

    Parameters
    ----------
    difference : of the weights; None where both are the same to the byte, or where they cannot be read.
    behaviour : of the answers; None where nothing was evaluated.
    files : other files that differ.
    """
    identical = a.sha256 == b.sha256
    return CheckpointComparison(
        verdict=comparison_verdict(names_of(a, b), identical, difference, behaviour),
        a=a,
        b=b,
        identical=identical,
        files=tuple(files),
        difference=difference,
        behaviour=behaviour,
        warnings=tuple(comparison_warnings(a, b, identical, difference, behaviour)),
        show_facts=show_facts,
        versions=dict(behaviour.b_against_a.versions) if behaviour else {"compressknow": __version__},
        command=command,
    )
