"""Sections of other packages: whether one can be used at all, tried out when the card is made, their text made plain.

One that fails is left out, with a warning that names its package: what was evaluated for an hour must not be lost
for it. Nothing that it says reaches a page unescaped, whatever it is made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from compressknow.format import plain
from compressknow.report.card.section import Context, ProbeAnswers, Section
from compressknow.report.card.sections import SECTIONS
from compressknow.report.drawing import Chart
from compressknow.report.pages import macro
from compressknow.report.parts import Beside, Facts, Folded, LeftOut, Note, Part, Remarks, Shown, Text, drawn
from compressknow.report.tables import Table
from compressknow.stats.records import Estimate

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
# Ids of what else a page holds of a model.
_TAKEN = ("card", "size", "from", "top")
_LONGEST = 2000  # characters of a text
# The shortest piece of a prompt by which it is told from other text.
_TELLING = 12
# `Drawn` is not among these: it is the one kind that is not escaped.
_KINDS = (Table, Text, Note, Remarks, Facts, LeftOut, Chart, Beside, Folded)


def is_foreign(name: str) -> bool:
    """Whether another package adds the section."""
    return not SECTIONS.is_built_in(name)


def usable() -> tuple[dict[str, Section], tuple[str, ...]]:
    """All sections that can be used, by name, in the order in which they stand; and why others cannot, in sentences."""
    found, unusable = SECTIONS.usable()
    reasons = [" ".join(f"{part.rstrip('.')}." for part in str(error).split("\n")) for error in unusable.values()]
    for name in [name for name in found if is_foreign(name)]:
        if why := _unfit(name, found[name]):
            del found[name]
            reasons.append(left_out(name, why))
    return dict(sorted(found.items(), key=lambda item: item[1].order)), tuple(plain(why, 1000) for why in reasons)


def _unfit(name: str, section: Section) -> str:
    if not _NAME.fullmatch(name) or name in _TAKEN:
        return f"its name must be of small letters, digits, - and _, and none of {', '.join(_TAKEN)}."
    title = getattr(section, "title", None)
    if not isinstance(title, str) or not title.strip():
        return "it has no title."
    return "" if isinstance(section.order, int | float) else "its order is no number."


def left_out(name: str, why: str | Exception) -> str:
    """The warning on a section that cannot be shown."""
    package = SECTIONS.added_by(name)
    reason = f"{type(why).__name__}: {plain(why, 500).rstrip('.')}." if isinstance(why, Exception) else why
    return plain(f"The section {name!r} that {package} adds is left out: {reason} Update or uninstall {package}.", 1000)


def try_out(name: str, section: Section, context: Context, secret: Sequence[ProbeAnswers]) -> None:
    """Do all that pages will do with the section, in both formats. Raises whatever it does.

    Parameters
    ----------
    secret : answers to facts of which no text may be shown.
    """
    parts = tuple(drawn(checked(section.parts(context)), name, charts=True))
    texts = [macro(f"parts.{suffix}.j2", "section")(Shown(name, section.title, parts), 2) for suffix in ("html", "md")]
    texts += [json.dumps(context.measured, ensure_ascii=False), *section.method]
    texts += [text for term in section.glossary for text in term]
    if any(piece in text for piece in _pieces(secret) for text in texts):
        raise ValueError("it shows the text of facts, which was to be left out, and does not say so by `shows_facts`")


def _pieces(answers: Sequence[ProbeAnswers]) -> Iterator[str]:
    """Of each prompt, the longer side of its blank."""
    for each in answers:
        for fact, _ in each.pairs:
            piece = max(fact.prompt.split("[MASK]"), key=len).strip()
            if len(piece) >= _TELLING:
                yield piece


def checked(parts: Iterable[Part] | str | bytes) -> tuple[Part, ...]:
    """The parts with all their text plain.

    Raises
    ------
    TypeError : one is no part, or holds what is neither text nor a number.
    ValueError : a row of a table has more or fewer cells than there are columns.
    """
    if isinstance(parts, str | bytes):
        raise TypeError("`parts` gives text, where it should give parts of a section")
    return tuple(_part(part) for part in parts)


def _part(part: Any) -> Any:
    if type(part) not in _KINDS:
        raise TypeError(f"`parts` gives {type(part).__name__}, which is no part of a section")
    if isinstance(part, Table) and any(len(row) != len(part.columns) for row in part.rows):
        raise ValueError(f"a row of the table {part.caption!r} has more or fewer cells than there are columns")
    return replace(part, **{each.name: _plain(getattr(part, each.name)) for each in fields(part)})


def _plain(value: Any) -> Any:
    # A text may be of a class that says it is HTML; what comes of `plain` is text alone.
    if isinstance(value, str):
        return plain(value, _LONGEST)
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if value is None or type(value) in (int, float, bool, Estimate) or (callable(value) and not is_dataclass(value)):
        return value
    return _part(value)
