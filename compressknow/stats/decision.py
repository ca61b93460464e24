"""Which of several compressed models to take: the smallest that keeps enough, and what facts do not tell from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from compressknow.evaluate.answers import Answer
from compressknow.stats.clusters import number_clusters, paired_test, tally
from compressknow.stats.intervals import SIGNIFICANT, holm


@dataclass(frozen=True, slots=True)
class Standing:
    """A model among the others.

    Attributes
    ----------
    keeps : how many of the original's facts.
    beaten_by : the place of a model of no more bytes that keeps more; None where there is none, and of a model whose
        size is not known.
    is_surely_beaten : whether a test tells that one from it.
    alike : the places of the models that no test tells from it, those that keep more first.
    """

    keeps: int
    beaten_by: int | None
    is_surely_beaten: bool
    alike: tuple[int, ...]


def standings(
    original: Sequence[Answer], models: Sequence[Sequence[Answer]], sizes: Sequence[int | None]
) -> list[Standing]:
    """Compare each model with each other on what the original knows: paired by fact, by relation, Holm over all pairs,
    since which are compared in the end is not known beforehand.

    Parameters
    ----------
    original, models : answers to the same facts.
    sizes : of the models, in bytes.
    """
    facts = [answer for answer in original if answer.correct]
    right = [{(answer.probe, answer.fact_id) for answer in answers if answer.correct} for answers in models]
    keeps = [np.array([(fact.probe, fact.fact_id) in each for fact in facts], dtype=bool) for each in right]
    cluster = number_clusters([(fact.probe, fact.relation) for fact in facts])
    pairs = list(combinations(range(len(models)), 2))
    adjusted = holm([paired_test(tally(keeps[one], keeps[other], cluster)).p for one, other in pairs])
    apart = {pair for pair, p in zip(pairs, adjusted, strict=True) if p is not None and p < SIGNIFICANT}
    known = [int(each.sum()) for each in keeps]
    order = sorted(range(len(models)), key=lambda place: -known[place])
    found = []
    for place, size in enumerate(sizes):
        better = [other for other in order if known[other] > known[place] and size is not None]
        better = [other for other in better if (sizes[other] or 0) <= (size or 0) and sizes[other] is not None]
        sure = [other for other in better if tuple(sorted((place, other))) in apart]
        alike = tuple(each for each in order if each != place and tuple(sorted((place, each))) not in apart)
        found.append(Standing(known[place], next(iter(sure or better), None), bool(sure), alike))
    return found


def smallest(places: Sequence[int], sizes: Sequence[int | None], standing: Sequence[Standing]) -> int | None:
    """Return the place of the smallest of these models, of equal ones that which keeps most; None where no size is
    known."""
    sized = [(size, -standing[place].keeps, place) for place in places if (size := sizes[place]) is not None]
    return min(sized)[2] if sized else None
