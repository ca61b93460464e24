"""Evaluate a model on probes into an answers folder, without repeating what that already contains."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from compressknow._version import __version__
from compressknow.base.errors import DamagedAnswers, OutputError, UsageError
from compressknow.base.progress import Advance, Listener, Stage, Work, report_progress
from compressknow.base.reading import compute_sha256, hash_json
from compressknow.evaluate.answers import (
    PARTS,
    RECORD,
    SCHEMA_VERSION,
    TABLE,
    Answer,
    Answers,
    check_table,
    gather_answers,
    is_answers_folder,
    lock_folder,
    read_record,
    read_stored,
    read_table,
    write_record,
    write_table,
)
from compressknow.evaluate.distributions import Context
from compressknow.evaluate.evaluate import (
    add_examples,
    check_facts,
    check_model,
    evaluate,
    find_first_ids,
    has_same_tokens,
)
from compressknow.evaluate.facts import Probe, compute_chance, compute_majority
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.records import (
    ALONE,
    NO_ROOM,
    Chunk,
    ModelRecord,
    ProbeEntry,
    Record,
    name_text_file,
    read_chunks,
    read_texts,
    write_chunks,
)
from compressknow.evaluate.runtimes import TRANSFORMERS
from compressknow.evaluate.sources import Opened, Task
from compressknow.evaluate.text import RunningText, TextChunks, describe_divergence

# Answers or chunks.
_Part = TypeVar("_Part")
# Answers are saved this often: a killed run loses no more.
SECONDS_BETWEEN_PARTS = 10.0


def probe_model(
    handle: ModelHandle,
    probes: Sequence[Opened],
    folder: Path,
    context: Context,
    *,
    on_progress: Listener | None = None,
    wait: bool = False,
    overwrite: bool = True,
) -> Answers:
    """Evaluate a model on probes, and add the answers to those that `folder` already has.

    A probe is not evaluated again if the folder has answers for the same model, facts and reference; a stopped
    evaluation resumes. `wait` waits for another run that uses the folder; `overwrite` replaces answers to the same
    probes that are to other facts, or were made with other settings.

    Raises OutputError if the folder has foreign files, answers of another model or answers that may not be replaced, or
    is in use by another run; CompressknowError if the model or a probe does not match the reference, a weight is NaN or
    infinite, or the model's files change during the run."""
    check_unique(probes)
    handle.check_tasks(probes)
    handle.check_sound(on_progress)
    if handle.located.url is not None:
        # Servers are too slow for distributions over all tokens.
        context = replace(context, distributions=None)
    # A folder of answers that cannot be written, such as a shared one, can still be read.
    if not os.access(folder, os.W_OK) and (stored := find_answers(handle, probes, folder, context.reference)):
        return stored
    with _explain_damage(folder), lock_folder(folder, wait):
        run = _Run(handle, folder, context, on_progress)
        if not overwrite:
            run.check_replaces_none(probes)
        missing = find_missing(handle, probes, folder, context)
        if missing and context.distributions and context.reference:
            context.distributions.complete(missing, context.reference, on_progress)
            # The disk may have been too full for some distributions, which are not missing then.
            missing = find_missing(handle, probes, folder, context)
        if any(isinstance(probe, RunningText) for probe in missing):
            # Fail before evaluating anything else if the model cannot read text.
            handle.make_reader()
        for probe in missing[1:]:
            # Likewise if a task's data is not available; it was for compressed models, if it was for the original.
            if isinstance(probe, Task) and context.reference is None:
                probe.check_data()
        for probe in missing:
            run.add(probe, count_facts(probes))
        # Remove the parts of these probes only: runs on other facts, or with other settings, resume from their own.
        for probe in probes:
            shutil.rmtree(_name_parts(folder, _compute_key(handle, probe, context)), ignore_errors=True)
        with suppress(OSError):
            (folder / PARTS).rmdir()
        run.update_labels(probes)
        return _read_folder(handle, folder, probes)


