"""Settings of how a model is run, and what a model is that a runtime has opened."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UnsupportedError, UsageError, did_you_mean
from compressknow.engine.language_model import AUTO, CPU, LanguageModel, check_device, device_of

if TYPE_CHECKING:
    from compressknow.evaluate.facts import Probe
    from compressknow.evaluate.scoring.reading import TextReader
    from compressknow.evaluate.scoring.scorer import Scorer


BATCH_SIZE = 128
RUNTIMES = TRANSFORMERS, LLAMA_CPP, SERVER = "transformers", "llama.cpp", "server"


@dataclass(frozen=True)
class Settings:
    """Settings of how a model is run. Float32 on the CPU by default, where the batch size shows in the last digits
    alone, if at all; with ``int8-paper`` in more than these (see `compressknow.engine.layers`).

    `device` is ``auto`` (cuda, else mps, else cpu), or one of these by name. Answers of one device are not taken for
    those of another: logits differ in their last digits. `runtime` is the name of what runs the model; by default
    what is meant for it (see `compressknow.evaluate.handle`). `noise_floor` has an original answer some facts in
    another precision too, or in another runtime (see `compressknow.evaluate.noise`).

    `model`, `parallel` and `timeout` are for servers: the model's name there, requests at a time, seconds to wait.
    """

    device: str = AUTO
    dtype: str | None = None
    batch_size: int = BATCH_SIZE
    trust_remote_code: bool = False
    runtime: str | None = None
    model: str | None = None
    parallel: int = 4
    timeout: float = 120.0
    noise_floor: bool = True

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.parallel < 1 or not self.timeout > 0:
            raise UsageError(f"--parallel and --timeout must be above 0: {self.parallel}, {self.timeout:g}.")
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise UsageError(
                f"There is no runtime {self.runtime!r}.",
                hint=f"{did_you_mean(self.runtime, RUNTIMES)}There is {', '.join(RUNTIMES)}.",
            )

    def here(self) -> Settings:
        """Return these settings with the device that they mean on this machine; imports torch."""
        return replace(self, device=device_of(self.device))

    @property
    def computed_in(self) -> str:
        return self.dtype or ("float32" if self.device == CPU else "auto")


class Loaded(abc.ABC):
    """Model that a runtime has opened.

    Attributes
    ----------
    family : ``masked``, ``causal`` or ``seq2seq``.
    architecture : its name for it: a class of transformers, say.
    computed_in : what it is run in, such as ``float32``.
    vocabulary : a short hash of its tokens and their ids; None where they are not known.
    parameters : how many it has; None where that is not known.
    language_model : the model as transformers has it, for what only that can run; None where another runtime runs it.
    gives_scores : whether it chooses among candidates by log-probabilities; else answers are what it writes.
    sha256 : of a model on a server, which shows no files, by what it answers; None of others.
    """

    family: str
    architecture: str
    computed_in: str
    vocabulary: str | None = None
    parameters: int | None = None
    language_model: LanguageModel | None = None
    gives_scores: bool = True
    sha256: str | None = None

    @abc.abstractmethod
    def make_scorer(self, probe: Probe) -> Scorer:
        """Return what answers a probe's facts. Raise CompressknowError where nothing can."""

    def make_reader(self) -> TextReader:
        """Return the model, which is causal, as a reader of text. Raise UnsupportedError where the runtime does not
        give the probabilities of all tokens.
        """
        raise UnsupportedError(
            f"text: cannot be evaluated on {self.architecture}: what runs it does not give all tokens' probabilities.",
            hint="Evaluate it on facts: atlas, lama:..., bear, facts:... and hf:....",
        )

    def make_record(self) -> Mapping[str, Any] | None:
        """Return the "runtime" entry of ``probe.json``: "name", "build" and, where it stores types of its own, "types":
        {group of layers: {type: parameters}}. None for transformers.
        """
        return None

    def describe(self) -> Mapping[str, Any]:
        """Return what it says of itself, for the "model" entry, in addition to what the model's files say."""
        return {}

    def release(self) -> None:  # noqa: B027
        """Let go of what garbage collection alone does not free."""


class LoadedInTransformers(Loaded):
    """Model of transformers."""

    language_model: LanguageModel

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model
        self.family = language_model.family
        self.architecture = type(language_model.model).__name__
        self.computed_in = language_model.dtype

    @property
    def vocabulary(self) -> str:  # type: ignore[override]
        """Return the hash of all tokens, which takes a while to compute."""
        return self.language_model.vocabulary

    @property
    def parameters(self) -> int:  # type: ignore[override]
        return self.language_model.parameters

    def make_scorer(self, probe: Probe) -> Scorer:
        from compressknow.evaluate.scoring.families import make_scorer

        return make_scorer(self.language_model.model, self.language_model.tokenizer, self.family, probe)

    def make_reader(self) -> TextReader:
        from compressknow.evaluate.scoring.reading import TransformersReader

        return TransformersReader(self.language_model)
