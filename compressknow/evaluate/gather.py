"""TODO

A comparison evaluates two models side by side: each on the facts, and each for the probabilities of the other's likely
tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.files import cache_folder
from compressknow.evaluate.answers import Answers, is_answers_folder, read_answers
from compressknow.evaluate.records import FactsInText

if TYPE_CHECKING:
    from compressknow.base.progress import Listener
    from compressknow.engine.identity import Located
    from compressknow.evaluate.distributions import Distributions
    from compressknow.evaluate.handle import Beside, ModelHandle, Settings
    from compressknow.evaluate.sources import Opened, Options


def with_calibration(answers: Answers, model: ModelHandle, known_by: Answers | None) -> Answers:
    """A model's answers, with what its folder says of calibration in their record, and the facts that stand in the text
    if that is at hand. (Kept answers may be those of another folder with the same weights.)

    Parameters
    ----------
    known_by : what the model that it is compared with answered to the same facts; None for the original.
    """
    calibration = model.described().get("calibration")
    found = _found(calibration, model, known_by) if calibration and known_by else None
    said = replace(answers.record.model, calibration=calibration, in_calibration=found)
    return replace(answers, record=replace(answers.record, model=said))


def _found(calibration: Mapping[str, Any], model: ModelHandle, known_by: Answers) -> FactsInText | None:
    from compressknow.compress.calibrate.text import texts_again

    trusted = model.settings.trust_remote_code
    texts = texts_again(model.located.folder, calibration, trust_remote_code=trusted)
    return facts_in_text(texts, known_by) if texts else None


def facts_in_text(texts: Sequence[str], known_by: Answers) -> FactsInText | None:
    """Counted over the facts that have a subject and an object; None where none has."""
    from compressknow.compress.calibrate.text import facts_in

    pairs: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for answer in known_by.answers:
        if answer.sub_label.strip() and answer.gold.strip():
            pairs[answer.correct].append((answer.sub_label, answer.gold))
    known, others = pairs[True], pairs[False]
    if not known and not others:
        return None
    found = facts_in(texts, known)
    return FactsInText(len(known) + len(others), found + facts_in(texts, others), len(known), found)


def default_answers_folder() -> Path:
    """Where answers are kept from one report to the next: ``$XDG_CACHE_HOME/compressknow/answers``."""
    return cache_folder() / "answers"


def open_named(probes: str | Sequence[str] | None, options: Options | None, known: str = "recognized") -> list[Opened]:
    """The probes that a user names, atlas where none is named, to tell what is `known` in this reading.

    Raises UsageError as `open_all` does, for twins, and where what is produced counts and a task does not tell that.
    """
    from compressknow.evaluate.run import refuse_twins
    from compressknow.evaluate.sources import DEFAULT, Options, open_all

    opened = open_all(names_of(probes) or DEFAULT, options or Options())
    refuse_twins(opened)
    _refuse_silent(opened, known)
    return opened


def refuse_texts_alone(opened: Sequence[Opened], what: str) -> None:
    """Raise UsageError where there is nothing but running texts: `what`, such as "A sweep", counts facts."""
    from compressknow.evaluate.text import RunningText

    if all(isinstance(probe, RunningText) for probe in opened):
        raise UsageError(
            f"{what} counts facts, and {opened[0].name} is a text.", hint="Add a probe of facts beside it: -p atlas."
        )


def _refuse_silent(opened: Sequence[Opened], known: str) -> None:
    """Raise UsageError where only what is ``produced`` counts, and one is a task: its answers do not tell what a model
    says."""
    from compressknow.evaluate.grades import PRODUCED
    from compressknow.evaluate.sources import Task

    for task in opened:
        if known == PRODUCED and isinstance(task, Task):
            raise UsageError(
                f"The answers to {task.name} do not tell what a model says: nothing of it can count as produced.",
                hint="Choose probes of facts, such as atlas, or leave out --known produced.",
            )


def names_of(probes: str | Sequence[str] | None) -> list[str]:
    """One name, several or none, as a list."""
    return [probes] if isinstance(probes, str) else list(probes or ())


def read_reference(folder: str | Path) -> Answers:
    """The original's answers, to evaluate others by. Raises CompressknowError where they do not tell whose they are."""
    original = read_answers(Path(folder))
    if original.record.model.sha256 is None:
        raise CompressknowError(
            f"{folder} does not record which model its answers come from.", hint="Probe the original again."
        )
    return original


