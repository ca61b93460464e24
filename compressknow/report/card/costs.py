"""Charts of what several compressed models keep against what each costs: bytes on disk and, where measured, speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from compressknow.format import share, size
from compressknow.report.card.rounding import kept_by_rounding, probes_of
from compressknow.report.drawing import INK, SERIES
from compressknow.report.records import Card, ModelFacts
from compressknow.report.tradeoff import Look, Mark, Tradeoff, unbeaten

# Fewer models are told apart at a glance at the table.
_FEWEST = 3
_ORIGINAL, _TRANSFORMERS = "the original", "transformers"
_SHAPES = (("o", SERIES[0]), ("s", SERIES[1]), ("^", SERIES[2]), ("v", SERIES[3]))


def runtime_of(model: ModelFacts) -> str:
    """What ran it, in a word or two."""
    return str(model.runtime["name"]) if model.runtime else _TRANSFORMERS


def costs(card: Card, names: Sequence[str]) -> tuple[Tradeoff, ...]:
    """Knowledge kept by size and by speed; each is left out where fewer than three compressed models differ in it.

    Parameters
    ----------
    names : of the compressed models, numbered as in the table.
    """
    sized = _chart(card, names, "size on disk", "MB", lambda model: model.bytes, 1e6, _bytes)
    timed = _chart(
        card, names, "tokens a second", "", _tokens, 1, "{:,.1f} tokens a second".format, more_is_better=True
    )
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
    *,
    more_is_better: bool = False,
) -> Tradeoff | None:
    marks = list(_marks(card, names, of, divisor, write))
    if len({mark.cost for mark in marks}) < _FEWEST:
        return None
    kinds = list(dict.fromkeys(mark.kind for mark in marks))
    looks = {kind: Look(*shape, size=6) for kind, shape in zip(kinds, _SHAPES, strict=False)}
    best = unbeaten(marks, lambda mark: (mark.cost, mark.kept), more_is_better=more_is_better)
    if (before := of(card.original)) is not None:
        marks.append(Mark(before / divisor, 1, _ORIGINAL, f"{_ORIGINAL}, {write(before)}"))
        looks[_ORIGINAL] = Look("D", INK, 6)
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
) -> Iterator[Mark]:
    """Each compressed model of which both are known, by the runtime that it was run in."""
    for number, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1):
        cost, kept = of(comparison.model), comparison.kept.value
        if cost is not None and kept is not None:
            told = f"{name}: {share(kept)} kept, {write(cost)}"
            yield Mark(cost / divisor, kept, f"in {runtime_of(comparison.model)}", told, str(number))
