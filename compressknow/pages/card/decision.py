"""Several compressed models: which one to take and why, and charts of what each keeps against what it costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from compressknow.base.format import count, estimate, share, size
from compressknow.comparison.clusters import Standing, find_smallest, rank_models
from compressknow.evaluate.answers import Answers
from compressknow.pages.card.gate import Gate, is_met
from compressknow.pages.card.method import kept_by_rounding, probes_of
from compressknow.pages.card.verdict import labels_of, listed
from compressknow.pages.records import Comparison, Decision


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
    labels = labels_of([comparison.model for comparison in comparisons])
    fitting = [i for i, n in enumerate(sizes) if n is not None and (within is None or n <= within) and i not in broken]
    if not fitting:
        return Decision(None, _none_fits(labels, sizes, within), tuple(standing), within)
    at_most = f" of {size(within)} at most" if within is not None else ""
    rounding = kept_by_rounding(probes_of(comparisons))
    best = max(fitting, key=lambda place: standing[place].keeps)
    if gates:
        floor = listed([gate.in_words for gate in gates])
        enough = [i for i in fitting if all(is_met(comparisons[i], gate, strict=strict) for gate in gates)]
        words = (f"that keeps {floor}", f"that keep {floor}")
    else:
        floor = f"what rounding alone keeps ({share(rounding)})" if rounding is not None else ""
        enough = [i for i in fitting if rounding is not None and (comparisons[i].kept.high or 0.0) >= rounding]
        words = (f"whose interval reaches {floor}", f"whose intervals reach {floor}")
    if not enough and gates:
        most = f"{labels[best]} keeps most, {_kept(comparisons[best])}"
        return Decision(
            None,
            f"No model{at_most} {words[0].removeprefix('that ')}: none is recommended. {most}.",
            tuple(standing),
            within,
        )
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
    said = f"Take {labels[taken]} ({size(sizes[taken])}): {before}it is {which}. It keeps {_kept(comparisons[taken])}."
    return Decision(taken, f"{said} {_others(taken, standing, labels, sizes)}", tuple(standing), within)


def _none_fits(labels: Sequence[str], sizes: Sequence[int | None], within: int | None) -> str:
    known = [(n, label) for n, label in zip(sizes, labels, strict=True) if n is not None]
    if within is None or not known:
        return "None is recommended: no size is known of a model that computes numbers."
    least, label = min(known)
    return f"No model has {size(within)} at most: none is recommended. The smallest, {label}, has {size(least)}."


def _others(taken: int, standing: Sequence[Standing], labels: Sequence[str], sizes: Sequence[int | None]) -> str:
    """What no test tells from the one that is taken."""
    alike = standing[taken].alike
    if not alike:
        return "No other keeps as much or as little: that is more than chance."
    named = listed([f"{labels[place]} ({size(sizes[place])})" for place in alike])
    return f"No test tells it from {named}."


def _kept(comparison: Comparison) -> str:
    kept = comparison.kept
    return estimate(kept.value, kept.low, kept.high)


def marks(decision: Decision, labels: Sequence[str]) -> list[str]:
    """What a table says of each model: that it is taken, or not told from that, or beaten by a smaller one."""
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


def to_json(decision: Decision, labels: Sequence[str]) -> dict[str, Any]:
    """The decision as plain values; models by their names on the page."""
    name: Mapping[int | None, str] = dict(enumerate(labels))
    return {
        "model": name.get(decision.place),
        "place": decision.place,
        "reason": decision.reason,
        "within": decision.within,
        "standings": [
            {
                "model": name[place],
                "keeps": each.keeps,
                "beaten_by": name.get(each.beaten_by),
                "surely": each.is_surely_beaten,
                "not_told_from": [name[other] for other in each.alike],
            }
            for place, each in enumerate(decision.standings)
        ],
    }
