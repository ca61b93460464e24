"""Settings for running a model, and the interface of runtimes."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

from compressknow.base.errors import UnsupportedError, UsageError, suggest_word
from compressknow.engine.identity import LocatedModel
from compressknow.engine.language_model import AUTO, CPU, LanguageModel, check_device, resolve_device
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.text import TextReader

if TYPE_CHECKING:
    from compressknow.evaluate.scoring.scorer import Scorer


BATCH_SIZE = 128
RUNTIMES = TRANSFORMERS, LLAMA_CPP, SERVER = "transformers", "llama.cpp", "server"


@dataclass(frozen=True)
class Settings:
    """Settings for running a model. On the CPU the default is float32, in which the batch size affects at most the last
    digits; with ``int8-paper`` it affects more (see `compressknow.engine.layers`).

    `device` is ``auto`` (cuda, else mps, else cpu), or one of these by name. Stored answers are not reused on another
    device, since logits differ in their last digits. `runtime` is the name of the runtime; None for the model's default
    (see `compressknow.evaluate.handle`). `noise_floor` evaluates an original on some facts in another precision, or
    another runtime, too (see `compressknow.evaluate.noise`).

    For servers, `model` is the model's name there, `parallel` the number of concurrent requests, and `timeout` is in
    seconds.
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
            # JSON does not take numpy's numbers.
            plain: Any = int if kind is Integral else float
            object.__setattr__(self, name, plain(value))
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise UsageError(
                f"There is no runtime {self.runtime!r}.",
                hint=f"{suggest_word(self.runtime, RUNTIMES)}Choose from {', '.join(RUNTIMES)}.",
            )

    def here(self) -> Settings:
        """Return these settings with the device resolved for this machine; imports torch."""
        return replace(self, device=resolve_device(self.device))

    @property
    def computed_in(self) -> str:
        return self.dtype or ("float32" if self.device == CPU else "auto")


class Runtime(abc.ABC):
    """Runtime of models; an instance has a model open.

    Attributes
    ----------
    name : value of ``--runtime``.
    family : ``masked``, ``causal`` or ``seq2seq``.
    architecture : name of the model's architecture in the runtime, such as a class of transformers.
    computed_in : type that the model computes in, such as ``float32``.
    vocabulary : short hash of the model's tokens and their ids; None if they are not known.
    parameters : number of the model's parameters; None if it is not known.
    language_model : the transformers model, for code that needs one; None in other runtimes.
    gives_scores : whether it returns log-probabilities of candidates; otherwise answers are the generated text.
    sha256 : for a model on a server, whose files are not accessible, a hash of its answers; None for others.
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
    def __init__(self, located: LocatedModel, settings: Settings) -> None:
        """Load a model; `settings` come from `resolve_settings`. Raises CompressknowError if it cannot be run."""

    @classmethod
    @abc.abstractmethod
    def reads(cls, located: LocatedModel) -> bool:
        """Return whether it can run this kind of model: a folder, a file format, or an address. Opens nothing."""

    @classmethod
    @abc.abstractmethod
    def resolve_settings(cls, settings: Settings) -> Settings:
        """Return the settings resolved for this machine. Raise UsageError for one that it does not support."""

    @classmethod
    def key(cls) -> tuple[str, ...]:
        """Return what determines answers besides model and settings: name and build; nothing for transformers."""
        return ()

    @abc.abstractmethod
    def make_scorer(self, probe: Probe) -> Scorer:
        """Return a scorer for a probe's facts. Raise CompressknowError if the model cannot be evaluated on them."""

    def make_reader(self) -> TextReader:
        """Return a reader of running text. Raise UnsupportedError if not all tokens' probabilities are available."""
        raise UnsupportedError(
            f"text: cannot be evaluated on {self.architecture}: its runtime does not return all tokens' probabilities.",
            hint="Evaluate it on facts: atlas, lama:..., bear, facts:... and hf:....",
        )

    def make_record(self) -> Mapping[str, Any] | None:
        """Return the "runtime" entry of ``probe.json``: "name", "build" and, if weights have their own types, "types":
        {group of layers: {type: parameters}}. None for transformers."""
        return None

    def describe(self) -> Mapping[str, Any]:
        """Return fields of the "model" entry, in addition to those that the model's files provide."""
        return {}

    def release(self) -> None:  # noqa: B027
        """Free what garbage collection does not."""
