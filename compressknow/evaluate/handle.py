"""A model to evaluate: how it is run, what runs it, and what its answers stand beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, UnsupportedError, UsageError, did_you_mean
from compressknow.base.progress import PanicError, no_panics
from compressknow.engine.identity import Located, describe
from compressknow.engine.language_model import AUTO, CPU, check_device, device_of
from compressknow.engine.load import reason_of
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.evaluate import BATCH_SIZE, Prompts, prompts_of
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.records import ModelRecord
from compressknow.evaluate.runtimes import RUNTIMES, Loaded, Runtime, runtime_for
from compressknow.evaluate.sources import Opened, Task
from compressknow.evaluate.text import RunningText, refuse_other_families

if TYPE_CHECKING:
    from compressknow.engine.contents import Contents
    from compressknow.evaluate.distributions import Distributions
    from compressknow.evaluate.scoring.reading import TextReader
    from compressknow.evaluate.scoring.scorer import Whole


@dataclass(frozen=True)
class Settings:
    """How a model is run. Float32 on the CPU by default, where the batch size shows in the last digits
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
        """These settings with the device that they mean on this machine; imports torch."""
        return replace(self, device=device_of(self.device))

    @property
    def computed_in(self) -> str:
        return self.dtype or ("float32" if self.device == CPU else "auto")


class ModelHandle:
    """A model located and hashed at once, and loaded on demand."""

    def __init__(self, located: Located, settings: Settings) -> None:
        self.located, self._settings = located, settings

    @cached_property
    def runtime(self) -> Runtime:
        """What runs it. Raises UsageError where the settings name one that does not."""
        return runtime_for(self.located, self._settings.runtime)

    @cached_property
    def settings(self) -> Settings:
        """With the device of this machine. Raises UsageError where it has no such device."""
        return self.runtime.settled(self._settings)

    @property
    def where(self) -> str:
        """Where it computes."""
        return self.runtime.where(self.located, self.settings)

    @cached_property
    def contents(self) -> Contents:
        """What its files hold; they are read and hashed once."""
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

    def prompts(self, probe: Probe) -> Prompts:
        """The probe's facts as this model reads them."""
        loaded = self.loaded
        try:
            with no_panics():
                return prompts_of(loaded.scorer(probe), self.settings.batch_size)
        except PanicError as error:
            raise CheckpointError(
                f"The tokenizer of {self.located.name} fails on the facts of {probe.name}.",
                why=reason_of(error),
                hint="See that its tokenizer.json is the model's own, and whole.",
            ) from error

    def reader(self) -> TextReader:
        """The model as it reads running text. Raises UnsupportedError where it does not continue text, or where its
        runtime does not give the probabilities of all tokens.
        """
        refuse_other_families(self.loaded.architecture, self.loaded.family)
        return self.loaded.reader()

    def release(self) -> None:
        """Let go of the model's memory; it is loaded again on demand."""
        loaded = self.__dict__.pop("loaded", None)
        if loaded is not None:
            loaded.release()

    def refuse_tasks(self, probes: Sequence[Opened]) -> None:
        """Raise UnsupportedError where there is a task among the probes, and no runtime of tasks runs the model."""
        task = next((probe for probe in probes if isinstance(probe, Task)), None)
        if task is None or self.runtime.runs_tasks:
            return
        raise UnsupportedError(
            f"{task.name} cannot evaluate {self.located.name} in {self.runtime.name}.",
            why="Tasks are run by lm-eval, on models of transformers.",
            hint="Choose probes of facts; or, for a GGUF file, pass --runtime transformers.",
        )

    def refuse_untimed(self) -> None:
        """Raise UsageError where the speed of the model cannot be measured on this machine."""
        if (url := self.located.url) is not None:
            raise UsageError(f"--time measures models on this machine: {url} is a server.", hint="Leave --time out.")

    def reach(self) -> None:
        """Find the model; raise CompressknowError where it is a server's that does not answer."""
        if self.located.url is not None:
            # Found by what it answers.
            _ = self.sha256

    def in_another_precision(self) -> ModelHandle | None:
        """The same model in bfloat16 or, where it is run in less than float32, in that; None where what runs it has one
        precision.
        """
        if not self.runtime.has_precisions:
            return None
        dtype = "bfloat16" if self.settings.computed_in == "float32" else "float32"
        other = ModelHandle(self.located, replace(self.settings, dtype=dtype))
        other.contents = self.contents
        return other

    def described(self) -> dict[str, Any]:
        """What the model's files tell of it."""
        changed = {"changed": True} if self.contents.changed else {}
        return describe(self.located) | changed

    def record(self) -> ModelRecord:
        """The "model" entry of ``probe.json``."""
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
        if runtime := loaded.record():
            evaluated["runtime"] = runtime
        known = {key: value for key, value in evaluated.items() if value is not None}
        return ModelRecord.from_dict(self.described() | dict(loaded.described()) | known)


def handles_of(
    located: Sequence[Located], settings: Settings, probes: Sequence[Opened] = (), *, timed: bool = False
) -> list[ModelHandle]:
    """Several models that are set side by side, to be evaluated on `probes` and, if `timed`, to be measured: where the
    settings name a runtime, it runs those that it reads, and the others run as if none was named.

    Raises UsageError where it reads none of them, UnsupportedError or UsageError where a model cannot be evaluated so,
    then CompressknowError where a server does not answer: before any model is evaluated.
    """
    handles = [ModelHandle(each, own) for each, own in zip(located, _settings_of(located, settings), strict=True)]
    for handle in handles:
        handle.refuse_tasks(probes)
        if timed:
            handle.refuse_untimed()
    for handle in handles:
        handle.reach()
    return handles


def _settings_of(located: Sequence[Located], settings: Settings) -> list[Settings]:
    named = settings.runtime
    if named is None:
        return [settings] * len(located)
    read = [RUNTIMES[named].reads(each) for each in located]
    if located and not any(read):
        runtime_for(located[-1], named)
    unnamed = replace(settings, runtime=None)
    return [settings if reads else unnamed for reads in read]


@dataclass(frozen=True)
class Beside:
    """What the answers of a model stand beside.

    Attributes
    ----------
    reference : answers of the original: the same tokens are evaluated at the answer's first position.
    known : answers of this very model to these probes, with another reference: what it answers is taken from there.
    whole : the original's distributions over the whole vocabulary: those of `reference` are compared with this model's;
        without a reference this model is the original, and they are kept.
    """

    reference: Answers | None = None
    known: Answers | None = None
    whole: Distributions | None = None

    @property
    def sha256(self) -> str | None:
        """Of the original; None where this model is the original."""
        return self.reference.record.model.sha256 if self.reference else None

    @property
    def runtime(self) -> str | None:
        """What ran the original where that was not transformers."""
        ran = self.reference.record.model.runtime if self.reference else None
        return str(ran["name"]) if ran else None

    def of_batches(self, probe: Probe | RunningText) -> Whole | None:
        """What is done with each batch's distributions: the original's are kept, those of others compared with them."""
        if self.whole is None:
            return None
        rows = self.whole.of(probe)
        return rows.divergence if self.reference else rows.keep
