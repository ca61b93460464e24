"""One model, some probes, one answers folder: what is answered already is not evaluated again."""

from __future__ import annotations

import hashlib
import json
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
from compressknow.base.reading import compute_sha256
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
from compressknow.evaluate.text import (
    RunningText,
    choose_context,
    cut_chunks,
    describe_divergence,
    make_text_entry,
    read_text,
)

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
) -> Answers:
    """Evaluate a model on some probes and keep the answers in `folder`, with those that it holds already.

    A probe that the folder holds for this very model, these facts and this reference is not evaluated again; one that
    was cut short resumes.

    Parameters
    ----------
    folder : an answers folder of this model, or a new one.
    wait : wait for another run that uses the folder, rather than raise OutputError.

    Raises
    ------
    OutputError : the folder holds something else, answers of another model, or is in use by another run.
    CompressknowError : the model or a probe is not the one of the reference; a weight is not a number; the model's
        files change meanwhile.
    """
    check_unique(probes)
    handle.check_tasks(probes)
    handle.check_sound(on_progress)
    if handle.located.url is not None:
        # No server tells the distribution over all tokens in time.
        context = replace(context, distributions=None)
    with _explain_damage(folder), lock_folder(folder, wait):
        run = _Run(handle, folder, context, on_progress)
        lacked = find_missing(handle, probes, folder, context)
        if lacked and context.distributions and context.reference:
            context.distributions.complete(lacked, context.reference, on_progress)
            # The disk may have had no room for what some lack.
            lacked = find_missing(handle, probes, folder, context)
        if any(isinstance(probe, RunningText) for probe in lacked):
            # A model that cannot read it is refused before it is evaluated on all else.
            handle.make_reader()
        for probe in lacked[1:]:
            # So is a task whose data cannot be had. They are the same for all models, so the original's run tells.
            if isinstance(probe, Task) and context.reference is None:
                probe.check_data()
        for probe in lacked:
            run.add(probe, count_facts(probes))
        # They are of no use once all is answered. A run on other facts, or with other settings, resumes from its own.
        for probe in probes:
            shutil.rmtree(_name_parts(folder, _compute_key(handle, probe, context)), ignore_errors=True)
        with suppress(OSError):
            (folder / PARTS).rmdir()
        run.update_labels(probes)
        return _read_folder(handle, folder, probes)


def find_answers(
    handle: ModelHandle, probes: Sequence[Opened], folder: Path, reference: Answers | None
) -> Answers | None:
    """Return this model's answers to these probes, where `folder` holds them all."""
    if find_missing(handle, probes, folder, Context(reference)):
        return None
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
        # Not those of models whose tokens are others: they can have none.
        alike = {name for name, entry in entries.items() if entry.reference == context.sha256}
        with _explain_damage(folder):
            bare = alike & {answer.probe for answer in read_stored(folder) if answer.first_kl is None}
        bare |= {name for name, entry in entries.items() if entry.text and entry.text["divergence"] in (ALONE, NO_ROOM)}
        measurable = (probe for probe in probes if not isinstance(probe, Task))
        missing |= bare & {probe.name for probe in measurable if not distributions.find_rows(probe).gave_up}
    return [probe for probe in probes if probe.name in missing]


@contextmanager
def _explain_damage(folder: Path) -> Iterator[None]:
    """Explain damage in a folder of the run's own: its answers can be computed again."""
    try:
        yield
    except DamagedAnswers as error:
        again = f"Remove {folder}, and repeat the command: what was in it is evaluated again."
        raise DamagedAnswers(error.what, error.why, again) from error


def count_facts(probes: Sequence[Opened]) -> int:
    """Count the facts of the probes; of tasks they are not known before, and texts have none."""
    return sum(len(probe.facts) for probe in probes if isinstance(probe, Probe))


def check_unique(probes: Sequence[Opened]) -> None:
    """Refuse two probes of one name, such as facts files of one name in different folders."""
    names = [probe.name for probe in probes]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"Two probes have the name {twins[0]}.", hint="Name each probe once; give facts files names of their own."
        )


