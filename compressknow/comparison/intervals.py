"""Intervals, tests and averages of shares of facts, as pure functions of counts, computed with scipy.

Confidence intervals are two-sided, at 95 % by default. Facts are correlated within clusters (relations): those of one
tend to be lost together. `benchmarks/inference.py` simulates null hypotheses with relations that differ, and counts
false positives of these methods and of alternatives.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from compressknow.comparison.records import Counts, Estimate

RESAMPLES = 10_000
SEED = 0
_QUANTILES = (2.5, 97.5)
_DRAWN_AT_A_TIME = 1 << 18  # relations to draw at a time, over all resamples: 8 MB of counts


def estimate_proportion(part: int, whole: int, level: float = 0.95) -> Estimate:
    """Return part / whole with its Wilson score interval (Wilson 1927); no value if `whole` is 0.

    >>> estimate = estimate_proportion(81, 263)  # Newcombe (1998a), table I
    >>> round(estimate.low, 4), round(estimate.high, 4)
    (0.2553, 0.3662)
    """
    if not whole:
        return Estimate(None)
    return Estimate(part / whole, *compute_wilson(part / whole, whole, compute_normal_quantile(level)))


def compute_normal_quantile(level: float = 0.95) -> float:
    """Return the half width of a two-sided interval at this level, in standard errors."""
    # scipy.stats has these intervals too, but takes longer to import than everything else in a report.
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def compute_wilson(share: float, number: float, z: float) -> tuple[float, float]:
    """Return the ends of Wilson's interval of a share of `number` facts, `z` standard errors to each side."""
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    low, high = ((share + z * z / (2 * number) + sign * spread) / (1 + z * z / number) for sign in (-1, 1))
    # Rounding may put an end slightly beyond the share, or beyond 0 or 1.
    return (max(0.0, min(low, share)) if share else 0.0), (min(1.0, max(high, share)) if share < 1 else 1.0)


def estimate_difference(counts: Counts, level: float = 0.95) -> Estimate:
    """Return the accuracy of the compressed model minus that of the original, (c - b) / n, with Newcombe's interval.

    Method 10 of Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based
    on paired data", Statistics in Medicine 17, 2635-2650: the Wilson intervals of both proportions, squared and added,
    minus the part explained by their correlation phi (corrected for continuity).

    >>> estimate = estimate_difference(Counts(both=59, lost=16, gained=6, neither=80))
    >>> [round(number, 4) for number in (estimate.value, estimate.low, estimate.high)]
    [-0.0621, -0.1186, -0.0046]
    """
    return _estimate_difference(counts, counts.n, compute_normal_quantile(level)) if counts.n else Estimate(None)


def _estimate_difference(counts: Counts, number: float, z: float) -> Estimate:
    """Return the difference with its interval for an effective `number` of facts, `z` standard errors to each side."""
    n = counts.n
    after, before = counts.known_after / n, counts.known_before / n
    (low_after, high_after), (low_before, high_before) = (compute_wilson(each, number, z) for each in (after, before))
    phi, value = _correlate(counts, number), (counts.gained - counts.lost) / n
    below = _add_squares(after - low_after, high_before - before, phi)
    above = _add_squares(high_after - after, before - low_before, phi)
    return Estimate(value, max(-1.0, value - below), min(1.0, value + above))


def _correlate(counts: Counts, number: float) -> float:
    """Return the correlation of both models' correctness, corrected for continuity as in Newcombe's method 10 for an
    effective `number` of facts; 0 if a model is always or never right."""
    n = counts.n
    margins = math.prod([counts.known_before, n - counts.known_before, counts.known_after, n - counts.known_after])
    if not margins:
        return 0.0
    product = counts.both * counts.neither - counts.lost * counts.gained
    return (max(product - n * n / (2 * number), 0) if product > 0 else product) / math.sqrt(margins)


def _add_squares(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def run_mcnemar(counts: Counts) -> float | None:
    """Return the p-value of the exact two-sided McNemar test (McNemar 1947), a binomial test of whether facts are lost
    as often as gained. 1 if nothing changed, None without facts.

    >>> run_mcnemar(Counts(both=1, lost=1, gained=7, neither=12))
    0.0703125
    """
    from scipy.special import bdtr

    if not counts.n:
        return None
    discordant = counts.lost + counts.gained
    # Both tails are equal. If they meet, their sum may round to 0.9999999999999999.
    if abs(counts.lost - counts.gained) <= discordant % 2:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(counts.lost, counts.gained), discordant, 0.5)))


