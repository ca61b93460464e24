"""The noise floor: how much of what a model answers another precision changes, weights and all else being the same.

What a compressed model changes beyond that is its own doing; what lies below may be rounding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.errors import CheckpointError, UnsupportedError
from compressknow.probe.answers import Answer, Answers, locked, read_record, write_record
from compressknow.probe.evaluate import evaluate, first_ids
from compressknow.probe.facts import Fact, Probe
from compressknow.probe.records import NoiseFloor, Record
from compressknow.quiet import Listener, Stage, begun

if TYPE_CHECKING:
    from compressknow.probe.run import ModelHandle
    from compressknow.probe.sources import Opened

# Facts of a probe that are asked again: a tenth of them, but no fewer than tell 1 % from 5 %, and no more than tell it
# from 3 %.
PART, LEAST_FACTS, MOST_FACTS = 0.1, 100, 300
_SEED = 20_231


def with_noise_floor(
    original: ModelHandle,
    probes: Sequence[Opened],
    answers: Answers,
    folder: Path,
    on_progress: Listener | None = None,
) -> Answers:
    """The original's answers with the noise floor of each probe of facts: of a sample of its facts, seeded.

    It is kept in the record of `folder`, where the answers lie, so that it is found once. A model that does not run in
    another precision has none. What runs elsewhere than in transformers has no other precision here.
    """
    if not original.settings.noise_floor:
        return answers
    entries = answers.record.probes
    lacking = [probe for probe in probes if isinstance(probe, Probe) and entries[probe.name].noise_floor is None]
    other = original.in_another_precision() if lacking else None
    if other is None:
        return answers
    try:
        found = _measured(original, other, [_sample(probe, answers) for probe in lacking], answers, folder, on_progress)
    except (CheckpointError, UnsupportedError):
        return answers
    finally:
        other.release()
    return _kept(answers, found, folder)


def _sample(probe: Probe, answers: Answers) -> Probe:
    """Some of the facts that were answered, in the probe's order."""
    answered = {answer.fact_id for answer in answers.of(probe.name)}
    facts = [fact for fact in probe.facts if fact.id in answered]
    wanted = min(len(facts), MOST_FACTS, max(LEAST_FACTS, round(PART * len(facts))))
    chosen: list[Fact] = random.Random(_SEED).sample(facts, wanted)
    names = {fact.id for fact in chosen}
    return replace(probe, facts=tuple(fact for fact in facts if fact.id in names))


def _measured(
    original: ModelHandle,
    other: ModelHandle,
    samples: Sequence[Probe],
    answers: Answers,
    folder: Path,
    on_progress: Listener | None,
) -> dict[str, NoiseFloor]:
    from compressknow.probe.distributions import Distributions

    facts = sum(len(sample.facts) for sample in samples)
    with Distributions(original, folder) as whole:
        asked = [_answers_to(sample, answers) for sample in samples]
        for sample, own in zip(samples, asked, strict=True):
            whole.complete([sample], own, on_progress)
        original.release()
        found = {}
        for sample, own in zip(samples, asked, strict=True):
            stage = Stage("noise", other.located.name, sample.name, facts, other.settings.device)
            with begun(on_progress, stage) as advance:
                prompts = other.prompts(sample)
                ids = first_ids(own, sample, prompts)
                batches = evaluate(prompts, reference=ids, whole=whole.of(sample).divergence, advance=advance)
                again = [answer for batch in batches for answer in batch]
            found[sample.name] = noise_of(own.of(sample.name), again, other.loaded.computed_in)
    return found


def _answers_to(sample: Probe, answers: Answers) -> Answers:
    """Those to the facts of a sample alone."""
    names = {fact.id for fact in sample.facts}
    return Answers(answers.record, tuple(answer for answer in answers.of(sample.name) if answer.fact_id in names))


def noise_of(before: Sequence[Answer], after: Sequence[Answer], computed_in: str) -> NoiseFloor:
    """Counts of one model's answers to the same facts in two precisions."""
    by_id = {answer.fact_id: answer for answer in after}
    pairs = [(one, by_id[one.fact_id]) for one in before]
    divergences = [other.first_kl for _, other in pairs]
    known = [value for value in divergences if value is not None and math.isfinite(value)]
    return NoiseFloor(
        n=len(pairs),
        changed=sum(one.predicted != other.predicted for one, other in pairs),
        known=sum(one.correct for one, _ in pairs),
        lost=sum(one.correct and not other.correct for one, other in pairs),
        gained=sum(other.correct and not one.correct for one, other in pairs),
        kl_mean=math.fsum(known) / len(known) if known and len(known) == len(pairs) else None,
        computed_in=computed_in,
    )


def _kept(answers: Answers, found: dict[str, NoiseFloor], folder: Path) -> Answers:
    """The answers with what was found, in their folder's record too."""

    def with_found(record: Record) -> Record:
        own = {name: replace(record.probes[name], noise_floor=floor) for name, floor in found.items()}
        return replace(record, probes={**record.probes, **own})

    with locked(folder, True):
        write_record(folder, with_found(read_record(folder)))
    return replace(answers, record=with_found(answers.record))
