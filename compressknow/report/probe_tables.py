"""The tables of each probe: all of its figures, and what was kept by relation, school subject and popularity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compressknow.report.format import NONE, at_least, count, estimate, number, p_value, percent, plain, points, share
from compressknow.report.tables import Table
from compressknow.stats.records import Estimate, Group, Movement, ProbeFigures

_GROUP_COLUMNS = ("Facts", "Known before", "Lost", "Gained", "Kept", "Answer changed", "p (Holm)")
_AVERAGES = {"micro": "share of all facts", "macro": "mean over relations"}


@dataclass(frozen=True, slots=True)
class ProbeTables:
    """One probe's groups. `popularity_groups` are the records behind the table, for its chart."""

    id: str
    name: str
    relations: Table | None
    subjects: Table | None
    popularity: Table | None
    popularity_groups: tuple[Group, ...]


def tables(probe: ProbeFigures, id: str, relations: int | None = None) -> ProbeTables:
    """The tables of one probe's groups; of its relations, the `relations` that lost most where not all."""
    name = plain(probe.probe, 60)
    return ProbeTables(
        id,
        name,
        _relations(probe, name, relations),
        _groups(probe.by_subject, "School subject", f"{name} by school subject"),
        _groups(probe.by_popularity, "Popularity", f"{name} by popularity", sortable=False),
        probe.by_popularity,
    )


def headline_accuracy(probe: ProbeFigures) -> tuple[Estimate, Estimate]:
    """Of the original and of the compressed model, averaged as the probe's protocol does."""
    if probe.average == "macro":
        return probe.macro_original, probe.macro_compressed
    return probe.accuracy_original, probe.accuracy_compressed


def dropped(probes: tuple[ProbeFigures, ...]) -> Table | None:
    """Facts that were read and not asked, by reason."""
    rows = tuple(
        (
            plain(reason, 120),
            plain(probe.probe, 60),
            count(number),
            percent(number, max(probe.facts_read, sum(probe.dropped.values()))),
        )
        for probe in probes
        for reason, number in probe.dropped.items()
        if number
    )
    columns = ("Reason", "Probe", "Facts", "Of those read")
    return Table("Facts that were read and not asked", columns, rows) if rows else None


def figures(probes: tuple[ProbeFigures, ...]) -> tuple[Table, tuple[str, ...]]:
    """Every figure of every probe, a column a probe; and why some figures are missing, a sentence each."""
    rows, missing = [], []
    for figure in _FIGURES:
        cells = tuple(figure.write(probe) for probe in probes)
        rows.append((figure.name, *cells))
        without = [plain(p.probe, 60) for p, cell in zip(probes, cells, strict=True) if cell == NONE]
        if without and figure.why_none:
            where = f" ({', '.join(without)})" if len(probes) > 1 else ""
            missing.append(f"{figure.name}{where}: {figure.why_none}")
    columns = ("Figure", *(plain(probe.probe, 60) for probe in probes))
    return Table("All figures of each probe", columns, tuple(rows)), tuple(missing)


def _relations(probe: ProbeFigures, name: str, limit: int | None) -> Table | None:
    groups = probe.by_relation
    if limit is None or len(groups) <= limit:
        return _groups(groups, "Relation", f"{name} by relation")
    most = sorted(groups, key=lambda group: -group.counts.lost)[:limit]
    others = count(len(groups) - limit)
    return _groups(tuple(most), "Relation", f"{name} by relation: those that lost most; {others} more are in the JSON")


def _groups(groups: tuple[Group, ...], kind: str, caption: str, sortable: bool = True) -> Table | None:
    if not groups:
        return None
    rows = tuple(_group_row(group) for group in groups)
    bars = tuple(group.kept for group in groups)
    return Table(caption, (kind, *_GROUP_COLUMNS), rows, bars=bars, bars_after=5, sortable=sortable and len(rows) > 1)


def _group_row(group: Group) -> tuple[str, ...]:
    counts = group.counts
    return (
        plain(group.name, 80),
        count(counts.n),
        count(counts.known_before),
        count(counts.lost),
        count(counts.gained),
        _written(group.kept),
        share(group.answer_changed),
        p_value(group.p_holm).removeprefix("p = ").removeprefix("p "),
    )


def _written(figure: Estimate, write: Callable[[float], str] = share) -> str:
    return estimate(figure.value, figure.low, figure.high, write)


def _pair(pair: tuple[float, float] | None, write: Callable[[float], str]) -> str:
    return NONE if pair is None else f"{write(pair[0])} → {write(pair[1])}"


def _moved(probe: ProbeFigures, get: Callable[[Movement], float]) -> str:
    moved = probe.movement
    return NONE if moved is None else at_least(number(get(moved)), moved.is_lower_bound)


def _rest(probe: ProbeFigures) -> str:
    return _pair(probe.movement.rest if probe.movement else None, share)


def _logp_change(probe: ProbeFigures, low: str, high: str) -> str:
    """What the changes between two percentiles lie between, or the median."""
    change = probe.logp_change
    if not change or low not in change or high not in change:
        return NONE
    return number(change[low], 2) if low == high else f"{number(change[low], 2)} to {number(change[high], 2)}"


