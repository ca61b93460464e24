"""Answers of two models to facts in random order, a chunk at a time, until what is asked of them is known."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from compressknow.base.errors import UsageError
from compressknow.base.progress import Listener, relabel_progress
from compressknow.engine.identity import locate
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.distributions import Distributions
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.gather import (
    Evaluation,
    finished,
    folder_of,
    of_probes,
    open_like,
    sound_handles,
    stored_answers,
)
from compressknow.evaluate.grades import known_as
from compressknow.evaluate.handle import Beside, ModelHandle
from compressknow.evaluate.noise import unmeasured
from compressknow.evaluate.run import facts_entry, held_answers, probe_model

if TYPE_CHECKING:
    from compressknow.evaluate.sources import Opened

T = TypeVar("T")
# Of the facts drawn so far, in their order: whether the original knows each, and the compressed model; and how many
# facts there are in all. Gives what is known then, or None for more.
Decide = Callable[[np.ndarray, np.ndarray, int], T | None]
# Facts of the first chunk, and what is added to those that are done: enough for batches, and little more than needed.
FIRST, FURTHER = 32, 0.25


class Early(NamedTuple, Generic[T]):
    """Both models' answers to the facts that were evaluated, and what is known of all; None where they do not tell."""

    original: Answers
    compressed: Answers
    found: T | None


def gather_early(
    original: str | Path,
    compressed: str | Path,
    evaluation: Evaluation,
    decide: Decide[T],
    *,
    revision: str | None = None,
    on_progress: Listener | None = None,
) -> Early[T]:
    """Evaluate two models on facts in random order, drawn by `evaluation.options.seed`, until `decide` knows enough.

    Both are in memory at the same time, but for one whose answers are stored. What is evaluated is stored, chunk by
    chunk, so that a run that was stopped resumes.

    Parameters
    ----------
    decide : called after each chunk.
    revision : of the original, if it is a hub id.

    Raises UsageError for a task or a text, which are run as a whole, and CompressknowError as `gather` does.
    """
    given = [stored_answers(model) for model in (original, compressed)]
    probes = _of_facts(open_like(next(filter(None, given), None), evaluation))
    named = zip((original, compressed), (revision, None), given, strict=True)
    located = [locate(model, of) for model, of, answers in named if not answers]
    handles = iter(sound_handles(located, evaluation, probes))
    first, second = (_Side(answers, None if answers else next(handles)) for answers in given)
    first.look_in(evaluation.keep_in, probes, None)
    if first.stored:
        second.look_in(evaluation.keep_in, probes, first.stored)
    drawing = _Drawing(first.answerable(probes), evaluation.options.seed)
    found = _until(decide, first, second, drawing, evaluation, on_progress)
    timed = evaluation.timed
    before = finished(first.answers(drawing), first.handle, None, on_progress, timed=timed)
    before = unmeasured(before, "--early leaves it out.")
    after = finished(second.answers(drawing), second.handle, before, on_progress, timed=timed)
    return Early(before, after, found)


def _of_facts(opened: Sequence[Opened]) -> list[Probe]:
    if others := [probe.name for probe in opened if not isinstance(probe, Probe)]:
        raise UsageError(
            f"--early cannot stop {others[0]}: it has no facts, and is run as a whole.",
            hint="Choose probes of facts, such as atlas, or leave out --early.",
        )
    facts = [probe for probe in opened if isinstance(probe, Probe)]
    if any(probe.templates for probe in facts):
        raise UsageError("--early draws facts in one wording.", hint="Leave out --early or --templates.")
    return facts


def _until(
    decide: Decide[T],
    first: _Side,
    second: _Side,
    drawing: _Drawing,
    evaluation: Evaluation,
    on_progress: Listener | None,
) -> T | None:
    """Evaluate chunk by chunk until `decide` knows enough, or all facts are done."""
    keep_in = evaluation.keep_in
    listen = [relabel_progress(on_progress, number=number, of=2) for number in (1, 2)]
    # Divergences over all tokens cost no second look at the original where both are evaluated side by side.
    of = first.handle if not first.stored and not second.stored else None
    known: list[bool] = []
    kept: list[bool] = []
    with Distributions(of, keep_in) if of else nullcontext() as whole:
        for chunk in drawing.chunks():
            folder = keep_in / f"early-{drawing.digest}" / f"{drawing.drawn:05}"
            before = first.answer(chunk, folder, Beside(whole=whole), listen[0])
            after = second.answer(chunk, folder, Beside(before, whole=whole), listen[1])
            known += _right(known_as(before, evaluation.known), chunk)
            kept += _right(known_as(after, evaluation.known), chunk)
            found = decide(np.array(known), np.array(kept), len(drawing.order))
            if found is not None:
                return found
    return None


@dataclass(frozen=True)
class _Chunk:
    """Facts in the order of drawing, and the probes that they are of, with these facts alone."""

    facts: tuple[tuple[str, str], ...]
    probes: tuple[Probe, ...]


