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

from compressknow._version import __version__

if TYPE_CHECKING:
    from compressknow.api.compare import compare
    from compressknow.api.convert import convert
    from compressknow.api.export import export
    from compressknow.api.inspect import inspect
    from compressknow.api.load import load
    from compressknow.api.probe import probe
    from compressknow.api.push import push
    from compressknow.api.report import report
    from compressknow.api.search import search
    from compressknow.api.sensitivity import sensitivity
    from compressknow.api.sweep import sweep
    from compressknow.api.verify import verify
    from compressknow.base.errors import (
        CheckpointError,
        CompressknowError,
        GateNotMet,
        GateUndecided,
        OutputError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from compressknow.base.hub import Upload
    from compressknow.base.progress import Progress, Stage
    from compressknow.compress.manifest import Manifest
    from compressknow.compress.recipe import Recipe
    from compressknow.compress.steps import Prune, Quantize, Where
    from compressknow.compress.verify import Verification
    from compressknow.evaluate.answers import Answers
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options
    from compressknow.gguf.record import ExportRecord
    from compressknow.model.summary import Inspection
    from compressknow.pages.diff.records import CheckpointComparison
    from compressknow.pages.records import Card
    from compressknow.pages.search import Search, Trial
    from compressknow.pages.study.records import Study
    from compressknow.study.folder import CellResult
    from compressknow.study.running import RayOptions
    from compressknow.study.sensitivity import Sensitivity
else:
    _VERBS = (
        *("compare", "convert", "export", "inspect", "load", "probe", "push", "report", "search", "sensitivity"),
        *("sweep", "verify"),
    )
    _RECORDS = {
        "compress.manifest": ("Manifest",),
        "compress.recipe": ("Recipe",),
        "compress.steps": ("Prune", "Quantize", "Where"),
        "compress.verify": ("Verification",),
        "base.errors": (
            *("CheckpointError", "CompressknowError", "GateNotMet", "GateUndecided", "OutputError", "UnsupportedError"),
            *("UsageError", "VerificationError"),
        ),
        "gguf.record": ("ExportRecord",),
        "base.hub": ("Upload",),
        "model.summary": ("Inspection",),
        "evaluate.answers": ("Answers",),
        "evaluate.runtimes": ("Settings",),
        "evaluate.sources": ("Options",),
        "base.progress": ("Progress", "Stage"),
        "pages.diff.records": ("CheckpointComparison",),
        "pages.records": ("Card",),
        "pages.search": ("Search", "Trial"),
        "pages.study.records": ("Study",),
        "study.folder": ("CellResult",),
        "study.running": ("RayOptions",),
        "study.sensitivity": ("Sensitivity",),
    }
    _ADDRESSES = {
        **{verb: f"api.{verb}" for verb in _VERBS},
        **{record: module for module, records in _RECORDS.items() for record in records},
    }

    def __getattr__(name):
        """Import what is named when it is first named."""
        import importlib

        if name not in _ADDRESSES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_ADDRESSES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "Answers",
    "Card",
    "CellResult",
    "CheckpointComparison",
    "CheckpointError",
    "CompressknowError",
    "ExportRecord",
    "GateNotMet",
    "GateUndecided",
    "Inspection",
    "Manifest",
    "Options",
    "OutputError",
    "Progress",
    "Prune",
    "Quantize",
    "RayOptions",
    "Recipe",
    "Search",
    "Sensitivity",
    "Settings",
    "Stage",
    "Study",
    "Trial",
    "UnsupportedError",
    "Upload",
    "UsageError",
    "Verification",
    "VerificationError",
    "Where",
    "__version__",
    "compare",
    "convert",
    "export",
    "inspect",
    "load",
    "probe",
    "push",
    "report",
    "search",
    "sensitivity",
    "sweep",
    "verify",
]
