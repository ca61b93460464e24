"""Sections of a report card: base class, registry, and how they measure and show a comparison.

A third-party section that fails is left out, with a warning that names its package, so that an hour's evaluation is not
lost because of it. Nothing from it reaches a page unescaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from compressknow.base.format import clean
from compressknow.base.packages import Registry
from compressknow.comparison.paired import Pair, pair_answers
from compressknow.comparison.records import Estimate
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.records import ModelRecord
from compressknow.pages.as_json import probe_to_json
from compressknow.pages.pages import render_html
from compressknow.pages.parts import (
    NO_FACTS,
    Beside,
    Chart,
    Facts,
    Folded,
    Note,
    Page,
    PageSection,
    Part,
    Remarks,
    Table,
    Text,
    draw_charts,
)
from compressknow.pages.records import Comparison

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_TAKEN = ("card", "size", "from", "top")  # ids of other elements on a model's page
_LONGEST = 2000  # characters of a text
# `Drawn` is excluded because it is the one kind that is not escaped.
_KINDS = (Table, Text, Note, Remarks, Facts, Chart, Beside, Folded)


@dataclass(frozen=True, slots=True)
class ProbeAnswers:
    """Answers of both models to one probe."""

    probe: str
    pairs: tuple[Pair, ...]  # for each fact, the `evaluate.answers.Answer` of the original and of the compressed model


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on what a format shows of one comparison; the JSON has everything."""

    lost: int  # facts
    gained: int
    shown: int = 20  # facts at once; the others are folded
    relations: int | None = None  # of each probe, those that lost most; None for all
    charts: bool = False  # charts, and bars in tables


@dataclass(frozen=True, slots=True)
class Context:
    """Context of a section: one compressed model against the original."""

    original: ModelRecord
    comparison: Comparison
    measured: Mapping[str, Any]  # by probe, the results of the section's `measure`; empty if it measures nothing
    limits: Limits


class Section:
    """Section of the report card of each compressed model. Subclasses define what it shows; only `parts` is required.

    Another package adds one by an entry point of the group ``compressknow.sections``; its name is the section's id on
    the page and the key of what it measures in ``report.json``. It starts with a lowercase letter and has at most 40
    characters: lowercase letters, digits, `-` and `_`; ``card``, ``size``, ``from`` and ``top`` are taken.

    Attributes
    ----------
    title : its heading, and its name in the page's table of contents.
    order : its position; the built-in sections have 10 to 80.
    shows_facts : whether it shows the text of facts; ``--no-facts`` then leaves it out.
    glossary : terms and their meanings, for readers who do not know them.
    method : sentences on how its figures are computed, with sources.
    """

    title: str
    order: int = 100
    shows_facts: bool = False
    glossary: tuple[tuple[str, str], ...] = ()
    method: tuple[str, ...] = ()

    def measure(self, answers: ProbeAnswers) -> Any:  # noqa: ARG002
        """Return figures of one probe that the card's records do not hold: values for JSON, or None for nothing.

        Called once, when the card is made; stored in ``report.json`` under ``probes[PROBE][NAME]``.
        """
        return None

    def parts(self, context: Context) -> Iterable[Part]:
        """Yield what the section shows, in order; without any part, the section is left out."""
        raise NotImplementedError

    def warnings(self, context: Context) -> Iterable[str]:  # noqa: ARG002
        """Yield what a reader must know before trusting the figures, a sentence each."""
        return ()


SECTIONS: Registry[Section] = Registry(
    "compressknow.sections",
    "section",
    Section,
    {
        "lost": "compressknow.pages.card.sections.facts:Lost",
        "gained": "compressknow.pages.card.sections.facts:Gained",
        "knowing": "compressknow.pages.card.sections.facts:Grades",
        "relations": "compressknow.pages.card.sections.facts:Relations",
        "popularity": "compressknow.pages.card.sections.facts:Popularity",
        "wordings": "compressknow.pages.card.sections.facts:ByWording",
        "layers": "compressknow.pages.card.sections.figures:Layers",
        "text": "compressknow.pages.card.sections.facts:Text",
        "confidence": "compressknow.pages.card.sections.facts:Confident",
        "certainty": "compressknow.pages.card.sections.figures:HowSure",
        "figures": "compressknow.pages.card.sections.figures:Figures",
        "speed": "compressknow.pages.card.sections.figures:Speed",
        "dropped": "compressknow.pages.card.sections.facts:Dropped",
    },
)


def find_sections() -> tuple[dict[str, Section], tuple[str, ...]]:
    """Return the usable sections by name, in order, and sentences on why others cannot be used."""
    sections, unusable = SECTIONS.usable()
    reasons = [" ".join(f"{part.rstrip('.')}." for part in str(error).split("\n")) for error in unusable.values()]
    for name in [name for name in sections if not SECTIONS.is_built_in(name)]:
        if why := _find_flaw(name, sections[name]):
            del sections[name]
            reasons.append(_describe_failure(name, why))
    return dict(sorted(sections.items(), key=lambda item: item[1].order)), tuple(clean(why, 1000) for why in reasons)


def _find_flaw(name: str, section: Section) -> str:
    if not _NAME.fullmatch(name) or name in _TAKEN:
        return f"its name must consist of lowercase letters, digits, - and _, and not be one of {', '.join(_TAKEN)}."
    if not str(getattr(section, "title", "")).strip():
        return "it has no title."
    method: Any = section.method
    # A single string would be shown letter by letter.
    if not isinstance(method, tuple | list):
        return "its method is not a tuple of sentences."
    pairs: Any = section.glossary if isinstance(section.glossary, tuple | list) else (None,)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        return "its glossary is not a tuple of pairs: a term and its meaning."
    return "" if isinstance(section.order, int | float) else "its order is not a number."


