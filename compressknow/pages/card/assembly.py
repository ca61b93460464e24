"""What all sections together make of a comparison: what they measure, what they show, what the JSON says of them.

A section of another package is tried out when the card is made, and its text made plain. One that fails is left out,
with a warning that names its package: what was evaluated for an hour must not be lost for it. Nothing that it says
reaches a page unescaped, whatever it is made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from compressknow.base.format import plain
from compressknow.comparison.records import Estimate, ProbeFigures
from compressknow.pages.card.sections import SECTIONS
from compressknow.pages.drawing import Chart
from compressknow.pages.pages import macro
from compressknow.pages.parts import (
    NO_FACTS,
    Beside,
    Facts,
    Folded,
    LeftOut,
    Note,
    Part,
    Remarks,
    Shown,
    Table,
    Text,
    drawn,
)
from compressknow.pages.records import Comparison, ModelFacts

if TYPE_CHECKING:
    pass
from compressknow.pages.card.sections import Context, Limits, ProbeAnswers, Section

_TRIAL = Limits(lost=5, gained=5, charts=True)


Answering = Callable[[], Sequence[ProbeAnswers]]


_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")


# Ids of what else a page holds of a model.
_TAKEN = ("card", "size", "from", "top")


_LONGEST = 2000  # characters of a text


# The shortest piece of a prompt by which it is told from other text.
_TELLING = 12


# `Drawn` is not among these: it is the one kind that is not escaped.
_KINDS = (Table, Text, Note, Remarks, Facts, LeftOut, Chart, Beside, Folded)


def with_sections(original: ModelFacts, comparison: Comparison, answers: Answering, *, show_facts: bool) -> Comparison:
    """The comparison with what its sections measure, and their warnings.

    Parameters
    ----------
    answers : gives what both models answered to each probe; called where it is needed only.
    """
    warnings = [*comparison.warnings]
    failed: dict[str, str] = {}
    measured: dict[str, Mapping[str, Any]] = {}
    for name, section in usable()[0].items():
        if section.shows_facts and not show_facts:
            continue
        try:
            context = _measured(name, section, Context(original, comparison, {}, _TRIAL), answers)
            said = [plain(warning, 1000) for warning in section.warnings(context)]
            if is_foreign(name):
                try_out(name, section, context, () if show_facts else answers())
        except Exception as error:
            # Whatever another package does; a failure of our own is to be seen.
            if not is_foreign(name):
                raise
            failed[name] = left_out(name, error)
        else:
            warnings += said
            measured |= {name: context.measured} if context.measured else {}
    return replace(comparison, measured=measured, left_out=failed, warnings=tuple(warnings))


def failures(comparisons: Iterable[Comparison]) -> tuple[str, ...]:
    """Why sections of other packages are not on the card: a sentence each."""
    _, unusable = usable()
    return tuple(dict.fromkeys((*unusable, *(why for each in comparisons for why in each.left_out.values()))))


def _measured(name: str, section: Section, context: Context, answers: Answering) -> Context:
    """Raises TypeError or ValueError for what is no JSON, NaN included, or has the name of something else in it."""
    if type(section).measure is Section.measure:
        return context
    figures = {each.probe: section.measure(each) for each in answers()}
    if any(name in _told(probe, show_facts=True) for probe in context.comparison.probes):
        raise ValueError("report.json has that name for something else")
    # As they will be read back: keys are text, tuples are lists.
    read: dict[str, Any] = json.loads(json.dumps(figures, allow_nan=False))
    return replace(context, measured={probe: value for probe, value in read.items() if value is not None})


def shown(
    original: ModelFacts, comparison: Comparison, id: str, limits: Limits, *, show_facts: bool
) -> tuple[Shown, ...]:
    """The sections of one comparison, as they stand on the page; the ids of all begin with `id`."""
    found = []
    for name, section in _of(comparison):
        own = f"{id}-{name}"
        context = Context(original, comparison, comparison.measured.get(name, {}), limits)
        parts = _parts(name, section, context, own) if show_facts or not section.shows_facts else (NO_FACTS,)
        if parts:
            found.append(Shown(own, plain(section.title, 80), parts))
    return tuple(found)


def _parts(name: str, section: Section, context: Context, id: str) -> tuple[Part, ...]:
    if not is_foreign(name):
        return tuple(drawn(section.parts(context), id, context.limits.charts))
    try:
        return tuple(drawn(checked(section.parts(context)), id, context.limits.charts))
    except Exception as error:
        # It passed its trial, on other figures.
        return (Text(left_out(name, error)),)


def glossary(comparisons: Iterable[Comparison]) -> tuple[tuple[str, str], ...]:
    """The terms of all sections, with their meanings."""
    terms = (term for each in _with_facts(comparisons) for _, section in _of(each) for term in section.glossary)
    return tuple(dict.fromkeys((plain(name, 80), plain(meaning, 1000)) for name, meaning in terms))


def sentences(comparisons: Iterable[Comparison]) -> tuple[str, ...]:
    """How the sections compute what they show."""
    told = (text for each in _with_facts(comparisons) for _, section in _of(each) for text in section.method)
    return tuple(dict.fromkeys(told))


def _with_facts(comparisons: Iterable[Comparison]) -> Iterator[Comparison]:
    """Terms and formulas are those of facts: where a text alone was read, nothing is to be explained by them."""
    return (comparison for comparison in comparisons if not comparison.only_texts)


def to_json(comparison: Comparison, *, show_facts: bool) -> dict[str, Any]:
    """What the sections say of a comparison, beside its probes."""
    return {key: value for section in _own(show_facts) for key, value in section.to_json(comparison).items()}


def probe_to_json(comparison: Comparison, probe: ProbeFigures, *, show_facts: bool) -> dict[str, Any]:
    """What the sections say of one probe: figures first, then tables, then what sections measured."""
    name = probe.probe
    measured = {section: values[name] for section, values in comparison.measured.items() if name in values}
    return _told(probe, show_facts=show_facts) | measured


def _told(probe: ProbeFigures, *, show_facts: bool) -> dict[str, Any]:
    told = [item for section in _own(show_facts) for item in section.probe_to_json(probe).items()]
    return dict(sorted(told, key=lambda item: isinstance(item[1], Mapping)))


def _own(show_facts: bool) -> Iterator[Section]:
    """Those built in: of the others, the JSON has what they measure."""
    found, _ = usable()
    return (each for name, each in found.items() if not is_foreign(name) and (show_facts or not each.shows_facts))


def _of(comparison: Comparison) -> Iterator[tuple[str, Section]]:
    found, _ = usable()
    return ((name, section) for name, section in found.items() if name not in comparison.left_out)


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
