"""compressknow: compress a language model, and know what it forgot.

>>> import compressknow
>>> manifest = compressknow.convert("bert-base-uncased", "bert-att-int8", scope="attention", prune=0.2,
...                                 quantize="int8")  # doctest: +SKIP
>>> manifest.setup  # doctest: +SKIP
'Att_GPQ 20%'
>>> model = compressknow.load("bert-att-int8")  # doctest: +SKIP

Importing this module is quick: torch and transformers are imported by the first call that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressknow._version import __version__ as __version__

if TYPE_CHECKING:
    from compressknow.api.compare import compare as compare
    from compressknow.api.convert import convert as convert
    from compressknow.api.export import export as export
    from compressknow.api.inspect import inspect as inspect
    from compressknow.api.load import load as load
    from compressknow.api.probe import probe as probe
    from compressknow.api.push import push as push
    from compressknow.api.report import report as report
    from compressknow.api.search import search as search
    from compressknow.api.sensitivity import sensitivity as sensitivity
    from compressknow.api.sweep import sweep as sweep
    from compressknow.api.verify import verify as verify
    from compressknow.base.errors import CheckpointError as CheckpointError
    from compressknow.base.errors import CompressknowError as CompressknowError
    from compressknow.base.errors import GateNotMet as GateNotMet
    from compressknow.base.errors import GateUndecided as GateUndecided
    from compressknow.base.errors import OutputError as OutputError
    from compressknow.base.errors import UnsupportedError as UnsupportedError
    from compressknow.base.errors import UsageError as UsageError
    from compressknow.base.errors import VerificationError as VerificationError
    from compressknow.base.hub import Upload as Upload
    from compressknow.base.progress import Progress as Progress
    from compressknow.base.progress import Stage as Stage
    from compressknow.compress.manifest import Manifest as Manifest
    from compressknow.compress.recipe import Recipe as Recipe
    from compressknow.compress.steps import Prune as Prune
    from compressknow.compress.steps import Quantize as Quantize
    from compressknow.compress.steps import Where as Where
    from compressknow.compress.verify import Verification as Verification
    from compressknow.evaluate.answers import Answers as Answers
    from compressknow.evaluate.runtimes import Settings as Settings
    from compressknow.evaluate.sources import Options as Options
    from compressknow.gguf.record import ExportRecord as ExportRecord
    from compressknow.model.summary import Inspection as Inspection
    from compressknow.pages.diff.make import CheckpointComparison as CheckpointComparison
    from compressknow.pages.records import Card as Card
    from compressknow.pages.search import Search as Search
    from compressknow.pages.search import Trial as Trial
    from compressknow.pages.study.records import Study as Study
    from compressknow.study.cells import CellResult as CellResult
    from compressknow.study.running import RayOptions as RayOptions
    from compressknow.study.sensitivity import Sensitivity as Sensitivity
else:
    _VERBS = "compare convert export inspect load probe push report search sensitivity sweep verify".split()
    # By the module below this package, the names that are imported from it when they are first used.
    _PUBLIC = {
        **{f"api.{verb}": verb for verb in _VERBS},
        "base.errors": "CheckpointError CompressknowError GateNotMet GateUndecided OutputError UnsupportedError "
        "UsageError VerificationError",
        "base.hub": "Upload",
        "base.progress": "Progress Stage",
        "compress.manifest": "Manifest",
        "compress.recipe": "Recipe",
        "compress.steps": "Prune Quantize Where",
        "compress.verify": "Verification",
        "evaluate.answers": "Answers",
        "evaluate.runtimes": "Settings",
        "evaluate.sources": "Options",
        "gguf.record": "ExportRecord",
        "model.summary": "Inspection",
        "pages.diff.make": "CheckpointComparison",
        "pages.records": "Card",
        "pages.search": "Search Trial",
        "pages.study.records": "Study",
        "study.cells": "CellResult",
        "study.running": "RayOptions",
        "study.sensitivity": "Sensitivity",
    }
    _MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
    __all__ = sorted(["__version__", *_MODULES])

    def __getattr__(name):
        """Import a public name when it is first used."""
        import importlib

        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