def find_answers(
    handle: ModelHandle, probes: Sequence[Opened], folder: Path, reference: Answers | None
) -> Answers | None:
    """Return this model's answers to these probes; None if `folder` lacks any of them."""
    if find_missing(handle, probes, folder, Context(reference)):
        return None
    with _explain_damage(folder):
        check_table(folder, read_record(folder))
        answers = _read_folder(handle, folder, probes)
    return replace(answers, answers=tuple(_label(answers.answers, probes)))


def find_missing(handle: ModelHandle, probes: Sequence[Opened], folder: Path, context: Context) -> list[Opened]:
    """Return the probes that `folder` lacks answers to; with the original's distributions, also those whose answers
    lack a divergence over the whole vocabulary that can be computed."""
    with _explain_damage(folder):
        entries = read_record(folder).probes if is_answers_folder(folder) else {}
    keys = {name: entry.key for name, entry in entries.items()}
    missing = {probe.name for probe in probes if keys.get(probe.name) != _compute_key(handle, probe, context)}
    distributions = context.distributions
    if distributions and context.reference and missing != {probe.name for probe in probes}:
        # Probes whose reference is this model have no divergences, as its tokens differ from the original's.
        same_tokens = {name for name, entry in entries.items() if entry.reference == context.sha256}
        with _explain_damage(folder):
            without = same_tokens & {answer.probe for answer in read_stored(folder) if answer.first_kl is None}
        texts = {name: entry.text["divergence"] for name, entry in entries.items() if entry.text}
        without |= {name for name, divergence in texts.items() if divergence in (ALONE, NO_ROOM)}
        measurable = (probe for probe in probes if not isinstance(probe, Task))
        missing |= without & {probe.name for probe in measurable if not distributions.find_rows(probe).gave_up}
    return [probe for probe in probes if probe.name in missing]


@contextmanager
def _explain_damage(folder: Path) -> Iterator[None]:
    """Add to errors about damaged answers that they can be computed again."""
    try:
        yield
    except DamagedAnswers as error:
        hint = f"Remove {folder}, and repeat the command, which evaluates its contents again."
        raise DamagedAnswers(error.what, error.why, hint) from error


def count_facts(probes: Sequence[Opened]) -> int:
    """Count the facts of the probes, without tasks, whose items are not known yet, and texts, which have none."""
    return sum(len(probe.facts) for probe in probes if isinstance(probe, Probe))


def check_unique(probes: Sequence[Opened]) -> None:
    """Raise UsageError if two probes have the same name, such as facts files in different folders."""
    names = [probe.name for probe in probes]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"Two probes have the name {duplicates[0]}.", hint="Give each probe once, and facts files different names."
        )


