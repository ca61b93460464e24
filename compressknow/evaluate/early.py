"""Evaluate two models on facts in random order, chunk by chunk, until a question about them is decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from compressknow.base.errors import UsageError
from compressknow.base.progress import Listener, relabel_progress
from compressknow.base.reading import hash_json
from compressknow.evaluate import gather
from compressknow.evaluate.answers import Answers, change_model
from compressknow.evaluate.distributions import Context, Distributions
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.grades import apply_reading
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.run import find_answers, make_facts_entry, probe_model
from compressknow.evaluate.sources import Opened, Options

T = TypeVar("T")
# Takes whether the original, and whether the compressed model, knows each fact drawn so far, in order, and the number
# of all facts. Returns the decision, or None if more facts are needed.
Decide = Callable[[np.ndarray, np.ndarray, int], T | None]
# Facts of the first chunk, and size of each further one relative to all before it: large enough for batches.
FIRST, FURTHER = 32, 0.25


def gather_early(
    original: str | Path, compressed: str | Path, evaluation: gather.Evaluation, decide: Decide[T]
) -> tuple[Answers, Answers, T | None]:
    """Evaluate two models on facts in random order, by `evaluation.options.seed`, until `decide` returns a decision;
    return both models' answers to these facts, and the decision, None if all facts leave it open.

    Both models are in memory, unless a model's answers are stored. Answers are stored by chunk, so that a stopped run
    resumes. Raises UsageError for a task or a text, which are run as a whole, and CompressknowError as `gather` does.
    """
    models = (original, compressed)
    stored = [gather.read_if_stored(model) for model in models]
    if all(stored):
        # A seed is allowed here, since it also determines the order of stored facts.
        unseeded = replace(evaluation, options=replace(evaluation.options, seed=Options.seed))
        gather.check_none_evaluated([answers for answers in stored if answers], unseeded)
    probes = _select_facts(gather.open_matching(next(filter(None, stored), None), evaluation))
    first, second = map(_Side, gather.open_models(models, stored, evaluation, probes))
    first.read_stored(evaluation.keep_in, probes, None)
    if first.stored or second.stored:
        second.read_stored(evaluation.keep_in, probes, first.stored)
    decision, done = _evaluate_until(decide, first, second, first.filter_answerable(probes), evaluation)
    timed, listener = evaluation.timed, evaluation.on_progress
    before = gather.finish_answers(first.merge_chunks(done), first.handle, None, timed, listener)
    before = change_model(before, runtime_unmeasured="--early leaves it out.")
    return before, gather.finish_answers(second.merge_chunks(done), second.handle, before, timed, listener), decision


def _select_facts(opened: Sequence[Opened]) -> list[Probe]:
    if unsuitable := [probe.name for probe in opened if not isinstance(probe, Probe)]:
        raise UsageError(
            f"--early cannot stop {unsuitable[0]}: it has no facts, and is run as a whole.",
            hint="Choose probes of facts, such as atlas, or leave out --early.",
        )
    probes = [probe for probe in opened if isinstance(probe, Probe)]
    if any(probe.templates for probe in probes):
        raise UsageError("--early evaluates facts in one wording.", hint="Leave out --early or --templates.")
    return probes


def _evaluate_until(
    decide: Decide[T], first: _Side, second: _Side, probes: Sequence[Probe], evaluation: gather.Evaluation
) -> tuple[T | None, list[Probe]]:
    """Evaluate until `decide` returns a decision, or all facts are done; return it, and probes of the facts done."""
    keep_in, seed = evaluation.keep_in, evaluation.options.seed
    listed = [(probe.name, fact.id) for probe in probes for fact in probe.facts]
    order = [listed[index] for index in np.random.default_rng(seed).permutation(len(listed))]
    # Everything that determines which facts are in which chunk.
    key = [[probe.fingerprint() for probe in probes], seed, FIRST, FURTHER]
    digest = hash_json(key)[:16]
    listeners = [relabel_progress(evaluation.on_progress, number=number, of=2) for number in (1, 2)]
    # Divergences over all tokens are free if both models are evaluated now, and none is on a server.
    is_local = first.handle is not None and first.handle.located.url is None
    original = first.handle if is_local and not first.stored and not second.stored else None
    known: list[bool] = []
    kept: list[bool] = []
    decision, drawn = None, 0
    with Distributions(original, keep_in) if original else nullcontext() as distributions:
        while decision is None and drawn < len(order):
            start, drawn = drawn, min(len(order), drawn + max(FIRST, math.ceil(FURTHER * drawn)))
            facts = order[start:drawn]
            chunk, folder = _sample(probes, facts, seed), keep_in / f"early-{digest}" / f"{drawn:05}"
            before = first.answer(chunk, folder, Context(distributions=distributions), listeners[0])
            after = second.answer(chunk, folder, Context(before, distributions=distributions), listeners[1])
            known += _list_correct(apply_reading(before, evaluation.known), facts)
            kept += _list_correct(apply_reading(after, evaluation.known), facts)
            decision = decide(np.array(known), np.array(kept), len(order))
    return decision, _sample(probes, order[:drawn], seed)


def _sample(probes: Sequence[Probe], names: Sequence[tuple[str, str]], seed: int) -> list[Probe]:
    """Return samples of the probes with these facts, given as (probe, fact id)."""
    sampled = frozenset(names)
    pairs = ((probe, tuple(fact for fact in probe.facts if (probe.name, fact.id) in sampled)) for probe in probes)
    return [replace(probe, facts=facts, limit=len(facts), seed=seed) for probe, facts in pairs if facts]


def _list_correct(answers: Answers, facts: Sequence[tuple[str, str]]) -> list[bool]:
    correct = {(answer.probe, answer.fact_id): answer.correct for answer in answers.answers}
    return [correct.get(fact, False) for fact in facts]


class _Side:
    """One of the two models: stored answers, or a model to evaluate."""

    def __init__(self, side: Answers | ModelHandle) -> None:
        self.stored = side if isinstance(side, Answers) else None
        self.handle = side if isinstance(side, ModelHandle) else None
        self._chunks: list[Answers] = []

    def read_stored(self, keep_in: Path, probes: Sequence[Probe], reference: Answers | None) -> None:
        """Use the answers to all these facts that an earlier run stored, if there are any."""
        if self.handle is not None:
            folder = gather.choose_folder(keep_in, self.handle, Context(reference), probes)
            self.stored = find_answers(self.handle, probes, folder, reference)

    def filter_answerable(self, probes: Sequence[Probe]) -> list[Probe]:
        """Return the probes with only the facts that the model can be evaluated on, and the counts of dropped ones."""
        answerable = []
        for probe in probes:
            if self.stored is not None:
                ids = {answer.fact_id for answer in self.stored.of(probe.name)}
                dropped = self.stored.record.probes[probe.name].dropped
            else:
                assert self.handle is not None
                prompts = self.handle.make_prompts(probe)
                prompts.check_not_empty()
                ids, dropped = {query.fact.id for batch in prompts.batches for query in batch}, prompts.dropped
            facts = tuple(fact for fact in probe.facts if fact.id in ids)
            answerable.append(replace(probe, facts=facts, dropped=dropped))
        return answerable

    def answer(self, chunk: Sequence[Probe], folder: Path, context: Context, on_progress: Listener | None) -> Answers:
        if self.stored is not None:
            return self.stored.restrict(chunk)
        assert self.handle is not None
        path = gather.choose_folder(folder, self.handle, context)
        self._chunks.append(probe_model(self.handle, chunk, path, context, on_progress=on_progress, wait=True))
        return self._chunks[-1]

    def merge_chunks(self, done: Sequence[Probe]) -> Answers:
        """Return the answers to all chunks as those to one sample; `done` are the probes with its facts."""
        chunks = [self.stored] if self.stored is not None else self._chunks
        rows = {(answer.probe, answer.fact_id): answer for chunk in chunks for answer in chunk.answers}
        entries, ordered = {}, []
        for probe in done:
            answers = [rows[probe.name, fact.id] for fact in probe.facts if (probe.name, fact.id) in rows]
            parts = [chunk.record.probes[probe.name] for chunk in chunks if probe.name in chunk.record.probes]
            seconds = round(sum(part.seconds or 0.0 for part in parts), 1)
            entry = make_facts_entry(probe, answers, probe.dropped)
            entries[probe.name] = replace(entry, reference=parts[0].reference, seconds=seconds)
            ordered += answers
        return Answers(replace(chunks[0].record, probes=entries), tuple(ordered))
