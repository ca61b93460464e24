"""A report card as a page for the terminal, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from compressknow.report.figures import at_least, count, estimate, p_value, share, size
from compressknow.report.records import Card, Comparison, Estimate
from compressknow.report.text import plain

WIDTH = 80
GRADES = f"{'Subject':<22}{'Known before':>14}{'Kept':>8}   {'Share kept (95 % interval)':<27}{'Grade':>6}"
MODELS = f"{'Model':<40}{'Size':>10}  {'Kept (95 % interval)':<28}"


def report_page(card: Card) -> Iterator[str]:
    """Lines: the verdict, the grades or, of several models, a line each; then the warnings."""
    yield from textwrap.wrap(card.verdict, WIDTH)
    yield ""
    if len(card.comparisons) == 1:
        yield from _grades(card.comparisons[0])
        yield from _probes(card.comparisons[0])
    else:
        yield from _models(card)
    for warning in _warnings(card):
        yield ""
        yield from _wrapped(f"! {warning}")


def _warnings(card: Card) -> Iterator[str]:
    """Those of the whole card, then those of its models, each said once."""
    yield from card.warnings
    models: dict[str, list[str]] = {}
    for comparison in card.comparisons:
        for warning in comparison.warnings:
            models.setdefault(warning, []).append(plain(comparison.model.name, 40))
    for warning, names in models.items():
        yield f"{', '.join(names)}: {warning}" if len(card.comparisons) > 1 else warning


def _grades(comparison: Comparison) -> Iterator[str]:
    yield GRADES
    yield "-" * len(GRADES)
    for grade in comparison.grades:
        mark = grade.grade + ("?" if grade.unsure else "")
        yield (
            f"{plain(grade.subject, 21):<22}{count(grade.counts.known_before):>14}{count(grade.counts.both):>8}   "
            f"{_written(grade.kept):<27}{mark:>6}"
        )
    if any(grade.unsure for grade in comparison.grades):
        yield "? the interval spans several grades"


def _probes(comparison: Comparison) -> Iterator[str]:
    for probe in comparison.probes:
        counts = probe.counts
        yield ""
        yield from _wrapped(
            f"{plain(probe.probe, 40)}: {count(counts.n)} facts, right before {share(probe.accuracy_original.value)}, "
            f"after {share(probe.accuracy_compressed.value)}"
        )
        yield from _wrapped(
            f"  lost {count(counts.lost)}, gained {count(counts.gained)} ({p_value(probe.p)}, McNemar); "
            f"answers changed {share(probe.answer_changed)}"
        )
        if probe.movement:
            mean, p99 = (f"{figure:.4f}" for figure in (probe.movement.kl_mean, probe.movement.kl_p99))
            bound = probe.movement.is_lower_bound
            yield f"  KL mean {at_least(mean, bound)}, p99 {at_least(p99, bound)} nats"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _models(card: Card) -> Iterator[str]:
    yield MODELS
    yield "-" * len(MODELS)
    for comparison in card.comparisons:
        model = comparison.model
        name = f"{model.name} ({model.setup})" if model.setup else model.name
        yield f"{plain(name, 39):<40}{size(model.bytes):>10}  {_written(comparison.kept):<28}".rstrip()


def _written(figure: Estimate) -> str:
    return estimate(figure.value, figure.low, figure.high)