class _Run:
    """Run of one model, which stores each probe's answers and then its entry in the folder."""

    def __init__(self, handle: ModelHandle, folder: Path, context: Context, on_progress: Listener | None) -> None:
        self._handle, self._folder, self._context, self._on_progress = handle, folder, context, on_progress
        self._record = _open_record(folder, handle)

    def check_replaces_none(self, probes: Sequence[Opened]) -> None:
        """Raise OutputError if the folder has answers to other facts of a probe, or that were made otherwise."""
        model = self._record.model
        for probe in probes:
            entry = self._record.probes.get(probe.name)
            if entry is None or entry.key == _compute_key(self._handle, probe, self._context):
                continue
            stored, asked = _describe_sample(entry), _describe_sample(probe)
            if entry.fingerprint == probe.fingerprint():
                why = (
                    "The facts are the same, but something else differs that answers depend on: --device, --dtype, "
                    "--batch-size, --reference, another file of the model, facts outside the sample, or a release. "
                    f"The last run in this folder was on {model.device} in {model.computed_in}."
                )
            elif stored != asked:
                why = f"They were made {stored}, and this run is {asked}."
            else:
                why = (
                    f"They were made {stored}, as this run is, but to other facts: of other data under this name, or "
                    "by another --protocol, --template, --map, --split or --context."
                )
            raise OutputError(
                f"{self._folder} has other answers to {probe.name}: nothing was changed.",
                why,
                "Choose another folder, or pass --overwrite to replace these answers.",
            )

    def add(self, probe: Opened, facts: int) -> None:
        """Evaluate the model on a probe; `facts` is the number of facts in all probes, for progress."""
        start = time.monotonic()
        handle, reference = self._handle, self._context.reference
        if reference:
            check_facts(reference, probe)
            if not isinstance(probe, RunningText):
                check_model(reference, handle.located.name, handle.loaded)
        same_tokens = reference is None or has_same_tokens(reference, handle.loaded)
        key = _compute_key(handle, probe, self._context)
        known = self._find_known(probe.name, key)
        work: Work = "read" if isinstance(probe, RunningText) else "evaluate"
        stage = Stage(work, handle.located.name, probe.name, facts, handle.located.url or handle.settings.device)
        chunks: tuple[Chunk, ...] = ()
        answers: list[Answer] = []
        parts = _name_parts(self._folder, key)
        with report_progress(self._on_progress, stage) as advance:
            if isinstance(probe, Probe):
                context = self._context if same_tokens else Context()
                answers, entry = self._evaluate_facts(probe, parts, known, context, advance)
            elif isinstance(probe, RunningText):
                chunks, entry = self._read_text(probe, parts, known, advance, same_tokens=same_tokens)
            elif known:
                # A task gives no distribution: there is nothing to evaluate again.
                answers, entry = list(known.of(probe.name)), known.record.probes[probe.name]
            else:
                assert handle.loaded.language_model is not None
                answers, entry = probe.run(handle.loaded.language_model)
        seconds = round(time.monotonic() - start, 1)
        scored_on = (self._context.sha256 if same_tokens or chunks else None) or handle.sha256
        self._store(probe.name, answers, replace(entry, key=key, reference=scored_on, seconds=seconds), chunks)

    def update_labels(self, probes: Sequence[Opened]) -> None:
        """Update stored domains, subjects and popularity that changed since, also if a run that did so was killed."""
        stored = read_stored(self._folder)
        labelled = list(_label(stored, probes))
        has_changed = any(new is not old for new, old in zip(labelled, stored, strict=True))
        if has_changed or self._record.answers_sha256 is None:
            entries = self._record.probes
            sources = {probe.name: dict(probe.source) for probe in probes if isinstance(probe, Probe)}
            updated = {name: replace(entries[name], source=source) for name, source in sources.items()}
            # The old hash must not be with the new table, should this run be killed here.
            write_record(self._folder, self._record.without_hash(entries))
            self._write(labelled, replace(self._record, probes={**entries, **updated}))

    def _find_known(self, name: str, key: str) -> Answers | None:
        """Return answers of this model to the probe that lack only a divergence, so that the rest is reused."""
        entry = self._record.probes.get(name)
        if entry is None or entry.key != key:
            return self._context.known
        return Answers(self._record, tuple(read_stored(self._folder)), read_texts(self._folder, self._record))

    def _read_text(
        self, text: RunningText, parts: Path, known: Answers | None, advance: Advance, *, same_tokens: bool
    ) -> tuple[tuple[Chunk, ...], ProbeEntry]:
        context = self._context
        original = context.reference.record.probes[text.name] if context.reference else None
        chunks = TextChunks(self._handle.make_reader(), text, original)
        measure_kl = context.choose_measure(text) if same_tokens else None
        read = {chunk.number: chunk for path in sorted(parts.glob("*.parquet")) for chunk in read_chunks(path)}
        if original and measure_kl:
            read = {number: chunk for number, chunk in read.items() if chunk.kl is not None}
        new = chunks.read_all(
            done=read,
            known={chunk.number: chunk for chunk in known.texts.get(text.name, ())} if known else {},
            measure_kl=measure_kl,
            advance=advance,
        )
        read |= {chunk.number: chunk for chunk in self._collect(([chunk] for chunk in new), parts, write_chunks)}
        all_read = tuple(read[number] for number in sorted(read))
        gave_up = context.distributions.find_rows(text).gave_up if context.distributions else None
        divergence = describe_divergence(
            all_read, reference=original is not None, same_tokens=same_tokens, gave_up=gave_up
        )
        return all_read, chunks.make_entry(all_read, divergence)

    def _evaluate_facts(
        self, probe: Probe, parts: Path, known: Answers | None, context: Context, advance: Advance
    ) -> tuple[list[Answer], ProbeEntry]:
        prompts = self._handle.make_prompts(probe)
        prompts.check_not_empty()
        answers = [answer for path in sorted(parts.glob("*.parquet")) for answer in read_table(path)]
        reference = context.reference
        batches = evaluate(
            prompts,
            reference=find_first_ids(reference, probe, prompts) if reference else None,
            done=frozenset(answer.fact_id for answer in answers),
            known={answer.fact_id: answer for answer in known.of(probe.name)} if known else None,
            measure_kl=context.choose_measure(probe),
            advance=advance,
        )
        answers += self._collect(batches, parts, write_table)
        by_id = {answer.fact_id: answer for answer in answers}
        answers = [by_id[fact.id] for fact in probe.facts if fact.id in by_id]
        # Even if the tokens differ, since generated text can be compared.
        original = self._context.reference
        answers = add_examples(prompts.scorer, answers, original.of(probe.name) if original else ())
        return answers, make_facts_entry(probe, answers, prompts.dropped)

    def _collect(
        self, batches: Iterable[list[_Part]], parts: Path, write: Callable[[Path, Sequence[_Part]], None]
    ) -> list[_Part]:
        """Return the elements of all batches; store them regularly, and also after an error or an interruption."""
        collected: list[_Part] = []
        written, since = 0, time.monotonic()

        def write_new() -> None:
            nonlocal written
            new, written = collected[written:], len(collected)
            if new:
                self._handle.check_unchanged()
                write(parts / f"{len(list(parts.glob('*.parquet'))):05}.parquet", new)

        try:
            for batch in batches:
                collected += batch
                if time.monotonic() - since > SECONDS_BETWEEN_PARTS:
                    write_new()
                    since = time.monotonic()
        finally:
            write_new()
        return collected

    def _store(self, name: str, answers: Sequence[Answer], entry: ProbeEntry, chunks: Sequence[Chunk]) -> None:
        record, folder = self._record, self._folder
        model = self._handle.make_record()
        # Store nothing if the files are no longer those that were hashed.
        self._handle.check_unchanged()
        other_answers = [a for a in read_stored(folder) if a.probe != name and a.probe in record.probes]
        probes = {other: each for other, each in record.probes.items() if other != name}
        if name in record.probes or record.answers_sha256 is not None:
            # Remove the old entry and hash first, in case this run is killed before it writes the new ones.
            write_record(folder, record.without_hash(probes))
        if chunks:
            path = folder / name_text_file(name)
            write_chunks(path, chunks)
            entry = replace(entry, text={**(entry.text or {}), "file": path.name, "sha256": compute_sha256(path)})
        self._write([*other_answers, *answers], replace(record, model=model, probes=probes | {name: entry}))

    def _write(self, answers: Sequence[Answer], record: Record) -> None:
        write_table(self._folder / TABLE, answers)
        self._record = replace(record.without_hash(record.probes), answers_sha256=compute_sha256(self._folder / TABLE))
        write_record(self._folder, self._record)


