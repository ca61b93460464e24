"""The answers that a report compares: read from answers folders, or asked of models and kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.errors import CompressknowError
from compressknow.probe.answers import Answers, is_answers_folder, read_answers

if TYPE_CHECKING:
    from compressknow.probe.facts import Probe
    from compressknow.probe.run import Settings
    from compressknow.probe.sources import Options, Task
    from compressknow.quiet import Listener


def default_answers_folder() -> Path:
    """Where answers are kept from one report to the next: ``$XDG_CACHE_HOME/compressknow/answers``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compressknow" / "answers"


def open_named(probes: str | Sequence[str] | None, options: Options | None) -> list[Probe | Task]:
    """The probes that a user names, atlas where none is named. Raises UsageError as `open_all` does, and for twins."""
    from compressknow.probe.run import refuse_twins
    from compressknow.probe.sources import DEFAULT, Options, open_all

    opened = open_all(names_of(probes) or DEFAULT, options or Options())
    refuse_twins(opened)
    return opened


def names_of(probes: str | Sequence[str] | None) -> list[str]:
    """One name, several or none, as a list."""
    return [probes] if isinstance(probes, str) else list(probes or ())


def read_reference(folder: str | Path) -> Answers:
    """The original's answers, to evaluate others by. Raises CompressknowError where they do not tell whose they are."""
    original = read_answers(Path(folder))
    if "sha256" not in original.record["model"]:
        raise CompressknowError(
            f"{folder} does not tell which model gave its answers.", hint="Probe the original again."
        )
    return original


def gather(
    original: str | Path,
    compressed: Sequence[str | Path],
    probes: Sequence[str],
    options: Options,
    settings: Settings,
    *,
    keep_in: Path,
    revision: str | None = None,
    timed: bool = False,
    on_progress: Listener | None = None,
) -> tuple[Answers, list[Answers]]:
    """The original's answers and those of each compressed model, to the same probes.

    Models are asked what `keep_in` does not hold yet, the original first: the others are asked for its most likely
    tokens, so that distributions can be compared. Answers folders are taken as they are.

    Parameters
    ----------
    probes : names; by default those of the answers folders, or atlas.
    keep_in : a folder that gets one answers folder a model.
    revision : of the original, if it is a hub id.
    timed : measure the speed and the memory of each model; of answers folders nothing can be measured.

    Raises CompressknowError where a model cannot be found, loaded or asked.
    """
    stored = [_stored(model) for model in (original, *compressed)]
    if all(answers is not None for answers in stored):
        first, *others = [_of(answers, probes) for answers in stored if answers is not None]
        return first, others
    return _ask(original, compressed, probes, options, settings, stored, keep_in, revision, timed, on_progress)


def _stored(model: str | Path) -> Answers | None:
    """The answers, where `model` is an answers folder."""
    return read_answers(Path(model)) if is_answers_folder(Path(model)) else None


def _ask(
    original: str | Path,
    compressed: Sequence[str | Path],
    probes: Sequence[str],
    options: Options,
    settings: Settings,
    stored: list[Answers | None],
    keep_in: Path,
    revision: str | None,
    timed: bool,
    on_progress: Listener | None,
) -> tuple[Answers, list[Answers]]:
    from compressknow.engine.identity import locate
    from compressknow.probe.distributions import Distributions
    from compressknow.probe.run import Respondent, probe_model
    from compressknow.probe.sources import DEFAULT, open_all
    from compressknow.probe.speed import measure
    from compressknow.quiet import staged

    known = next((answers for answers in stored if answers is not None), None)
    names = list(probes) or (list(known.probes) if known else list(DEFAULT))
    asked = open_all(names, _like(known, options))
    names = [probe.name for probe in asked]
    # All are found before the first is asked: a wrong name is told at once.
    revisions = [revision, *(None for _ in compressed)]
    respondents = [
        None if answers else Respondent(locate(model, of), settings)
        for model, of, answers in zip((original, *compressed), revisions, stored, strict=True)
    ]
    # What is kept of the original's distributions serves models alone that are evaluated beside it.
    beside = respondents[0] if any(respondents[1:]) else None
    gathered: list[Answers] = []
    number, of = 0, sum(respondent is not None for respondent in respondents)
    with Distributions(beside, keep_in) if beside else contextlib.nullcontext() as whole:
        for answers, respondent in zip(stored, respondents, strict=True):
            if respondent is None:
                assert answers is not None
                gathered.append(_of(answers, names))
                continue
            reference = gathered[0] if gathered else None
            folder = folder_of(keep_in, respondent.sha256, reference)
            number += 1
            watched = staged(on_progress, number=number, of=of)
            answers = probe_model(
                respondent, asked, folder, reference=reference, whole=whole, on_progress=watched, wait=True
            )
            respondent.release()
            speed = measure(respondent.located, respondent.settings) if timed else None
            gathered.append(_with_speed(answers, speed) if speed else answers)
    return gathered[0], gathered[1:]


def folder_of(keep_in: Path, sha256: str, reference: Answers | None) -> Path:
    """A folder for each model, and one more for each original whose tokens it was asked for."""
    of = f"-{reference.record['model']['sha256'][:16]}" if reference else ""
    return keep_in / f"{sha256[:16]}{of}"


def _like(known: Answers | None, options: Options) -> Options:
    """The options, with the sample that an answers folder was asked where the user names none."""
    if known is None or options.limit is not None:
        return options
    entry: dict[str, Any] = next(iter(known.record["probes"].values()), {})
    return replace(options, limit=entry.get("limit"), seed=entry.get("seed", options.seed))


def _of(answers: Answers, probes: Sequence[str]) -> Answers:
    """The answers to these probes alone, or to all if none is named."""
    if not probes:
        return answers
    probes = [_name(probe, answers) for probe in probes]
    if missing := [name for name in probes if name not in answers.probes]:
        raise CompressknowError(
            f"{answers.record['model'].get('name')} was not asked {missing[0]}.",
            why=f"Its answers folder holds: {', '.join(answers.probes)}.",
            hint="Leave out -p, name one of these, or probe the model again.",
        )
    kept = {name: answers.record["probes"][name] for name in probes}
    return Answers(dict(answers.record) | {"probes": kept}, tuple(a for a in answers.answers if a.probe in kept))


def _name(probe: str, answers: Answers) -> str:
    """A probe's name as an answers folder has it."""
    from compressknow.probe.sources import name_in_answers

    return probe if probe in answers.probes else name_in_answers(probe)


def _with_speed(answers: Answers, speed: dict[str, Any]) -> Answers:
    record = dict(answers.record)
    return replace(answers, record=record | {"model": {**record["model"], "speed": speed}})
