"""The errors that a user may see: what is wrong, why, and what to try."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class CompressknowError(Exception):
    """Something that the user can act on; the command line prints it without a traceback.

    Parameters
    ----------
    what : what is wrong and where, one sentence.
    why : the reason, where it is not plain from `what`.
    hint : what to try.
    """

    exit_code = 1

    def __init__(self, what: str, why: str | None = None, hint: str | None = None) -> None:
        self.what, self.why, self.hint = what, why, hint
        super().__init__("\n".join(part for part in (what, why, hint) if part))


class UsageError(CompressknowError):
    """The request itself makes no sense: an amount out of range, a scope that matches nothing."""

    exit_code = 2


class CheckpointError(CompressknowError):
    """A checkpoint is missing, damaged, or of a kind that cannot be read safely."""


class UnsupportedError(CompressknowError):
    """The checkpoint is sound, but what is asked for has no form that would load and run right."""


class OutputError(CompressknowError):
    """The output cannot be written, or would overwrite something of the user's."""


class DamagedAnswers(CompressknowError):
    """The files of an answers folder are damaged, or do not belong together."""


class NotInstalled(CompressknowError):
    """Something is missing that can be installed; the hint says how."""


class VerificationError(CompressknowError):
    """A checkpoint differs from its manifest."""


class GateNotMet(CompressknowError):
    """A threshold that the user set was not met."""

    exit_code = 3


class GateUndecided(CompressknowError):
    """Whether a threshold that the user set was met cannot be told from so few facts."""

    exit_code = 4


def is_panic(error: BaseException) -> bool:
    """Whether Rust code of a library has panicked: what is raised then is no Exception."""
    return type(error).__name__ == "PanicException"


# As torch on a CPU, on a GPU, the system and Python say it.
_NO_MEMORY = re.compile("out of memory|allocate memory|start new thread", re.IGNORECASE)


def lacks_memory(error: BaseException) -> bool:
    """Whether something failed because there was no memory; torch raises a mere RuntimeError then."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The beginning of a hint, where a word is nearly one of those known; otherwise nothing.

    >>> did_you_mean("Atention", ["attention", "final"])
    'Did you mean attention? '
    >>> did_you_mean("tail", ["attention", "final"], cutoff=0.8)
    ''
    """
    near = nearest(word, known, cutoff)
    return f"Did you mean {near}? " if near else ""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that a word nearly is; None where it is like none."""
    names = {_folded(name): name for name in known}
    near = difflib.get_close_matches(_folded(word), names, n=1, cutoff=cutoff)
    return names[near[0]] if near else None


def _folded(word: str) -> str:
    return word.strip().lower().replace("_", "-")
