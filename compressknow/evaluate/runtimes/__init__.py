"""Runtimes: a registry of what answers for a model, each in a file of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressknow.errors import UsageError
from compressknow.evaluate.runtimes.runtime import Answering, Loaded, Runtime
from compressknow.registry import Registry

if TYPE_CHECKING:
    from compressknow.engine.identity import Located

__all__ = ["RUNTIMES", "Answering", "Loaded", "Runtime", "runtime_for"]

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


def runtime_for(located: Located, named: str | None = None) -> Runtime:
    """The runtime of that name; where none is named, the one that is meant for such a model.

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