class _Run:
    """Run of one model: each probe's answers and its entry go into the folder, the answers first."""

    def __init__(self, handle: ModelHandle, folder: Path, context: Context, on_progress: Listener | None) -> None:
        self._handle, self._folder, self._context, self._on_progress = handle, folder, context, on_progress
        self._record = _open_record(folder, handle)

    def add(self, probe: Opened, facts: int) -> None:
        """Evaluate the model on a probe; `facts` are those of all probes, for the time that is left."""
        start = time.monotonic()
        handle, reference = self._handle, self._context.reference
        if reference:
            check_facts(reference, probe)
            if not isinstance(probe, RunningText):
                check_model(reference, handle.located.name, handle.loaded)
        alike = reference is None or has_same_tokens(reference, handle.loaded)
        key = _compute_key(handle, probe, self._context)
        known = self._find_known(probe.name, key)
        work: Work = "read" if isinstance(probe, RunningText) else "evaluate"
        stage = Stage(work, handle.located.name, probe.name, facts, handle.located.url or handle.settings.device)
        chunks: tuple[Chunk, ...] = ()
        answers: list[Answer] = []
        parts = _name_parts(self._folder, key)
        with report_progress(self._on_progress, stage) as advance:
            if isinstance(probe, Probe):
                context = self._context if alike else Context()
                answers, entry = self._evaluate_facts(probe, parts, known, context, advance)
            elif isinstance(probe, RunningText):
                chunks, entry = self._read_text(probe, parts, known, advance, same_tokens=alike)
            elif known:
                # A task gives no distribution: there is nothing to evaluate again.
                answers, entry = list(known.of(probe.name)), known.record.probes[probe.name]
            else:
                assert handle.loaded.language_model is not None
                answers, entry = probe.run(handle.loaded.language_model)
        seconds = round(time.monotonic() - start, 1)
        of = (self._context.sha256 if alike or chunks else None) or handle.sha256
        self._store(probe.name, answers, replace(entry, key=key, reference=of, seconds=seconds), chunks)

    def update_labels(self, probes: Sequence[Opened]) -> None:
        """Update the stored domains, subjects and popularity if they changed since the evaluation, or if a run that did
        so was killed before it wrote the hash."""
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
        """Return answers of this model to the probe that lack only a divergence: they are not evaluated whole again."""
        entry = self._record.probes.get(name)
        if entry is None or entry.key != key:
            return self._context.known
        return Answers(self._record, tuple(read_stored(self._folder)), read_texts(self._folder, self._record))

    def _read_text(
        self, text: RunningText, parts: Path, known: Answers | None, advance: Advance, *, same_tokens: bool
    ) -> tuple[tuple[Chunk, ...], ProbeEntry]:
        reader, context = self._handle.make_reader(), self._context
        original = context.reference.record.probes[text.name] if context.reference else None
        chunks = cut_chunks(reader, text, choose_context(reader, text, original))
        measure_kl = context.choose_measure(text) if same_tokens else None
        read = {chunk.number: chunk for path in sorted(parts.glob("*.parquet")) for chunk in read_chunks(path)}
        if original and measure_kl:
            read = {number: chunk for number, chunk in read.items() if chunk.kl is not None}
        fresh = read_text(
            reader,
            chunks,
            done=read,
            known={chunk.number: chunk for chunk in known.texts.get(text.name, ())} if known else {},
            measure_kl=measure_kl,
            advance=advance,
        )
        read |= {chunk.number: chunk for chunk in self._keep(([chunk] for chunk in fresh), parts, write_chunks)}
        all_read = tuple(read[number] for number in sorted(read))
        gave_up = context.distributions.find_rows(text).gave_up if context.distributions else None
        compared = describe_divergence(
            all_read, reference=original is not None, same_tokens=same_tokens, gave_up=gave_up
        )
        return all_read, make_text_entry(text, chunks, all_read, compared)

    def _evaluate_facts(
        self, probe: Probe, parts: Path, known: Answers | None, context: Context, advance: Advance
    ) -> tuple[list[Answer], ProbeEntry]:
        prompts = self._handle.make_prompts(probe)
        if not prompts.total:
            reasons = "\n".join(f"{count:,} dropped: {reason}" for reason, count in prompts.dropped.items())
            raise UsageError(
                f"{probe.name} has no fact that this model can be evaluated on.",
                reasons,
                "Choose another probe or protocol.",
            )
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
        answers += self._keep(batches, parts, write_table)
        by_id = {answer.fact_id: answer for answer in answers}
        answers = [by_id[fact.id] for fact in probe.facts if fact.id in by_id]
        # Also where its tokens are others: what it says is a text.
        original = self._context.reference
        answers = add_examples(prompts.scorer, answers, original.of(probe.name) if original else ())
        return answers, make_facts_entry(probe, answers, prompts.dropped)

    def _keep(
        self, batches: Iterable[list[_Part]], parts: Path, write: Callable[[Path, Sequence[_Part]], None]
    ) -> list[_Part]:
        """Return what the batches hold, put on disk as it comes; also what came before an error or an interruption."""
        found: list[_Part] = []
        written, since = 0, time.monotonic()

        def write_new() -> None:
            nonlocal written
            new, written = found[written:], len(found)
            if new:
                self._handle.check_unchanged()
                write(parts / f"{len(list(parts.glob('*.parquet'))):05}.parquet", new)

        try:
            for batch in batches:
                found += batch
                if time.monotonic() - since > SECONDS_BETWEEN_PARTS:
                    write_new()
                    since = time.monotonic()
        finally:
            write_new()
        return found

    def _store(self, name: str, answers: Sequence[Answer], entry: ProbeEntry, chunks: Sequence[Chunk]) -> None:
        record, folder = self._record, self._folder
        model = self._handle.make_record()
        # Nothing is kept of files that are not those that were hashed.
        self._handle.check_unchanged()
        others = [a for a in read_stored(folder) if a.probe != name and a.probe in record.probes]
        probes = {other: kept for other, kept in record.probes.items() if other != name}
        if name in record.probes or record.answers_sha256 is not None:
            # Neither the old entry nor the old hash may be with the new answers, should this run be killed here.
            write_record(folder, record.without_hash(probes))
        if chunks:
            path = folder / name_text_file(name)
            write_chunks(path, chunks)
            entry = replace(entry, text={**(entry.text or {}), "file": path.name, "sha256": compute_sha256(path)})
        self._write([*others, *answers], replace(record, model=model, probes=probes | {name: entry}))

    def _write(self, answers: Sequence[Answer], record: Record) -> None:
        write_table(self._folder / TABLE, answers)
        self._record = replace(record.without_hash(record.probes), answers_sha256=compute_sha256(self._folder / TABLE))
        write_record(self._folder, self._record)


