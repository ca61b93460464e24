"""One model, some probes, one answers folder: what is answered already is not evaluated again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from compressknow._version import __version__
from compressknow.base.errors import DamagedAnswers, OutputError, UsageError
from compressknow.base.progress import Advance, Listener, Stage, Work, report_progress
from compressknow.base.reading import sha256_of
from compressknow.evaluate.answers import (
    RECORD,
    SCHEMA_VERSION,
    TABLE,
    Answer,
    Answers,
    check_counts,
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
from compressknow.evaluate.evaluate import evaluate, first_ids, refuse_other_facts, refuse_other_model, tokens_alike
from compressknow.evaluate.facts import Probe, chance, majority
from compressknow.evaluate.grades import with_examples
from compressknow.evaluate.handle import Beside, ModelHandle
from compressknow.evaluate.records import (
    ALONE,
    NO_ROOM,
    Chunk,
    ModelRecord,
    ProbeEntry,
    Record,
    entry_with_file,
    file_of,
    read_chunks,
    read_texts,
    write_chunks,
)
from compressknow.evaluate.runtimes import RUNTIMES
from compressknow.evaluate.sources import Opened, Task
from compressknow.evaluate.text import RunningText, chunks_of, context_of, entry_of, outcome, read_text

# What parts are made of.
_Part = TypeVar("_Part")
# Answers are put on disk this often: what a killed run has to run again.
SECONDS_BETWEEN_PARTS = 10.0


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
    on_progress : called with each `compressknow.base.progress.Progress`.
    wait : wait for another run that uses the folder, rather than raise OutputError.

    Raises
    ------
    OutputError : the folder holds something else, answers of another model, or is in use by another run.
    CompressknowError : the model or a probe is not the one of the reference; a weight is no number; the model's files
        change meanwhile.
    """
    refuse_twins(probes)
    handle.refuse_tasks(probes)
    handle.check_sound()
    beside = beside or Beside()
    if not handle.runtime.whole_vocabulary:
        beside = replace(beside, whole=None)
    with _kept_in(folder), locked(folder, wait):
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
        return _read(handle, folder, [probe.name for probe in probes])


def is_answered(handle: ModelHandle, probe: Opened, folder: Path, reference: Answers | None) -> bool:
    """Whether `folder` holds this model's answers to this probe, so that `probe_model` would evaluate nothing."""
    return not lacking(handle, [probe], folder, Beside(reference))


def held_answers(
    handle: ModelHandle, probes: Sequence[Opened], folder: Path, reference: Answers | None
) -> Answers | None:
    """This model's answers to these probes, where `folder` holds them all."""
    if lacking(handle, probes, folder, Beside(reference)):
        return None
    return _read(handle, folder, [probe.name for probe in probes])


def lacking(handle: ModelHandle, probes: Sequence[Opened], folder: Path, beside: Beside) -> list[Opened]:
    """The probes to which `folder` holds no answers of this model; with the original's distributions, those too whose
    answers lack a divergence over the whole vocabulary that can be had.
    """
    with _kept_in(folder):
        entries = read_record(folder).probes if is_answers_folder(folder) else {}
    keys = {name: entry.key for name, entry in entries.items()}
    missing = {probe.name for probe in probes if keys.get(probe.name) != _key(handle, probe, beside)}
    whole = beside.whole
    if whole and beside.reference and missing != {probe.name for probe in probes}:
        # Not those of models whose tokens are others: they can have none.
        alike = {name for name, entry in entries.items() if entry.reference == beside.sha256}
        with _kept_in(folder):
            bare = alike & {answer.probe for answer in stored(folder) if answer.first_kl is None}
        bare |= {name for name, entry in entries.items() if entry.text and entry.text["divergence"] in (ALONE, NO_ROOM)}
        possible = (probe for probe in probes if not isinstance(probe, Task) and not whole.of(probe).gave_up)
        missing |= bare & {probe.name for probe in possible}
    return [probe for probe in probes if probe.name in missing]


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """What a run has kept for itself it can make again."""
    try:
        yield
    except DamagedAnswers as error:
        again = f"Remove {folder}, and repeat the command: what was in it is evaluated again."
        raise DamagedAnswers(error.what, error.why, again) from error


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
        with report_progress(self._on_progress, stage) as advance:
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
            self._handle.check_unchanged()
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
            self._handle.check_unchanged()
            write_part(parts, part)
            answers += part
        order = {fact.id: number for number, fact in enumerate(probe.facts)}
        answers = sorted({a.fact_id: a for a in answers}.values(), key=lambda answer: order[answer.fact_id])
        answers = with_examples(prompts.scorer, answers, reference.of(probe.name) if reference else ())
        return answers, facts_entry(probe, answers, prompts.dropped)

    def _keep(self, name: str, answers: Sequence[Answer], entry: ProbeEntry, chunks: Sequence[Chunk]) -> None:
        record, folder = self._record, self._folder
        model = self._handle.record()
        # Nothing is kept of files that are not those that were hashed.
        self._handle.check_unchanged()
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
            model=model,
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
        # Another version may prompt or score otherwise; this one finds answers in quotes, and the sum over all.
        *(SCHEMA_VERSION, __version__, "grades/2", handle.sha256, probe.fingerprint()),
        beside.sha256,
        *(str(settings.device), settings.computed_in, settings.batch_size),
        *handle.runtime.key(),
        *([beside.runtime] if beside.runtime else []),
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _in_parts(batches: Iterable[list[_Part]]) -> Iterator[list[_Part]]:
    """Batches gathered to what is worth a file; also those before an error, or before the user interrupts."""
    part: list[_Part] = []
    since = time.monotonic()
    try:
        for batch in batches:
            part += batch
            if time.monotonic() - since > SECONDS_BETWEEN_PARTS:
                ready, part = part, []
                yield ready
                since = time.monotonic()
    finally:
        if part:
            yield part


def _read(handle: ModelHandle, folder: Path, names: Sequence[str]) -> Answers:
    """The answers to these probes alone; the folder may hold those to others.

    They are kept by the content of the model, which may have another name by now, or another manifest.
    """
    record, located = read_record(folder), handle.located
    model = record.model
    if located.url is None:
        said = handle.described()
        model = replace(model, name=located.name, revision=located.revision, changed=said.get("changed"))
        model = replace(model, source=said.get("source", model.source))
    record = replace(record, model=model, probes={name: record.probes[name] for name in names})
    rows = tuple(answer for answer in stored(folder) if answer.probe in record.probes)
    answers = Answers(record, rows, read_texts(folder, record))
    check_counts(folder, answers)
    return answers


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
