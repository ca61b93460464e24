"""transformers, with the engine's layers: it runs checkpoint folders, and GGUF files unpacked to floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressknow.engine.language_model import LanguageModel, load_language_model
from compressknow.evaluate.runtimes import Loaded, Runtime

if TYPE_CHECKING:
    from compressknow.engine.identity import Located
    from compressknow.evaluate.facts import Probe
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.scoring.reading import TransformersReader
    from compressknow.evaluate.scoring.scorer import Scorer


class Transformers(Runtime):
    """Registered as ``transformers``."""

    name = "transformers"
    help = "checkpoint folders, Hub ids; unpacks GGUF files to floats"
    has_precisions = True

    runs_tasks = True

    def reads(self, located: Located) -> bool:
        return located.url is None

    def open(self, located: Located, settings: Settings) -> LoadedInTransformers:
        return LoadedInTransformers(
            load_language_model(
                located.path,
                device=settings.device,
                dtype=settings.computed_in,
                trust_remote_code=settings.trust_remote_code,
            )
        )


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
        """Return the scorer of the model's family."""
        from compressknow.evaluate.scoring.families import make_scorer

        return make_scorer(self.language_model.model, self.language_model.tokenizer, self.family, probe)

    def make_reader(self) -> TransformersReader:
        from compressknow.evaluate.scoring.reading import TransformersReader

        return TransformersReader(self.language_model)