def make_facts_entry(probe: Probe, answers: Sequence[Answer], dropped: Mapping[str, int]) -> ProbeEntry:
    """Return the entry in ``probe.json`` of a probe of facts that was answered."""
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
    """Hash all that decides the answers: the model, the facts, whose tokens are scored, and how it is run."""
    settings = handle.settings
    decides: list[object] = [
        # Another version may prompt or score otherwise; this one finds answers in Chinese, in quotes and as whole
        # numbers, the sum over all, and a candidate that begins another where no full stop follows.
        *(SCHEMA_VERSION, __version__, "grades/4", handle.sha256, probe.fingerprint()),
        context.sha256,
        *(str(settings.device), settings.computed_in, settings.batch_size),
        *handle.runtime.key(),
        *([context.runtime] if context.runtime else []),
        *handle.list_decisive(writes=isinstance(probe, Task)),
    ]
    if handle.runtime.name == TRANSFORMERS:
        # Another release may split a text into other tokens, or compute otherwise.
        decides += [version(name) for name in ("transformers", "tokenizers")]
    if isinstance(probe, Probe):
        # From all facts, not just the sample: the solved examples for lost facts, and the baseline.
        decides += [(fact.prompt, fact.obj_label) for examples in probe.examples.values() for fact in examples]
        decides += probe.most_frequent.items()
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _name_parts(folder: Path, key: str) -> Path:
    """Return where answers are kept until all of them are there."""
    return folder / PARTS / key[:16]


def _label(answers: Iterable[Answer], probes: Sequence[Opened]) -> Iterator[Answer]:
    """Yield the answers with what may be corrected later, and is not part of the key: domain, subject, popularity."""
    facts = {(probe.name, fact.id): fact for probe in probes if isinstance(probe, Probe) for fact in probe.facts}
    for answer in answers:
        fact = facts.get((answer.probe, answer.fact_id), answer)
        labels = {name: getattr(fact, name) for name in ("subject", "sub_label", "popularity")}
        same = all(getattr(answer, name) == value for name, value in labels.items())
        yield answer if same else replace(answer, **labels)


def _read_folder(handle: ModelHandle, folder: Path, probes: Sequence[Opened]) -> Answers:
    """Read the answers to these probes alone; the folder may hold those to others."""
    record, located = read_record(folder), handle.located
    model = record.model
    if located.url is None:
        # They are kept by the content of the model, which may have another name by now, or another manifest.
        described = handle.describe()
        changed, source = described.get("changed"), described.get("source", model.source)
        model = replace(model, name=located.name, revision=located.revision, changed=changed, source=source)
    entries = {probe.name: record.probes[probe.name] for probe in probes}
    return gather_answers(folder, replace(record, model=model, probes=entries))


def _open_record(folder: Path, handle: ModelHandle) -> Record:
    """Read the record of the folder so far; begin one where there is none."""
    if not (folder / RECORD).is_file():
        model = ModelRecord(name=handle.located.name)
        return Record(schema=SCHEMA_VERSION, model=model, probes={}, versions=_list_versions())
    record = read_record(folder)
    # A run that was killed between the two files has left none.
    if record.answers_sha256 is not None:
        check_table(folder, record)
    if record.model.sha256 != handle.sha256:
        raise OutputError(
            f"{folder} holds the answers of another model ({record.model.name}).",
            why="Or the model's files have changed since then.",
            hint="Choose another folder for the answers, or remove that one.",
        )
    ran_in = (record.model.runtime or {}).get("name", TRANSFORMERS)
    if record.probes and ran_in != handle.runtime.name:
        raise OutputError(
            f"{folder} holds answers that {record.model.name} gave in {ran_in}, not in {handle.runtime.name}.",
            hint=f"Choose another folder for the answers, or pass --runtime {ran_in}.",
        )
    return replace(record, versions=_list_versions())


def _list_versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"compressknow": __version__} | libraries
