"""Errors that a user may see: what is wrong, why, and what to try."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any


class CompressknowError(Exception):
    """Error that the user can act on, printed without a traceback: `what` is wrong and where, `why` if that does not
    make it clear, and a `hint` what to try."""

    exit_code = 1

    def __init__(self, what: str, why: str | None = None, hint: str | None = None) -> None:
        self.what, self.why, self.hint = what, why, hint
        # With the names of command-line options, whatever `name_parameters` does to the others.
        self.of_options = (what, why, hint)
        super().__init__("\n".join(part for part in (what, why, hint) if part))

    def name_parameters(self, flags: Mapping[str, bool]) -> None:
        """Replace options in the message by parameters; `flags` maps each parameter to whether it is a flag."""
        what, why, hint = (None if part is None else name_parameters_in(part, flags) for part in self.of_options)
        self.what, self.why, self.hint = what or "", why, hint
        self.args = ("\n".join(part for part in (what, why, hint) if part),)


# An option and its value: a number, a word in capitals, one of a few names, or a word with a ":", "=" or ".".
_OPTION = re.compile(
    r"(?P<pass>(?:[Pp]ass|[Aa]dd) )?(?<![\w-])--?(?P<name>[a-z][a-z-]*)"
    r"(?: (?P<value>\d[\w.%-]*[\w%]|\d|[A-Z][A-Z_]+\b|[a-z-]+[:=.][\w./]*\w|(?:"
    r"atlas|attention|blocks|cpu|feed-forward|float16|gptq|int8|produced|transformers|vision|wanda)\b))?"
)
_SHORT = {"p": "probe", "o": "output"}


def name_parameters_in(text: str, flags: Mapping[str, bool]) -> str:
    """Return a message with options replaced by the parameters of the same name; other options are unchanged.

    >>> name_parameters_in("Add --fail-under 0.9, or leave out --early.", {"fail_under": False, "early": True})
    'Add `fail_under=0.9`, or leave out `early`.'
    >>> name_parameters_in("Pass --overwrite, not --force.", {"overwrite": True})
    'Pass `overwrite=True`, not --force.'
    >>> name_parameters_in("In my-p, give -o OUT and `--probe atlas`.", {"probe": False, "output": False})
    'In my-p, give `output=OUT` and `probe="atlas"`.'
    """

    def replace(match: re.Match[str]) -> str:
        name = _SHORT.get(match["name"], match["name"].replace("-", "_"))
        if name not in flags:
            return match[0]
        before, value, after = match["pass"] or "", match["value"], ""
        if flags[name]:
            parameter, after = f"{name}=True" if before else name, f" {value}" if value else ""
        elif value is None:
            parameter = name
        else:
            bare = value.isupper() or re.fullmatch(r"\d+(\.\d+)?", value)
            parameter = f"{name}={value}" if bare else f'{name}="{value}"'
        # The message may already have backticks here.
        tick = "" if text[: match.start()].endswith("`") else "`"
        return f"{before}{tick}{parameter}{tick}{after}"

    return _OPTION.sub(replace, text)


class UsageError(CompressknowError):
    """Invalid request, such as an amount out of range or a scope that matches nothing."""

    exit_code = 2


class UnusedOptions(UsageError):
    """Options (by their names in Python) without effect next to the others. Those of a project's file are dropped."""

    def __init__(
        self, what: str, why: str | None = None, hint: str | None = None, *, names: Iterable[str] = ()
    ) -> None:
        super().__init__(what, why, hint)
        self.names = tuple(names)


class CheckpointError(CompressknowError):
    """Checkpoint that is missing, damaged, or in a format that cannot be read safely."""


class UnsupportedError(CompressknowError):
    """Request whose result could not be loaded and run correctly, though the checkpoint is intact."""


class OutputError(CompressknowError):
    """Output that cannot be written, or would overwrite the user's files."""


class DamagedAnswers(CompressknowError):
    """Answers folder whose files are damaged, or do not belong together."""


class NotInstalled(CompressknowError):
    """Something missing that can be installed; the hint says how."""


class VerificationError(CompressknowError):
    """Checkpoint that differs from its manifest."""


class GateNotMet(CompressknowError):
    """Gate that was not met; `result` is the card or comparison that shows it."""

    exit_code = 3
    result: Any = None


class GateUndecided(CompressknowError):
    """Gate that too few facts were evaluated to decide; `result` is the card or comparison, as in `GateNotMet`."""

    exit_code = 4
    result: Any = None


def is_panic(error: BaseException) -> bool:
    """Return whether this is a panic in a library's Rust code, which is not raised as an Exception."""
    return type(error).__name__ == "PanicException"


# In messages of torch (CPU and GPU), the operating system and Python.
_NO_MEMORY = re.compile("out of memory|allocate memory|start new thread", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, for which torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def suggest_word(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "Did you mean ...? " if a word is close to a known one, otherwise "".

    >>> suggest_word("Atention", ["attention", "final"])
    'Did you mean attention? '
    >>> suggest_word("tail", ["attention", "final"], cutoff=0.8)
    ''
    """
    near = find_nearest(word, known, cutoff)
    return f"Did you mean {near}? " if near else ""


def find_nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word closest to a word; None if none is close."""
    names = {_fold(name): name for name in known}
    # In Python, anything may be given as a name.
    matches = difflib.get_close_matches(_fold(str(word)), names, n=1, cutoff=cutoff)
    return names[matches[0]] if matches else None


def _fold(word: str) -> str:
    return word.strip().lower().replace("_", "-")
