"""Decide which of several compressed models to take, and say why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

from compressknow.base.format import count, share, size
from compressknow.comparison.clusters import Standing, find_smallest, rank_models
from compressknow.evaluate.answers import Answers
from compressknow.pages.card.gate import Gate, is_met
from compressknow.pages.card.method import find_rounding_kept, list_probes
from compressknow.pages.card.verdict import join_names
from compressknow.pages.records import Comparison, Decision, label_models, write_estimate


def decide(
    original: Answers,
    compressed: Sequence[Answers],
    comparisons: Sequence[Comparison],
    *,
    gates: Sequence[Gate] = (),
    strict: bool = False,
    within: int | None = None,
    broken: Collection[int] = (),
) -> Decision | None:
    """Choose the smallest model that keeps enough; None where they were not evaluated on the same facts, or none knows
    any.

    Parameters
    ----------
    gates : what is enough. Without them it is what rounding alone keeps, as far as the interval reaches; where that is
        not known or none keeps it, what no test tells from the model that keeps most.
    within : the most bytes that a model may have.
    broken : places of models that compute no numbers.
    """
    probes = [{probe.probe for probe in c.probes} for c in comparisons]
    if any(each != probes[0] for each in probes) or not any(c.counts.known_before for c in comparisons):
        return None
    of = [[answer for answer in each.answers if answer.probe in probes[0]] for each in (original, *compressed)]
    sizes = [comparison.model.bytes for comparison in comparisons]
    standing = rank_models(of[0], of[1:], sizes)
    conclude = partial(Decision, standings=tuple(standing), within=within)
    labels = label_models([comparison.model for comparison in comparisons])
    fitting = [i for i, n in enumerate(sizes) if n is not None and (within is None or n <= within) and i not in broken]
    if not fitting:
        return conclude(None, _write_none_fits(labels, sizes, within))
    at_most = f" of {size(within)} at most" if within is not None else ""
    rounding = find_rounding_kept(list_probes(comparisons))
    best = max(fitting, key=lambda place: standing[place].keeps)
    if gates:
        floor = join_names([gate.in_words for gate in gates])
        enough = [i for i in fitting if all(is_met(comparisons[i], gate, strict=strict) for gate in gates)]
        words = (f"that keeps {floor}", f"that keep {floor}")
    else:
        floor = f"what rounding alone keeps ({share(rounding)})" if rounding is not None else ""
        enough = [i for i in fitting if rounding is not None and (comparisons[i].kept.high or 0.0) >= rounding]
        words = (f"whose interval reaches {floor}", f"whose intervals reach {floor}")
    if not enough and gates:
        most = f"{labels[best]} keeps most, {write_estimate(comparisons[best].kept)}"
        return conclude(None, f"No model{at_most} {words[0].removeprefix('that ')}: none is recommended. {most}.")
    before = ""
    if not enough:
        enough = [best, *(place for place in standing[best].alike if place in fitting)]
        before = f"none keeps {floor}; " if floor else ""
        words = ("that keeps so much", f"that no test tells from {labels[best]}, which keeps most")
    taken = find_smallest(enough, sizes, standing)
    assert taken is not None  # All that fit have a size.
    number = count(len(enough))
    which = (
        f"the only model{at_most} {words[0]}"
        if len(enough) == 1
        else f"the smallest of {number} models{at_most} {words[1]}"
    )
    reason = (
        f"Take {labels[taken]} ({size(sizes[taken])}): {before}it is {which}. It keeps "
        f"{write_estimate(comparisons[taken].kept)}. {_write_others(taken, standing, labels, sizes)}"
    )
    return conclude(taken, reason)


def _write_none_fits(labels: Sequence[str], sizes: Sequence[int | None], within: int | None) -> str:
    known = [(n, label) for n, label in zip(sizes, labels, strict=True) if n is not None]
    if within is None or not known:
        return "None is recommended: no size is known of a model that computes numbers."
    least, label = min(known)
    return f"No model has {size(within)} at most: none is recommended. The smallest, {label}, has {size(least)}."


def _write_others(taken: int, standing: Sequence[Standing], labels: Sequence[str], sizes: Sequence[int | None]) -> str:
    """Say what no test tells from the one that is taken."""
    alike = standing[taken].alike
    if not alike:
        return "No other keeps as much or as little: that is more than chance."
    named = join_names([f"{labels[place]} ({size(sizes[place])})" for place in alike])
    return f"No test tells it from {named}."


def mark_models(decision: Decision, labels: Sequence[str]) -> list[str]:
    """Say of each model that it is recommended, or unbeaten at its size, or beaten by a smaller one."""
    found = []
    for place, standing in enumerate(decision.standings):
        if place == decision.place:
            found.append("recommended")
        elif standing.beaten_by is not None:
            sure = "beaten by" if standing.is_surely_beaten else "perhaps beaten by"
            found.append(f"{sure} {labels[standing.beaten_by]}")
        else:
            found.append("unbeaten at its size")
    return found