@dataclass(frozen=True)
class Evaluation:
    """What models are evaluated on, how, and where their answers are kept.

    Attributes
    ----------
    probes : names; by default those of the answers folders, or atlas.
    keep_in : a folder that gets one answers folder per model.
    known : what counts as known, for `gather_early`; see `compressknow.evaluate.grades`.
    timed : measure the speed and the memory of each model; of answers folders nothing can be measured.
    """

    probes: Sequence[str]
    options: Options
    settings: Settings
    keep_in: Path
    timed: bool = False
    known: str = "recognized"


def gather(
    original: str | Path,
    compressed: Sequence[str | Path],
    evaluation: Evaluation,
    *,
    revision: str | None = None,
    on_progress: Listener | None = None,
) -> tuple[Answers, list[Answers]]:
    """The original's answers and those of each compressed model, to the same probes.

    Models are evaluated on what is not kept yet, the original first: the others are asked for its most likely tokens,
    so that distributions can be compared. Answers folders are taken as they are.

    Parameters
    ----------
    revision : of the original, if it is a hub id.

    Raises CompressknowError where a model cannot be found, loaded or evaluated.
    """
    models = [original, *compressed]
    stored = [stored_answers(model) for model in models]
    if all(answers is not None for answers in stored):
        first, *others = [of_probes(answers, evaluation.probes) for answers in stored if answers is not None]
    else:
        first, *others = _Gathering(models, stored, evaluation, revision).run(on_progress)
    return first, others


def stored_answers(model: str | Path) -> Answers | None:
    """The answers, where `model` is an answers folder."""
    return read_answers(Path(model)) if is_answers_folder(Path(model)) else None


class _Gathering:
    """Models, the original first, some of which are answers folders: `stored` holds the answers of these."""

    def __init__(
        self,
        models: Sequence[str | Path],
        stored: Sequence[Answers | None],
        evaluation: Evaluation,
        revision: str | None,
    ) -> None:
        from compressknow.engine.identity import locate

        self._stored, self._evaluation = stored, evaluation
        self._probes = open_like(next((answers for answers in stored if answers is not None), None), evaluation)
        # All are found before the first is evaluated: a wrong name is told at once.
        revisions = [revision, *(None for _ in models[1:])]
        asked = [(model, of) for model, of, answers in zip(models, revisions, stored, strict=True) if not answers]
        located = [locate(model, of) for model, of in asked]
        handles = iter(sound_handles(located, evaluation, self._probes))
        self._handles = [None if answers else next(handles) for answers in stored]

    def run(self, on_progress: Listener | None) -> list[Answers]:
        """The answers of all, in their order."""
        from compressknow.base.progress import relabel_progress
        from compressknow.evaluate.distributions import Distributions
        from compressknow.evaluate.handle import Beside

        first, *others = self._handles
        # What is kept of the original's distributions serves models alone that are evaluated beside it.
        kept_of = first if first and any(others) and first.runtime.whole_vocabulary else None
        names = [probe.name for probe in self._probes]
        gathered: list[Answers] = []
        number, of = 0, sum(handle is not None for handle in self._handles)
        with Distributions(kept_of, self._evaluation.keep_in) if kept_of else contextlib.nullcontext() as whole:
            for answers, handle in zip(self._stored, self._handles, strict=True):
                reference = gathered[0] if gathered else None
                if handle is not None:
                    number += 1
                    watched = relabel_progress(on_progress, number=number, of=of)
                    gathered.append(self._evaluate(handle, Beside(reference, whole=whole), watched))
                elif answers is not None:
                    gathered.append(of_probes(answers, names))
        return gathered

    def _evaluate(self, handle: ModelHandle, beside: Beside, on_progress: Listener | None) -> Answers:
        from compressknow.evaluate.noise import is_wanted, with_noise_floor, with_runtime_noise_floor
        from compressknow.evaluate.run import probe_model

        folder = folder_of(self._evaluation.keep_in, handle, beside)
        answers = probe_model(handle, self._probes, folder, beside, on_progress=on_progress, wait=True)
        if beside.reference is None:
            answers = with_noise_floor(handle, self._probes, answers, folder, on_progress, whole=beside.whole)
            if is_wanted(handle, [*self._stored[1:], *self._handles[1:]]):
                answers = with_runtime_noise_floor(
                    handle, self._probes, answers, folder, on_progress, whole=beside.whole
                )
        return finished(answers, handle, beside.reference, on_progress, timed=self._evaluation.timed)