def average_estimates(estimates: Sequence[Estimate], weights: Sequence[int] | None = None) -> Estimate:
    """Return the mean of independent figures, optionally weighted, with its interval: the distances to the ends of
    their intervals, squared and added (MOVER, Zou and Donner 2008, Statistics in Medicine 27, 1693-1702). No value if
    one has none.

    >>> average_estimates([Estimate(0.5, 0.2, 0.6), Estimate(0.7, 0.3, 0.7)])
    Estimate(value=0.6, low=0.35, high=0.65)
    """
    values = [estimate.value for estimate in estimates if estimate.value is not None]
    if not values or len(values) < len(estimates):
        return Estimate(None)
    weights = weights or [1] * len(values)
    total = sum(weights)
    mean = math.fsum(map(operator.mul, weights, values)) / total
    bounds = [(e.low, e.high) for e in estimates if e.low is not None and e.high is not None]
    if len(bounds) < len(values):
        return Estimate(mean)
    below, above = (
        math.hypot(*(w * (value - pair[end]) for w, value, pair in zip(weights, values, bounds, strict=True))) / total
        for end in (0, 1)
    )
    return Estimate(*(round(number, 12) for number in (mean, mean - below, mean + above)))


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for multiple testing by Holm (1979), "A simple sequentially rejective multiple test procedure",
    Scandinavian Journal of Statistics 6, 65-70. None remains None and does not count.

    >>> adjust_holm([0.01, 0.04, 0.03, None, 0.005])
    [0.03, 0.06, 0.06, None, 0.02]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def correct_for_chance(kept: Estimate, chance: float | None) -> Estimate:
    """Return knowledge kept beyond what guessing would get right: (kept - g) / (1 - g), at least 0.

    A model that has forgotten a fact still answers it correctly with probability g (1 / number of candidates, its mean
    over the facts that the original knew). If the share k is truly kept, k + (1 - k) g appears to be kept; this is
    solved for k (Abbott 1925, "A method of computing the effectiveness of an insecticide", J. Econ. Entomology 18,
    265-267; Cohen's kappa has the same form). The interval is transformed likewise, as g is known, not estimated.

    >>> correct_for_chance(Estimate(0.75, 0.6, 0.9), chance=0.5)
    Estimate(value=0.5, low=0.2, high=0.8)
    """
    if kept.value is None or chance is None or chance >= 1:
        return Estimate(None)
    shares = (kept.value, kept.low, kept.high)
    # Rounded to the precision of floats, so that 0.6 at 0.5 is 0.2 and not 0.19999999999999996.
    corrected = (None if share is None else round((share - chance) / (1 - chance), 12) for share in shares)
    return Estimate(*(None if share is None else min(1.0, max(0.0, share)) for share in corrected))


