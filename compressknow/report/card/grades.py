"""Grades: what a compressed model kept of each school subject, as a report card has it."""

from __future__ import annotations

from collections.abc import Iterable

from compressknow.report.comparison import subject_order
from compressknow.report.records import Counts, Estimate, Grade, ProbeFigures
from compressknow.report.statistics import proportion

# The least that must be kept for each grade, in percent.
SCALE = (("A+", 99), ("A", 97), ("B", 93), ("C", 85), ("D", 70))
LOWEST = "F"
NOTHING_KNOWN = "-"


def grades(probes: Iterable[ProbeFigures]) -> tuple[Grade, ...]:
    """A grade for each school subject over all probes; those of lm-eval's tasks have the task as their subject."""
    totals: dict[str, Counts] = {}
    for probe in probes:
        for group in probe.by_subject:
            totals[group.name] = totals.get(group.name, Counts()) + group.counts
    return tuple(_grade(subject, totals[subject]) for subject in sorted(totals, key=subject_order))


def grade_of(part: float, whole: float = 1) -> str:
    """The grade for keeping `part` of `whole`. Counts are compared as whole numbers: nothing is rounded up.

    >>> grade_of(99, 100), grade_of(98_999, 100_000), grade_of(7, 10), grade_of(0, 3), grade_of(0, 0)
    ('A+', 'A', 'D', 'F', '-')
    """
    if not whole:
        return NOTHING_KNOWN
    return next((name for name, least in SCALE if 100 * part >= least * whole), LOWEST)


def _grade(subject: str, counts: Counts) -> Grade:
    kept = proportion(counts.both, counts.known_before)
    best, worst = _ends(kept)
    return Grade(
        subject=subject,
        counts=counts,
        kept=kept,
        grade=grade_of(counts.both, counts.known_before),
        unsure=best != worst,
        range=f"{best} to {worst}" if best != worst else None,
    )


def _ends(kept: Estimate) -> tuple[str, str]:
    """The grades of an interval's upper and lower end."""
    if kept.low is None or kept.high is None:
        return NOTHING_KNOWN, NOTHING_KNOWN
    return grade_of(kept.high), grade_of(kept.low)
