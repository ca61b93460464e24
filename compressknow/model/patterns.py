"""Regular expressions of users and of recipes, matched within a time: some take longer than the universe has."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from compressknow.errors import CheckpointError, UsageError

# For one pattern, over all names that it is searched in.
MOST_SECONDS = 3.0
# Nobody writes longer ones; compiling takes time too.
MOST_CHARACTERS = 1000
# Repetitions without an end, one after the other, in a pattern that another library matches without a limit of time.
MOST_REPETITIONS = 4


class Pattern:
    """A regular expression of Python's `re`, which may search for `MOST_SECONDS` in all.

    Raises UsageError, which names the option it was given by, where it is none, or takes longer.
    """

    def __init__(self, option: str, pattern: str) -> None:
        self.option, self.pattern = option, pattern
        self._left = MOST_SECONDS
        if len(pattern) > MOST_CHARACTERS:
            raise UsageError(f"{option}: a pattern of {len(pattern):,} characters; {MOST_CHARACTERS:,} are allowed.")
        # Here, since the command line starts without it.
        import regex

        try:
            re.compile(pattern)
            self._compiled = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise UsageError(f"{option} {pattern!r} is no regular expression: {error}.") from None

    def search(self, name: str) -> bool:
        """Whether the pattern matches anywhere in a name."""
        begun = time.monotonic()
        try:
            found = self._compiled.search(name, timeout=max(self._left, 0.001)) is not None
        except TimeoutError:
            raise UsageError(
                f"{self.option} {self.pattern!r} takes too long to match {name}.",
                "A repetition inside a repetition, such as (a+)+, tries every way to divide a name.",
                "Write it without the inner or the outer one.",
            ) from None
        self._left -= time.monotonic() - begun
        return found


def refuse_slow_targets(where: str, quantization: Any) -> None:
    """Raise CheckpointError where the `re:` targets of a quantization_config could take for ever to match.

    compressed-tensors matches them against every module's name with Python's `re`, which knows no limit of time.
    """
    for pattern in _regular_expressions(quantization):
        try:
            slow = _is_slow(_parser.parse(pattern))
        except (re.error, RecursionError, OverflowError):
            slow = True
        if slow:
            raise CheckpointError(
                f"{where} names its quantized layers by a pattern that may take for ever to match: {pattern[:80]!r}.",
                hint="Write the pattern without a repetition inside another, or name the layers.",
            )


def _regular_expressions(quantization: Any) -> Iterator[str]:
    if not isinstance(quantization, Mapping):
        return
    groups = quantization.get("config_groups")
    lists = [group.get("targets") for group in (groups.values() if isinstance(groups, Mapping) else ()) if group]
    for names in (*lists, quantization.get("ignore")):
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str) and name.startswith("re:"):
                yield name.removeprefix("re:")


def _is_slow(parsed: Any) -> bool:
    """Whether an endless repetition holds another or a choice (exponential), or there are many (a high power)."""
    endless = [body for operation, body in _nodes(parsed) if _is_endless(operation, body)]
    nested = any(
        operation is ops.BRANCH or _is_endless(operation, inner)
        for _, _, body in endless
        for operation, inner in _nodes(body)
    )
    return nested or len(endless) > MOST_REPETITIONS


def _is_endless(operation: Any, body: Any) -> bool:
    return operation in (ops.MAX_REPEAT, ops.MIN_REPEAT) and body[1] > 100


def _nodes(parsed: Any) -> Iterator[tuple[Any, Any]]:
    """Every operation of a parsed pattern, those within others too."""
    for operation, body in parsed:
        yield operation, body
        for part in body if isinstance(body, tuple) else ():
            for inner in part if isinstance(part, list) else (part,):
                if isinstance(inner, _parser.SubPattern):
                    yield from _nodes(inner)
