"""Model handles: models that are located, hashed, and loaded on demand by what runs them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from compressknow.base.errors import CheckpointError, UnsupportedError, UsageError
from compressknow.base.packages import is_installed, require
from compressknow.base.progress import PanicError, no_panics
from compressknow.engine.identity import Located, describe
from compressknow.engine.language_model import AUTO, CPU, load_language_model
from compressknow.engine.load import reason_of
from compressknow.evaluate.evaluate import Prompts, make_prompts
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.records import ModelRecord
from compressknow.evaluate.runtimes import LLAMA_CPP, SERVER, TRANSFORMERS, Loaded, LoadedInTransformers, Settings
from compressknow.evaluate.sources import Opened, Task
from compressknow.evaluate.text import check_family

if TYPE_CHECKING:
    from compressknow.engine.identity import Contents
    from compressknow.evaluate.runtimes.server import LoadedFromServer
    from compressknow.evaluate.scoring.llama_cpp import LoadedInLlamaCpp
    from compressknow.evaluate.scoring.reading import TextReader


# On servers a part of the key of stored answers, and nothing else: facts are answered one by one.
SERVER_BATCH_SIZE = 32


class Runtime(abc.ABC):
    """Something that runs models; `name` is what the user calls it with ``--runtime``."""

    name: ClassVar[str]

    @abc.abstractmethod
    def reads(self, located: Located) -> bool:
        """Return whether it can run such a model at all: a folder, a file of its format, an address. Opens nothing."""

    def is_default(self, located: Located) -> bool:
        """Return whether it runs a model that it reads where the user names no runtime."""
        return self.reads(located)

    @abc.abstractmethod
    def resolve_settings(self, settings: Settings) -> Settings:
        """Return the settings with what they mean on this machine. Raise UsageError for one that it cannot keep."""

    def key(self) -> tuple[str, ...]:
        """Return what besides model and settings decides the answers: name and build; nothing for transformers."""
        return ()

    @abc.abstractmethod
    def open(self, located: Located, settings: Settings) -> Loaded:
        """Load a model; `settings` are those of `resolve_settings`. Raises CompressknowError where it cannot be run."""


class Transformers(Runtime):
    """transformers, with the engine's layers: checkpoint folders, Hub ids, and GGUF files unpacked to floats."""

    name = TRANSFORMERS

    def reads(self, located: Located) -> bool:
        return located.url is None

    def resolve_settings(self, settings: Settings) -> Settings:
        return settings.here()

    def open(self, located: Located, settings: Settings) -> LoadedInTransformers:
        return LoadedInTransformers(
            load_language_model(
                located.path,
                device=settings.device,
                dtype=settings.computed_in,
                trust_remote_code=settings.trust_remote_code,
            )
        )


class LlamaCpp(Runtime):
    """llama.cpp: GGUF files as they are deployed, in its own kernels, on this machine's processor."""

    name = LLAMA_CPP

    def reads(self, located: Located) -> bool:
        return located.url is None and located.path.suffix == ".gguf"

    def is_default(self, located: Located) -> bool:
        """Return whether the extra is installed; else transformers unpacks the files."""
        return self.reads(located) and is_installed("llama_cpp_py_sync")

    def resolve_settings(self, settings: Settings) -> Settings:
        """Choose the processor: other devices are refused. What it computes in is the file's own, not `dtype`."""
        if settings.device not in (AUTO, CPU):
            raise UsageError(
                f"--device {settings.device}: GGUF files run on the processor here.",
                hint="Leave out --device, or pass --runtime transformers to unpack them.",
            )
        return replace(settings, device=CPU, dtype=None)

    def key(self) -> tuple[str, ...]:
        """Return name and build: another build may compute otherwise."""
        from compressknow.gguf.llama_cpp import load_native

        return self.name, load_native().build

    def open(self, located: Located, settings: Settings) -> LoadedInLlamaCpp:  # noqa: ARG002
        from compressknow.evaluate.scoring.llama_cpp import LoadedInLlamaCpp

        return LoadedInLlamaCpp(located)


class Server(Runtime):
    """OpenAI-compatible server, by its address: http://HOST:PORT."""

    name = SERVER

    def reads(self, located: Located) -> bool:
        return located.url is not None

    def resolve_settings(self, settings: Settings) -> Settings:
        """Return the settings; device, dtype and batches are the server's own business."""
        return replace(settings, batch_size=SERVER_BATCH_SIZE)

    def open(self, located: Located, settings: Settings) -> LoadedFromServer:
        require("requests", "urllib3")
        from compressknow.evaluate.runtimes.server import connect

        assert located.url is not None
        return connect(located.url, settings)


# The last one that reads a model, and is meant for it, runs it.
_RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (Transformers(), LlamaCpp(), Server())}


def choose_runtime(located: Located, named: str | None = None) -> Runtime:
    """Return the runtime of that name, or the one meant for such a model. Raise UsageError where it cannot run it."""
    if named is None:
        return next(runtime for runtime in reversed(_RUNTIMES.values()) if runtime.is_default(located))
    runtime = _RUNTIMES[named]
    if runtime.reads(located):
        return runtime
    others = [name for name, each in _RUNTIMES.items() if each.reads(located)]
    raise UsageError(
        f"--runtime {named} does not run {located.name}.",
        hint=f"Leave it out, or pass --runtime {' or '.join(others)}.",
    )


