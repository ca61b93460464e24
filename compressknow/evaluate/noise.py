"""Noise floors: how many of a model's answers another precision or runtime changes, with the same weights.

Changes by a compressed model below that may be rounding. For another runtime, the original runs from an unquantized
GGUF file of its own weights, which is made for this and removed again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from compressknow.base.errors import CheckpointError, CompressknowError, NotInstalled, OutputError, UnsupportedError
from compressknow.base.progress import Advance, Listener, Stage, begin_stages, report_progress
from compressknow.engine.language_model import CPU
from compressknow.engine.load import load_tokenizer
from compressknow.evaluate.answers import Answers, change_model, lock_folder, read_record, write_record
from compressknow.evaluate.distributions import DistributionFile, Distributions
from compressknow.evaluate.evaluate import Prompts, evaluate, find_first_ids, has_same_tokens
from compressknow.evaluate.facts import Probe, strip_wording
from compressknow.evaluate.grades import PRODUCED, apply_reading, merge_wordings
from compressknow.evaluate.handle import LlamaCpp, ModelHandle
from compressknow.evaluate.records import NoiseFloor, Record
from compressknow.evaluate.runtimes import LLAMA_CPP, TRANSFORMERS
from compressknow.evaluate.sources import Opened

# Facts of a probe to evaluate again: a tenth of them, but at least as many as distinguish 1 % from 5 %, and at most as
# many as distinguish it from 3 %.
PART, LEAST_FACTS, MOST_FACTS = 0.1, 100, 300
_SEED = 20_231
_INSTEAD = "an f16 GGUF file as the original."


class NoiseFloors:
    """Noise floors of an original, measured on a seeded sample of each probe and stored in the record of its answers.
    `distributions` are the original's, if this run keeps them; what they lack is computed for the sample."""

    def __init__(
        self, original: ModelHandle, folder: Path, listener: Listener | None, distributions: Distributions | None = None
    ) -> None:
        self._original, self._folder, self._on_progress = original, folder, listener
        self._distributions = distributions

    def add(self, probes: Sequence[Opened], answers: Answers, compared: Sequence[ModelHandle | Answers]) -> Answers:
        """Add the noise floors of another precision and, if it runs one of the `compared` models, of llama.cpp."""
        answers = self.add_precision(probes, answers)
        ran_in = {
            (other.record.model.runtime or {}).get("name") if isinstance(other, Answers) else other.runtime.name
            for other in compared
        }
        if self._original.runtime.name != TRANSFORMERS or LLAMA_CPP not in ran_in:
            return answers
        return self.add_runtime(probes, answers)

    def add_precision(self, probes: Sequence[Opened], answers: Answers) -> Answers:
        """Add the noise floors of another precision, if the model can run in one: not outside of transformers."""
        if not self._original.settings.noise_floor:
            return answers
        entries = answers.record.probes
        missing = [probe for probe in probes if isinstance(probe, Probe) and entries[probe.name].noise_floor is None]
        try:
            other = self._original.copy_in_other_precision() if missing else None
            if other is None:
                return answers
            floors = self._measure(other, "noise", missing, answers)
        except (CheckpointError, UnsupportedError):
            return answers
        return self._store(answers, {name: {"noise_floor": floor} for name, floor in floors.items()})

    def add_runtime(self, probes: Sequence[Opened], answers: Answers, *, floats: Path | None = None) -> Answers:
        """Add the noise floor of llama.cpp on the same sample, or why it cannot be measured. `floats` is the original
        as an unquantized GGUF file, if there is one already."""
        if not self._original.settings.noise_floor:
            return change_model(answers, runtime_unmeasured="--no-noise-floor leaves it out.")
        facts = [probe for probe in probes if isinstance(probe, Probe)]
        if not facts:
            return change_model(answers, runtime_unmeasured="it is measured on facts.")
        try:
            # Includes the build, since builds may compute differently.
            runtime = " ".join(LlamaCpp.key())
            entries = answers.record.probes
            missing = [probe for probe in facts if runtime not in entries[probe.name].runtime_noise_floors]
            if not missing:
                return answers
            with self._open_in_llama_cpp(answers, floats) as other:
                floors = self._measure(other, "runtime", missing, answers)
        except NotInstalled as error:
            why = f"{error.what} {str(error.hint).rstrip('.')}; or give {_INSTEAD}"
            return change_model(answers, runtime_unmeasured=why)
        except OutputError:
            why = f"the disk has no room for the original as a GGUF file. Free some, or give {_INSTEAD}"
            return change_model(answers, runtime_unmeasured=why)
        except CompressknowError as error:
            return change_model(answers, runtime_unmeasured=f"{error.what.rstrip('.')}. Give {_INSTEAD}")
        by_probe = {name: {**entries[name].runtime_noise_floors, runtime: floor} for name, floor in floors.items()}
        return self._store(answers, {name: {"runtime_noise_floors": each} for name, each in by_probe.items()})

    def _measure(
        self, other: ModelHandle, work: Literal["noise", "runtime"], probes: Sequence[Probe], answers: Answers
    ) -> dict[str, NoiseFloor]:
        """Return noise floors by probe; `other` is the model in another precision or runtime. Releases both models."""
        original, distributions = self._original, self._distributions
        samples = {probe.name: _draw_sample(probe, answers) for probe in probes}
        facts = sum(len(sample.facts) for sample, _ in samples.values())
        files, floors = {}, {}
        try:
            with Distributions(original, self._folder) as of_samples:
                for probe in probes:
                    sample, known = samples[probe.name]
                    file = distributions.find_rows(probe) if distributions else None
                    if file is None or not file.holds(answer.fact_id for answer in known.answers):
                        of_samples.complete([sample], known, self._on_progress)
                        file = of_samples.find_rows(sample)
                    files[probe.name] = file
                original.release()
                for name, (sample, known) in samples.items():
                    stage = Stage(work, other.located.name, name, facts, other.settings.device)
                    prompts = other.make_prompts(sample)
                    with report_progress(self._on_progress, stage) as advance:
                        rerun = _rerun(other, prompts, known, files[name], advance)
                    floor = _count_noise(known, rerun, other.loaded.computed_in)
                    floors[name] = floor if work == "noise" else self._add_read_otherwise(floor, prompts)
                return floors
        finally:
            other.release()

    def _add_read_otherwise(self, floor: NoiseFloor, prompts: Prompts) -> NoiseFloor:
        """Add the number of prompts that the original's own tokenizer splits differently."""
        from compressknow.evaluate.scoring.scorer import Encoder

        trusted = self._original.settings.trust_remote_code
        original = Encoder(load_tokenizer(self._original.located.path, trust_remote_code=trusted))
        other = prompts.scorer.encoder
        texts = [query.fact.before for batch in prompts.batches for query in batch]
        count = sum(original.begin(text) != other.begin(text) for text in texts)
        return replace(
            floor, read_otherwise=count, produced=floor.produced and replace(floor.produced, read_otherwise=count)
        )

    def _store(self, answers: Answers, changes: Mapping[str, Mapping[str, Any]]) -> Answers:
        """Store changed fields of probes' entries in the folder's record; return the answers with them."""

        def apply_changes(record: Record) -> Record:
            probes = dict(record.probes)
            for name, fields in changes.items():
                # Another run may have replaced the answers to a probe by those to other facts.
                if name in probes and probes[name].key == answers.record.probes[name].key:
                    probes[name] = replace(probes[name], **fields)
            return replace(record, probes=probes)

        with lock_folder(self._folder, True):
            write_record(self._folder, apply_changes(read_record(self._folder)))
        return replace(answers, record=apply_changes(answers.record))

    @contextmanager
    def _open_in_llama_cpp(self, answers: Answers, floats: Path | None) -> Iterator[ModelHandle]:
        """Open the original in llama.cpp, from a temporary file. Raises CompressknowError if it cannot be converted."""
        from compressknow.compress.staging import make_scratch
        from compressknow.gguf.choice import TypeChoice
        from compressknow.gguf.converter import find_converter, quantize
        from compressknow.gguf.export import prepare_export, write_floats

        if answers.record.model.family != "causal":
            raise UnsupportedError("only decoder-only models can be run in llama.cpp here")
        located, settings = self._original.located, self._original.settings
        export = prepare_export(
            located.path, TypeChoice("f16"), find_converter(), trust_remote_code=settings.trust_remote_code
        )
        # The converter needs memory too.
        self._original.release()
        settings = replace(settings, runtime=LLAMA_CPP, device=CPU, dtype=None)
        # Not bf16: llama.cpp would round activations too, which is an effect of the type, not of the runtime.
        kind = "f32" if export.exact == "f32" else "f16"
        begin = begin_stages(self._on_progress, located.name)
        with make_scratch(self._folder / "in-llama-cpp") as scratch:
            if floats is None:
                floats = write_floats(export, scratch, kind, begin=begin)
            elif kind != export.exact:
                # Writes the same bytes as the converter, in a tenth of the time.
                source, floats = floats, scratch / "floats.gguf"
                with begin("quantize") as advance:
                    quantize(source, floats, kind, scratch, advance=advance)
            yield ModelHandle(replace(located, path=floats), settings)


