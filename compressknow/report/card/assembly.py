"""What all sections together make of a comparison: what they measure, what they show, what the JSON says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compressknow.format import plain
from compressknow.report.card.foreign import checked, is_foreign, left_out, try_out, usable
from compressknow.report.card.section import Context, Limits, ProbeAnswers, Section
from compressknow.report.parts import NO_FACTS, Part, Shown, Text, drawn
from compressknow.report.records import Comparison, ModelFacts
from compressknow.stats.records import ProbeFigures

_TRIAL = Limits(lost=5, gained=5, charts=True)
Answering = Callable[[], Sequence[ProbeAnswers]]


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
    terms = (term for each in comparisons for _, section in _of(each) for term in section.glossary)
    return tuple(dict.fromkeys((plain(name, 80), plain(meaning, 1000)) for name, meaning in terms))


def sentences(comparisons: Iterable[Comparison]) -> tuple[str, ...]:
    """How the sections compute what they show."""
    return tuple(dict.fromkeys(text for each in comparisons for _, section in _of(each) for text in section.method))


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