def sound_handles(located: Sequence[Located], evaluation: Evaluation, probes: Sequence[Opened]) -> list[ModelHandle]:
    """The models to evaluate, hashed. Raises what `handles_of` does, and CheckpointError where a weight of one is no
    number: before the first is evaluated."""
    from compressknow.evaluate.handle import handles_of

    handles = handles_of(located, evaluation.settings, probes, timed=evaluation.timed)
    for handle in handles:
        handle.check_sound()
    return handles


def finished(
    answers: Answers,
    handle: ModelHandle | None,
    reference: Answers | None,
    on_progress: Listener | None,
    *,
    timed: bool,
) -> Answers:
    """The answers of a model that has given them all, with what is found once: facts of its calibration text that they
    are to and, if `timed`, its speed. Stored answers, which have no model beside them, are given back as they are.
    """
    from compressknow.base.progress import Stage, report_progress
    from compressknow.evaluate.speed import measure

    if handle is None:
        return answers
    handle.release()
    answers = with_calibration(answers, handle, reference)
    if not timed:
        return answers
    with report_progress(on_progress, Stage("time", handle.located.name)):
        model = replace(answers.record.model, speed=measure(handle.located, handle.settings))
    return replace(answers, record=replace(answers.record, model=model))


def open_like(known: Answers | None, evaluation: Evaluation) -> list[Opened]:
    """The probes to evaluate: those named, else those of the answers that are at hand, else atlas."""
    from compressknow.evaluate.sources import DEFAULT, open_all

    names = list(evaluation.probes) or (list(known.probes) if known else list(DEFAULT))
    opened = open_all(names, _like(known, evaluation.options))
    _refuse_silent(opened, evaluation.known)
    return opened


def folder_of(keep_in: Path, model: ModelHandle, beside: Beside) -> Path:
    """A folder for each model, and one more for each original whose tokens it was asked for; so for each runtime."""
    of = f"-{(beside.sha256 or '')[:16]}{_suffix(beside.runtime)}" if beside.reference else ""
    return keep_in / f"{model.sha256[:16]}{_suffix(next(iter(model.runtime.key()), None))}{of}"


def _suffix(runtime: str | None) -> str:
    return f"-{runtime}" if runtime else ""


def _like(known: Answers | None, options: Options) -> Options:
    """The options, with the sample that an answers folder was evaluated on where the user names none."""
    if known is None or options.limit is not None:
        return options
    entry = next(iter(known.record.probes.values()), None)
    if entry is None:
        return options
    return replace(options, limit=entry.limit, seed=options.seed if entry.seed is None else entry.seed)


def of_probes(answers: Answers, probes: Sequence[str]) -> Answers:
    """The answers to these probes alone, or to all if none is named."""
    if not probes:
        return answers
    probes = [_name(probe, answers) for probe in probes]
    if missing := [name for name in probes if name not in answers.probes]:
        raise CompressknowError(
            f"{answers.record.model.name} was not evaluated on {missing[0]}.",
            why=f"Its answers folder holds: {', '.join(answers.probes)}.",
            hint="Leave out -p, name one of these, or probe the model again.",
        )
    return answers.only(probes)


def _name(probe: str, answers: Answers) -> str:
    """A probe's name as an answers folder has it."""
    from compressknow.evaluate.sources import name_in_answers

    return probe if probe in answers.probes else name_in_answers(probe)


