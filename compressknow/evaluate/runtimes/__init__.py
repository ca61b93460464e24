"""Runtimes: a registry of what answers for a model, each in a file of its own, and what a runtime is."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from compressknow.base.errors import UnsupportedError, UsageError, did_you_mean
from compressknow.base.registry import Registry
from compressknow.engine.language_model import AUTO, CPU, check_device, device_of

if TYPE_CHECKING:
    from compressknow.engine.contents import Contents
    from compressknow.engine.identity import Located
    from compressknow.engine.language_model import LanguageModel
    from compressknow.evaluate.facts import Probe
    from compressknow.evaluate.scoring.reading import TextReader
    from compressknow.evaluate.scoring.scorer import Scorer


BATCH_SIZE = 128


@dataclass(frozen=True)
class Settings:
    """Settings of how a model is run. Float32 on the CPU by default, where the batch size shows in the last digits
    alone, if at all; with ``int8-paper`` in more than these (see `compressknow.engine.layers`).

    `device` is ``auto`` (cuda, else mps, else cpu), or one of these by name. Answers of one device are not taken for
    those of another: logits differ in their last digits. `runtime` is the name of what runs the model; by default
    what is meant for it (see `compressknow.evaluate.runtimes`). `noise_floor` has an original answer some facts in
    another precision too, or in another runtime (see `compressknow.evaluate.noise` and
    `compressknow.evaluate.noise`).

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
    """

    family: str
    architecture: str
    computed_in: str
    vocabulary: str | None = None
    parameters: int | None = None
    language_model: LanguageModel | None = None
    # Whether it chooses among candidates by log-probabilities; else answers are what it writes.
    gives_scores: bool = True

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


class Runtime(abc.ABC):
    """Something that runs models.

    Attributes
    ----------
    name : as the user names it with ``--runtime``.
    help : what it is, for ``--help``.
    whole_vocabulary : whether it tells the distribution over all tokens.
    runs_tasks : whether lm-eval's tasks can be run on what it opens.
    has_precisions : whether it computes in the dtype that it is told.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    whole_vocabulary: ClassVar[bool] = True
    runs_tasks: ClassVar[bool] = False
    has_precisions: ClassVar[bool] = False

    @abc.abstractmethod
    def reads(self, located: Located) -> bool:
        """Return whether it can run such a model at all: a folder, a file of its format, an address. Opens nothing."""

    def is_default(self, located: Located) -> bool:
        """Return whether it runs a model that it reads where the user names no runtime."""
        return self.reads(located)

    def resolve_settings(self, settings: Settings) -> Settings:
        """Return the settings with what they mean on this machine. Raise UsageError for one that it cannot keep."""
        return settings.here()

    def where(self, located: Located, settings: Settings) -> str:  # noqa: ARG002
        """Return where it computes, for people; `settings` are those of `resolve_settings`."""
        return str(settings.device)

    def contents(self, located: Located, settings: Settings) -> Contents:  # noqa: ARG002
        """Return what decides the model's answers, by whose hash it is known again: its files."""
        from compressknow.engine.contents import read_contents

        return read_contents(located)

    def key(self) -> tuple[str, ...]:
        """Return what besides model and settings decides the answers: name and build; nothing for transformers."""
        return ()

    @abc.abstractmethod
    def open(self, located: Located, settings: Settings) -> Loaded:
        """Load a model; `settings` are those of `resolve_settings`. Raises CompressknowError where it cannot be run."""


# The last one that reads a model, and is meant for it, runs it.
RUNTIMES = Registry(
    "compressknow.runtimes",
    "runtime",
    Runtime,  # type: ignore[type-abstract]
    {
        "transformers": "compressknow.evaluate.runtimes.transformers:Transformers",
        "llama.cpp": "compressknow.evaluate.runtimes.llama_cpp:LlamaCpp",
        "server": "compressknow.evaluate.runtimes.server:Server",
    },
)


def choose_runtime(located: Located, named: str | None = None) -> Runtime:
    """Return the runtime of that name; where none is named, the one that is meant for such a model.

    Raises UsageError where there is none of that name, or it does not read such models.
    """
    if named is None:
        return next(RUNTIMES[name] for name in reversed(list(RUNTIMES)) if RUNTIMES[name].is_default(located))
    runtime = RUNTIMES[named]
    if runtime.reads(located):
        return runtime
    others = [name for name in RUNTIMES if RUNTIMES[name].reads(located)]
    raise UsageError(
        f"--runtime {named} does not run {located.name}.",
        hint=f"Leave it out, or pass --runtime {' or '.join(others)}.",
    )