def make_facts_entry(probe: Probe, answers: Sequence[Answer], dropped: Mapping[str, int]) -> ProbeEntry:
    """Return the entry in ``probe.json`` for answers to a probe of facts."""
    evaluated = {answer.fact_id for answer in answers}
    facts = [fact for fact in probe.facts if fact.id in evaluated]
    return ProbeEntry(
        protocol=probe.protocol,
        fingerprint=probe.fingerprint(),
        facts=probe.read,
        asked=len(answers),
        dropped=dict(dropped),
        average=probe.average,
        chance=compute_chance(answer.choices for answer in answers),
        majority=compute_majority(facts, probe.most_frequent, probe.average),
        limit=probe.limit,
        seed=probe.seed,
        templates=probe.templates,
        source=dict(probe.source),
    )


def _compute_key(handle: ModelHandle, probe: Opened, context: Context) -> str:
    """Hash what determines the answers: the model, the facts, the scored tokens, the settings, and releases. That of
    torch, a CPU's kernels and layers of other packages are left out, though they may round differently."""
    settings = handle.settings
    values: list[object] = [
        # Versions may differ in prompts and scoring. "grades/4" finds answers in Chinese, in quotes and as whole
        # numbers, sums over all candidates, and tells a candidate from the beginning of another without a full stop.
        *(SCHEMA_VERSION, __version__, "grades/4", handle.sha256, probe.fingerprint()),
        context.sha256,
        *(str(settings.device), settings.computed_in, settings.batch_size),
        *handle.runtime.key(),
        *([context.runtime] if context.runtime else []),
        *handle.list_decisive(writes=isinstance(probe, Task)),
    ]
    if handle.runtime.name == TRANSFORMERS:
        # Releases may tokenize or compute differently.
        values += [version(name) for name in ("transformers", "tokenizers")]
    if isinstance(probe, Probe):
        # The solved examples, which are chosen by subject, and the majority baseline come from all facts, not from the
        # sample.
        examples = (probe.find_example(fact) for fact in probe.facts)
        values += [example and (example.prompt, example.obj_label) for example in examples]
        values += probe.most_frequent.items()
    return hash_json(values)


