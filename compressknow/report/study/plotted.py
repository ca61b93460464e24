"""The numbers of the paper's figures: as lines by amount pruned and as bars, with the levels that they are measured by.

Where a study has several probes, each number is the mean over them, as in the paper (section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from compressknow.report.drawing import Bar, Level, Line
from compressknow.report.records import Comparison, Estimate
from compressknow.report.statistics import mean
from compressknow.report.study.grid import (
    ATTENTION_KINDS,
    STRUCTURED,
    UNSTRUCTURED,
    pruned,
    pruned_and_quantized,
    quantized,
    schemes,
)
from compressknow.report.study.records import Study
from compressknow.report.text import plain

_GPQ_AMOUNTS = (20, 40)
_METHODS = {UNSTRUCTURED: "L1-unstructured", STRUCTURED: "L1-structured"}


def mean_drop(comparison: Comparison) -> Estimate:
    """Accuracy before less accuracy after (0 to 1), averaged as each probe's protocol does: the mean over probes."""
    change = mean([p.macro_difference if p.average == "macro" else p.difference for p in comparison.probes])
    return Estimate(*(None if end is None else 0.0 - end for end in (change.value, change.high, change.low)))


def mean_kept(comparison: Comparison) -> Estimate:
    """Knowledge kept: the mean over the probes of which the original knows anything."""
    return mean([probe.kept for probe in comparison.probes if probe.kept.value is not None])


def baselines(study: Study) -> tuple[Level, ...]:
    """The drops that lead to the majority baseline and to guessing: means over probes, where every probe has them."""
    return _levels(
        study, (("majority baseline", [p.majority for p in study.probes]), _chances(study)), from_original=True
    )


def guessing(study: Study) -> tuple[Level, ...]:
    """What a model that guesses keeps: the mean of chance over probes, where every probe has it."""
    return _levels(study, (_chances(study),), from_original=False)


def _chances(study: Study) -> tuple[str, list[float | None]]:
    return "guessing", [probe.chance for probe in study.probes]


def _levels(
    study: Study, scores: Iterable[tuple[str, list[float | None]]], *, from_original: bool
) -> tuple[Level, ...]:
    before = [probe.accuracy if from_original else 0.0 for probe in study.probes]
    found = []
    for name, values in scores:
        known = [value for value in values if value is not None]
        if known and len(known) == len(values):
            level = sum(known) / len(known)
            found.append(Level(name, sum(before) / len(before) - level if from_original else level))
    return tuple(found)


def by_amount(study: Study, scopes: Iterable[str], of: Callable[[Comparison], Estimate]) -> tuple[Line, ...]:
    """A line for each scope that was pruned by at least two amounts."""
    values = {scope: [(a, of(cell.comparison)) for a, cell in pruned(study, scope).items()] for scope in scopes}
    points = {scope: tuple((a, y) for a, y in each if y.value is not None) for scope, each in values.items()}
    return tuple(Line(scope, each) for scope, each in points.items() if len(each) > 1)


def when_quantized(study: Study, scopes: Iterable[str]) -> tuple[Bar, ...]:
    """A group for each scheme, a bar for each scope."""
    return _known(
        Bar(scope, mean_drop(cell.comparison), series, plain(scheme, 20))
        for scheme in schemes(study)
        for series, scope in enumerate(scopes)
        if (cell := quantized(study, scope).get(scheme))
    )


def when_both(study: Study, scopes: Iterable[str]) -> tuple[Bar, ...]:
    """A group for each scheme and amount, a bar for each scope."""
    return _known(
        Bar(scope, mean_drop(cell.comparison), series, f"{amount} % and {plain(scheme, 20)}")
        for scheme in schemes(study)
        for amount in _GPQ_AMOUNTS
        for series, scope in enumerate(scopes)
        if (cell := pruned_and_quantized(study, scope, scheme).get(amount))
    )


def of_attention_kinds(study: Study) -> tuple[Bar, ...]:
    """The four kinds of attention of encoder-decoder models: quantized, then pruned and quantized."""
    return when_quantized(study, ATTENTION_KINDS) + when_both(study, ATTENTION_KINDS)


def of_final_layer(study: Study) -> tuple[Bar, ...]:
    """A group for each amount, a bar for each method."""
    by_method = {method: pruned(study, "final", method) for method in _METHODS}
    return _known(
        Bar(_METHODS[method], mean_drop(cells[amount].comparison), series, f"{amount:g} %")
        for amount in sorted({amount for cells in by_method.values() for amount in cells})
        for series, (method, cells) in enumerate(by_method.items())
        if amount in cells
    )


def _known(bars: Iterable[Bar]) -> tuple[Bar, ...]:
    return tuple(bar for bar in bars if bar.value.value is not None)
