"""Charts of what several compressed models keep against what each costs: bytes on disk and, where measured, speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from compressknow.base.format import estimate, size
from compressknow.comparison.records import Estimate
from compressknow.pages.card.method import kept_by_rounding, probes_of
from compressknow.pages.drawing import INK, SERIES
from compressknow.pages.records import Card, ModelFacts
from compressknow.pages.tradeoff import Look, Mark, Tradeoff, unbeaten

_ORIGINAL, _TRANSFORMERS = "the original", "transformers"

# Fewer models are told apart at a glance at the table.
_FEWEST = 3


_SHAPES = (("o", SERIES[0]), ("s", SERIES[1]), ("^", SERIES[2]), ("v", SERIES[3]))


def runtime_of(model: ModelFacts) -> str:
    """What ran it, in a word or two."""
    return str(model.runtime["name"]) if model.runtime else _TRANSFORMERS


def deployed_in(model: ModelFacts) -> str:
    """The runtime and precision, or build, that its speed was measured in."""
    computed_in = str(model.speed.computed_in or "") if model.speed else ""
    name = runtime_of(model)
    return computed_in if computed_in.startswith(name) else ", ".join(filter(None, (name, computed_in)))


def costs(card: Card, names: Sequence[str]) -> tuple[Tradeoff, ...]:
    """Knowledge kept by size and by speed; each is left out where fewer than three compressed models differ in it.

    Parameters
    ----------
    names : of the compressed models, numbered as in the table.
    """
    sized = _chart(card, names, "size on disk", "MB", lambda model: model.bytes, 1e6, _bytes, runtime_of)
    written = "{:,.1f} tokens a second".format
    timed = _chart(card, names, "tokens a second", "", _tokens, 1, written, deployed_in, more_is_better=True)
    return tuple(chart for chart in (sized, timed) if chart)


def _bytes(amount: float) -> str:
    return size(round(amount))


def _tokens(model: ModelFacts) -> float | None:
    return model.speed.tokens_per_second if model.speed else None


def _chart(
    card: Card,
    names: Sequence[str],
    cost: str,
    unit: str,
    of: Callable[[ModelFacts], float | None],
    divisor: float,
    write: Callable[[float], str],
    run_in: Callable[[ModelFacts], str],
    *,
    more_is_better: bool = False,
) -> Tradeoff | None:
    marks = list(_marks(card, names, of, divisor, write, run_in))
    if len({mark.cost for mark in marks}) < _FEWEST:
        return None
    kinds = list(dict.fromkeys(mark.kind for mark in marks))
    looks = {kind: Look(*shape, size=6) for kind, shape in zip(kinds, _SHAPES, strict=False)}
    best = unbeaten(marks, lambda mark: (mark.cost, mark.share), more_is_better=more_is_better)
    if (before := of(card.original)) is not None:
        name = f"{_ORIGINAL}, in {run_in(card.original)}"
        marks.append(Mark(before / divisor, Estimate(1), name, f"{name}, {write(before)}"))
        looks[name] = Look("D", INK, 6)
    return Tradeoff(
        f"Knowledge kept by {cost}",
        ", ".join(filter(None, (cost, unit))),
        marks,
        looks,
        edge=kinds,
        told=f"The best: {'; '.join(mark.told for mark in best)}.",
        more_is_better=more_is_better,
        rounding=kept_by_rounding(probes_of(card.comparisons)),
    )


def _marks(
    card: Card,
    names: Sequence[str],
    of: Callable[[ModelFacts], float | None],
    divisor: float,
    write: Callable[[float], str],
    run_in: Callable[[ModelFacts], str],
) -> Iterator[Mark]:
    """Each compressed model of which both are known, by what it was run in."""
    for number, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1):
        cost, kept = of(comparison.model), comparison.kept
        if cost is not None and kept.value is not None:
            told = f"{name}: {estimate(kept.value, kept.low, kept.high)} kept, {write(cost)}"
            yield Mark(cost / divisor, kept, f"in {run_in(comparison.model)}", told, str(number))
