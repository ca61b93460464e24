"""Noise floors: how much of what a model answers another precision, or another runtime, changes with the same weights.

What a compressed model changes beyond that is its own doing; what lies below may be rounding.

It is what a GGUF file beside a checkpoint changes through no fault of its types: the original runs from an unquantized
GGUF file of its own weights, made for that and removed again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from compressknow.base.errors import CheckpointError, CompressknowError, NotInstalled, OutputError, UnsupportedError
from compressknow.base.progress import Listener, Stage, report_progress
from compressknow.compress.staging import scratch
from compressknow.engine.language_model import CPU
from compressknow.evaluate.answers import Answers, locked, read_record, write_record
from compressknow.evaluate.evaluate import evaluate, first_ids, tokens_alike
from compressknow.evaluate.facts import Probe, fact_of
from compressknow.evaluate.grades import PRODUCED, by_majority, known_as
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.records import NoiseFloor, Record
from compressknow.evaluate.runtimes.llama_cpp import LlamaCpp
from compressknow.evaluate.runtimes.transformers import Transformers

if TYPE_CHECKING:
    from compressknow.evaluate.distributions import Distributions, Rows
    from compressknow.evaluate.sources import Opened


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
    *,
    whole: Distributions | None = None,
) -> Answers:
    """The original's answers with the noise floor of each probe of facts: of a sample of its facts, seeded.

    A model that does not run in another precision has none. What runs elsewhere than in transformers has no other
    precision here.

    Parameters
    ----------
    folder : where the answers lie; the noise floor is kept in its record, so that it is found once.
    whole : the original's distributions, where this run keeps them; what it lacks is found for the sample.
    """
    if not original.settings.noise_floor:
        return answers
    entries = answers.record.probes
    lacking = [probe for probe in probes if isinstance(probe, Probe) and entries[probe.name].noise_floor is None]
    other = original.in_another_precision() if lacking else None
    if other is None:
        return answers
    try:
        found = measured(original, other, "noise", lacking, answers, folder, on_progress, whole=whole)
    except (CheckpointError, UnsupportedError):
        return answers
    return kept(answers, folder, {name: {"noise_floor": floor} for name, floor in found.items()})


def measured(
    original: ModelHandle,
    other: ModelHandle,
    work: Literal["noise", "runtime"],
    probes: Sequence[Probe],
    answers: Answers,
    folder: Path,
    on_progress: Listener | None,
    *,
    whole: Distributions | None = None,
) -> dict[str, NoiseFloor]:
    """The noise floor by probe: `other` is the same model, run otherwise, and answers a sample of each probe's facts.

    Both are released. Parameters are those of `with_noise_floor`; the stages are of that `work`.
    """
    from compressknow.evaluate.distributions import Distributions

    samples = {probe.name: _sample(probe, answers) for probe in probes}
    try:
        with Distributions(original, folder) as own:
            rows = {probe.name: _rows(probe, samples[probe.name], whole, own, on_progress) for probe in probes}
            original.release()
            return _answered(other, work, samples, rows, on_progress)
    finally:
        other.release()


class _Sample(NamedTuple):
    """Some of a probe's facts, and the original's answers to them."""

    probe: Probe
    answers: Answers


def _sample(probe: Probe, answers: Answers) -> _Sample:
    """Of the facts that were answered, in the probe's order, each in all its wordings."""
    answered = {answer.fact_id: answer for answer in answers.of(probe.name)}
    # A user's own id may end like that of a wording.
    whole = fact_of if probe.templates else str
    asked = [fact for fact in probe.facts if fact.id in answered]
    facts = list(dict.fromkeys(whole(fact.id) for fact in asked))
    wanted = min(len(facts), MOST_FACTS, max(LEAST_FACTS, round(PART * len(facts))))
    chosen = set(random.Random(_SEED).sample(facts, wanted))
    sample = tuple(fact for fact in asked if whole(fact.id) in chosen)
    return _Sample(replace(probe, facts=sample), Answers(answers.record, tuple(answered[fact.id] for fact in sample)))


def _rows(
    probe: Probe, sample: _Sample, whole: Distributions | None, own: Distributions, on_progress: Listener | None
) -> Rows:
    """The original's distributions of a sample: those that this run has kept of the whole probe, or found now."""
    kept = whole.of(probe) if whole else None
    if kept is not None and kept.holds(answer.fact_id for answer in sample.answers.answers):
        return kept
    own.complete([sample.probe], sample.answers, on_progress)
    return own.of(sample.probe)


def _answered(
    other: ModelHandle,
    work: Literal["noise", "runtime"],
    samples: Mapping[str, _Sample],
    rows: Mapping[str, Rows],
    on_progress: Listener | None,
) -> dict[str, NoiseFloor]:
    facts, found = sum(len(sample.probe.facts) for sample in samples.values()), {}
    for name, (sample, own) in samples.items():
        stage = Stage(work, other.located.name, name, facts, other.settings.device)
        with report_progress(on_progress, stage) as advance:
            prompts = other.prompts(sample)
            # What it would write is of no use where the original writes nothing.
            prompts.scorer.says = all(answer.produced is not None for answer in own.answers)
            alike = tokens_alike(own, other.loaded)
            batches = evaluate(
                prompts,
                reference=first_ids(own, sample, prompts) if alike else None,
                whole=rows[name].divergence if alike else None,
                advance=advance,
            )
            again = replace(own, answers=tuple(answer for batch in batches for answer in batch))
        found[name] = noise_of(own, again, other.loaded.computed_in)
    return found


