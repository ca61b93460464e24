"""One model, some probes, one answers folder: what is answered already is not asked again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow._version import __version__
from compressknow.engine.identity import Located, describe, fingerprint
from compressknow.engine.language_model import AUTO, CPU, check_device, device_of
from compressknow.engine.load import reason_of
from compressknow.errors import CheckpointError, OutputError, UsageError
from compressknow.probe.answers import (
    HASH,
    RECORD,
    SCHEMA_VERSION,
    TABLE,
    Answer,
    Answers,
    check_table,
    is_answers_folder,
    locked,
    parts_of,
    read_record,
    stored,
    stored_parts,
    tidy,
    write_part,
    write_record,
    write_table,
)
from compressknow.probe.evaluate import (
    BATCH_SIZE,
    Questions,
    ask,
    first_ids,
    questions_of,
    refuse_other_model,
    refuse_other_questions,
    scorer_for,
)
from compressknow.probe.facts import Probe, chance, majority
from compressknow.probe.sources import Task
from compressknow.quiet import Advance, Listener, PanicError, Stage, begun, no_panics
from compressknow.reading import sha256_of

if TYPE_CHECKING:
    from compressknow.engine.language_model import LanguageModel
    from compressknow.probe.distributions import Distributions
    from compressknow.probe.scoring.scorer import Whole

# Answers are put on disk this often: what a killed run has to ask again.
SECONDS_BETWEEN_PARTS = 10.0


@dataclass(frozen=True)
class Settings:
    """How a model is run. Float32 on the CPU by default, where the batch size shows in the last digits
    alone, if at all; with ``int8-paper`` in more than these (see `compressknow.engine.int8`).

    `device` is ``auto`` (cuda, else mps, else cpu), or one of these by name. Answers of one device are not taken for
    those of another: logits differ in their last digits.
    """

    device: str = AUTO
    dtype: str | None = None
    batch_size: int = BATCH_SIZE
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_device(self.device)

    def here(self) -> Settings:
        """These settings with the device that they mean on this machine; imports torch."""
        return replace(self, device=device_of(self.device))

    @property
    def computed_in(self) -> str:
        return self.dtype or ("float32" if self.device == CPU else "auto")


class Respondent:
    """A model that is asked: found and hashed at once, loaded when the first question comes."""

    def __init__(self, located: Located, settings: Settings) -> None:
        self.located, self._settings = located, settings

    @cached_property
    def settings(self) -> Settings:
        """With the device of this machine. Raises UsageError where it has no such device."""
        return self._settings.here()

    @cached_property
    def sha256(self) -> str:
        return fingerprint(self.located)

    @cached_property
    def loaded(self) -> LanguageModel:
        from compressknow.engine.language_model import load_language_model

        settings = self.settings
        return load_language_model(
            self.located.path,
            device=settings.device,
            dtype=settings.computed_in,
            trust_remote_code=settings.trust_remote_code,
        )

    def questions(self, probe: Probe) -> Questions:
        """The probe's facts as this model can be asked them."""
        loaded = self.loaded
        try:
            with no_panics():
                scorer = scorer_for(loaded.model, loaded.tokenizer, loaded.family, probe)
                return questions_of(scorer, self.settings.batch_size)
        except PanicError as error:
            raise CheckpointError(
                f"The tokenizer of {self.located.name} fails on the facts of {probe.name}.",
                why=reason_of(error),
                hint="See that its tokenizer.json is the model's own, and whole.",
            ) from error

    def release(self) -> None:
        """Let go of the model's memory; it is loaded again if it is asked again."""
        self.__dict__.pop("loaded", None)

    def described(self) -> dict[str, Any]:
        """What the model's files tell of it."""
        return describe(self.located)

    def record(self) -> dict[str, Any]:
        """The "model" entry of ``probe.json``."""
        loaded = self.loaded
        return self.described() | {
            "sha256": self.sha256,
            "architecture": type(loaded.model).__name__,
            "family": loaded.family,
            "parameters": loaded.parameters,
            "vocabulary": loaded.vocabulary,
            "device": str(self.settings.device),
            "computed_in": loaded.dtype,
        }


