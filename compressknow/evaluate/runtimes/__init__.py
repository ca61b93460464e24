"""Settings of how a model is run, and what runs it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compressknow.base.errors import UnsupportedError, UsageError, suggest_word
from compressknow.engine.identity import Located
from compressknow.engine.language_model import AUTO, CPU, LanguageModel, check_device, resolve_device
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.text import TextReader

if TYPE_CHECKING:
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
        # torch's objects stand for their names, as where a model is loaded.
        object.__setattr__(self, "device", str(self.device))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        check_device(self.device)
        for name, kind, what in (
            ("batch_size", Integral, "whole number"),
            ("parallel", Integral, "whole number"),
            ("timeout", Real, "number"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or not float(value) > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be a {what} above 0: {value!r}.")
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise UsageError(
                f"There is no runtime {self.runtime!r}.",
                hint=f"{suggest_word(self.runtime, RUNTIMES)}Choose from {', '.join(RUNTIMES)}.",
            )

    def here(self) -> Settings:
        """Return these settings with the device that they mean on this machine; imports torch."""
        return replace(self, device=resolve_device(self.device))

    @property
    def computed_in(self) -> str:
        return self.dtype or ("float32" if self.device == CPU else "auto")


class Runtime(abc.ABC):
    """Something that runs models; an instance has one of them open.

    Attributes
    ----------
    name : what the user calls it with ``--runtime``.
    family : ``masked``, ``causal`` or ``seq2seq``.
    architecture : its name for that of the model: a class of transformers, say.
    computed_in : what the model is run in, such as ``float32``.
    vocabulary : a short hash of the model's tokens and their ids; None where they are not known.
    parameters : how many the model has; None where that is not known.
    language_model : the model as transformers has it, for what only that can run; None where another runtime runs it.
    gives_scores : whether it chooses among candidates by log-probabilities; else answers are what it writes.
    sha256 : of a model on a server, which shows no files, by what it answers; None of others.
    """

    name: ClassVar[str]
    family: str
    architecture: str
    computed_in: str
    vocabulary: str | None = None
    parameters: int | None = None
    language_model: LanguageModel | None = None
    gives_scores: bool = True
    sha256: str | None = None

    @abc.abstractmethod
    def __init__(self, located: Located, settings: Settings) -> None:
        """Load a model; `settings` are those of `resolve_settings`. Raises CompressknowError where it cannot be run."""

    @classmethod
    @abc.abstractmethod
    def reads(cls, located: Located) -> bool:
        """Return whether it can run such a model at all: a folder, a file of its format, an address. Opens nothing."""

    @classmethod
    @abc.abstractmethod
    def resolve_settings(cls, settings: Settings) -> Settings:
        """Return the settings with what they mean on this machine. Raise UsageError for one that it cannot keep."""

    @classmethod
    def key(cls) -> tuple[str, ...]:
        """Return what besides model and settings decides the answers: name and build; nothing for transformers."""
        return ()

    @classmethod
    def open(cls, located: Located, settings: Settings) -> Self:
        return cls(located, settings)

    @abc.abstractmethod
    def make_scorer(self, probe: Probe) -> Scorer:
        """Return what answers a probe's facts. Raise CompressknowError where nothing can."""

    def make_reader(self) -> TextReader:
        """Return the causal model as a reader of text. Raise UnsupportedError where not all probabilities are given."""
        raise UnsupportedError(
            f"text: cannot be evaluated on {self.architecture}: what runs it does not give all tokens' probabilities.",
            hint="Evaluate it on facts: atlas, lama:..., bear, facts:... and hf:....",
        )

    def make_record(self) -> Mapping[str, Any] | None:
        """Return the "runtime" entry of ``probe.json``: "name", "build" and, where it stores types of its own, "types":
        {group of layers: {type: parameters}}. None for transformers."""
        return None

    def describe(self) -> Mapping[str, Any]:
        """Return what it says of the model, for the "model" entry, in addition to what the model's files say."""
        return {}

    def release(self) -> None:  # noqa: B027
        """Let go of what garbage collection alone does not free."""
