"""Errors that a user may see: what is wrong, why, and what to try."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any


class CompressknowError(Exception):
    """Error that the user can act on; the command line prints it without a traceback.

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
        """Name the parameters of a function where the message names options; `flags` says which are true or false."""
        what, why, hint = (None if part is None else name_parameters_in(part, flags) for part in self.of_options)
        self.what, self.why, self.hint = what or "", why, hint
        self.args = ("\n".join(part for part in (what, why, hint) if part),)


# An option, and the value that a message gives it: a number, a word in capitals, a name, or what holds a sign.
_OPTION = re.compile(
    r"(?P<pass>(?:[Pp]ass|[Aa]dd) )?(?<![\w-])--?(?P<name>[a-z][a-z-]*)"
    r"(?: (?P<value>\d[\w.%-]*[\w%]|\d|[A-Z][A-Z_]+\b|[a-z-]+[:=.][\w./]*\w|(?:"
    r"atlas|attention|blocks|cpu|feed-forward|float16|gptq|int8|produced|transformers|vision|wanda)\b))?"
)
_SHORT = {"p": "probe", "o": "output"}


def name_parameters_in(text: str, flags: Mapping[str, bool]) -> str:
    """Return a message with parameters in place of the options that have their names; others stay.

    >>> name_parameters_in("Add --fail-under 0.9, or leave out --early.", {"fail_under": False, "early": True})
    'Add `fail_under=0.9`, or leave out `early`.'
    >>> name_parameters_in("Pass --overwrite, not --force.", {"overwrite": True})
    'Pass `overwrite=True`, not --force.'
    """

    def replace(match: re.Match[str]) -> str:
        name = _SHORT.get(match["name"], match["name"].replace("-", "_"))
        if name not in flags:
            return match[0]
        before, value, after = match["pass"] or "", match["value"], ""
        if flags[name]:
            named, after = f"{name}=True" if before else name, f" {value}" if value else ""
        elif value is None:
            named = name
        else:
            bare = value.isupper() or re.fullmatch(r"\d+(\.\d+)?", value)
            named = f"{name}={value}" if bare else f'{name}="{value}"'
        # A command stands in these already.
        tick = "" if text[: match.start()].endswith("`") else "`"
        return f"{before}{tick}{named}{tick}{after}"

    return _OPTION.sub(replace, text)


class UsageError(CompressknowError):
    """Request that makes no sense: an amount out of range, a scope that matches nothing."""

    exit_code = 2


class UnusedOptions(UsageError):
    """Options that have no effect given the others, by their names in Python: an error for the user, but ignored if
    they come from a project's file."""

    def __init__(
        self, what: str, why: str | None = None, hint: str | None = None, *, names: Iterable[str] = ()
    ) -> None:
        super().__init__(what, why, hint)
        self.names = tuple(names)


class CheckpointError(CompressknowError):
    """Checkpoint that is missing, damaged, or of a kind that cannot be read safely."""


class UnsupportedError(CompressknowError):
    """Request that has no form which would load and run right, though the checkpoint is sound."""


class OutputError(CompressknowError):
    """Output that cannot be written, or would overwrite something of the user's."""


class DamagedAnswers(CompressknowError):
    """Answers folder whose files are damaged, or do not belong together."""


class NotInstalled(CompressknowError):
    """Something missing that can be installed; the hint says how."""


class VerificationError(CompressknowError):
    """Checkpoint that differs from its manifest."""


class GateNotMet(CompressknowError):
    """Threshold of the user that was not met; `result` is the card or the comparison that shows it."""

    exit_code = 3
    result: Any = None


class GateUndecided(CompressknowError):
    """Facts too few to tell whether a threshold is met; `result` is as for `GateNotMet`."""

    exit_code = 4
    result: Any = None


def is_panic(error: BaseException) -> bool:
    """Return whether Rust code of a library has panicked: what is raised then is not an Exception."""
    return type(error).__name__ == "PanicException"


# As torch on a CPU, on a GPU, the system and Python say it.
_NO_MEMORY = re.compile("out of memory|allocate memory|start new thread", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether something failed because there was no memory; torch raises a mere RuntimeError then."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def suggest_word(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the beginning of a hint, where a word is nearly one of those known; otherwise nothing.

    >>> suggest_word("Atention", ["attention", "final"])
    'Did you mean attention? '
    >>> suggest_word("tail", ["attention", "final"], cutoff=0.8)
    ''
    """
    near = find_nearest(word, known, cutoff)
    return f"Did you mean {near}? " if near else ""


def find_nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that a word nearly is; None if it is like none."""
    names = {_fold(name): name for name in known}
    near = difflib.get_close_matches(_fold(word), names, n=1, cutoff=cutoff)
    return names[near[0]] if near else None


def _fold(word: str) -> str:
    return word.strip().lower().replace("_", "-")