def probe_model(
    respondent: Respondent,
    probes: Sequence[Probe | Task],
    folder: Path,
    *,
    reference: Answers | None = None,
    known: Answers | None = None,
    whole: Distributions | None = None,
    on_progress: Listener | None = None,
    wait: bool = False,
) -> Answers:
    """Ask a model some probes and keep the answers in `folder`, beside those that it holds already.

    A probe that the folder holds for this very model, these facts and this reference is not asked again; one that was
    cut short resumes.

    Parameters
    ----------
    folder : an answers folder of this model, or a new one.
    reference : answers of the original: the same tokens are asked for at the answer's first position.
    known : answers of this very model to these probes, with another reference: what it answers is taken from there.
    whole : the original's distributions over the whole vocabulary: those of `reference` are compared with this model's;
        without a reference this model is the original, and they are kept.
    on_progress : called with each `compressknow.quiet.Progress`.
    wait : wait for another run that uses the folder, rather than raise OutputError.

    Raises
    ------
    OutputError : the folder holds something else, answers of another model, or is in use by another run.
    CompressknowError : the model or a probe is not the one of the reference.
    """
    refuse_twins(probes)
    with locked(folder, wait):
        record = _record(folder, respondent)
        if whole and reference:
            left = lacking(respondent, probes, folder, reference, whole)
            whole.complete([probe for probe in left if not isinstance(probe, Task)], reference, on_progress)
        for probe in lacking(respondent, probes, folder, reference, whole):
            key = _key(respondent, probe, reference)
            # What lacks a divergence alone is not asked whole again.
            given = _answers(folder, record) if record["probes"].get(probe.name, {}).get("key") == key else known
            stage = Stage("evaluate", respondent.located.name, probe.name, facts_of(probes), respondent.settings.device)
            _ask_one(respondent, probe, stage, folder, record, key, reference, given, whole, on_progress)
        tidy(folder)
        return _read(folder, [probe.name for probe in probes])


def is_answered(respondent: Respondent, probe: Probe | Task, folder: Path, reference: Answers | None) -> bool:
    """Whether `folder` holds this model's answers to this probe, so that `probe_model` would ask nothing."""
    return not lacking(respondent, [probe], folder, reference)


def lacking(
    respondent: Respondent,
    probes: Sequence[Probe | Task],
    folder: Path,
    reference: Answers | None,
    whole: Distributions | None = None,
) -> list[Probe | Task]:
    """The probes to which `folder` holds no answers of this model; with `whole` and a reference, those too whose
    answers lack a divergence over the whole vocabulary that can be had.
    """
    record = read_record(folder) if is_answers_folder(folder) else {"probes": {}}
    keys = {name: entry.get("key") for name, entry in record["probes"].items()}
    missing = {probe.name for probe in probes if keys.get(probe.name) != _key(respondent, probe, reference)}
    if whole and reference and missing != {probe.name for probe in probes}:
        bare = {answer.probe for answer in stored(folder) if answer.first_kl is None}
        possible = (probe for probe in probes if isinstance(probe, Probe) and not whole.of(probe).gave_up)
        missing |= bare & {probe.name for probe in possible}
    return [probe for probe in probes if probe.name in missing]


def facts_of(probes: Sequence[Probe | Task]) -> int:
    """How many facts the probes have; the items of lm-eval's tasks are not known before they are run."""
    return sum(len(probe.facts) for probe in probes if not isinstance(probe, Task))


def refuse_twins(probes: Sequence[Probe | Task]) -> None:
    """Refuse two probes of one name, such as facts files of one name in different folders."""
    names = [probe.name for probe in probes]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"Two probes have the name {twins[0]}.", hint="Name each probe once; give facts files names of their own."
        )


def _ask_one(
    respondent: Respondent,
    probe: Probe | Task,
    stage: Stage,
    folder: Path,
    record: dict[str, Any],
    key: str,
    reference: Answers | None,
    known: Answers | None,
    whole: Distributions | None,
    on_progress: Listener | None,
) -> None:
    """Ask one probe and put its answers and its entry on disk, the answers first."""
    start = time.monotonic()
    if reference:
        refuse_other_questions(reference, probe)
        refuse_other_model(reference, respondent.located.name, respondent.loaded)
    with begun(on_progress, stage) as advance:
        if not isinstance(probe, Task):
            answers, entry = _ask_facts(
                respondent, probe, parts_of(folder, key), reference, known, _told(whole, probe, reference), advance
            )
        elif known:
            # lm-eval gives no distribution: there is nothing to ask anew.
            answers, entry = list(known.of(probe.name)), dict(known.record["probes"][probe.name])
        else:
            answers, entry = probe.run(respondent.loaded)
    others = [a for a in stored(folder) if a.probe != probe.name and a.probe in record["probes"]]
    entry |= {
        "key": key,
        "reference": reference.record["model"]["sha256"] if reference else respondent.sha256,
        "seconds": round(time.monotonic() - start, 1),
    }
    if record["probes"].pop(probe.name, None) or record.pop(HASH, None):
        # Neither the old entry nor the old hash must stand beside the new answers, should this run be killed here.
        record.pop(HASH, None)
        write_record(folder, record)
    write_table(folder / TABLE, [*others, *answers])
    record[HASH] = sha256_of(folder / TABLE)
    record["probes"][probe.name] = entry
    record["model"] = respondent.record()
    write_record(folder, record)