def _facts(probe: ProbeFigures) -> str:
    limited = f", limited to {count(probe.limit)}" if probe.limit is not None else ""
    return f"{count(probe.counts.n)} of {count(probe.facts_read)} read{limited}"


def _hidden(probe: ProbeFigures) -> str:
    if probe.lost_still_in_top5 is None or not probe.counts.lost:
        return NONE
    share_of_lost = percent(probe.lost_still_in_top5, probe.counts.lost)
    return f"{count(probe.lost_still_in_top5)} of {count(probe.counts.lost)} ({share_of_lost})"


def _lost(probe: ProbeFigures) -> str:
    counts = probe.counts
    return f"{count(counts.lost)} of {count(counts.known_before)} ({percent(counts.lost, counts.known_before)})"


def _gained(probe: ProbeFigures) -> str:
    counts = probe.counts
    unknown = counts.gained + counts.neither
    return f"{count(counts.gained)} of {count(unknown)} ({percent(counts.gained, unknown)})"


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    write: Callable[[ProbeFigures], str]
    why_none: str = ""


_NO_FACTS = "there is nothing to count."
_NOTHING_KNOWN = "the original knew none of the facts."
_NO_DISTRIBUTION = "the answers hold no distribution over tokens."
_LOGP = "Change of the right answer's log-probability"
_NO_LOGP = "the answers hold no probability of the right answer."
_NO_RANK = "the answers hold no rank of the right answer."
_NO_CONFIDENCE = "it needs the probability of each answer, which this way of asking does not give."

_FIGURES = (
    _Figure("Facts asked", _facts),
    _Figure("Accuracy before", lambda p: _written(p.accuracy_original), _NO_FACTS),
    _Figure("Accuracy after", lambda p: _written(p.accuracy_compressed), _NO_FACTS),
    _Figure("Difference", lambda p: _written(p.difference, points), _NO_FACTS),
    _Figure("Mean over relations before", lambda p: _written(p.macro_original), "there are too few relations."),
    _Figure("Mean over relations after", lambda p: _written(p.macro_compressed), "there are too few relations."),
    _Figure(
        "Difference of these means", lambda p: _written(p.macro_difference, points), "there are too few relations."
    ),
    _Figure("Knowledge kept", lambda p: _written(p.kept), _NOTHING_KNOWN),
    _Figure(
        "Kept above chance",
        lambda p: _written(p.kept_above_chance),
        "any text may be answered, so that nothing is right by chance, or the original was no better than chance.",
    ),
    _Figure("Lost", _lost),
    _Figure("Gained", _gained),
    _Figure("Flips (lost or gained)", lambda p: share(p.counts.flips), _NO_FACTS),
    _Figure("Net change against chance (exact McNemar)", lambda p: p_value(p.p), "no fact was lost or gained."),
    _Figure("Top answer changed", lambda p: share(p.answer_changed), _NO_FACTS),
    _Figure("Lost, but still among the top 5", _hidden, "nothing was lost, or " + _NO_RANK),
    _Figure("Mean reciprocal rank", lambda p: _pair(p.mrr, number), _NO_RANK),
    _Figure("Right answer among the top 5", lambda p: _pair(p.p_at_5, share), _NO_RANK),
    _Figure("Movement (KL, nats), mean", lambda p: _moved(p, lambda m: m.kl_mean), _NO_DISTRIBUTION),
    _Figure("Movement, median", lambda p: _moved(p, lambda m: m.kl_median)),
    _Figure("Movement, 99th percentile", lambda p: _moved(p, lambda m: m.kl_p99)),
    _Figure("Movement, largest", lambda p: _moved(p, lambda m: m.kl_max)),
    _Figure("Probability of the tokens taken together", _rest),
    _Figure(f"{_LOGP}, median", lambda p: _logp_change(p, "p50", "p50"), _NO_LOGP),
    _Figure(f"{_LOGP}, middle half", lambda p: _logp_change(p, "p25", "p75")),
    _Figure(f"{_LOGP}, 5th to 95th percentile", lambda p: _logp_change(p, "p5", "p95")),
    _Figure(f"{_LOGP}, 1st to 99th percentile", lambda p: _logp_change(p, "p1", "p99")),
    _Figure("Calibration error (ECE)", lambda p: _pair(p.ece, number), _NO_CONFIDENCE),
    _Figure("Brier score", lambda p: _pair(p.brier, number), _NO_CONFIDENCE),
    _Figure("Right by chance", lambda p: share(p.chance), "any text may be answered."),
    _Figure("Always the commonest answer", lambda p: share(p.majority), _NO_FACTS),
    _Figure("The paper's drop, absolute", lambda p: points(p.drop_absolute).removeprefix("+"), _NO_FACTS),
    _Figure("The paper's drop, relative", lambda p: share(p.drop_relative), _NOTHING_KNOWN),
    _Figure("Headline accuracy is the", lambda p: _AVERAGES.get(p.average, plain(p.average, 40))),
    _Figure("Way of asking", lambda p: plain(p.protocol, 60)),
    _Figure("Seed", lambda p: str(p.seed)),
)
