"""Model handles: models that are located, hashed, and loaded on demand by what runs them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError, UnusedOptions, UsageError
from compressknow.base.format import clean
from compressknow.base.packages import is_installed, require
from compressknow.base.progress import Listener, PanicError, Stage, count_progress, report_progress, translate_panics
from compressknow.base.reading import check_unchanged, compute_sha256, find_mismatch, hash_json
from compressknow.engine.identity import TOKENIZER_FILES, Contents, LocatedModel, describe, read_contents
from compressknow.engine.language_model import AUTO, CPU, LanguageModel, find_named_family, load_language_model
from compressknow.engine.load import find_reason, load_tokenizer
from compressknow.evaluate.evaluate import Prompts
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.records import ModelRecord
from compressknow.evaluate.runtimes import LLAMA_CPP, SERVER, TRANSFORMERS, Runtime, Settings
from compressknow.evaluate.sources import Opened, Task
from compressknow.evaluate.text import TextReader, check_family
from compressknow.model.checkpoint import open_checkpoint, read_json

if TYPE_CHECKING:
    from compressknow.evaluate.runtimes.server import ServedScorer
    from compressknow.evaluate.scoring.llama_cpp import GgufReader, LlamaCppScorer
    from compressknow.evaluate.scoring.scorer import Scorer


# The continuations of these prompts identify a model on a server, whose name is not enough.
PROMPTS = ("The capital of France is", "Water boils at", "The author of Hamlet is", "1, 1, 2, 3, 5, 8,")
WRITTEN_TOKENS = 8
# Bytes that take more than a second to hash.
LARGE = 1 << 30
# Only part of the key of stored answers: servers evaluate facts one by one.
SERVER_BATCH_SIZE = 32


class Transformers(Runtime):
    """transformers, with the engine's layers: checkpoint folders, Hub ids, and GGUF files unpacked to floats."""

    name = TRANSFORMERS
    language_model: LanguageModel

    def __init__(self, located: LocatedModel, settings: Settings, made: LanguageModel | None = None) -> None:
        """Load a model, unless it is `made` in memory."""
        trusted, dtype = settings.trust_remote_code, settings.computed_in
        self.language_model = loaded = made or load_language_model(
            located.path, device=settings.device, dtype=dtype, trust_remote_code=trusted
        )
        self.family, self.architecture = loaded.family, type(loaded.model).__name__
        self.computed_in, self.vocabulary, self.parameters = loaded.dtype, loaded.vocabulary, loaded.parameters

    @classmethod
    def reads(cls, located: LocatedModel) -> bool:
        return located.url is None

    @classmethod
    def resolve_settings(cls, settings: Settings) -> Settings:
        return settings.here()

    def make_scorer(self, probe: Probe) -> Scorer:
        from compressknow.evaluate.scoring.families import make_scorer

        return make_scorer(self.language_model.model, self.language_model.tokenizer, self.family, probe)

    def make_reader(self) -> TextReader:
        from compressknow.evaluate.scoring.decoding import TransformersReader

        return TransformersReader(self.language_model)


