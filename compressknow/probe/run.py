"""One model, some probes, one answers folder: what is answered already is not evaluated again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compressknow._version import __version__
from compressknow.engine.identity import Located, describe
from compressknow.engine.language_model import AUTO, CPU, check_device, device_of
from compressknow.engine.load import reason_of
from compressknow.errors import CheckpointError, OutputError, UnsupportedError, UsageError, did_you_mean
from compressknow.probe.answers import (
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
    Prompts,
    evaluate,
    first_ids,
    prompts_of,
    refuse_other_facts,
    refuse_other_model,
    tokens_alike,
)
from compressknow.probe.examples import with_examples
from compressknow.probe.facts import Probe, chance, majority
from compressknow.probe.records import ModelRecord, ProbeEntry, Record
from compressknow.probe.runtimes import RUNTIMES, Loaded, Runtime, runtime_for
from compressknow.probe.sources import Opened, Task
from compressknow.probe.text.evaluate import chunks_of, context_of, entry_of, outcome, read_text, refuse_other_families
from compressknow.probe.text.records import (
    ALONE,
    NO_ROOM,
    Chunk,
    entry_with_file,
    file_of,
    read_chunks,
    read_texts,
    write_chunks,
)
from compressknow.probe.text.running import RunningText
from compressknow.quiet import Advance, Listener, PanicError, Stage, Work, begun, no_panics
from compressknow.reading import sha256_of

if TYPE_CHECKING:
    from compressknow.probe.distributions import Distributions
    from compressknow.probe.scoring.scorer import Whole
    from compressknow.probe.text.reading import TextReader

# What parts are made of.
_Part = TypeVar("_Part")
# Answers are put on disk this often: what a killed run has to run again.
SECONDS_BETWEEN_PARTS = 10.0


@dataclass(frozen=True)
class Settings:
    """How a model is run. Float32 on the CPU by default, where the batch size shows in the last digits
    alone, if at all; with ``int8-paper`` in more than these (see `compressknow.engine.int8`).

    `device` is ``auto`` (cuda, else mps, else cpu), or one of these by name. Answers of one device are not taken for
    those of another: logits differ in their last digits. `runtime` is the name of what runs the model; by default
    what is meant for it (see `compressknow.probe.runtimes`). `noise_floor` has an original answer some facts in another
    precision too (see `compressknow.probe.noise`).

    `model`, `parallel` and `timeout` are for servers: the model's name there, requests at a time, seconds to wait.
    """

    device: str = AUTO
    dtype: str | None = None
    batch_size: int = BATCH_SIZE
    trust_remote_code: bool = False
    runtime: str | None = None
    model: str | None = None
    parallel: int = 4
    timeout: float = 120.0
    noise_floor: bool = True

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.parallel < 1 or not self.timeout > 0:
            raise UsageError(f"--parallel and --timeout must be above 0: {self.parallel}, {self.timeout:g}.")
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise UsageError(
                f"There is no runtime {self.runtime!r}.",
                hint=f"{did_you_mean(self.runtime, RUNTIMES)}There is {', '.join(RUNTIMES)}.",
            )

    def here(self) -> Settings:
        """These settings with the device that they mean on this machine; imports torch."""
        return replace(self, device=device_of(self.device))

    @property
    def computed_in(self) -> str:
        return self.dtype or ("float32" if self.device == CPU else "auto")


class ModelHandle:
    """A model located and hashed at once, and loaded on demand."""

    def __init__(self, located: Located, settings: Settings) -> None:
        self.located, self._settings = located, settings

    @cached_property
    def runtime(self) -> Runtime:
        """What runs it. Raises UsageError where the settings name one that does not."""
        return runtime_for(self.located, self._settings.runtime)

    @cached_property
    def settings(self) -> Settings:
        """With the device of this machine. Raises UsageError where it has no such device."""
        return self.runtime.settled(self._settings)

    @property
    def where(self) -> str:
        """Where it computes."""
        return self.runtime.where(self.located, self.settings)

    @cached_property
    def sha256(self) -> str:
        return self.runtime.fingerprint(self.located, self.settings)

    @cached_property
    def loaded(self) -> Loaded:
        return self.runtime.open(self.located, self.settings)

    def prompts(self, probe: Probe) -> Prompts:
        """The probe's facts as this model reads them."""
        loaded = self.loaded
        try:
            with no_panics():
                return prompts_of(loaded.scorer(probe), self.settings.batch_size)
        except PanicError as error:
            raise CheckpointError(
                f"The tokenizer of {self.located.name} fails on the facts of {probe.name}.",
                why=reason_of(error),
                hint="See that its tokenizer.json is the model's own, and whole.",
            ) from error

    def reader(self) -> TextReader:
        """The model as it reads running text. Raises UnsupportedError where it does not continue text, or where its
        runtime does not give the probabilities of all tokens.
        """
        refuse_other_families(self.loaded.architecture, self.loaded.family)
        return self.loaded.reader()

    def release(self) -> None:
        """Let go of the model's memory; it is loaded again on demand."""
        loaded = self.__dict__.pop("loaded", None)
        if loaded is not None:
            loaded.release()

    def refuse_tasks(self, probes: Sequence[Opened]) -> None:
        """Raise UnsupportedError where there is a task among the probes, and no runtime of tasks runs the model."""
        task = next((probe for probe in probes if isinstance(probe, Task)), None)
        if task is None or self.runtime.runs_tasks:
            return
        raise UnsupportedError(
            f"{task.name} cannot evaluate {self.located.name} in {self.runtime.name}.",
            why="Tasks are run by lm-eval, on models of transformers.",
            hint="Choose probes of facts; or, for a GGUF file, pass --runtime transformers.",
        )

    def in_another_precision(self) -> ModelHandle | None:
        """The same model in bfloat16 or, where it is run in less than float32, in that; None where what runs it has one
        precision.
        """
        if not self.runtime.has_precisions:
            return None
        dtype = "bfloat16" if self.settings.computed_in == "float32" else "float32"
        other = ModelHandle(self.located, replace(self.settings, dtype=dtype))
        other.sha256 = self.sha256
        return other

    def described(self) -> dict[str, Any]:
        """What the model's files tell of it."""
        return describe(self.located)

    def record(self) -> ModelRecord:
        """The "model" entry of ``probe.json``."""
        loaded = self.loaded
        evaluated: dict[str, Any] = {
            "sha256": self.sha256,
            "architecture": loaded.architecture,
            "family": loaded.family,
            "parameters": loaded.parameters,
            "vocabulary": loaded.vocabulary,
            "device": self.where,
            "computed_in": loaded.computed_in,
        }
        if runtime := loaded.record():
            evaluated["runtime"] = runtime
        known = {key: value for key, value in evaluated.items() if value is not None}
        return ModelRecord.from_dict(self.described() | dict(loaded.described()) | known)