def noise_of(before: Answers, after: Answers, computed_in: str) -> NoiseFloor:
    """Counts of one model's answers to the facts of a probe that it answered in both precisions or runtimes, in each
    reading of knowing that they tell."""
    floor = _counted(by_majority(before), by_majority(after), computed_in)
    if any(answer.produced is None for each in (before, after) for answer in each.answers):
        return floor
    said, said_again = (by_majority(known_as(each, PRODUCED)) for each in (before, after))
    return replace(floor, produced=_counted(said, said_again, computed_in))


def _counted(before: Answers, after: Answers, computed_in: str) -> NoiseFloor:
    by_id = {answer.fact_id: answer for answer in after.answers}
    pairs = [(one, by_id[one.fact_id]) for one in before.answers if one.fact_id in by_id]
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


def kept(answers: Answers, folder: Path, found: Mapping[str, Mapping[str, Any]]) -> Answers:
    """The answers with what was found, in their folder's record too: by probe, fields of its entry."""

    def with_found(record: Record) -> Record:
        own = {name: replace(record.probes[name], **fields) for name, fields in found.items()}
        return replace(record, probes={**record.probes, **own})

    with locked(folder, True):
        write_record(folder, with_found(read_record(folder)))
    return replace(answers, record=with_found(answers.record))


_INSTEAD = "an f16 GGUF file as the original."


def is_wanted(original: ModelHandle, others: Sequence[ModelHandle | Answers | None]) -> bool:
    """Whether llama.cpp runs one of the others, or ran it, and transformers the original."""
    return original.runtime.name == Transformers.name and any(map(_is_in_llama_cpp, others))


def _is_in_llama_cpp(other: ModelHandle | Answers | None) -> bool:
    if isinstance(other, Answers):
        return (other.record.model.runtime or {}).get("name") == LlamaCpp.name
    return other is not None and other.runtime.name == LlamaCpp.name


def with_runtime_noise_floor(
    original: ModelHandle,
    probes: Sequence[Opened],
    answers: Answers,
    folder: Path,
    on_progress: Listener | None = None,
    *,
    whole: Distributions | None = None,
) -> Answers:
    """The original's answers with the noise floor of llama.cpp, of the sample of facts of `with_noise_floor`, whose
    parameters these are; where it cannot be had, with why.
    """
    if not original.settings.noise_floor:
        return unmeasured(answers, "--no-noise-floor leaves it out.")
    facts = [probe for probe in probes if isinstance(probe, Probe)]
    if not facts:
        return unmeasured(answers, "it is measured on facts.")
    try:
        # Another build may compute otherwise.
        runtime = " ".join(LlamaCpp().key())
        entries = answers.record.probes
        lacking = [probe for probe in facts if runtime not in entries[probe.name].runtime_noise_floors]
        if not lacking:
            return answers
        with _in_llama_cpp(original, answers, folder, on_progress) as other:
            found = measured(original, other, "runtime", lacking, answers, folder, on_progress, whole=whole)
    except NotInstalled as error:
        return unmeasured(answers, f"{error.what} `compressknow export` fetches it; or give {_INSTEAD}")
    except OutputError:
        return unmeasured(
            answers, f"the disk has no room for the original as a GGUF file. Free some, or give {_INSTEAD}"
        )
    except CompressknowError as error:
        return unmeasured(answers, f"{error.what.rstrip('.')}. Give {_INSTEAD}")
    by_probe = {name: {**entries[name].runtime_noise_floors, runtime: floor} for name, floor in found.items()}
    return kept(answers, folder, {name: {"runtime_noise_floors": floors} for name, floors in by_probe.items()})


def unmeasured(answers: Answers, why: str) -> Answers:
    """The answers with `ModelRecord.runtime_unmeasured`."""
    return replace(answers, record=replace(answers.record, model=replace(answers.record.model, runtime_unmeasured=why)))


@contextmanager
def _in_llama_cpp(
    original: ModelHandle, answers: Answers, folder: Path, on_progress: Listener | None
) -> Iterator[ModelHandle]:
    """The original in llama.cpp, from a file that lies in `folder` meanwhile.

    Raises CompressknowError where the converter is missing, or does not take it.
    """
    from compressknow.gguf.choice import Choice
    from compressknow.gguf.converter import find_converter
    from compressknow.gguf.export import prepare, write_floats

    if answers.record.model.family != "causal":
        raise UnsupportedError("only decoder-only models can be run in llama.cpp here")
    name = original.located.name
    export = prepare(
        original.located.path,
        Choice("f16"),
        find_converter(),
        trust_remote_code=original.settings.trust_remote_code,
    )
    # The converter takes memory of its own.
    original.release()
    with scratch(folder / "in-llama-cpp") as place:
        # In a file of bf16 llama.cpp rounds activations to bf16 too: that is the type's doing, not the runtime's.
        kind = "f32" if export.exact == "f32" else "f16"
        file = write_floats(export, place, kind, begin=lambda work: report_progress(on_progress, Stage(work, name)))
        settings = replace(original.settings, runtime=LlamaCpp.name, device=CPU, dtype=None)
        yield ModelHandle(replace(original.located, path=file), settings)
