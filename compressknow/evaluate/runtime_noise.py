"""The noise floor of a runtime: how much of what an original answers changes where llama.cpp runs it, not transformers.

It is what a GGUF file beside a checkpoint changes through no fault of its types: the original runs from an unquantized
GGUF file of its own weights, made for that and removed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.compress.staging import scratch
from compressknow.engine.language_model import CPU
from compressknow.errors import CompressknowError, NotInstalled, OutputError, UnsupportedError
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.noise import kept, measured
from compressknow.evaluate.runtimes.llama_cpp import LlamaCpp
from compressknow.evaluate.runtimes.transformers import Transformers
from compressknow.quiet import Listener, Stage, begun

if TYPE_CHECKING:
    from compressknow.evaluate.distributions import Distributions
    from compressknow.evaluate.sources import Opened

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
        file = write_floats(export, place, kind, begin=lambda work: begun(on_progress, Stage(work, name)))
        settings = replace(original.settings, runtime=LlamaCpp.name, device=CPU, dtype=None)
        yield ModelHandle(replace(original.located, path=file), settings)