def handles_of(located: Sequence[Located], settings: Settings) -> list[ModelHandle]:
    """Several models that are set side by side: where the settings name a runtime, it runs those that it reads, and the
    others run as if none was named.

    Raises UsageError where it reads none of them, CompressknowError where a server does not answer: before any model is
    evaluated.
    """
    handles = [ModelHandle(each, own) for each, own in zip(located, _settings_of(located, settings), strict=True)]
    for handle in handles:
        if handle.located.url is not None:
            # Found by what it answers.
            _ = handle.sha256
    return handles


def _settings_of(located: Sequence[Located], settings: Settings) -> list[Settings]:
    named = settings.runtime
    if named is None:
        return [settings] * len(located)
    read = [RUNTIMES[named].reads(each) for each in located]
    if located and not any(read):
        runtime_for(located[-1], named)
    unnamed = replace(settings, runtime=None)
    return [settings if reads else unnamed for reads in read]


@dataclass(frozen=True)
class Beside:
    """What the answers of a model stand beside.

    Attributes
    ----------
    reference : answers of the original: the same tokens are evaluated at the answer's first position.
    known : answers of this very model to these probes, with another reference: what it answers is taken from there.
    whole : the original's distributions over the whole vocabulary: those of `reference` are compared with this model's;
        without a reference this model is the original, and they are kept.
    """

    reference: Answers | None = None
    known: Answers | None = None
    whole: Distributions | None = None

    @property
    def sha256(self) -> str | None:
        """Of the original; None where this model is the original."""
        return self.reference.record.model.sha256 if self.reference else None

    @property
    def runtime(self) -> str | None:
        """What ran the original where that was not transformers."""
        ran = self.reference.record.model.runtime if self.reference else None
        return str(ran["name"]) if ran else None

    def of_batches(self, probe: Probe | RunningText) -> Whole | None:
        """What is done with each batch's distributions: the original's are kept, those of others compared with them."""
        if self.whole is None:
            return None
        rows = self.whole.of(probe)
        return rows.divergence if self.reference else rows.keep


