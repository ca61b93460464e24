"""Answers of two models to facts in random order, a chunk at a time, until a question about them is decided."""

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
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.distributions import Context, Distributions
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.gather import (
    Evaluation,
    choose_folder,
    finish_answers,
    open_matching,
    open_models,
    read_if_stored,
    select_probes,
)
from compressknow.evaluate.grades import apply_reading
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.noise import mark_unmeasured
from compressknow.evaluate.run import find_answers, make_facts_entry, probe_model

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
    models = (original, compressed)
    stored = [read_if_stored(model) for model in models]
    probes = _select_facts(open_matching(next(filter(None, stored), None), evaluation))
    first, second = map(_Side, stored, open_models(models, revision, stored, evaluation, probes))
    first.read_stored(evaluation.keep_in, probes, None)
    if first.stored:
        second.read_stored(evaluation.keep_in, probes, first.stored)
    drawing = _Drawing(first.filter_answerable(probes), evaluation.options.seed)
    found = _evaluate_until(decide, first, second, drawing, evaluation, on_progress)
    timed = evaluation.timed
    before = finish_answers(first.merge_chunks(drawing), first.handle, None, on_progress, timed=timed)
    before = mark_unmeasured(before, "--early leaves it out.")
    after = finish_answers(second.merge_chunks(drawing), second.handle, before, on_progress, timed=timed)
    return Early(before, after, found)


def _select_facts(opened: Sequence[Opened]) -> list[Probe]:
    if others := [probe.name for probe in opened if not isinstance(probe, Probe)]:
        raise UsageError(
            f"--early cannot stop {others[0]}: it has no facts, and is run as a whole.",
            hint="Choose probes of facts, such as atlas, or leave out --early.",
        )
    facts = [probe for probe in opened if isinstance(probe, Probe)]
    if any(probe.templates for probe in facts):
        raise UsageError("--early draws facts in one wording.", hint="Leave out --early or --templates.")
    return facts


