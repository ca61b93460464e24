"""Compare two models' answers, paired by fact: counts, figures and tests of each probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from compressknow.base.errors import CompressknowError
from compressknow.base.format import SIGNIFICANT
from compressknow.base.reading import group_by
from compressknow.comparison import intervals
from compressknow.comparison.distributions import (
    PERCENTILES,
    assign_popularity_bins,
    compare_confidence,
    compute_kl,
    compute_mean_reciprocal_rank,
    compute_percentiles,
    compute_precision,
    compute_rest,
    count_grades,
    count_pairs,
    name_popularity_bins,
)
from compressknow.comparison.power import count_facts_to_show, find_smallest_loss
from compressknow.comparison.records import Certainty, ChangedFact, Counts, Estimate, Group, KlFigures, ProbeFigures
from compressknow.evaluate.answers import REFERENCE_TOKENS, SERVER_TOKENS, Answer, Answers
from compressknow.evaluate.facts import DOMAINS
from compressknow.evaluate.grades import average_known
from compressknow.evaluate.records import ProbeEntry

_BLOCK = 4096  # facts whose distributions are in memory as float64 at a time: 4,096 x 257 numbers are 8 MB


def compare_probe(original: Answers, compressed: Answers, probe: str) -> ProbeFigures:
    """Return all figures of one probe. Raises CompressknowError if the two were evaluated on different prompts."""
    pairs, entry = pair_answers(original, compressed, probe), original.record.probes[probe]
    by_subject = _group_pairs(pairs, lambda answer: answer.subject)
    changes = [change for pair in pairs if (change := _measure_logp_change(pair)) is not None]
    # Whether both models were scored on the most likely tokens of the same model.
    has_same_reference = entry.reference is not None and entry.reference == compressed.record.probes[probe].reference
    return ProbeFigures(
        probe=probe,
        protocol=entry.protocol,
        average=entry.average,
        chance=entry.chance,
        majority=entry.majority,
        facts_read=entry.facts,
        dropped=dict(sorted(entry.dropped.items())),
        limit=entry.limit,
        seed=entry.seed or 0,
        noise_floor=entry.noise_floor,
        runtime_noise_floor=entry.runtime_noise_floors.get(compressed.record.model.ran_in),
        **_measure_shares(pairs, entry.average),
        answer_changed=_share_changed(pairs),
        movement=_measure_movement(pairs) if has_same_reference else None,
        logp_change=compute_percentiles(changes, PERCENTILES) if changes else None,
        **_measure_ranks(pairs),
        confidence=compare_confidence(pairs),
        by_subject=tuple(sorted(by_subject, key=lambda group: order_domains(group.name))),
        by_popularity=_group_by_popularity(pairs),
        knowing=count_grades(pairs),
    )


def _measure_shares(pairs: Sequence[Pair], average: str) -> dict[str, Any]:
    """Return shares of right answers with their intervals, over facts and over relations."""
    total, by_relation = count_pairs(pairs), _group_pairs(pairs, lambda answer: answer.relation)
    relations = [group.counts for group in by_relation]
    before, after, difference = intervals.average_relations(relations)
    kept = intervals.estimate_kept(intervals.list_clusters(relations))
    chance = _estimate_chance([pair for pair in pairs if pair[0].correct])
    drop_absolute, drop_relative = _compute_drop(total, (before, difference) if average == "macro" else None)
    return {
        "counts": total,
        "accuracy_original": intervals.estimate_proportion(total.known_before, total.n),
        "accuracy_compressed": intervals.estimate_proportion(total.known_after, total.n),
        "difference": intervals.estimate_difference(total),
        "kept": kept,
        "kept_above_chance": intervals.correct_for_chance(kept, chance),
        "macro_original": before,
        "macro_compressed": after,
        "macro_difference": difference,
        "drop_absolute": drop_absolute,
        "drop_relative": drop_relative,
        "by_relation": by_relation,
        "certainty": measure_certainty([relations]),
    }


def measure_certainty(probes: Sequence[Sequence[Counts]]) -> Certainty:
    """Return how certain figures over all facts of these probes are, each given by its relations, and which loss they
    could show. A relation is a cluster; in a probe of one relation, each fact is."""
    clusters = [cluster for relations in probes for cluster in intervals.list_clusters(relations)]
    total, change = sum(clusters, Counts()), intervals.design_of_change(clusters)
    return Certainty(
        p=intervals.run_paired_test(clusters),
        unit=intervals.find_unit(clusters),
        relations=sum(bool(relation.known_before) for relations in probes for relation in relations),
        kept=intervals.estimate_kept_by_cluster(clusters),
        difference=intervals.estimate_difference_by_cluster(clusters),
        smallest_loss=find_smallest_loss(total, change),
        facts_for_two=count_facts_to_show(total, design=change),
    )


def list_changed_facts(pairs: Iterable[Pair]) -> tuple[tuple[ChangedFact, ...], tuple[ChangedFact, ...]]:
    """Return the facts lost and gained, by domain and relation; those whose gold moved farthest come first."""
    pairs = list(pairs)
    lost = sorted((pair for pair in pairs if pair[0].correct and not pair[1].correct), key=lambda p: _order(p, 1))
    gained = sorted((pair for pair in pairs if pair[1].correct and not pair[0].correct), key=lambda p: _order(p, -1))
    return tuple(map(_make_changed_fact, lost)), tuple(map(_make_changed_fact, gained))


def _order(pair: Pair, sign: int) -> tuple[Any, ...]:
    fact, change = pair[0], _measure_logp_change(pair)
    # Facts whose change is not known come last in their relation.
    return order_domains(fact.subject), fact.relation, change is None, sign * (change or 0.0), fact.probe, fact.fact_id


def _make_changed_fact(pair: Pair) -> ChangedFact:
    before, after = pair
    return ChangedFact(
        probe=before.probe,
        relation=before.relation,
        subject=before.subject,
        prompt=before.prompt,
        gold=before.gold,
        before=before.predicted,
        after=after.predicted,
        rank_before=before.rank,
        rank_after=after.rank,
        fact_id=before.fact_id,
        grade_before=before.grade,
        grade_after=after.grade,
        with_example=None if after.with_example is None else after.with_example == after.gold,
    )


def order_domains(subject: str) -> tuple[int, str]:
    """Return a sort key: domains as on a report card, then all others by name."""
    index = DOMAINS.index(subject) if subject in DOMAINS else len(DOMAINS)
    return index, subject


def _group_pairs(pairs: Iterable[Pair], get_name: Callable[[Answer], str | None]) -> tuple[Group, ...]:
    """Return the figures of each group of facts, by name; facts without a group are left out."""
    members = group_by(pairs, lambda pair: get_name(pair[0]))
    groups = [_make_group(name, members[name]) for name in sorted(members)]
    adjusted = intervals.adjust_holm([group.p for group in groups])
    return tuple(replace(group, p_holm=p) for group, p in zip(groups, adjusted, strict=True))


def _make_group(name: str, pairs: Sequence[Pair]) -> Group:
    relations = group_by(pairs, lambda pair: pair[0].relation)
    clusters, total = tuple(map(count_pairs, relations.values())), count_pairs(pairs)
    return Group(
        name=name,
        counts=total,
        relations=clusters,
        kept=intervals.estimate_kept(clusters),
        p=intervals.run_paired_test(clusters),
        p_holm=None,
        answer_changed=_share_changed(pairs),
        chance=_estimate_chance(pairs),
    )


def _group_by_popularity(pairs: Sequence[Pair]) -> tuple[Group, ...]:
    """Return the figures of each popularity bin, the most popular first."""
    bins = assign_popularity_bins([before.popularity for before, _ in pairs])
    bin_of = {before.fact_id: name for (before, _), name in zip(pairs, bins, strict=True)}
    groups = {group.name: group for group in _group_pairs(pairs, lambda answer: bin_of[answer.fact_id])}
    return tuple(groups[name] for name in name_popularity_bins(len(groups))) if groups else ()


def _estimate_chance(pairs: Sequence[Pair]) -> float | None:
    """Return the mean of 1 / number of choices; None if any text is a possible answer to a fact."""
    return average_known(1 / before.choices if before.choices else None for before, _ in pairs)


def _share_changed(pairs: Sequence[Pair]) -> float | None:
    return sum(a.predicted != b.predicted for a, b in pairs) / len(pairs) if pairs else None


def _compute_drop(total: Counts, macros: tuple[Estimate, Estimate] | None) -> tuple[float | None, float | None]:
    """Return the paper's figures: the drop of the probe's headline accuracy, in points of 1 and relative to before. If
    the headline is the mean over relations, `macros` are that before, and its increase."""
    if not total.n:
        return None, None
    if macros is None:
        lost = total.lost - total.gained
        return lost / total.n, lost / total.known_before if total.known_before else None
    before, drop = macros[0].value or 0.0, 0.0 - (macros[1].value or 0.0)
    return drop, drop / before if before else None


def _measure_movement(pairs: Sequence[Pair]) -> KlFigures | None:
    """Measure KL over the whole vocabulary if each fact has it; otherwise over the stored tokens of facts for which
    both sides have the same. NaN (a broken model) is left out."""
    exact = [after.first_kl for _, after in pairs if after.first_kl is not None]
    if len(exact) == len(pairs):
        return _summarize_movement(np.array([value for value in exact if math.isfinite(value)]), None)
    same_size = (pair for pair in pairs if len(pair[0].first_ids) == len(pair[1].first_ids))
    by_size = group_by(same_size, lambda pair: len(pair[0].first_ids) or None)
    blocks = [group[start : start + _BLOCK] for group in by_size.values() for start in range(0, len(group), _BLOCK)]
    rows = np.concatenate([_measure_divergence(block) for block in blocks]) if blocks else np.empty((0, 3))
    rows = rows[np.isfinite(rows[:, 0])]
    if not len(rows):
        return None
    before, after = (math.fsum(column) / len(rows) for column in rows[:, 1:].T)
    # Of a smaller vocabulary, all tokens but one are stored, whose probability follows.
    is_partial = max(by_size) >= REFERENCE_TOKENS or max(by_size) <= SERVER_TOKENS
    return _summarize_movement(rows[:, 0], (before, after) if is_partial else None)


def _summarize_movement(values: np.ndarray, rest: tuple[float, float] | None) -> KlFigures | None:
    if not len(values):
        return None
    median, p99 = np.percentile(values, [50, 99])
    mean = math.fsum(values) / len(values)
    return KlFigures(len(values), mean, float(median), float(p99), float(values.max()), rest)


def _measure_divergence(pairs: Sequence[Pair]) -> np.ndarray:
    """Return KL divergence, and the probability of the rest before and after, [facts, 3]."""
    ids = [np.array([answer.first_ids for answer in answers]) for answers in zip(*pairs, strict=True)]
    logps = [np.array([answer.first_logp for answer in answers]) for answers in zip(*pairs, strict=True)]
    same_tokens = (ids[0] == ids[1]).all(axis=1)
    before, after = logps[0][same_tokens], logps[1][same_tokens]
    return np.stack([compute_kl(before, after), compute_rest(before), compute_rest(after)], axis=1)


def _measure_logp_change(pair: Pair) -> float | None:
    """Return the change of the gold's log-probability; None if it is not known for both models."""
    before, after = pair[0].logp_gold, pair[1].logp_gold
    if before is None or after is None or not math.isfinite(after - before):
        return None
    return after - before