class _Drawing:
    """The facts of all probes in random order, of which `drawn` are done."""

    def __init__(self, probes: Sequence[Probe], seed: int) -> None:
        self._probes, self._seed, self.drawn = probes, seed, 0
        facts = [(probe.name, fact.id) for probe in probes for fact in probe.facts]
        self.order = [facts[place] for place in np.random.default_rng(seed).permutation(len(facts))]

    @property
    def digest(self) -> str:
        """Of all that decides which facts are in which chunk."""
        decides = [[probe.fingerprint() for probe in self._probes], self._seed, FIRST, FURTHER]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def chunks(self) -> Iterator[_Chunk]:
        while self.drawn < len(self.order):
            start = self.drawn
            self.drawn = min(len(self.order), start + max(FIRST, math.ceil(FURTHER * start)))
            facts = self.order[start : self.drawn]
            yield _Chunk(tuple(facts), self._samples(facts))

    def done(self) -> tuple[Probe, ...]:
        """The probes with the facts that are done."""
        return self._samples(self.order[: self.drawn])

    def _samples(self, names: Sequence[tuple[str, str]]) -> tuple[Probe, ...]:
        wanted = frozenset(names)
        samples = (_only(probe, wanted, self._seed) for probe in self._probes)
        return tuple(sample for sample in samples if sample.facts)


def _only(probe: Probe, wanted: frozenset[tuple[str, str]], seed: int) -> Probe:
    """A probe with some of its facts, as a sample."""
    facts = tuple(fact for fact in probe.facts if (probe.name, fact.id) in wanted)
    return replace(probe, facts=facts, limit=len(facts), seed=seed)


def _right(answers: Answers, chunk: _Chunk) -> list[bool]:
    right = {(answer.probe, answer.fact_id): answer.correct for answer in answers.answers}
    return [right.get(fact, False) for fact in chunk.facts]


class _Side:
    """One of the two models: answers that are stored, or a model to be evaluated."""

    def __init__(self, stored: Answers | None, handle: ModelHandle | None) -> None:
        self.stored, self.handle = stored, handle
        self._chunks: list[Answers] = []

    def look_in(self, keep_in: Path, probes: Sequence[Probe], reference: Answers | None) -> None:
        """Take what an earlier run has stored of all facts, if it has. Raises CompressknowError where the answers that
        the user names are to other facts.
        """
        if self.handle is not None:
            folder = folder_of(keep_in, self.handle, Beside(reference))
            self.stored = held_answers(self.handle, probes, folder, reference)
        elif self.stored is not None:
            self.stored = of_probes(self.stored, [probe.name for probe in probes])
            for probe in probes:
                _refuse_other_facts(self.stored, probe)

    def answerable(self, probes: Sequence[Probe]) -> list[Probe]:
        """The probes with the facts that the model can be evaluated on, and how many others were dropped."""
        return [self._answerable(probe) for probe in probes]

    def _answerable(self, probe: Probe) -> Probe:
        if self.stored is not None:
            ids, dropped = (
                {a.fact_id for a in self.stored.of(probe.name)},
                self.stored.record.probes[probe.name].dropped,
            )
        else:
            assert self.handle is not None
            prompts = self.handle.prompts(probe)
            ids, dropped = {query.fact.id for batch in prompts.batches for query in batch}, prompts.dropped
        return replace(probe, facts=tuple(fact for fact in probe.facts if fact.id in ids), dropped=dropped)

    def answer(self, chunk: _Chunk, folder: Path, beside: Beside, on_progress: Listener | None) -> Answers:
        """The answers to a chunk, which are stored in `folder`."""
        if self.stored is not None:
            answers = _restricted(self.stored, chunk)
        else:
            assert self.handle is not None
            place = folder_of(folder, self.handle, beside)
            answers = probe_model(self.handle, chunk.probes, place, beside, on_progress=on_progress, wait=True)
        self._chunks.append(answers)
        return answers

    def answers(self, drawing: _Drawing) -> Answers:
        """Those to all chunks, as if they had been one sample."""
        rows = {(answer.probe, answer.fact_id): answer for chunk in self._chunks for answer in chunk.answers}
        entries, ordered = {}, []
        for probe in drawing.done():
            own = [rows[probe.name, fact.id] for fact in probe.facts if (probe.name, fact.id) in rows]
            parts = [chunk.record.probes[probe.name] for chunk in self._chunks if probe.name in chunk.record.probes]
            seconds = sum(part.seconds or 0.0 for part in parts)
            entry = facts_entry(probe, own, probe.dropped)
            entries[probe.name] = replace(entry, reference=parts[0].reference, seconds=round(seconds, 1))
            ordered += own
        return Answers(replace(self._chunks[0].record, probes=entries), tuple(ordered))


def _restricted(answers: Answers, chunk: _Chunk) -> Answers:
    """Stored answers to the facts of a chunk, as if these alone had been evaluated."""
    wanted = frozenset(chunk.facts)
    entries = {
        probe.name: replace(answers.record.probes[probe.name], fingerprint=probe.fingerprint())
        for probe in chunk.probes
    }
    own = tuple(answer for answer in answers.answers if (answer.probe, answer.fact_id) in wanted)
    return Answers(replace(answers.record, probes=entries), own)


def _refuse_other_facts(answers: Answers, probe: Probe) -> None:
    if answers.record.probes[probe.name].fingerprint != probe.fingerprint():
        raise UsageError(
            f"{answers.record.model.name} was evaluated on other facts or prompts of {probe.name}.",
            hint="Give the options that it was probed with (--limit, --seed, --template, --protocol, --data), or probe "
            "it again.",
        )
