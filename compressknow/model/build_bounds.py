"""Bounds on building a module tree: a config of three lines can ask for a billion layers.

Sizes cost nothing on the meta device, counts do: each layer, expert or label is a Python object. So counts in a config
have a bound of their own, and the modules that are made of it are counted while they are made.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressknow.errors import CheckpointError

# The most that a number may be, by its name; the first pattern that is found in it holds. Nobody has 10,000 layers.
_MOST = (
    (re.compile(r"positions?$|embeddings$|embd$|ctx$|vocab|words$|inner$|tokens?$|channels$|_size$"), 1 << 40),
    (re.compile(r"param|samples"), math.inf),
    (re.compile(r"(layers?|blocks?|heads?|experts?|stages?|depths?)$"), 10_000),
    (re.compile(r"(^|_)(num|n|number)_|labels?$"), 1_000_000),
)
MOST_DEPTH = 30
# Switch-C, of 2048 experts, has 300,000 modules; few others have 20,000.
MOST_MODULES, MODULES_IN_ANY_TIME, MOST_SECONDS = 400_000, 20_000, 8.0


def check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the config at `path` counts more of anything than a model has, parts included, or is
    nested so deeply that who copies it would fail."""
    level: list[Any] = [config]
    for _ in range(MOST_DEPTH):
        for key, value in _entries(level):
            if isinstance(value, (int, float)) and abs(value) > _most(key):
                raise CheckpointError(
                    f"{path} has {key} {value:,}, and at most {_most(key):,} is sound.",
                    hint="Is the config damaged? Download or save it again.",
                )
        inner = [value.values() if isinstance(value, Mapping) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, (Mapping, list))]
    if level:
        raise CheckpointError(
            f"{path} is nested more than {MOST_DEPTH} levels deep.", hint="Download or save it again."
        )


def _entries(level: list[Any]) -> Iterator[tuple[str, Any]]:
    return (entry for value in level if isinstance(value, Mapping) for entry in value.items())


def _most(key: str) -> float:
    return next((most for pattern, most in _MOST if pattern.search(key)), math.inf)


@contextmanager
def bounded_building(path: Path) -> Iterator[None]:
    """Raise CheckpointError as soon as the modules that are built from the config at `path` are too many."""
    from torch.nn.modules.module import register_module_module_registration_hook

    begun, made = time.monotonic(), 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        late = made > MODULES_IN_ANY_TIME and time.monotonic() - begun > MOST_SECONDS
        if made > MOST_MODULES or late:
            raise CheckpointError(
                f"{path} describes a model of more than {made - 1:,} modules: too many to be built.",
                hint="Is its number of layers or experts right? Download or save it again.",
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
