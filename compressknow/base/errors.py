"""The errors that a user may see: what is wrong, why, and what to try."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any


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
        # As the command line says it.
        self.of_options = (what, why, hint)
        super().__init__("\n".join(part for part in (what, why, hint) if part))

    def name_parameters(self, flags: Mapping[str, bool]) -> None:
        """Name the parameters of a function where the message names options of the command line.

        Parameters
        ----------
        flags : by name, whether a parameter is true or false.
        """
        what, why, hint = (None if part is None else with_parameters(part, flags) for part in self.of_options)
        self.what, self.why, self.hint = what or "", why, hint
        self.args = ("\n".join(part for part in (what, why, hint) if part),)


# An option, and the value that a message gives it: a number, a word in capitals, a name, or what holds a sign.
_OPTION = re.compile(
    r"(?P<pass>(?:[Pp]ass|[Aa]dd) )?(?<![\w-])--?(?P<name>[a-z][a-z-]*)"
    r"(?: (?P<value>\d[\w.%-]*[\w%]|\d|[A-Z][A-Z_]+\b|[a-z-]+[:=.][\w./]*\w|(?:"
    r"atlas|attention|blocks|cpu|feed-forward|float16|gptq|int8|produced|transformers|vision|wanda)\b))?"
)
_SHORT = {"p": "probe", "o": "output"}


def with_parameters(text: str, flags: Mapping[str, bool]) -> str:
    """Return a message with parameters in place of the options that have their names; others stay.

    >>> with_parameters("Add --fail-under 0.9, or leave out --early.", {"fail_under": False, "early": True})
    'Add `fail_under=0.9`, or leave out `early`.'
    >>> with_parameters("Pass --overwrite, not --force.", {"overwrite": True})
    'Pass `overwrite=True`, not --force.'
    """

    def parameter(match: re.Match[str]) -> str:
        said = _parameter(match)
        return said.replace("`", "") if text[: match.start()].endswith("`") else said

    def _parameter(match: re.Match[str]) -> str:
        name = _SHORT.get(match["name"], match["name"].replace("-", "_"))
        if name not in flags:
            return match[0]
        before, value = match["pass"] or "", match["value"]
        if flags[name]:
            said = f"`{name}=True`" if before else f"`{name}`"
            return f"{before}{said} {value}" if value else before + said
        if value is None:
            return f"{before}`{name}`"
        bare = value.isupper() or re.fullmatch(r"\d+(\.\d+)?", value)
        return f"{before}`{name}={value}`" if bare else f'{before}`{name}="{value}"`'

    return _OPTION.sub(parameter, text)


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
    """A threshold that the user set was not met; `result` is the card or the comparison that shows it."""

    exit_code = 3
    result: Any = None


class GateUndecided(CompressknowError):
    """Whether a threshold was met cannot be told from so few facts; `result` is as of `GateNotMet`."""

    exit_code = 4
    result: Any = None


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