def probe_model(
    handle: ModelHandle,
    probes: Sequence[Opened],
    folder: Path,
    beside: Beside | None = None,
    *,
    on_progress: Listener | None = None,
    wait: bool = False,
) -> Answers:
    """Evaluate a model on some probes and keep the answers in `folder`, beside those that it holds already.

    A probe that the folder holds for this very model, these facts and this reference is not evaluated again; one that
    was cut short resumes.

    Parameters
    ----------
    folder : an answers folder of this model, or a new one.
    beside : the original's answers, and what else is known; by default this model is the original.
    on_progress : called with each `compressknow.quiet.Progress`.
    wait : wait for another run that uses the folder, rather than raise OutputError.

    Raises
    ------
    OutputError : the folder holds something else, answers of another model, or is in use by another run.
    CompressknowError : the model or a probe is not the one of the reference.
    """
    refuse_twins(probes)
    handle.refuse_tasks(probes)
    beside = beside or Beside()
    if not handle.runtime.whole_vocabulary:
        beside = replace(beside, whole=None)
    with locked(folder, wait):
        run = _Run(handle, folder, beside, on_progress)
        if beside.whole and beside.reference:
            left = lacking(handle, probes, folder, beside)
            beside.whole.complete(left, beside.reference, on_progress)
        lacked = lacking(handle, probes, folder, beside)
        if any(isinstance(probe, RunningText) for probe in lacked):
            # A model that cannot read it is refused before it is evaluated on all else.
            handle.reader()
        for probe in lacked:
            run.add(probe, facts_of(probes))
        tidy(folder)
        return _read(folder, [probe.name for probe in probes])


def is_answered(handle: ModelHandle, probe: Opened, folder: Path, reference: Answers | None) -> bool:
    """Whether `folder` holds this model's answers to this probe, so that `probe_model` would evaluate nothing."""
    return not lacking(handle, [probe], folder, Beside(reference))


def held_answers(
    handle: ModelHandle, probes: Sequence[Opened], folder: Path, reference: Answers | None
) -> Answers | None:
    """This model's answers to these probes, where `folder` holds them all."""
    if lacking(handle, probes, folder, Beside(reference)):
        return None
    return _read(folder, [probe.name for probe in probes])


def lacking(handle: ModelHandle, probes: Sequence[Opened], folder: Path, beside: Beside) -> list[Opened]:
    """The probes to which `folder` holds no answers of this model; with the original's distributions, those too whose
    answers lack a divergence over the whole vocabulary that can be had.
    """
    entries = read_record(folder).probes if is_answers_folder(folder) else {}
    keys = {name: entry.key for name, entry in entries.items()}
    missing = {probe.name for probe in probes if keys.get(probe.name) != _key(handle, probe, beside)}
    whole = beside.whole
    if whole and beside.reference and missing != {probe.name for probe in probes}:
        # Not those of models whose tokens are others: they can have none.
        alike = {name for name, entry in entries.items() if entry.reference == beside.sha256}
        bare = alike & {answer.probe for answer in stored(folder) if answer.first_kl is None}
        bare |= {name for name, entry in entries.items() if entry.text and entry.text["divergence"] in (ALONE, NO_ROOM)}
        possible = (probe for probe in probes if not isinstance(probe, Task) and not whole.of(probe).gave_up)
        missing |= bare & {probe.name for probe in possible}
    return [probe for probe in probes if probe.name in missing]


def facts_of(probes: Sequence[Opened]) -> int:
    """How many facts the probes have; the items of lm-eval's tasks are not known before they are run, and texts
    have none."""
    return sum(len(probe.facts) for probe in probes if isinstance(probe, Probe))


def refuse_twins(probes: Sequence[Opened]) -> None:
    """Refuse two probes of one name, such as facts files of one name in different folders."""
    names = [probe.name for probe in probes]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"Two probes have the name {twins[0]}.", hint="Name each probe once; give facts files names of their own."
        )