def _draw_sample(probe: Probe, answers: Answers) -> tuple[Probe, Answers]:
    """Return a sample of the answered facts, in the probe's order and with all their wordings, and their answers."""
    answered = {answer.fact_id: answer for answer in answers.of(probe.name)}
    # A user's id may end like that of a wording.
    get_id = strip_wording if probe.templates else str
    known = [fact for fact in probe.facts if fact.id in answered]
    ids = list(dict.fromkeys(get_id(fact.id) for fact in known))
    size = min(len(ids), MOST_FACTS, max(LEAST_FACTS, round(PART * len(ids))))
    drawn = set(random.Random(_SEED).sample(ids, size))
    sample = tuple(fact for fact in known if get_id(fact.id) in drawn)
    return replace(probe, facts=sample), replace(answers, answers=tuple(answered[fact.id] for fact in sample))


def _rerun(other: ModelHandle, prompts: Prompts, known: Answers, file: DistributionFile, advance: Advance) -> Answers:
    same_tokens = has_same_tokens(known, other.loaded)
    batches = evaluate(
        prompts,
        reference=find_first_ids(known, prompts.scorer.probe, prompts) if same_tokens else None,
        measure_kl=file.measure if same_tokens else None,
        advance=advance,
    )
    return replace(known, answers=tuple(answer for batch in batches for answer in batch))


def _count_noise(before: Answers, after: Answers, computed_in: str) -> NoiseFloor:
    """Compare the answers to a probe in two precisions or runtimes, by both definitions of known."""
    produced_before, produced_after = (merge_wordings(apply_reading(each, PRODUCED)) for each in (before, after))
    floor = _count(merge_wordings(before), merge_wordings(after), computed_in)
    return replace(floor, produced=_count(produced_before, produced_after, computed_in))


def _count(before: Answers, after: Answers, computed_in: str) -> NoiseFloor:
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