def _measure_ranks(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return MRR, P@5, and the number of lost facts whose gold is still among the five most likely answers; the latter
    two are None if no fact has more than five possible answers."""
    before, after = ([each.rank for each in answers] for answers in (zip(*pairs, strict=True) if pairs else ((), ())))
    has_few = all(pair[0].choices is not None and pair[0].choices <= 5 for pair in pairs)
    still = [b.rank for a, b in pairs if a.correct and not b.correct and b.rank is not None and b.rank <= 5]
    top5 = None if has_few else _pair(compute_precision(5, before), compute_precision(5, after))
    return {
        "mrr": _pair(compute_mean_reciprocal_rank(before), compute_mean_reciprocal_rank(after)),
        "p_at_5": top5,
        "lost_still_in_top5": None if top5 is None else len(still),
    }


def _pair(before: float | None, after: float | None) -> tuple[float, float] | None:
    return (before, after) if before is not None and after is not None else None


# The original's and the compressed model's answer to one fact.
Pair = tuple[Answer, Answer]

# Fields in which two runs of a probe may differ, and their names in messages.
_SETTINGS = {"protocol": "protocol", "limit": "--limit", "seed": "--seed", "facts": "facts read"}


def pair_answers(original: Answers, compressed: Answers, probe: str) -> list[Pair]:
    """Pair answers by fact, sorted by id. Raises CompressknowError if protocols, fingerprints or facts differ."""
    _check_prompts(probe, original.record.probes[probe], compressed.record.probes[probe])
    before, after = ({answer.fact_id: answer for answer in side.of(probe)} for side in (original, compressed))
    _check_facts(probe, before, after)
    return [(before[fact], after[fact]) for fact in sorted(before)]


def _check_prompts(probe: str, original: ProbeEntry, compressed: ProbeEntry) -> None:
    if (original.protocol, original.fingerprint) == (compressed.protocol, compressed.fingerprint):
        return
    differing = [
        f"{label} {getattr(original, key)} and {getattr(compressed, key)}"
        for key, label in _SETTINGS.items()
        if getattr(original, key) != getattr(compressed, key)
    ]
    raise CompressknowError(
        f"The two models were not evaluated on {probe} in the same way, so their answers cannot be compared.",
        why=f"They differ in: {', '.join(differing) or 'the facts, prompts or candidates themselves'}.",
        hint="Probe both models again with the same data and the same options.",
    )


def _check_facts(probe: str, original: Mapping[str, Answer], compressed: Mapping[str, Answer]) -> None:
    only_original, only_compressed = sorted(set(original) - set(compressed)), sorted(set(compressed) - set(original))
    if not only_original and not only_compressed:
        return
    example = (only_original or only_compressed)[0]
    raise CompressknowError(
        f"The two models did not answer the same facts of {probe}: {len(only_original)} only the original, "
        f"{len(only_compressed)} only the compressed model (such as {example!r}).",
        why="Probably their tokenizers differ, so that different facts were dropped, or one run was interrupted.",
        hint="Compare models with the same vocabulary, and probe both again with the same options.",
    )


def is_as_small(size: int, other: int) -> bool:
    """Return whether a size in bytes is at most another, or at most 1 % above it: packing and headers alone can make
    such a difference."""
    return 100 * (size - other) <= other


@dataclass(frozen=True, slots=True)
class Standing:
    """Standing of a model: how many of the original's facts it keeps; the place of a model that keeps as much and is as
    small (see `is_as_small`), and is better in one of these, and whether a test tells them apart; and the places of
    models that no test tells from it."""

    keeps: int
    beaten_by: int | None
    is_surely_beaten: bool
    alike: tuple[int, ...]


def rank_models(
    original: Sequence[Answer], models: Sequence[Sequence[Answer]], sizes: Sequence[int | None]
) -> list[Standing]:
    """Compare each model with each other on what the original knows, and by `sizes` in bytes: with paired tests by
    relation, adjusted (Holm) over all pairs, since the pairs of interest are not known beforehand."""
    facts = [answer for answer in original if answer.correct]
    correct = [{(answer.probe, answer.fact_id) for answer in answers if answer.correct} for answers in models]
    keeps = [np.array([(fact.probe, fact.fact_id) in each for fact in facts], dtype=bool) for each in correct]
    cluster = intervals.number_clusters([(fact.probe, fact.relation) for fact in facts])
    pairs = list(combinations(range(len(models)), 2))
    adjusted = intervals.adjust_holm(
        [intervals.run_paired_test(intervals.tally(keeps[one], keeps[other], cluster)) for one, other in pairs]
    )
    different = {pair for pair, p in zip(pairs, adjusted, strict=True) if p is not None and p < SIGNIFICANT}
    known = [int(each.sum()) for each in keeps]
    order = sorted(range(len(models)), key=lambda index: -known[index])
    standings = []
    for index, size in enumerate(sizes):
        better = [
            other
            for other in order
            if size is not None and (least := sizes[other]) is not None and is_as_small(least, size)
            if known[other] > known[index] or (known[other] == known[index] and not is_as_small(size, least))
        ]
        sure = [other for other in better if tuple(sorted((index, other))) in different]
        alike = tuple(each for each in order if each != index and tuple(sorted((index, each))) not in different)
        standings.append(Standing(known[index], next(iter(sure or better), None), bool(sure), alike))
    return standings
