"""Regular expressions of users and of recipes, matched within a time: some take longer than the universe has."""

from __future__ import annotations

import re
import time

from compressknow.errors import UsageError

# For one pattern, over all names that it is searched in.
MOST_SECONDS = 3.0
# Nobody writes longer ones; compiling takes time too.
MOST_CHARACTERS = 1000


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