class _Run:
    """A run of one model: each probe's answers and its entry go into the folder, the answers first."""

    def __init__(self, handle: ModelHandle, folder: Path, beside: Beside, on_progress: Listener | None) -> None:
        self._handle, self._folder, self._beside, self._on_progress = handle, folder, beside, on_progress
        self._record = _record(folder, handle)

    def add(self, probe: Opened, facts: int) -> None:
        """Evaluate the model on a probe; `facts` are those of all probes, for the time that is left."""
        start = time.monotonic()
        handle, reference = self._handle, self._beside.reference
        if reference:
            refuse_other_facts(reference, probe)
            if not isinstance(probe, RunningText):
                refuse_other_model(reference, handle.located.name, handle.loaded)
        alike = reference is None or tokens_alike(reference, handle.loaded)
        key = _key(handle, probe, self._beside)
        known = self._known(probe.name, key)
        work: Work = "read" if isinstance(probe, RunningText) else "evaluate"
        stage = Stage(work, handle.located.name, probe.name, facts, handle.where)
        chunks: tuple[Chunk, ...] = ()
        answers: list[Answer] = []
        with begun(self._on_progress, stage) as advance:
            if isinstance(probe, Probe):
                beside = self._beside if alike else Beside()
                answers, entry = self._evaluate(probe, parts_of(self._folder, key), known, beside, advance)
            elif isinstance(probe, RunningText):
                chunks, entry = self._read(probe, parts_of(self._folder, key), known, advance)
            elif known:
                # A task gives no distribution: there is nothing to evaluate anew.
                answers, entry = list(known.of(probe.name)), known.record.probes[probe.name]
            else:
                assert handle.loaded.language_model is not None
                answers, entry = probe.run(handle.loaded.language_model)
        seconds = round(time.monotonic() - start, 1)
        of = (self._beside.sha256 if alike or chunks else None) or handle.sha256
        self._keep(probe.name, answers, replace(entry, key=key, reference=of, seconds=seconds), chunks)

    def _known(self, name: str, key: str) -> Answers | None:
        """Answers of this model to the probe that lack a divergence alone: they are not evaluated whole again."""
        entry = self._record.probes.get(name)
        if entry is None or entry.key != key:
            return self._beside.known
        return Answers(self._record, tuple(stored(self._folder)), read_texts(self._folder, self._record))

    def _read(
        self, text: RunningText, parts: Path, known: Answers | None, advance: Advance | None
    ) -> tuple[tuple[Chunk, ...], ProbeEntry]:
        reader, beside = self._handle.reader(), self._beside
        original = beside.reference.record if beside.reference else None
        chunks = chunks_of(reader, text, context_of(reader, text, original.probes[text.name] if original else None))
        same_tokens = original is None or original.model.vocabulary in (None, self._handle.loaded.vocabulary)
        whole = beside.of_batches(text) if same_tokens else None
        read = {chunk.number: chunk for path in sorted(parts.glob("*.parquet")) for chunk in read_chunks(path)}
        if original and whole:
            read = {number: chunk for number, chunk in read.items() if chunk.kl is not None}
        fresh = read_text(
            reader,
            chunks,
            done=read,
            known={chunk.number: chunk for chunk in known.texts.get(text.name, ())} if known else None,
            whole=whole,
            advance=advance,
        )
        for part in _in_parts([chunk] for chunk in fresh):
            parts.mkdir(parents=True, exist_ok=True)
            write_chunks(parts / f"{len(read):08}.parquet", part)
            read |= {chunk.number: chunk for chunk in part}
        all_read = tuple(read[number] for number in sorted(read))
        gave_up = beside.whole.of(text).gave_up if beside.whole else None
        compared = outcome(all_read, reference=original is not None, same_tokens=same_tokens, gave_up=gave_up)
        return all_read, entry_of(text, chunks, all_read, compared)

    def _evaluate(
        self, probe: Probe, parts: Path, known: Answers | None, beside: Beside, advance: Advance | None
    ) -> tuple[list[Answer], ProbeEntry]:
        prompts = self._handle.prompts(probe)
        if not prompts.total:
            raise _nothing_left(probe, prompts.dropped)
        answers, reference = stored_parts(parts), beside.reference
        batches = evaluate(
            prompts,
            reference=first_ids(reference, probe, prompts) if reference else None,
            done=frozenset(answer.fact_id for answer in answers),
            known={answer.fact_id: answer for answer in known.of(probe.name)} if known else None,
            whole=beside.of_batches(probe),
            advance=advance,
        )
        for part in _in_parts(batches):
            write_part(parts, part)
            answers += part
        order = {fact.id: number for number, fact in enumerate(probe.facts)}
        answers = sorted({a.fact_id: a for a in answers}.values(), key=lambda answer: order[answer.fact_id])
        answers = with_examples(prompts.scorer, answers, reference.of(probe.name) if reference else ())
        return answers, facts_entry(probe, answers, prompts.dropped)

    def _keep(self, name: str, answers: Sequence[Answer], entry: ProbeEntry, chunks: Sequence[Chunk]) -> None:
        record, folder = self._record, self._folder
        others = [a for a in stored(folder) if a.probe != name and a.probe in record.probes]
        probes = {other: kept for other, kept in record.probes.items() if other != name}
        if name in record.probes or record.answers_sha256 is not None:
            # Neither the old entry nor the old hash must stand beside the new answers, should this run be killed here.
            write_record(folder, record.without_hash(probes))
        if chunks:
            write_chunks(folder / file_of(name), chunks)
            entry = entry_with_file(entry, folder / file_of(name))
        write_table(folder / TABLE, [*others, *answers])
        self._record = replace(
            record.without_hash(probes | {name: entry}),
            model=self._handle.record(),
            answers_sha256=sha256_of(folder / TABLE),
        )
        write_record(folder, self._record)