def _describe_sample(of: ProbeEntry | Opened) -> str:
    """Return the options that chose facts, such as "with --limit 200, --seed 0"."""
    names = ("limit", "seed", "templates") if getattr(of, "limit", None) else ("templates",)
    chosen = [f"--{name} {value}" for name in names if (value := getattr(of, name, None)) is not None]
    return f"with {', '.join(chosen)}" if chosen else "without --limit"


def _name_parts(folder: Path, key: str) -> Path:
    """Return the folder of incomplete answers with this key."""
    return folder / PARTS / key[:16]


def _label(answers: Iterable[Answer], probes: Sequence[Opened]) -> Iterator[Answer]:
    """Yield the answers with the current domain, subject and popularity, which can be corrected without a new key."""
    facts = {(probe.name, fact.id): fact for probe in probes if isinstance(probe, Probe) for fact in probe.facts}
    for answer in answers:
        fact = facts.get((answer.probe, answer.fact_id), answer)
        labels = {name: getattr(fact, name) for name in ("subject", "sub_label", "popularity")}
        unchanged = all(getattr(answer, name) == value for name, value in labels.items())
        yield answer if unchanged else replace(answer, **labels)


def _read_folder(handle: ModelHandle, folder: Path, probes: Sequence[Opened]) -> Answers:
    """Read only the answers to these probes from a folder that may have others."""
    record, located = read_record(folder), handle.located
    model = record.model
    if located.url is None:
        # Answers are stored by the model's content; its name and manifest may have changed since.
        described = handle.describe()
        changed, source = described.get("changed"), described.get("source", model.source)
        model = replace(model, name=located.name, revision=located.revision, changed=changed, source=source)
    entries = {probe.name: record.probes[probe.name] for probe in probes}
    return gather_answers(folder, replace(record, model=model, probes=entries))


def _open_record(folder: Path, handle: ModelHandle) -> Record:
    """Read the record of the folder, or create a new one."""
    if not (folder / RECORD).is_file():
        model = ModelRecord(name=handle.located.name)
        return Record(schema=SCHEMA_VERSION, model=model, probes={}, versions=_list_versions())
    record = read_record(folder)
    # There is no hash if a run was killed between writing the two files.
    if record.answers_sha256 is not None:
        check_table(folder, record)
    if record.model.sha256 != handle.sha256:
        raise OutputError(
            f"{folder} has the answers of another model ({record.model.name}).",
            why="Or the model's files have changed since then.",
            hint="Choose another folder for the answers, or remove that one.",
        )
    ran_in = (record.model.runtime or {}).get("name", TRANSFORMERS)
    if record.probes and ran_in != handle.runtime.name:
        raise OutputError(
            f"{folder} has answers of {record.model.name} in {ran_in}, not in {handle.runtime.name}.",
            hint=f"Choose another folder for the answers, or pass --runtime {ran_in}.",
        )
    return replace(record, versions=_list_versions())


def _list_versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"compressknow": __version__} | libraries
