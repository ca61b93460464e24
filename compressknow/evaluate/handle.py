"""Model handles: models that are located, hashed, and loaded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, UnsupportedError, UsageError
from compressknow.base.progress import PanicError, no_panics
from compressknow.engine.identity import Located, describe
from compressknow.engine.load import reason_of
from compressknow.evaluate.evaluate import Prompts, make_prompts
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.records import ModelRecord
from compressknow.evaluate.runtimes import RUNTIMES, Loaded, Runtime, Settings, choose_runtime
from compressknow.evaluate.sources import Opened, Task
from compressknow.evaluate.text import check_family

if TYPE_CHECKING:
    from compressknow.engine.contents import Contents
    from compressknow.evaluate.scoring.reading import TextReader


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

    @property
    def where(self) -> str:
        return self.runtime.where(self.located, self.settings)

    @cached_property
    def contents(self) -> Contents:
        """Return what its files hold; they are read and hashed once."""
        return self.runtime.contents(self.located, self.settings)

    @cached_property
    def sha256(self) -> str:
        return self.contents.sha256

    @cached_property
    def loaded(self) -> Loaded:
        loaded = self.runtime.open(self.located, self.settings)
        try:
            self.check_unchanged()
        except BaseException:
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
        if task is None or self.runtime.runs_tasks:
            return
        raise UnsupportedError(
            f"{task.name} cannot evaluate {self.located.name} in {self.runtime.name}.",
            why="Tasks are run by lm-eval, on models of transformers.",
            hint="Choose probes of facts; or, for a GGUF file, pass --runtime transformers.",
        )

    def check_timed(self) -> None:
        """Raise UsageError where the speed of the model cannot be measured on this machine."""
        if (url := self.located.url) is not None:
            raise UsageError(f"--time measures models on this machine: {url} is a server.", hint="Leave --time out.")

    def check_reachable(self) -> None:
        """Find the model; raise CompressknowError where it is a server's that does not answer."""
        if self.located.url is not None:
            # Found by what it answers.
            _ = self.sha256

    def copy_in_other_precision(self) -> ModelHandle | None:
        """Return the same model in bfloat16 or, where it is run in less than float32, in that; None where its runtime
        has one precision.
        """
        if not self.runtime.has_precisions:
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
            "device": self.where,
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
    handles = [ModelHandle(each, own) for each, own in zip(located, _choose_settings(located, settings), strict=True)]
    for handle in handles:
        handle.check_tasks(probes)
        if timed:
            handle.check_timed()
    for handle in handles:
        handle.check_reachable()
    return handles


def _choose_settings(located: Sequence[Located], settings: Settings) -> list[Settings]:
    named = settings.runtime
    if named is None:
        return [settings] * len(located)
    read = [RUNTIMES[named].reads(each) for each in located]
    if located and not any(read):
        choose_runtime(located[-1], named)
    unnamed = replace(settings, runtime=None)
    return [settings if reads else unnamed for reads in read]