def facts_entry(probe: Probe, answers: Sequence[Answer], dropped: Mapping[str, int]) -> ProbeEntry:
    """The entry in ``probe.json`` of a probe that was answered so."""
    evaluated = {answer.fact_id for answer in answers}
    facts = [fact for fact in probe.facts if fact.id in evaluated]
    return ProbeEntry(
        protocol=probe.protocol,
        fingerprint=probe.fingerprint(),
        facts=probe.read,
        asked=len(answers),
        dropped=dict(dropped),
        average=probe.average,
        chance=chance(answer.choices for answer in answers),
        majority=majority(facts, probe.most_frequent),
        limit=probe.limit,
        seed=probe.seed,
        templates=probe.templates,
        source=dict(probe.source),
    )


def _nothing_left(probe: Probe, dropped: Mapping[str, int]) -> UsageError:
    reasons = "\n".join(f"{count:,} dropped: {reason}" for reason, count in dropped.items())
    return UsageError(
        f"{probe.name} has no fact that this model can be evaluated on.", reasons, "Choose another probe or protocol."
    )


def _key(handle: ModelHandle, probe: Opened, beside: Beside) -> str:
    """A hash of all that decides the answers: the model, the facts, whose tokens are asked for, and how it is run."""
    settings = handle.settings
    decides = [
        # Another version may prompt or score otherwise; this one gives grades.
        *(SCHEMA_VERSION, __version__, "grades", handle.sha256, probe.fingerprint()),
        beside.sha256,
        *(str(settings.device), settings.computed_in, settings.batch_size),
        *handle.runtime.key(),
        *([beside.runtime] if beside.runtime else []),
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _in_parts(batches: Iterable[list[_Part]]) -> Iterator[list[_Part]]:
    """Batches gathered to what is worth a file."""
    part: list[_Part] = []
    since = time.monotonic()
    for batch in batches:
        part += batch
        if time.monotonic() - since > SECONDS_BETWEEN_PARTS:
            yield part
            part, since = [], time.monotonic()
    if part:
        yield part


def _read(folder: Path, names: Sequence[str]) -> Answers:
    """The answers to these probes alone; the folder may hold those to others."""
    record = read_record(folder)
    record = replace(record, probes={name: record.probes[name] for name in names})
    answers = tuple(answer for answer in stored(folder) if answer.probe in record.probes)
    return Answers(record, answers, read_texts(folder, record))


def _record(folder: Path, handle: ModelHandle) -> Record:
    """The record of the folder so far; a new one where there is none."""
    if not (folder / RECORD).is_file():
        model = ModelRecord(name=handle.located.name)
        return Record(schema=SCHEMA_VERSION, model=model, probes={}, versions=_versions())
    record = read_record(folder)
    check_table(folder, record)
    if record.model.sha256 != handle.sha256:
        raise OutputError(
            f"{folder} holds the answers of another model ({record.model.name}).",
            why="Or the model's files have changed since then.",
            hint="Choose another folder for the answers, or remove that one.",
        )
    ran_in = (record.model.runtime or {}).get("name", RUNTIMES.first)
    if record.probes and ran_in != handle.runtime.name:
        raise OutputError(
            f"{folder} holds answers that {record.model.name} gave in {ran_in}, not in {handle.runtime.name}.",
            hint=f"Choose another folder for the answers, or pass --runtime {ran_in}.",
        )
    return replace(record, versions=_versions())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"compressknow": __version__} | libraries