def average_relations(relations: Sequence[Counts]) -> tuple[Estimate, Estimate, Estimate]:
    """Return the accuracy of the original, of the compressed model, and their difference, as means over relations with
    facts.

    Intervals are percentiles 2.5 and 97.5 of a stratified paired bootstrap with `RESAMPLES` samples (Efron and
    Tibshirani 1993, chapter 13): each relation's four counts are drawn from a multinomial distribution. If all
    resamples are equal (with one fact per relation, say), the spread is not known, and there is no interval.
    """
    table = np.array([[c.both, c.lost, c.gained, c.neither] for c in relations if c.n], dtype=np.int64).reshape(-1, 4)
    if not len(table):
        return Estimate(None), Estimate(None), Estimate(None)
    sizes = table.sum(axis=1)
    generator, shares = np.random.default_rng(SEED), table / sizes[:, None]
    step = max(1, _DRAWN_AT_A_TIME // len(table))
    resampled = np.empty((3, RESAMPLES))
    for start in range(0, RESAMPLES, step):
        block = resampled[:, start : start + step]
        block[:] = _average_relations(generator.multinomial(sizes, shares, size=(block.shape[1], len(table))), sizes)
    estimates = []
    for value, samples in zip(_average_relations(table, sizes), resampled, strict=True):
        ends = np.percentile(samples, _QUANTILES) if np.ptp(samples) else ()
        # As floats, 1/10, 2/10 and -3/10 add up to 6e-17.
        estimates.append(Estimate(*(float(end) if abs(end) > 1e-12 else 0.0 for end in (value, *ends))))
    before, after, difference = estimates
    return before, after, difference


def _average_relations(counts: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Return means over relations, the last axis but one: accuracy before, after, and after minus before."""
    both, lost, gained = counts[..., 0], counts[..., 1], counts[..., 2]
    return [(part / sizes).mean(axis=-1) for part in (both + lost, both + gained, gained - lost)]


# Minimum of relations to estimate how they differ; with fewer, facts count as independent, and pages warn about it.
FEWEST = 5
FEWEST_SIGNS = 10  # minimum of relations for sign flips; with fewer, the smallest possible p-value is too large


def list_clusters(relations: Sequence[Counts]) -> list[Counts]:
    """Return a probe's relations or, if it has only one, as lm-eval's tasks do, its facts one by one."""
    clusters = [relation for relation in relations if relation.n]
    if len(clusters) > 1:
        return clusters
    return [Counts(**{kind: 1}) for each in clusters for kind, number in asdict(each).items() for _ in range(number)]


def number_clusters(facts: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return each fact's cluster number, from 0, by (probe, relation); in a probe of one relation, each has its own."""
    relations = Counter(probe for probe, _ in set(facts))
    names = [fact if relations[fact[0]] > 1 else index for index, fact in enumerate(facts)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=int)


def tally(first: np.ndarray, second: np.ndarray, cluster: np.ndarray) -> list[Counts]:
    """Count the facts of each cluster by which of two models knows them, the first taken as the original; `cluster` is
    the number of each fact's cluster, from 0.

    >>> tally(np.array([True, True, True, False]), np.array([True, False, False, True]), np.array([0, 0, 1, 1]))
    [Counts(both=1, lost=1, gained=0, neither=0), Counts(both=0, lost=1, gained=1, neither=0)]
    """
    number = int(cluster.max()) + 1 if len(cluster) else 0
    kind = 2 * first.astype(int) + second
    table = np.bincount(4 * cluster + kind, minlength=4 * number).reshape(number, 4)
    return [Counts(*row) for row in table[:, [3, 2, 1, 0]].tolist()]


def find_unit(clusters: Sequence[Counts]) -> str:
    """Return what is sampled independently: ``relation`` if there are enough, and some have several facts; or ``fact``.

    >>> find_unit([Counts(both=2)] * 5), find_unit([Counts(both=2)] * 4), find_unit([Counts(both=1)] * 5)
    ('relation', 'fact', 'fact')
    """
    sizes = [cluster.n for cluster in clusters if cluster.n]
    return "relation" if FEWEST <= len(sizes) < sum(sizes) else "fact"


def run_paired_test(clusters: Sequence[Counts]) -> float | None:
    """Test whether facts are lost as often as gained, two-sided, given that facts of a cluster are correlated.

    With 10 clusters or more, the test is by sign flips: under the null hypothesis, the net change of each cluster could
    as well have the opposite sign. All flips are counted, not sampled. If each cluster is one fact, this is the exact
    McNemar test. With 5 to 9 clusters, which have too few flips, it is the larger p-value of McNemar's test and of
    Student's t-test of the mean over facts, by the jackknife over clusters; with fewer, it is McNemar's.

    Among the tests for clusters (these, signed ranks, Durkalski et al. 2003, "Analysis of clustered matched-pair data",
    Statistics in Medicine 22, 2417-2428), sign flips are exact, and lose no power if clusters do not matter.

    >>> run_paired_test([Counts(lost=9, gained=2)]), run_paired_test([Counts(lost=3)] * 8 + [Counts(gained=3)] * 2)
    (0.06542..., 0.109375)
    """
    table = np.array([(c.both, c.lost, c.gained, c.neither) for c in clusters if c.n], dtype=np.int64).reshape(-1, 4)
    changes, sizes = table[:, 2] - table[:, 1], table.sum(axis=1)
    exact = run_mcnemar(Counts(*table.sum(axis=0).tolist()))
    if exact is None or find_unit(clusters) == "fact":
        return exact
    return _flip_signs(changes) if len(sizes) >= FEWEST_SIGNS else max(exact, _jackknife(changes, sizes))


def _flip_signs(changes: np.ndarray) -> float:
    """Return the share of all assignments of signs whose sum is as far from 0 as the changes' own."""
    # Probabilities of each sum that the changes so far can have, in ascending order.
    chances = np.ones(1)
    for size in map(int, np.sort(np.abs(changes[changes != 0]))):
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] = chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    observed = abs(int(changes.sum()))
    # Both tails are equal.
    return min(1.0, float(2 * chances[len(chances) // 2 + observed :].sum())) if observed else 1.0


def _jackknife(changes: np.ndarray, sizes: np.ndarray) -> float:
    """Return the p-value that the mean over facts is 0, by Student's t of its changes when each cluster is left out
    (Tukey 1958, "Bias and confidence in not-quite large samples", Annals of Mathematical Statistics 29, 614).

    For clusters of equal size, this is the t-test of their net changes. For others, that test would count a larger
    cluster as spread, even if a model lost the same share of each; and residuals, which a large cluster pulls towards
    itself, would underestimate the spread (Bell and McCaffrey 2002, Survey Methodology 28, 169-181).
    """
    from scipy.special import stdtr

    number, facts = len(sizes), float(sizes.sum())
    mean = float(changes.sum()) / facts
    moves = (changes - mean * sizes) / (facts - sizes)
    error = math.sqrt((number - 1) / number * float((moves**2).sum()))
    if not error:
        return 0.0 if mean else 1.0
    degrees = max(1.0, facts**2 / float((sizes**2).sum()) - 1)
    return 2 * float(stdtr(degrees, -abs(mean) / error))


class Design(NamedTuple):
    """Loss of information in clustered facts, compared with the same number of independent ones."""

    # Variance of a figure over clusters / that of independent facts (Kish 1965, "Survey Sampling", section 5.4); at
    # least 1, so that an interval over clusters is never narrower than the simple one.
    effect: float = 1.0
    size: float = 1.0  # mean size of a fact's cluster: the sum of squares / the sum
    degrees: float = math.inf  # degrees of freedom: Kish's effective number of clusters minus one

    def discount(self, growth: float = 1.0) -> float:
        """Return the number of facts that are worth one independent fact if each cluster has `growth` times as many:
        the effect grows with them (1 + (size - 1) x intra-class correlation). Includes the factor of Student's t."""
        correlation = (self.effect - 1) / (self.size - 1) if self.size > 1 else 0.0
        effect = max(1.0, 1 + (growth * self.size - 1) * min(1.0, correlation))
        return effect * (_compute_quantile(self.degrees) / compute_normal_quantile()) ** 2


INDEPENDENT = Design()


def design_of_kept(clusters: Sequence[Counts]) -> Design:
    """Return the design of knowledge kept, without clusters of which the original knew nothing."""
    return _design([c.both for c in clusters], [c.known_before for c in clusters])


def design_of_change(clusters: Sequence[Counts]) -> Design:
    """Return the design of the net change over all facts, including those that did not change: if all changed facts are
    lost, only clusters without changes show the correlation."""
    total = sum(clusters, Counts())
    return _design([c.gained - c.lost for c in clusters], [c.n for c in clusters], total.lost + total.gained)


def _design(sums: Sequence[int], sizes: Sequence[int], squares: int | None = None) -> Design:
    """Return the design of a mean over facts from the sums of its values in each cluster. `squares` is the sum of all
    squared values, by default that of a share, whose values are 0 or 1."""
    total, size = (np.asarray(each, dtype=np.float64) for each in (sums, sizes))
    total, size = total[size > 0], size[size > 0]
    number, facts = len(size), float(size.sum())
    if not FEWEST <= number < facts:
        return INDEPENDENT
    mean, mean_size = float(total.sum()) / facts, float((size**2).sum()) / facts
    clustered = number / (number - 1) * float(((total - mean * size) ** 2).sum())
    independent = facts * mean * (1 - mean) if squares is None else squares - facts * mean * mean
    return Design(max(1.0, clustered / independent) if independent else 1.0, mean_size, max(1.0, facts / mean_size - 1))


def estimate_kept(clusters: Sequence[Counts], level: float = 0.95) -> Estimate:
    """Return knowledge kept with the preferred interval: over clusters if there is one, else the simple one.

    >>> estimate_kept([Counts(both=9, lost=1)]) == estimate_proportion(9, 10)
    True
    """
    total = sum(clusters, Counts())
    simple = estimate_proportion(total.both, total.known_before, level)
    return simple.or_by_relation(estimate_kept_by_cluster(clusters, level))


def estimate_kept_by_cluster(clusters: Sequence[Counts], level: float = 0.95) -> Estimate:
    """Return knowledge kept with its interval over clusters; see `share_by_cluster`."""
    return share_by_cluster([c.both for c in clusters], [c.known_before for c in clusters], level)


def share_by_cluster(parts: Sequence[int], wholes: Sequence[int], level: float = 0.95) -> Estimate:
    """Return the sum of parts / the sum of wholes over clusters, with its interval; clusters whose whole is 0 are left
    out.

    Wilson's interval of as many independent facts as tell as much (facts / design effect), with Student's t in place of
    the normal quantile, since the effect is estimated: Korn and Graubard 1998 ("Confidence intervals for proportions
    with small expected number of positive counts estimated from survey data", Survey Methodology 24, 193-201) for
    Wilson's, which Franco et al. 2019 (Journal of Survey Statistics and Methodology 7, 334-364) found to cover best.
    There is none below `FEWEST` clusters, nor if each has one fact: the simple one is as good.

    >>> share_by_cluster([9], [10])
    Estimate(value=0.9, low=None, high=None)
    """
    facts, part = sum(wholes), sum(parts)
    if not facts:
        return Estimate(None)
    if not FEWEST <= sum(whole > 0 for whole in wholes) < facts:
        return Estimate(part / facts)
    effect, _, degrees = _design(parts, wholes)
    return Estimate(part / facts, *compute_wilson(part / facts, facts / effect, _compute_quantile(degrees, level)))


def estimate_difference_by_cluster(clusters: Sequence[Counts], level: float = 0.95) -> Estimate:
    """Return the accuracy of the compressed model minus that of the original over all facts, with its interval over
    clusters: Newcombe's for the effective number of independent facts, with Student's t; see `share_by_cluster`.

    The symmetric interval of a linearized ratio (Cochran 1977, "Sampling Techniques", section 9A.2) misses the true
    difference far more often if few facts change, as `benchmarks/inference.py` shows.
    """
    total = sum(clusters, Counts())
    if not total.n:
        return Estimate(None)
    if find_unit(clusters) == "fact":
        return Estimate((total.gained - total.lost) / total.n)
    effect, _, degrees = design_of_change(clusters)
    return _estimate_difference(total, total.n / effect, _compute_quantile(degrees, level))


def _compute_quantile(degrees: float, level: float = 0.95) -> float:
    """Return the half width of a two-sided interval at this level by Student's t, in standard errors."""
    from scipy.special import stdtrit

    return compute_normal_quantile(level) if math.isinf(degrees) else float(stdtrit(degrees, (1 + level) / 2))


def compare_rates(
    first: np.ndarray, second: np.ndarray, cluster: np.ndarray, millions: tuple[float, float]
) -> tuple[Estimate, float | None]:
    """Return how much more the second of two forms loses than the first, per million changed parameters: the mean over
    facts with its interval over clusters, and the two-sided p-value that it is 0, both by Student's t with the variance
    of a linearized ratio (Cochran 1977, "Sampling Techniques", section 9A.2). There is no interval if all clusters are
    equal. `first` and `second` are 1 for each fact that the form lost, -1 for one that it gained, and otherwise 0;
    `cluster` is the number of each fact's cluster, from 0. `millions` is the number of parameters that each form
    changed.

    A form that changed few parameters may lose no fact by chance. So if a form changed fewer facts than the common rate
    predicts, the variance is raised to that of the predicted number of independent facts.
    """
    if not len(first) or not all(millions):
        return Estimate(None), None
    from scipy.special import stdtr

    size = np.bincount(cluster)
    total, size = np.bincount(cluster, weights=second / millions[1] - first / millions[0])[size > 0], size[size > 0]
    number, facts = len(size), len(cluster)
    mean = float(total.sum()) / facts
    variance = number / (number - 1) * float(((total - mean * size) ** 2).sum()) if number > 1 else 0.0
    if not variance:
        return Estimate(mean), None if mean else 1.0
    rate = float(first.sum() + second.sum()) / sum(millions)
    forms = [(float(np.abs(each).sum()), million) for each, million in zip((first, second), millions, strict=True)]
    observed = math.fsum(changed / million**2 for changed, million in forms)
    expected = math.fsum(max(changed, rate * million) / million**2 for changed, million in forms)
    error = math.sqrt(variance * (expected / observed)) / facts
    degrees = max(1.0, facts**2 / float((size**2).sum()) - 1)
    spread = _compute_quantile(degrees) * error
    return Estimate(mean, mean - spread, mean + spread), 2 * float(stdtr(degrees, -abs(mean) / error))