def _describe_failure(name: str, why: str | Exception) -> str:
    package = SECTIONS.added_by(name)
    reason = f"{type(why).__name__}: {clean(why, 500).rstrip('.')}." if isinstance(why, Exception) else why
    return clean(f"The section {name!r} that {package} adds is left out: {reason} Update or uninstall {package}.", 1000)


def list_failures(comparisons: Iterable[Comparison]) -> tuple[str, ...]:
    """Return why sections of other packages are not on the card, one sentence each."""
    _, unusable = find_sections()
    return tuple(dict.fromkeys((*unusable, *(why for each in comparisons for why in each.left_out.values()))))


def add_sections(
    original: ModelRecord, comparison: Comparison, answers: tuple[Answers, Answers], *, show_facts: bool
) -> Comparison:
    """Return the comparison with what the sections measure on both models' `answers`, and with their warnings."""
    warnings = [*comparison.warnings]
    failed: dict[str, str] = {}
    measured: dict[str, Mapping[str, Any]] = {}
    for name, section in find_sections()[0].items():
        if section.shows_facts and not show_facts:
            continue
        try:
            figures = _measure(name, section, comparison, answers)
            context = Context(original, comparison, figures, Limits(lost=0, gained=0))
            texts = section.warnings(context)
            if isinstance(texts, str):
                raise TypeError("`warnings` returns one string, not several")
            warnings += [clean(warning, 1000) for warning in texts]
            measured |= {name: figures} if figures else {}
        except Exception as error:
            # Third-party code may raise anything; our own errors must surface.
            if SECTIONS.is_built_in(name):
                raise
            failed[name] = _describe_failure(name, error)
    return replace(comparison, measured=measured, left_out=failed, warnings=tuple(warnings))


def _measure(
    name: str, section: Section, comparison: Comparison, answers: tuple[Answers, Answers]
) -> Mapping[str, Any]:
    """Return what a section measures, by probe. Raises TypeError or ValueError for what JSON cannot hold."""
    if type(section).measure is Section.measure:
        return {}
    figures = {}
    for probe in (each.probe for each in comparison.probes):
        figures[probe] = section.measure(ProbeAnswers(probe, tuple(pair_answers(*answers, probe))))
    if any(name in probe_to_json(probe) for probe in comparison.probes):
        raise ValueError("report.json has that name for something else")
    # Convert values to what reading the JSON gives: keys are strings, tuples are lists.
    values: dict[str, Any] = json.loads(json.dumps(figures, allow_nan=False))
    return {probe: value for probe, value in values.items() if value is not None}


def show_sections(
    original: ModelRecord, comparison: Comparison, id: str, limits: Limits, *, show_facts: bool
) -> tuple[tuple[PageSection, ...], tuple[str, ...]]:
    """Return the sections of one comparison, whose ids begin with `id`, and why others are left out."""
    shown, failures = [], []
    for name, section in _list_sections(comparison):
        context = Context(original, comparison, comparison.measured.get(name, {}), limits)
        try:
            parts: Iterable[Part] = (NO_FACTS,)
            if show_facts or not section.shows_facts:
                parts = section.parts(context)
                parts = parts if SECTIONS.is_built_in(name) else tuple(map(_check_part, parts))
            finished = tuple(draw_charts(parts, f"{id}-{name}", limits.charts))
            if not SECTIONS.is_built_in(name):
                # Render it now: a faulty part would otherwise break the whole page.
                render_html(Page("", (PageSection("", "", finished),)))
        except Exception as error:
            if SECTIONS.is_built_in(name):
                raise
            failures.append(_describe_failure(name, error))
            continue
        if finished:
            shown.append(PageSection(f"{id}-{name}", clean(section.title, 80), finished))
    return tuple(shown), tuple(failures)


def _check_part(part: Any) -> Any:
    """Return a part with all its text plain. Raises TypeError or ValueError if it cannot be shown."""
    for each in (part, *(part.parts if type(part) is Folded else ())):
        if type(each) not in _KINDS:
            raise TypeError(f"`parts` gives {type(each).__name__}, which is not part of a section")
    if isinstance(part, Table) and any(len(row) != len(part.columns) for row in part.rows):
        raise ValueError(f"a row of the table {part.caption!r} has more or fewer cells than there are columns")
    if isinstance(part, Table) and any(each and len(each) != len(part.rows) for each in (part.bars, part.links)):
        raise ValueError(f"the table {part.caption!r} has more or fewer bars, or links, than rows")
    if isinstance(part, Facts) and len(part.table.columns) < 3:
        raise ValueError("facts have fewer than three columns, the fact, one answer and another")
    return replace(part, **{each.name: _make_plain(getattr(part, each.name)) for each in fields(part)})


def _make_plain(value: Any) -> Any:
    # A text may be of a class that marks it as HTML; `clean` returns a plain string.
    if isinstance(value, str):
        return clean(value, _LONGEST)
    if isinstance(value, tuple | list):
        return tuple(map(_make_plain, value))
    if value is None or type(value) in (int, float, bool, Estimate) or (callable(value) and not is_dataclass(value)):
        return value
    return _check_part(value)


def list_explained(comparisons: Iterable[Comparison]) -> list[Section]:
    """Return the sections whose terms and formulas need explaining, if facts were evaluated."""
    return [section for each in comparisons if not each.only_texts for _, section in _list_sections(each)]


def _list_sections(comparison: Comparison) -> Iterator[tuple[str, Section]]:
    return ((name, section) for name, section in find_sections()[0].items() if name not in comparison.left_out)
