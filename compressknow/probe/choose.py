"""The probes that a user names, read with one set of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compressknow.errors import UsageError
from compressknow.probe.facts import Probe
from compressknow.probe.open import is_lm_eval, open_probe
from compressknow.probe.tasks import Task, open_task

DEFAULT = ("atlas",)


@dataclass(frozen=True)
class Options:
    """How probes are read; each applies to the probes that know it.

    Attributes
    ----------
    data : where downloaded sets lie: the set's own folder, or one that holds `lama/`, `bear/`, `tasks/`.
    protocol : of LAMA: ``lama`` or ``paper``.
    template : which of a relation's templates asks, from 1 (atlas, BEAR).
    limit, seed : a sample of at most so many facts a probe; of lm-eval's tasks the first so many items.
    columns, split : of ``hf:`` data sets.
    tasks : a folder of lm-eval tasks of the user's own.
    """

    data: Path | None = None
    protocol: str = "lama"
    template: int = 1
    limit: int | None = None
    seed: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    tasks: Path | None = None


def open_all(names: Sequence[str], options: Options) -> list[Probe | Task]:
    """The probes of these names, in their order. Raises UsageError for one that is unknown, missing or empty."""
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit must be at least 1: {options.limit}.")
    return [_open(name, options) for name in names]


def _open(name: str, options: Options) -> Probe | Task:
    if is_lm_eval(name):
        return open_task(name, data=options.data, include=options.tasks, limit=options.limit, seed=options.seed)
    several = name.lower() in ("atlas", "bear")
    return open_probe(
        name,
        data=options.data,
        protocol=options.protocol,
        # One option for all probes: those with one template have no other.
        template=options.template if several else 1,
        limit=options.limit,
        seed=options.seed,
        columns=options.columns,
        split=options.split,
    )
