"""Charts of what several compressed models keep: by what each costs (bytes, speed), and by setup."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compressknow.base.format import size
from compressknow.comparison.records import Estimate
from compressknow.pages import drawing
from compressknow.pages.card.method import find_rounding_kept, list_probes, mark_rounding
from compressknow.pages.drawing import INK, SERIES, Line
from compressknow.pages.records import Card, Comparison, ModelFacts, write_estimate
from compressknow.pages.tradeoff import Mark, Tradeoff, find_unbeaten

_FEWEST = 3  # fewer models are told apart at a glance at the table
_SHAPES = (("o", SERIES[0]), ("s", SERIES[1]), ("^", SERIES[2]), ("v", SERIES[3]))
_MOST_BARS = 15
_AMOUNT = re.compile(r"(?P<scope>.*\S)\s+(?P<amount>\d+(?:\.\d+)?)\s*%")


def name_runtime(model: ModelFacts) -> str:
    """Return what ran a model, in a word or two."""
    return str(model.runtime["name"]) if model.runtime else "transformers"


def name_deployment(model: ModelFacts) -> str:
    """Return the runtime and precision, or build, that a model's speed was measured in."""
    computed_in = str(model.speed.computed_in or "") if model.speed else ""
    name = name_runtime(model)
    return computed_in if computed_in.startswith(name) else ", ".join(filter(None, (name, computed_in)))


@dataclass(frozen=True, slots=True)
class _Cost:
    """Cost of a model: how it is read, drawn (divided, in its unit) and written, and what tells models apart by it."""

    name: str
    unit: str
    divisor: float
    read: Callable[[ModelFacts], float | None]
    write: Callable[[float], str]
    run_in: Callable[[ModelFacts], str]
    more_is_better: bool = False


_COSTS = (
    _Cost("size on disk", "MB", 1e6, lambda model: model.bytes, lambda amount: size(round(amount)), name_runtime),
    _Cost(
        "tokens a second",
        "",
        1,
        lambda model: model.speed.tokens_per_second if model.speed else None,
        "{:,.1f} tokens a second".format,
        name_deployment,
        more_is_better=True,
    ),
)


def chart_costs(card: Card, names: Sequence[str]) -> tuple[Tradeoff, ...]:
    """Return knowledge kept by size and by speed, each where three compressed models or more differ in it.

    Parameters
    ----------
    names : of the compressed models, numbered as in the table.
    """
    return tuple(chart for cost in _COSTS if (chart := _chart_cost(card, names, cost)))


def _chart_cost(card: Card, names: Sequence[str], cost: _Cost) -> Tradeoff | None:
    marks = []
    for number, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1):
        amount, kept = cost.read(comparison.model), comparison.kept
        if amount is not None and kept.value is not None:
            text = f"{name}: {write_estimate(kept)} kept, {cost.write(amount)}"
            kind = f"in {cost.run_in(comparison.model)}"
            marks.append(Mark(amount / cost.divisor, kept, kind, text, str(number)))
    if len({mark.cost for mark in marks}) < _FEWEST:
        return None
    kinds = list(dict.fromkeys(mark.kind for mark in marks))
    looks = {kind: (*shape, 6.0) for kind, shape in zip(kinds, _SHAPES, strict=False)}
    best = find_unbeaten(marks, lambda mark: (mark.cost, mark.share), more_is_better=cost.more_is_better)
    if (before := cost.read(card.original)) is not None:
        name = f"the original, in {cost.run_in(card.original)}"
        marks.append(Mark(before / cost.divisor, Estimate(1), name, f"{name}, {cost.write(before)}"))
        looks[name] = ("D", INK, 6.0)
    return Tradeoff(
        f"Knowledge kept by {cost.name}",
        ", ".join(filter(None, (cost.name, cost.unit))),
        marks,
        looks,
        edge=kinds,
        told=f"The best: {'; '.join(mark.told for mark in best)}.",
        more_is_better=cost.more_is_better,
        rounding=find_rounding_kept(list_probes(card.comparisons)),
    )


def chart_setups(comparisons: Sequence[Comparison], names: Sequence[str], id: str) -> tuple[str, ...]:
    """Return charts of what several models kept: lines where setups are amounts by scope, bars for the others."""
    lines, others = split_setups(comparisons)
    title = "Knowledge kept by how much was pruned"
    levels = mark_rounding(find_rounding_kept(list_probes(comparisons)))
    charts = [drawing.draw_lines(lines, f"{id}-lines", title, start=1, levels=levels)] if lines else []
    # Many bars would repeat the overview's, one below the other.
    bars = (
        []
        if len(others) > _MOST_BARS
        else [drawing.Bar(names[i], comparisons[i].kept) for i in others if comparisons[i].kept.value is not None]
    )
    title = "Knowledge kept by compressed model"
    return (*charts, *([drawing.draw_bars(bars, f"{id}-bars", title, levels=levels)] if bars else []))


def split_setups(comparisons: Sequence[Comparison]) -> tuple[tuple[Line, ...], tuple[int, ...]]:
    """Return scopes of which at least two amounts were pruned, and the places of all other comparisons.

    More scopes than there are ways of drawing a line are left to the bars.
    """
    amounts: dict[str, dict[float, int]] = {}
    for place, comparison in enumerate(comparisons):
        match = _AMOUNT.fullmatch(comparison.model.setup or "")
        if match and comparison.kept.value is not None:
            amounts.setdefault(match["scope"], {}).setdefault(float(match["amount"]), place)
    several = [(scope, by_amount) for scope, by_amount in amounts.items() if len(by_amount) > 1][: len(drawing.MARKERS)]
    lines = tuple(
        Line(scope, tuple((amount, comparisons[place].kept) for amount, place in sorted(by_amount.items())))
        for scope, by_amount in several
    )
    drawn = {place for _, by_amount in several for place in by_amount.values()}
    return lines, tuple(place for place in range(len(comparisons)) if place not in drawn)
