"""Facts that were put in several wordings: one answer a fact, by majority."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median_high

from compressknow.evaluate.answers import GRADES, Answer, Answers
from compressknow.evaluate.facts import fact_of
from compressknow.evaluate.records import ProbeEntry


def by_majority(answers: Answers) -> Answers:
    """One answer per fact where facts were put in several wordings: known if more than half of them are.

    The rank is the middle one, log-probability and divergence are means, and what is answered is what most wordings
    give, of equally many the first.
    """
    split = {name: entry for name, entry in answers.record.probes.items() if entry.templates}
    if not split:
        return answers
    kept = [answer for answer in answers.answers if answer.probe not in split]
    entries: dict[str, ProbeEntry] = {}
    for name, entry in split.items():
        merged = [_merged(wordings) for wordings in by_fact(answers.of(name)).values()]
        entries[name] = _entry(entry, len(merged))
        kept += merged
    probes = {name: entries.get(name, entry) for name, entry in answers.record.probes.items()}
    return replace(answers, record=replace(answers.record, probes=probes), answers=tuple(kept))


def by_fact(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """The answers to the wordings of each fact, by its id."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(fact_of(answer.fact_id), []).append(answer)
    return found


def _merged(wordings: Sequence[Answer]) -> Answer:
    first = wordings[0]
    predicted = Counter(answer.predicted for answer in wordings).most_common(1)[0][0]
    shown = next(answer for answer in wordings if answer.predicted == predicted)
    rank = median_high(math.inf if answer.rank is None else answer.rank for answer in wordings)
    tried = [answer.with_example for answer in wordings if answer.with_example is not None]
    return replace(
        first,
        fact_id=fact_of(first.fact_id),
        template=None,
        correct=2 * sum(answer.correct for answer in wordings) > len(wordings),
        predicted=predicted,
        produced=shown.produced,
        top5=shown.top5,
        top5_logp=shown.top5_logp,
        total_logp=shown.total_logp,
        rank=int(rank) if math.isfinite(rank) else None,
        logp_gold=_mean(answer.logp_gold for answer in wordings),
        first_kl=_mean(answer.first_kl for answer in wordings),
        with_example=_said_by_most(tried, first.gold),
        grade=_middle(wordings),
    )


def _middle(wordings: Sequence[Answer]) -> str | None:
    """The middle grade, the worse of two."""
    grades = [GRADES.index(answer.grade) for answer in wordings if answer.grade is not None]
    return GRADES[median_high(grades)] if len(grades) == len(wordings) else None


def _said_by_most(said: Sequence[str], gold: str) -> str | None:
    if not said:
        return None
    return gold if 2 * said.count(gold) > len(said) else next((text for text in said if text != gold), gold)


def _mean(values: Iterable[float | None]) -> float | None:
    given = list(values)
    known = [value for value in given if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(given) else None


def _entry(entry: ProbeEntry, facts: int) -> ProbeEntry:
    """The entry as if facts, not wordings, had been evaluated."""
    number = entry.templates or 1
    dropped = {f"{reason} (counted by wording)": prompts for reason, prompts in entry.dropped.items()}
    return replace(entry, facts=entry.facts // number, asked=facts, dropped=dropped)
