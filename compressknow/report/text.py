"""Text from models, facts and file names, made fit to be read: one line, nothing hidden in it, not endless."""

from __future__ import annotations

import json
import re
from typing import Any

# Joiners that are part of how Persian, Indic scripts and emoji are written.
_SEEMLY = {"\u200c", "\u200d"}
# Letters of scripts that run from right to left, with the spaces between them.
_RTL = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff"
RIGHT_TO_LEFT = re.compile(rf"[{_RTL}]+(?:\s+[{_RTL}]+)*")


def plain(text: object, limit: int = 200) -> str:
    r"""`text` on one line; characters without a form of their own are named, and what is beyond `limit` is cut.

    Controls of the direction of writing are among those: unseen, they could turn a sentence round.

    >>> plain("a\n b\u202ec"), plain("x" * 9, limit=4), plain(" \n")
    ('a b⟨U+202E⟩c', 'xxx…', '')
    """
    line = " ".join(str(text).split())
    if len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    return _seen(line)


def plain_lines(text: str) -> str:
    """`text` with its lines kept, for blocks of code; nothing in it is unseen."""
    return "\n".join(map(_seen, text.split("\n")))


def json_text(values: Any) -> str:
    """`values` as a JSON file: NaN is an error; half a surrogate pair, which a folder's name may hold, an escape."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def answer(text: object) -> str:
    """What a model said; that it said nothing is said."""
    return plain(text) or "(nothing)"


def _seen(line: str) -> str:
    return "".join(c if is_seen(c) else f"⟨U+{ord(c):04X}⟩" for c in line)


def is_seen(character: str) -> bool:
    """Whether a character has a form of its own, or belongs to how its script is written."""
    return character.isprintable() or character in _SEEMLY
