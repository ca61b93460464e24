"""Figures of facts that hang together in clusters (relations): tests, intervals, and models ranked by them.

`benchmarks/inference.py` draws nulls with relations that differ and counts false alarms of what stands here and of its
rivals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from compressknow.comparison.intervals import SIGNIFICANT, holm, mcnemar, wilson
from compressknow.comparison.records import Counts, Estimate, PairedTest
from compressknow.evaluate.answers import Answer

# Relations that it takes to know how these differ: with fewer, facts are taken as independent, and a page warns of it.
FEWEST = 5
# Relations that it takes for sign flips: the fewest flips of so many are rare enough to tell anything.
FEWEST_SIGNS = 10


def independent(counts: Counts) -> list[Counts]:
    """Return facts without relations (lm-eval's tasks, say) as clusters of one fact each."""
    kinds = {"both": counts.both, "lost": counts.lost, "gained": counts.gained, "neither": counts.neither}
    return [Counts(**{kind: 1}) for kind, number in kinds.items() for _ in range(number)]


def clusters_of(relations: Sequence[Counts]) -> list[Counts]:
    """Return what a probe's facts are drawn in: its relations, or its facts one by one where it has one relation."""
    there = [relation for relation in relations if relation.n]
    return there if len(there) > 1 else independent(sum(there, Counts()))


def number_clusters(facts: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return the number of each fact's cluster, from 0, where facts are given by probe and relation: its relation or,
    in a probe of one relation, itself."""
    relations = Counter(probe for probe, _ in set(facts))
    names = [fact if relations[fact[0]] > 1 else place for place, fact in enumerate(facts)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=int)


def tally(first: np.ndarray, second: np.ndarray, cluster: np.ndarray) -> list[Counts]:
    """Count facts by which of two models answers them right, the first taken as the original, in each cluster, by the
    number of each fact's cluster, from 0.

    >>> tally(np.array([True, True, True, False]), np.array([True, False, False, True]), np.array([0, 0, 1, 1]))
    [Counts(both=1, lost=1, gained=0, neither=0), Counts(both=0, lost=1, gained=1, neither=0)]
    """
    number = int(cluster.max()) + 1 if len(cluster) else 0
    of_kind = 2 * first.astype(int) + second
    found = np.bincount(4 * cluster + of_kind, minlength=4 * number).reshape(number, 4)
    return [Counts(*map(int, kinds)) for kinds in found[:, [3, 2, 1, 0]]]


def paired_test(clusters: Sequence[Counts]) -> PairedTest:
    """Test whether facts are lost as often as gained, two-sided, where those of one cluster hang together.

    With 10 clusters or more by sign flips: were a change as likely either way, the net change of each cluster could as
    well have had the other sign. All flips are counted, not sampled. Where each cluster is one fact this is the exact
    McNemar test. With 5 to 9 clusters, of which too few flips are possible, the larger p-value of McNemar's test and of
    Student's t-test of the clusters' net changes; with fewer, McNemar's.

    Of the tests that draw clusters (these, signed ranks, Durkalski et al. 2003, "Analysis of clustered matched-pair
    data", Statistics in Medicine 22, 2417-2428) sign flips are exact, and lose no power where clusters do not matter.

    >>> paired_test([Counts(lost=9, gained=2)]), paired_test([Counts(lost=3)] * 8 + [Counts(gained=3)] * 2)
    (PairedTest(p=0.06542..., unit='fact'), PairedTest(p=0.109375, unit='relation'))
    """
    changes = np.array([c.gained - c.lost for c in clusters if c.n], dtype=np.int64)
    total = sum(clusters, Counts())
    if not FEWEST <= len(changes) < total.n:
        return PairedTest(mcnemar(total), "fact")
    if len(changes) >= FEWEST_SIGNS:
        return PairedTest(_flip_signs(changes), "relation")
    exact = mcnemar(total)
    return PairedTest(None if exact is None else max(exact, _students_t(changes)), "relation")


def _flip_signs(changes: np.ndarray) -> float:
    """Return the share of all assignments of signs whose sum is as far from 0 as the changes' own."""
    sizes = np.sort(np.abs(changes[changes != 0]))
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)
    chances[reach], spread = 1.0, 0
    for size in map(int, sizes):
        # Only what the sizes so far can come to is not 0.
        inner = chances[reach - spread : reach + spread + 1] / 2
        spread += size
        chances[reach - spread : reach + spread + 1] = 0.0
        chances[reach - spread : reach - spread + len(inner)] = inner
        chances[reach + spread + 1 - len(inner) : reach + spread + 1] += inner
    seen = abs(int(changes.sum()))
    # Both tails are alike.
    return min(1.0, float(2 * chances[reach + seen :].sum())) if seen else 1.0


def _students_t(changes: np.ndarray) -> float:
    from scipy.special import stdtr

    number, spread = len(changes), float(changes.std(ddof=1))
    if not spread:
        return 0.0 if changes[0] else 1.0
    return 2 * float(stdtr(number - 1, -abs(float(changes.mean())) * math.sqrt(number) / spread))


class Design(NamedTuple):
    """Loss of information: how much less clustered facts tell than as many independent ones.

    Attributes
    ----------
    effect : variance of a figure over clusters / that of independent facts (Kish 1965, "Survey Sampling", section 5.4);
        1 at least, so that an interval over clusters is nowhere narrower than the simple one.
    size : facts per cluster, as a fact sees it: the sum of squares / the sum.
    degrees : of freedom: Kish's effective number of clusters, less one. Infinite for independent facts.
    """

    effect: float = 1.0
    size: float = 1.0
    degrees: float = math.inf

    def discount(self, growth: float = 1.0, level: float = 0.95) -> float:
        """Return by how many facts one independent fact is outweighed, where each cluster has `growth` times as many
        facts: the effect grows with them (1 + (size - 1) x intra-class correlation). Student's t is allowed for.
        """
        from scipy.special import ndtri

        correlation = (self.effect - 1) / (self.size - 1) if self.size > 1 else 0.0
        effect = max(1.0, 1 + (growth * self.size - 1) * min(1.0, correlation))
        tail = (1 + level) / 2
        return effect * (_quantile(self.degrees, tail) / float(ndtri(tail))) ** 2


INDEPENDENT = Design()


def design_of_kept(clusters: Sequence[Counts]) -> Design:
    """Return the design of knowledge kept; clusters of which the original knew nothing say nothing of it."""
    return _design([c.both for c in clusters], [c.known_before for c in clusters])


def design_of_change(clusters: Sequence[Counts]) -> Design:
    """Return the design of the net change: of lost facts among those that changed."""
    return _design([c.lost for c in clusters], [c.lost + c.gained for c in clusters])


def _design(parts: Sequence[int], wholes: Sequence[int]) -> Design:
    part, whole = (np.asarray(side, dtype=np.float64) for side in (parts, wholes))
    part, whole = part[whole > 0], whole[whole > 0]
    number, facts = len(whole), float(whole.sum())
    if not FEWEST <= number < facts:
        return INDEPENDENT
    share, size = float(part.sum()) / facts, float((whole**2).sum()) / facts
    apart = number / (number - 1) * float(((part - share * whole) ** 2).sum())
    alone = facts * share * (1 - share)
    return Design(max(1.0, apart / alone) if alone else 1.0, size, max(1.0, facts / size - 1))


def kept_by_cluster(clusters: Sequence[Counts], level: float = 0.95) -> Estimate:
    """Return knowledge kept with its interval over clusters; see `share_by_cluster`."""
    return share_by_cluster([c.both for c in clusters], [c.known_before for c in clusters], level)


def share_by_cluster(parts: Sequence[int], wholes: Sequence[int], level: float = 0.95) -> Estimate:
    """Return the sum of parts / the sum of wholes over clusters, with its interval; clusters whose whole is 0 are left
    out.

    Wilson's interval of as many independent facts as tell as much (facts / design effect), with Student's t in place of
    the normal quantile, since the effect is estimated: Korn and Graubard 1998 ("Confidence intervals for proportions
    with small expected number of positive counts estimated from survey data", Survey Methodology 24, 193-201) for
    Wilson's, which Franco et al. 2019 (Journal of Survey Statistics and Methodology 7, 334-364) found to cover best.
    There is none below `FEWEST` clusters, nor where each is one fact: the simple one is as good.

    >>> share_by_cluster([9], [10])
    Estimate(value=0.9, low=None, high=None)
    """
    facts, part = sum(wholes), sum(parts)
    if not facts:
        return Estimate(None)
    if not FEWEST <= sum(whole > 0 for whole in wholes) < facts:
        return Estimate(part / facts)
    effect, _, degrees = _design(parts, wholes)
    return Estimate(part / facts, *wilson(part / facts, facts / effect, _quantile(degrees, (1 + level) / 2)))


def difference_by_cluster(clusters: Sequence[Counts], level: float = 0.95) -> Estimate:
    """Return the accuracy of the compressed model less that of the original over all facts, with its interval over
    clusters: of a ratio, linearized, by Student's t (Cochran 1977, "Sampling Techniques", section 9A.2).
    """
    sizes = [c.n for c in clusters]
    value, error, degrees = standard_error([c.gained - c.lost for c in clusters], sizes)
    if not FEWEST <= sum(size > 0 for size in sizes) < sum(sizes) or value is None or not error:
        return Estimate(value)
    spread = _quantile(degrees, (1 + level) / 2) * error
    return Estimate(value, value - spread, value + spread)


def standard_error(sums: Sequence[float], sizes: Sequence[int]) -> tuple[float | None, float, float]:
    """Return the mean over all facts, its standard error over clusters, and the error's degrees of freedom."""
    total, size = (np.asarray(side, dtype=np.float64) for side in (sums, sizes))
    total, size = total[size > 0], size[size > 0]
    number, facts = len(size), float(size.sum())
    if not number:
        return None, 0.0, 1.0
    mean = float(total.sum()) / facts
    if number < 2:
        return mean, 0.0, 1.0
    apart = number / (number - 1) * float(((total - mean * size) ** 2).sum())
    return mean, math.sqrt(apart) / facts, max(1.0, facts**2 / float((size**2).sum()) - 1)


def _quantile(degrees: float, tail: float) -> float:
    from scipy.special import ndtri, stdtrit

    return float(ndtri(tail)) if math.isinf(degrees) else float(stdtrit(degrees, tail))


def rate_difference(
    first: np.ndarray, second: np.ndarray, cluster: np.ndarray, millions: tuple[float, float]
) -> tuple[Estimate, float | None]:
    """Return how much more the second of two forms loses than the first, a million of its changed parameters: the mean
    over facts with its interval over clusters, and a two-sided p-value, both by Student's t. There is no interval where
    all clusters are alike.

    Parameters
    ----------
    first, second : by fact, 1 where the form lost it, -1 where it gained it, 0 where nothing changed.
    cluster : by fact, the number of its cluster, from 0.
    millions : of parameters that each form changed.
    """
    from scipy.special import stdtr

    if not len(first) or not all(millions):
        return Estimate(None), None
    sums = np.bincount(cluster, weights=second / millions[1] - first / millions[0])
    middle, error, degrees = standard_error(sums.tolist(), np.bincount(cluster).tolist())
    if middle is None or not error:
        return Estimate(middle), 1.0 if not middle else None
    spread = _quantile(degrees, 0.975) * error
    return Estimate(middle, middle - spread, middle + spread), 2 * float(stdtr(degrees, -abs(middle) / error))


@dataclass(frozen=True, slots=True)
class Standing:
    """Standing of a model among the others.

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


def rank_models(
    original: Sequence[Answer], models: Sequence[Sequence[Answer]], sizes: Sequence[int | None]
) -> list[Standing]:
    """Compare each model, of so many bytes, with each other on what the original knows: paired by fact, by relation,
    Holm over all pairs, since which are compared in the end is not known beforehand."""
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


def find_smallest(places: Sequence[int], sizes: Sequence[int | None], standing: Sequence[Standing]) -> int | None:
    """Return the place of the smallest of these models, of equal ones the best; None where no size is known."""
    sized = [(size, -standing[place].keeps, place) for place in places if (size := sizes[place]) is not None]
    return min(sized)[2] if sized else None