class LlamaCpp(Runtime):
    """llama.cpp: GGUF files as they are deployed, with its own kernels, on as many threads as torch uses."""

    name = LLAMA_CPP
    family = "causal"

    def __init__(self, located: LocatedModel, settings: Settings) -> None:  # noqa: ARG002
        from compressknow.gguf.llama_cpp import GgufModel

        self._model = GgufModel(located.path)
        self._readers: list[LlamaCppScorer | GgufReader] = []
        self.architecture = self._model.architecture
        self.computed_in = f"llama.cpp {self._model.native.build}"
        self.parameters, self.vocabulary = self._model.parameters, self._model.vocabulary

    @classmethod
    def reads(cls, located: LocatedModel) -> bool:
        return located.url is None and located.path.suffix == ".gguf"

    @classmethod
    def resolve_settings(cls, settings: Settings) -> Settings:
        """Return settings for the CPU, the only device here, without a dtype, which the file determines."""
        if settings.device not in (AUTO, CPU):
            raise UsageError(
                f"--device {settings.device}: GGUF files run only on the CPU.",
                hint="Leave out --device, or pass --runtime transformers to unpack them.",
            )
        return replace(settings, device=CPU, dtype=None)

    @classmethod
    def key(cls) -> tuple[str, ...]:
        """Return name and build, since builds may compute differently."""
        from compressknow.gguf.llama_cpp import load_native

        return cls.name, load_native().build

    def make_scorer(self, probe: Probe) -> LlamaCppScorer:
        from compressknow.evaluate.scoring.llama_cpp import LlamaCppScorer

        scorer = LlamaCppScorer(self._model, probe)
        self._readers.append(scorer)
        return scorer

    def make_reader(self) -> GgufReader:
        from compressknow.evaluate.scoring.llama_cpp import GgufReader

        reader = GgufReader(self._model)
        self._readers.append(reader)
        return reader

    @cached_property
    def _types(self) -> dict[str, dict[str, int]]:
        from compressknow.gguf.llama_cpp import count_types

        return count_types(self._model.path)

    def make_record(self) -> Mapping[str, Any]:
        """Return the name, the build, and the types of each group of layers."""
        return {"name": LLAMA_CPP, "build": self._model.native.build, "types": self._types}

    def describe(self) -> Mapping[str, Any]:
        """Return the type of most weights, the bits per weight and, for a file made by compressknow, its source."""
        from compressknow.gguf.record import PREFIX, SOURCE

        values = {key: self._model.meta(f"{PREFIX}.source.{key}") for key in SOURCE}
        source = {key: value for key, value in values.items() if value}
        quantization = f"GGUF {_describe_type(self._model.file_type, self._model.bytes, self.parameters)}"
        return {"quantization": quantization, **({"source": source} if source else {})}

    def release(self) -> None:
        """Close the contexts, then the model that they use."""
        for reader in self._readers:
            reader.release()
        self._model.close()


class Server(Runtime):
    """OpenAI-compatible server at an address, http://HOST:PORT."""

    name = SERVER
    family = "causal"

    def __init__(self, located: LocatedModel, settings: Settings) -> None:
        require("requests", "urllib3")
        from compressknow.evaluate.runtimes.server import connect

        assert located.url is not None
        self._served, self._parallel = connect(located.url, settings), settings.parallel
        served = self._served
        self.architecture = served.name
        self.computed_in = _describe_type(self._type or "its own precision")
        self.parameters = self._read_property("n_params", int)
        self.gives_scores = served.scores
        # A server does not give access to files. Hash its address, the model's name, the build, the model's size, and
        # its greedy continuations of a few prompts instead.
        identity = [served.client.url, served.model, served.name, served.build]
        identity += [self._read_property(key, int) for key in ("n_params", "size")] + [self._type]
        identity += [served.write(served.encode(prompt, True), WRITTEN_TOKENS) for prompt in PROMPTS]
        self.sha256 = hash_json(identity)

    @classmethod
    def reads(cls, located: LocatedModel) -> bool:
        return located.url is not None

    @classmethod
    def resolve_settings(cls, settings: Settings) -> Settings:
        """Return the settings with a fixed batch size; the server decides on device, dtype and batches."""
        return replace(settings, batch_size=SERVER_BATCH_SIZE)

    def make_scorer(self, probe: Probe) -> ServedScorer:
        from compressknow.evaluate.runtimes.server import ServedScorer

        return ServedScorer(self._served, probe, self._parallel)

    def make_record(self) -> Mapping[str, Any]:
        """Return the name and build, the address, the model's name there, and what the server supports: ``scores``
        (log-probabilities of candidates) and ``distribution`` (of the first token)."""
        served = self._served
        build = " ".join(filter(None, (served.name, served.build)))
        location = {"url": served.client.url, "model": served.model}
        return {"name": SERVER, "build": build, **location, "scores": served.scores, "distribution": served.tokens}

    def describe(self) -> Mapping[str, Any]:
        size = self._read_property("size", int)
        quantization = self._type and _describe_type(self._type, size, self.parameters)
        known = {"bytes": size, "dtype": self._type and _describe_type(self._type), "quantization": quantization}
        name = self._served.model.rpartition("/")[2] or self._served.model
        return {"name": clean(name, 80), **{key: value for key, value in known.items() if value is not None}}

    def release(self) -> None:
        self._served.client.close()

    @property
    def _type(self) -> str | None:
        """Return llama.cpp's name of the type of most weights, which it guesses if the file does not have it."""
        ftype = self._read_property("ftype", str)
        return ftype and str(ftype).removeprefix("(guessed) ")

    def _read_property(self, key: str, kind: type) -> Any:
        value = self._served.about.get(key)
        return None if find_mismatch(value, kind) else value