class ModelHandle:
    """Model that is located and hashed at once, and loaded on demand."""

    def __init__(self, located: Located, settings: Settings) -> None:
        self.located, self._settings = located, settings

    @cached_property
    def runtime(self) -> Runtime:
        """Return what runs it. Raise UsageError where the settings name a runtime that does not."""
        return choose_runtime(self.located, self._settings.runtime)

    @cached_property
    def settings(self) -> Settings:
        """Return the settings on this machine. Raise UsageError where it has no such device."""
        return self.runtime.resolve_settings(self._settings)

    @cached_property
    def contents(self) -> Contents:
        """Return what its files hold, which are read and hashed once; of a model on a server, what it answers."""
        from compressknow.engine.identity import Contents, read_contents

        if self.located.url is not None:
            return Contents(str(self.loaded.sha256))
        return read_contents(self.located)

    @cached_property
    def sha256(self) -> str:
        return self.contents.sha256

    @cached_property
    def loaded(self) -> Loaded:
        loaded = self.runtime.open(self.located, self.settings)
        try:
            self.check_unchanged()
        except CheckpointError:
            loaded.release()
            raise
        return loaded

    def check_sound(self) -> None:
        """Raise CheckpointError where a weight holds NaN or infinity."""
        self.contents.check_finite(self.located, trust_remote_code=self._settings.trust_remote_code)

    def check_unchanged(self) -> None:
        """Raise CheckpointError where what it answers may not be that of the files that were hashed, if they were."""
        if "contents" in self.__dict__:
            self.contents.check_unchanged()

    def make_prompts(self, probe: Probe) -> Prompts:
        """Build the prompts of the probe as this model reads them."""
        loaded = self.loaded
        try:
            with no_panics():
                return make_prompts(loaded.make_scorer(probe), self.settings.batch_size)
        except PanicError as error:
            raise CheckpointError(
                f"The tokenizer of {self.located.name} fails on the facts of {probe.name}.",
                why=reason_of(error),
                hint="See that its tokenizer.json is the model's own, and whole.",
            ) from error

    def make_reader(self) -> TextReader:
        """Return the model as a reader of text. Raise UnsupportedError where it does not continue text, or where its
        runtime does not give the probabilities of all tokens.
        """
        check_family(self.loaded.architecture, self.loaded.family)
        return self.loaded.make_reader()

    def release(self) -> None:
        """Let go of the model's memory; it is loaded again on demand."""
        loaded = self.__dict__.pop("loaded", None)
        if loaded is not None:
            loaded.release()

    def check_tasks(self, probes: Sequence[Opened]) -> None:
        """Raise UnsupportedError where there is a task among the probes, and no runtime of tasks runs the model."""
        task = next((probe for probe in probes if isinstance(probe, Task)), None)
        if task is None or self.runtime.name == TRANSFORMERS:
            return
        raise UnsupportedError(
            f"{task.name} cannot evaluate {self.located.name} in {self.runtime.name}.",
            why="Tasks are run by lm-eval, on models of transformers.",
            hint="Choose probes of facts; or, for a GGUF file, pass --runtime transformers.",
        )

    def copy_in_other_precision(self) -> ModelHandle | None:
        """Return the same model in bfloat16, or float32 where it runs in less; None where it has one precision."""
        if self.runtime.name != TRANSFORMERS:
            return None
        dtype = "bfloat16" if self.settings.computed_in == "float32" else "float32"
        other = ModelHandle(self.located, replace(self.settings, dtype=dtype))
        other.contents = self.contents
        return other

    def describe(self) -> dict[str, Any]:
        """Return what the model's files say of it."""
        changed = {"changed": True} if self.contents.changed else {}
        return describe(self.located) | changed

    def make_record(self) -> ModelRecord:
        """Return the "model" entry of ``probe.json``."""
        loaded = self.loaded
        evaluated: dict[str, Any] = {
            "sha256": self.sha256,
            "architecture": loaded.architecture,
            "family": loaded.family,
            "parameters": loaded.parameters,
            "vocabulary": loaded.vocabulary,
            "device": self.located.url or self.settings.device,
            "computed_in": loaded.computed_in,
        }
        if runtime := loaded.make_record():
            evaluated["runtime"] = runtime
        known = {key: value for key, value in evaluated.items() if value is not None}
        return ModelRecord.from_dict(self.describe() | dict(loaded.describe()) | known)


def make_handles(
    located: Sequence[Located], settings: Settings, probes: Sequence[Opened] = (), *, timed: bool = False
) -> list[ModelHandle]:
    """Return handles of models that are compared, to be evaluated on `probes` and, if `timed`, to be measured: where
    the settings name a runtime, it runs those that it reads, and the others run as if none was named.

    Raises UsageError where it reads none of them, UnsupportedError or UsageError where a model cannot be evaluated so,
    then CompressknowError where a server does not answer: before any model is evaluated.
    """
    own = [settings] * len(located)
    if settings.runtime is not None:
        runtime, unnamed = _RUNTIMES[settings.runtime], replace(settings, runtime=None)
        if located and not any(map(runtime.reads, located)):
            choose_runtime(located[-1], settings.runtime)
        own = [settings if runtime.reads(each) else unnamed for each in located]
    handles = [ModelHandle(each, of) for each, of in zip(located, own, strict=True)]
    for handle in handles:
        handle.check_tasks(probes)
        if timed and handle.located.url is not None:
            url = handle.located.url
            raise UsageError(f"--time measures models on this machine: {url} is a server.", hint="Leave --time out.")
    for handle in handles:
        if handle.located.url is not None:
            # Found by what it answers.
            _ = handle.sha256
    return handles