class Named(NamedTuple):
    """What a user names: a folder or a hub id, and of the latter a revision."""

    model: str | Path
    revision: str | None = None


def find_both(
    a: Named, b: Named, settings: Settings, on_progress: Listener | None = None
) -> tuple[ModelHandle, ModelHandle]:
    """Both checkpoints, found and hashed; a folder that is given twice is hashed once, and is one of them.

    Raises CompressknowError where one is not found, UsageError where it is a folder of answers.
    """
    from compressknow.base.progress import Stage, count_progress, report_progress
    from compressknow.engine.contents import read_contents
    from compressknow.engine.identity import locate
    from compressknow.evaluate.handle import handles_of
    from compressknow.model.checkpoint import build_server_error, is_address

    for named in (a, b):
        if is_address(named.model):
            raise build_server_error(named.model)
        _refuse_answers(Path(named.model))
    first, second = handles_of([locate(*a), locate(*b)], settings)
    if first.located.path.resolve() == second.located.path.resolve():
        return first, first
    total = sum(path.stat().st_size for side in (first, second) for path in side.located.files)
    with (
        report_progress(on_progress, Stage("hash", f"{a.model} and {b.model}")) as advance,
        ThreadPoolExecutor(2) as pool,
    ):
        read = count_progress(advance, total)
        first.contents, second.contents = pool.map(lambda side: read_contents(side.located, read), (first, second))
    return first, second


def _refuse_answers(path: Path) -> None:
    if is_answers_folder(path):
        raise UsageError(
            f"{path} holds answers, no checkpoint.",
            hint="Use `compressknow report` to compare answers, or give the checkpoints that they come from.",
        )


class BothWays(NamedTuple):
    """Answers of `a` and `b`, and of each with the probabilities of the other's most likely tokens."""

    a: Answers
    b_like_a: Answers
    b: Answers
    a_like_b: Answers


def evaluate_both(
    a: ModelHandle,
    b: ModelHandle,
    probes: Sequence[Opened],
    keep_in: Path,
    on_progress: Listener | None = None,
) -> BothWays:
    """Evaluate both models, one in memory at a time: each once for its answers, and once more for what it gives the
    other's tokens. Answers that `keep_in` holds already are not asked for again.

    Raises CompressknowError where a model cannot be loaded or evaluated, or where the two have no vocabulary in common.
    """
    from compressknow.base.progress import relabel_progress
    from compressknow.evaluate.distributions import Distributions
    from compressknow.evaluate.handle import Beside
    from compressknow.evaluate.noise import is_wanted, with_noise_floor, with_runtime_noise_floor
    from compressknow.evaluate.run import probe_model

    def evaluate(
        model: ModelHandle, reference: Answers | None, whole: Distributions | None, known: Answers | None = None
    ) -> Answers:
        beside = Beside(reference, known, whole)
        watched = relabel_progress(on_progress, number=1 if model is a else 2, of=2)
        return probe_model(model, probes, folder_of(keep_in, model, beside), beside, on_progress=watched, wait=True)

    if a.sha256 == b.sha256:
        alone = evaluate(a, None, None)
        a.release()
        return BothWays(alone, alone, alone, alone)
    with Distributions(a, keep_in) as whole_a, Distributions(b, keep_in) as whole_b:
        of_a = evaluate(a, None, whole_a)
        folder = folder_of(keep_in, a, Beside())
        of_a = with_noise_floor(a, probes, of_a, folder, on_progress, whole=whole_a)
        if is_wanted(a, [b]):
            of_a = with_runtime_noise_floor(a, probes, of_a, folder, on_progress, whole=whole_a)
        a.release()
        b_like_a = evaluate(b, of_a, whole_a)
        whole_a.close()
        of_b = evaluate(b, None, whole_b, known=b_like_a)
        b.release()
        a_like_b = evaluate(a, of_b, whole_b, known=of_a)
        a.release()
    of_b = with_calibration(of_b, b, of_a)
    return BothWays(of_a, b_like_a, of_b, a_like_b)