def _evaluate_until(
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
        for chunk in drawing.draw():
            folder = keep_in / f"early-{drawing.digest}" / f"{drawing.drawn:05}"
            before = first.answer(chunk, folder, Context(whole=whole), listen[0])
            after = second.answer(chunk, folder, Context(before, whole=whole), listen[1])
            known += _list_correct(apply_reading(before, evaluation.known), chunk)
            kept += _list_correct(apply_reading(after, evaluation.known), chunk)
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
    """Facts of all probes in random order, of which `drawn` are done."""

    def __init__(self, probes: Sequence[Probe], seed: int) -> None:
        self._probes, self._seed, self.drawn = probes, seed, 0
        facts = [(probe.name, fact.id) for probe in probes for fact in probe.facts]
        self.order = [facts[place] for place in np.random.default_rng(seed).permutation(len(facts))]

    @property
    def digest(self) -> str:
        """Hash all that decides which facts are in which chunk."""
        decides = [[probe.fingerprint() for probe in self._probes], self._seed, FIRST, FURTHER]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def draw(self) -> Iterator[_Chunk]:
        while self.drawn < len(self.order):
            start = self.drawn
            self.drawn = min(len(self.order), start + max(FIRST, math.ceil(FURTHER * start)))
            facts = self.order[start : self.drawn]
            yield _Chunk(tuple(facts), self._sample(facts))

    def list_done(self) -> tuple[Probe, ...]:
        """Return the probes with the facts that are done."""
        return self._sample(self.order[: self.drawn])

    def _sample(self, names: Sequence[tuple[str, str]]) -> tuple[Probe, ...]:
        wanted = frozenset(names)
        samples = (_restrict(probe, wanted, self._seed) for probe in self._probes)
        return tuple(sample for sample in samples if sample.facts)


def _restrict(probe: Probe, wanted: frozenset[tuple[str, str]], seed: int) -> Probe:
    """Return a probe with some of its facts, as a sample."""
    facts = tuple(fact for fact in probe.facts if (probe.name, fact.id) in wanted)
    return replace(probe, facts=facts, limit=len(facts), seed=seed)


def _list_correct(answers: Answers, chunk: _Chunk) -> list[bool]:
    right = {(answer.probe, answer.fact_id): answer.correct for answer in answers.answers}
    return [right.get(fact, False) for fact in chunk.facts]


class _Side:
    """One of the two models: answers that are stored, or a model to be evaluated."""

    def __init__(self, stored: Answers | None, handle: ModelHandle | None) -> None:
        self.stored, self.handle = stored, handle
        self._chunks: list[Answers] = []

    def read_stored(self, keep_in: Path, probes: Sequence[Probe], reference: Answers | None) -> None:
        """Take what an earlier run has stored of all facts, if it has. Raises CompressknowError where the answers that
        the user names are to other facts.
        """
        if self.handle is not None:
            folder = choose_folder(keep_in, self.handle, Context(reference))
            self.stored = find_answers(self.handle, probes, folder, reference)
        elif self.stored is not None:
            self.stored = select_probes(self.stored, [probe.name for probe in probes])
            for probe in probes:
                _check_facts(self.stored, probe)

    def filter_answerable(self, probes: Sequence[Probe]) -> list[Probe]:
        """Return the probes with the facts that the model can be evaluated on, and how many others were dropped."""
        found = []
        for probe in probes:
            if self.stored is not None:
                ids = {answer.fact_id for answer in self.stored.of(probe.name)}
                dropped = self.stored.record.probes[probe.name].dropped
            else:
                assert self.handle is not None
                prompts = self.handle.make_prompts(probe)
                ids, dropped = {query.fact.id for batch in prompts.batches for query in batch}, prompts.dropped
            facts = tuple(fact for fact in probe.facts if fact.id in ids)
            found.append(replace(probe, facts=facts, dropped=dropped))
        return found

    def answer(self, chunk: _Chunk, folder: Path, context: Context, on_progress: Listener | None) -> Answers:
        """Answer a chunk; the answers are stored in `folder`."""
        if self.stored is not None:
            answers = _restrict_answers(self.stored, chunk)
        else:
            assert self.handle is not None
            place = choose_folder(folder, self.handle, context)
            answers = probe_model(self.handle, chunk.probes, place, context, on_progress=on_progress, wait=True)
        self._chunks.append(answers)
        return answers

    def merge_chunks(self, drawing: _Drawing) -> Answers:
        """Return the answers to all chunks, as if they had been one sample."""
        rows = {(answer.probe, answer.fact_id): answer for chunk in self._chunks for answer in chunk.answers}
        entries, ordered = {}, []
        for probe in drawing.list_done():
            own = [rows[probe.name, fact.id] for fact in probe.facts if (probe.name, fact.id) in rows]
            parts = [chunk.record.probes[probe.name] for chunk in self._chunks if probe.name in chunk.record.probes]
            seconds = sum(part.seconds or 0.0 for part in parts)
            entry = make_facts_entry(probe, own, probe.dropped)
            entries[probe.name] = replace(entry, reference=parts[0].reference, seconds=round(seconds, 1))
            ordered += own
        return Answers(replace(self._chunks[0].record, probes=entries), tuple(ordered))


def _restrict_answers(answers: Answers, chunk: _Chunk) -> Answers:
    """Return stored answers to the facts of a chunk, as if these alone had been evaluated."""
    wanted = frozenset(chunk.facts)
    entries = {
        probe.name: replace(answers.record.probes[probe.name], fingerprint=probe.fingerprint())
        for probe in chunk.probes
    }
    own = tuple(answer for answer in answers.answers if (answer.probe, answer.fact_id) in wanted)
    return Answers(replace(answers.record, probes=entries), own)


def _check_facts(answers: Answers, probe: Probe) -> None:
    if answers.record.probes[probe.name].fingerprint != probe.fingerprint():
        raise UsageError(
            f"{answers.record.model.name} was evaluated on other facts or prompts of {probe.name}.",
            hint="Give the options that it was probed with (--limit, --seed, --template, --protocol, --data), or probe "
            "it again.",
        )