def _describe_type(name: str, size: int | None = None, parameters: int | None = None) -> str:
    """Return llama.cpp's name of a file's type, without the bits per weight of the type, which are not those of a file
    of several types; with those of tensors of this `size` in bytes.

    >>> _describe_type("IQ4_NL - 4.5 bpw", 86_388_480, 134_515_008), _describe_type("TQ1_0 - 1.69 bpw ternary")
    ('IQ4_NL, 5.14 bits per weight', 'TQ1_0 ternary')
    """
    name = re.sub(r" - [\d.]+ bpw", "", name)
    return f"{name}, {8 * size / parameters:.3g} bits per weight" if size and parameters else name


_RUNTIMES: dict[str, type[Runtime]] = {runtime.name: runtime for runtime in (Transformers, LlamaCpp, Server)}


def choose_runtime(located: LocatedModel, named: str | None) -> type[Runtime]:
    """Return the runtime of that name, or the default for the model. Raise UsageError if it cannot run the model."""
    if named is None:
        if Server.reads(located):
            return Server
        # Without the "gguf" extra, transformers unpacks GGUF files.
        return LlamaCpp if LlamaCpp.reads(located) and is_installed("llama_cpp_py_sync") else Transformers
    runtime = _RUNTIMES[named]
    if runtime.reads(located):
        return runtime
    suitable = [name for name, each in _RUNTIMES.items() if each.reads(located)]
    raise UsageError(
        f"--runtime {named} cannot run {located.name}.",
        hint=f"Leave it out, or pass --runtime {' or '.join(suitable)}.",
    )