def _ask_facts(
    respondent: Respondent,
    probe: Probe,
    parts: Path,
    reference: Answers | None,
    known: Answers | None,
    whole: Whole | None,
    advance: Advance | None,
) -> tuple[list[Answer], dict[str, Any]]:
    questions = respondent.questions(probe)
    if not questions.asked:
        raise _nothing_left(probe, questions.dropped)
    answers = stored_parts(parts)
    ids = first_ids(reference, probe, questions) if reference else None
    done = frozenset(answer.fact_id for answer in answers)
    given = {answer.fact_id: answer for answer in known.of(probe.name)} if known else None
    for part in _in_parts(ask(questions, reference=ids, done=done, known=given, whole=whole, advance=advance)):
        write_part(parts, part)
        answers += part
    order = {fact.id: number for number, fact in enumerate(probe.facts)}
    answers = sorted({a.fact_id: a for a in answers}.values(), key=lambda answer: order[answer.fact_id])
    return answers, _entry(probe, answers, questions.dropped)


def _told(whole: Distributions | None, probe: Probe, reference: Answers | None) -> Whole | None:
    """What is done with each batch's distributions: the original's are kept, those of others compared with them."""
    if whole is None:
        return None
    rows = whole.of(probe)
    return rows.divergence if reference else rows.keep


def _entry(probe: Probe, answers: Sequence[Answer], dropped: Mapping[str, int]) -> dict[str, Any]:
    asked = {answer.fact_id for answer in answers}
    facts = [fact for fact in probe.facts if fact.id in asked]
    return {
        "protocol": probe.protocol,
        "fingerprint": probe.fingerprint(),
        "facts": probe.read,
        "asked": len(answers),
        "dropped": dict(dropped),
        "average": probe.average,
        "chance": chance(answer.choices for answer in answers),
        "majority": majority(facts, probe.commonest),
        "limit": probe.limit,
        "seed": probe.seed,
        "source": dict(probe.source),
    }


def _nothing_left(probe: Probe, dropped: Mapping[str, int]) -> UsageError:
    reasons = "\n".join(f"{count:,} dropped: {reason}" for reason, count in dropped.items())
    return UsageError(
        f"{probe.name} leaves no fact that this model could be asked.", reasons, "Choose another probe or protocol."
    )


def _key(respondent: Respondent, probe: Probe | Task, reference: Answers | None) -> str:
    """A hash of all that decides the answers: the model, the facts, whose tokens are asked for, and how it is run."""
    settings = respondent.settings
    decides = [
        # Another version may ask or score otherwise.
        *(SCHEMA_VERSION, __version__, respondent.sha256, probe.fingerprint()),
        reference.record["model"]["sha256"] if reference else None,
        *(str(settings.device), settings.computed_in, settings.batch_size),
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _in_parts(batches: Iterator[list[Answer]]) -> Iterator[list[Answer]]:
    """Batches gathered to what is worth a file."""
    part: list[Answer] = []
    since = time.monotonic()
    for batch in batches:
        part += batch
        if time.monotonic() - since > SECONDS_BETWEEN_PARTS:
            yield part
            part, since = [], time.monotonic()
    if part:
        yield part


def _answers(folder: Path, record: Mapping[str, Any]) -> Answers:
    return Answers(dict(record) | {"probes": dict(record["probes"])}, tuple(stored(folder)))


def _read(folder: Path, names: Sequence[str]) -> Answers:
    """The answers to these probes alone; the folder may hold those to others."""
    record = read_record(folder)
    probes = {name: record["probes"][name] for name in names}
    return Answers(record | {"probes": probes}, tuple(a for a in stored(folder) if a.probe in probes))


def _record(folder: Path, respondent: Respondent) -> dict[str, Any]:
    """The record of the folder so far; a new one where there is none."""
    if not (folder / RECORD).is_file():
        return {"schema": SCHEMA_VERSION, "model": {}, "probes": {}, "versions": _versions()}
    record = read_record(folder)
    check_table(folder, record)
    if record["model"].get("sha256") != respondent.sha256:
        raise OutputError(
            f"{folder} holds the answers of another model ({record['model'].get('name')}).",
            why="Or of this one before its files changed.",
            hint="Choose another folder for the answers, or remove that one.",
        )
    return record | {"versions": _versions()}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"compressknow": __version__} | libraries
