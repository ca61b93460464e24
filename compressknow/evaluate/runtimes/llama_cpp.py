"""llama.cpp: it runs GGUF files as they are deployed, in its own kernels, on this machine's processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UsageError
from compressknow.engine.language_model import AUTO, CPU
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.runtimes import Loaded, Runtime
from compressknow.gguf.llama_cpp import GgufModel

if TYPE_CHECKING:
    from compressknow.engine.identity import Located
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.scoring.llama_cpp import GgufReader, LlamaCppScorer


class LlamaCpp(Runtime):
    """Registered as ``llama.cpp``."""

    name = "llama.cpp"
    help = "GGUF files, in llama.cpp's own kernels; the default for these where it is installed"

    def reads(self, located: Located) -> bool:
        return located.url is None and located.path.suffix == ".gguf"

    def is_default(self, located: Located) -> bool:
        """Return whether the extra is installed; else transformers unpacks the files."""
        from compressknow.gguf.llama_cpp import is_there

        return self.reads(located) and is_there()

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
        return LoadedInLlamaCpp(located)


class LoadedInLlamaCpp(Loaded):
    """GGUF file, memory-mapped."""

    family = "causal"

    def __init__(self, located: Located) -> None:

        self._model = GgufModel(located.path)
        self._readers: list[LlamaCppScorer | GgufReader] = []
        self.architecture = self._model.architecture
        self.computed_in = f"llama.cpp {self._model.native.build}"
        self.parameters = self._model.parameters

    @property
    def vocabulary(self) -> str:  # type: ignore[override]
        return self._model.vocabulary

    def make_scorer(self, probe: Probe) -> LlamaCppScorer:
        """Return a scorer on as many threads as torch uses."""
        import torch

        from compressknow.evaluate.scoring.llama_cpp import LlamaCppScorer

        scorer = LlamaCppScorer(self._model, probe, torch.get_num_threads())
        self._readers.append(scorer)
        return scorer

    def make_reader(self) -> GgufReader:
        """Return a reader on as many threads as torch uses."""
        import torch

        from compressknow.evaluate.scoring.llama_cpp import GgufReader

        reader = GgufReader(self._model, torch.get_num_threads())
        self._readers.append(reader)
        return reader

    def make_record(self) -> Mapping[str, Any]:
        """Name, build, and how each group of layers is stored."""
        return self._record

    def describe(self) -> Mapping[str, Any]:
        """Return how most weights are stored, and what an export of compressknow says that it was made from."""
        from compressknow.gguf.record import PREFIX, SOURCE

        values = {key: self._model.meta(f"{PREFIX}.source.{key}") for key in SOURCE}
        source = {key: value for key, value in values.items() if value}
        return {"quantization": f"GGUF {self._model.file_type}", **({"source": source} if source else {})}

    @cached_property
    def _record(self) -> Mapping[str, Any]:
        from compressknow.gguf.llama_cpp import count_types

        types = count_types(self._model.path)
        return {"name": LlamaCpp.name, "build": self._model.native.build, "types": types}

    def release(self) -> None:
        """Close the contexts first, which read the model."""
        for reader in self._readers:
            reader.release()
        self._model.close()