class ModelHandle:
    """Model that is located, and that is hashed and loaded on demand."""

    def __init__(self, located: LocatedModel, settings: Settings) -> None:
        self.located, self._settings = located, settings

    @cached_property
    def runtime(self) -> type[Runtime]:
        """Return the model's runtime. Raise UsageError if the settings name one that cannot run it."""
        return choose_runtime(self.located, self._settings.runtime)

    @cached_property
    def settings(self) -> Settings:
        """Return the settings resolved for this machine. Raise UsageError if it has no such device."""
        return self.runtime.resolve_settings(self._settings)

    @cached_property
    def contents(self) -> Contents:
        """Read and hash the model's files, once; for a model on a server, hash its answers to a few prompts."""
        if self.located.url is not None:
            return Contents(str(self.loaded.sha256))
        return read_contents(self.located)

    @cached_property
    def sha256(self) -> str:
        return self.contents.sha256

    def list_decisive(self, *, writes: bool) -> list[str]:
        """Return what else determines the answers, besides the hashed files: whether it may run Python code from its
        folder, and a hash of its generation settings if it `writes` texts or they may name a decoder's first token."""
        trusted = self._settings.trust_remote_code and self.runtime is Transformers
        runs_code = trusted and any(path.suffix == ".py" for path in self.located.files)
        path = self.located.path / "generation_config.json"
        # The family is None for a BartModel, say, which has a decoder.
        matters = path.is_file() and (writes or self.named_family in ("seq2seq", None))
        return [*(["own code"] if runs_code else []), *([compute_sha256(path)] if matters else [])]

    @cached_property
    def loaded(self) -> Runtime:
        loaded = self.runtime(self.located, self.settings)
        try:
            self.check_unchanged()
        except CheckpointError:
            loaded.release()
            raise
        return loaded

    @property
    def named_family(self) -> str | None:
        """Return the family, as far as the files tell before the model is loaded."""
        if self.runtime is not Transformers:
            return self.runtime.family
        config = self.located.path / "config.json"
        return find_named_family(read_json(config)) if config.is_file() else None

    @cached_property
    def named_vocabulary(self) -> str | None:
        """Return a hash of the tokens, as far as the files tell before the weights are loaded."""
        path, trusted = self.located.path, self._settings.trust_remote_code
        if self.runtime is not Transformers or path.suffix == ".gguf":
            return None
        tokenizer = load_tokenizer(path, trust_remote_code=trusted)
        from compressknow.model.meta import build_meta_model

        try:
            names = open_checkpoint(path).tensors
            tree = build_meta_model(path, trust_remote_code=trusted, tensor_names=names)
            return LanguageModel(tree, tokenizer, self.named_family or "").vocabulary
        except CompressknowError:
            return None

    def has_tokenizer_of(self, other: ModelHandle) -> bool:
        """Return whether the tokenizer files of both models are identical."""

        def read(folder: Path) -> list[bytes | None]:
            return [(folder / name).read_bytes() if (folder / name).is_file() else None for name in TOKENIZER_FILES]

        return read(self.located.path) == read(other.located.path)

    def check_sound(self, on_progress: Listener | None = None) -> None:
        """Raise CheckpointError if a weight is NaN or infinite; hashing large files is reported as a stage."""
        if "contents" not in self.__dict__ and self.located.url is None:
            total = sum(path.stat().st_size for path in self.located.files)
            listener = on_progress if total >= LARGE else None
            with report_progress(listener, Stage("hash", self.located.name)) as advance:
                self.contents = read_contents(self.located, count_progress(advance, total))
        self.contents.check_finite(self.located, trust_remote_code=self._settings.trust_remote_code)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the files have changed since they were hashed."""
        if "contents" in self.__dict__:
            check_unchanged(self.contents.states)

    def make_prompts(self, probe: Probe) -> Prompts:
        """Build the prompts of the probe for this model."""
        loaded = self.loaded
        try:
            with translate_panics():
                return Prompts(loaded.make_scorer(probe), self.settings.batch_size)
        except PanicError as error:
            raise CheckpointError(
                f"The tokenizer of {self.located.name} fails on the facts of {probe.name}.",
                why=find_reason(error),
                hint="Check that its tokenizer.json is complete and belongs to this model.",
            ) from error

    def make_reader(self) -> TextReader:
        """Return a reader of running text. Raise UnsupportedError if the model or its runtime cannot be one."""
        check_family(self.loaded.architecture, self.loaded.family)
        return self.loaded.make_reader()

    def release(self) -> None:
        """Free the model's memory; it is loaded again on demand."""
        loaded = self.__dict__.pop("loaded", None)
        if loaded is not None:
            loaded.release()

    def check_tasks(self, probes: Sequence[Opened]) -> None:
        """Raise UnsupportedError if a task among the probes cannot evaluate the model, as far as its files tell."""
        for task in (probe for probe in probes if isinstance(probe, Task)):
            if self.runtime.name != TRANSFORMERS:
                raise UnsupportedError(
                    f"{task.name} cannot evaluate {self.located.name} in {self.runtime.name}.",
                    why="lm-eval runs tasks, and only in transformers.",
                    hint="Choose probes of facts; or, for a GGUF file, pass --runtime transformers.",
                )
            if self.named_family:
                task.check_family(self.named_family)

    def copy_in_other_precision(self) -> ModelHandle | None:
        """Return the model in bfloat16 if it runs in float32, else in float32; None outside of transformers."""
        if self.runtime.name != TRANSFORMERS:
            return None
        dtype = "bfloat16" if self.loaded.computed_in.startswith("float32") else "float32"
        other = ModelHandle(self.located, replace(self.settings, dtype=dtype))
        other.contents = self.contents
        return other

    def describe(self) -> dict[str, Any]:
        """Return what the model's files say about it."""
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
    located: Sequence[LocatedModel], settings: Settings, probes: Sequence[Opened] = (), *, timed: bool = False
) -> list[ModelHandle]:
    """Return handles of models to be compared on `probes` and, if `timed`, measured. If the settings name a runtime,
    models that it cannot read run in their default one. Raises UsageError if it can read none, UnsupportedError or
    UsageError if a model cannot be evaluated or measured, then CompressknowError if a server does not answer."""
    named, without_runtime = settings.runtime, replace(settings, runtime=None)
    readable = [named is None or _RUNTIMES[named].reads(each) for each in located]
    if located and not any(readable):
        choose_runtime(located[-1], named)
    default, server_settings = Settings(), ("model", "parallel", "timeout")
    unused = [name for name in server_settings if getattr(settings, name) != getattr(default, name)]
    if unused and not any(each.url for each in located):
        raise UnusedOptions(
            f"--{unused[0]} is for a server, and no model here is on one.",
            hint="Give an address, http://HOST:PORT, or leave it out.",
            names=["model_name" if name == "model" else name for name in unused],
        )
    handles = [
        ModelHandle(each, settings if reads else without_runtime) for each, reads in zip(located, readable, strict=True)
    ]
    for handle in handles:
        handle.check_tasks(probes)
        if timed and handle.located.url is not None:
            url = handle.located.url
            raise UsageError(f"--time measures models on this machine: {url} is a server.", hint="Leave --time out.")
    for handle in handles:
        if handle.located.url is not None:
            # Connects to the server.
            _ = handle.sha256
    return handles
