"""The probes that a user names, read with one set of options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from compressknow.errors import UsageError, did_you_mean
from compressknow.probe.facts import Probe
from compressknow.probe.sources.atlas import atlas
from compressknow.probe.sources.bear import METADATA, bear, is_bear
from compressknow.probe.sources.bear import WHERE_FROM as BEAR_FROM
from compressknow.probe.sources.hub import hub_facts
from compressknow.probe.sources.lama import PROTOCOLS, SETS, holds_set, lama
from compressknow.probe.sources.lama import WHERE_FROM as LAMA_FROM
from compressknow.probe.sources.own_facts import own_facts
from compressknow.probe.sources.task_index import COLUMNS
from compressknow.probe.sources.tasks import Task, open_task

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


_FIXED = ("atlas", *(f"lama:{name}" for name in SETS), "bear")
KNOWN = (*_FIXED, "facts:FILE.jsonl", "hf:DATASET", "lm-eval:TASK")


def open_probe(
    name: str,
    *,
    data: Path | None = None,
    protocol: str = "lama",
    template: int = 1,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
) -> Probe:
    """The probe of that name, one of `KNOWN`; the case of letters does not matter, but in names of files.

    Parameters
    ----------
    data : where downloaded sets lie: the set's own folder, or one that holds `lama/`, `bear/`.
    protocol : how LAMA is asked, `lama` or `paper`; see `compressknow.probe.sources.lama.lama`.
    template : which of a relation's templates asks, counted from 1; `atlas` and `bear` have several.
    limit, seed : at most so many facts, drawn by relation; see `Probe.limited`.
    columns, split : for `hf:` only; see `compressknow.probe.sources.hub.hub_facts`.

    Raises UsageError where the name is unknown or names an lm-eval task, where the set is not there or damaged, where
    there is no such protocol or template, and where no fact is left.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"Unknown protocol {protocol!r}.", hint=f"There is {' and '.join(PROTOCOLS)}.")
    if is_lm_eval(name):
        raise UsageError(f"{name} is a task of lm-eval.", hint="It holds no facts that could be read one by one.")
    probe = _read(name, data, protocol, template, columns or {}, split)
    if not probe.facts:
        reasons = [f"  {count} dropped: {reason}" for reason, count in probe.dropped.items()]
        raise UsageError(f"{probe.name} has no facts left to ask.", "\n".join(reasons) or "It is empty.")
    return probe.limited(limit, seed)


def is_lm_eval(name: str) -> bool:
    """Whether the name is ``lm-eval:TASK``: such a probe is run by lm-eval, not read."""
    return name.lower().startswith("lm-eval:")


def _read(
    name: str, data: Path | None, protocol: str, template: int, columns: Mapping[str, str], split: str | None
) -> Probe:
    kind, _, rest = name.partition(":")
    known = name.lower().replace("_", "-")
    if known == "atlas":
        return atlas(template)
    if known == "bear":
        return bear(_bear_folder(data), template)
    if template != 1:
        raise UsageError(f"{name} has no template {template}.", hint="Only atlas and bear have several templates.")
    if known in _FIXED:
        chosen = known.removeprefix("lama:")
        return lama(_lama_folder(data, chosen), chosen, cast(Literal["lama", "paper"], protocol))
    if kind.lower() == "facts" and rest:
        return own_facts(_facts_file(Path(rest).expanduser()))
    if kind.lower() == "hf" and rest:
        return hub_facts(rest, columns, split)
    raise _unknown(name)


def _facts_file(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"There is no file {path}.", hint="facts: is followed by the path of a file of JSON lines.")
    return path


def _unknown(name: str) -> UsageError:
    return UsageError(f"Unknown probe {name!r}.", hint=f"{_suggestion(name)}There is {', '.join(KNOWN)}.")


def _suggestion(name: str) -> str:
    """What a name without its kind may be meant for."""
    suffix = Path(name).suffix.lower()
    if suffix == ".jsonl":
        return f"Did you mean facts:{name}? "
    if suffix in (".json", ".csv", ".parquet") or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f"Did you mean hf:{name}? "
    if name.lower() in COLUMNS:
        return f"Did you mean lm-eval:{name.lower()}? "
    return did_you_mean(name, _FIXED, cutoff=0.5)


def _lama_folder(data: Path | None, name: str) -> Path:
    url = f"{LAMA_FROM} (unpacked, it holds TREx/, Google_RE/, Squad/ and ConceptNet/)"
    return _folder(data, ("lama", "LAMA", "data"), lambda folder: holds_set(folder, name), f"lama:{name}", url)


def _bear_folder(data: Path | None) -> Path:
    return _folder(data, ("bear", "BEAR"), is_bear, "bear", f"{BEAR_FROM}: the folder with {METADATA}")


def _folder(data: Path | None, names: tuple[str, ...], holds: Callable[[Path], bool], probe: str, source: str) -> Path:
    """The folder of a set: `data` itself or one of that name in it."""
    places = [data, *(data / name for name in names)] if data else []
    for place in places:
        if holds(place):
            return place
    raise UsageError(
        f"{data} does not hold {probe}." if data else f"{probe} does not come with compressknow.",
        f"It can be had from {source}.",
        f"Put it into DIR/{names[0]} and say --data DIR.",
    )
