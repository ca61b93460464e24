"""Findings in words: the figures behind an answer, and what in them decides."""

from __future__ import annotations

from collections.abc import Sequence

from compressknow.format import count, estimate, number, p_value, share
from compressknow.report.study.records import Study, names
from compressknow.report.study.tests import CANNOT_TELL, HOLDS, Bound, CheckpointComparison

_FEW = 3  # comparisons that are told one by one; of more, their number and the one that separates best
NO_CELLS = "The study has no cells for it."


def paired_tests(study: Study, pairs: Sequence[CheckpointComparison]) -> str:
    """Each of a few comparisons with its numbers; of many, how many separate their cells, and the clearest."""
    if not pairs:
        return "-"
    called = names(study)
    if len(pairs) <= _FEW:
        return " ".join(paired_test(pair, called) for pair in pairs)
    best = min(pairs, key=lambda pair: 2.0 if pair.p_holm is None else pair.p_holm)
    return f"{_numbers(pairs)} The clearest: {paired_test(best, called)}"


def paired_test(pair: CheckpointComparison, called: dict[str, str]) -> str:
    """One comparison: what each answers right, what only one of them does, and p."""
    c = pair.counts
    sentence = (
        f"{called[pair.less]} answers {count(c.known_before)} of {count(c.n)} right, {called[pair.more]} "
        f"{count(c.known_after)}: {count(c.lost)} only the first, {count(c.gained)} only the second"
    )
    if pair.at_floor:
        return f"{sentence}; neither is clearly above the baseline, so it does not count."
    return f"{sentence} ({p_value(pair.p_holm)})."


def _numbers(pairs: Sequence[CheckpointComparison]) -> str:
    as_claimed, against = sum(p.direction > 0 for p in pairs), sum(p.direction < 0 for p in pairs)
    floor = sum(p.at_floor for p in pairs)
    parts = [
        f"{count(as_claimed)} as claimed",
        f"{count(against)} the other way round",
        f"{count(len(pairs) - as_claimed - against - floor)} not significant",
        *([f"{count(floor)} not counted, neither cell being clearly above the baseline"] if floor else []),
    ]
    return f"{count(len(pairs))} comparisons: {', '.join(parts)}."


def why_paired_tests(answer: str, pairs: Sequence[CheckpointComparison], parts: Sequence[str]) -> str:
    """What decides."""
    if not pairs:
        return NO_CELLS
    if answer == HOLDS:
        return "Every significant comparison agrees with the claim."
    if answer != CANNOT_TELL:
        if any(pair.direction > 0 for pair in pairs):
            return "Some significant comparisons agree with the claim, others contradict it."
        return "All significant comparisons contradict the claim."
    open_parts = [part for part in parts if not any(p.direction > 0 and p.part == part for p in pairs)]
    missing = [part for part in open_parts if not any(pair.part == part for pair in pairs)]
    if missing and missing != [""]:
        return f"The study has no cells to compare {' and '.join(missing)}."
    if all(pair.at_floor for pair in pairs):
        return "No cell knows clearly more than the baseline: there is nothing left to compare."
    where = f" {' and '.join(open_parts)}" if open_parts != [""] else ""
    return f"Chance could explain the differences{where}."


def per_million(study: Study, answer: str, pairs: Sequence[CheckpointComparison]) -> str:
    """The same question by million parameters changed, with the clearest comparison."""
    told = [pair for pair in pairs if pair.rate_p_holm is not None and pair.rate.value is not None]
    if not told:
        return ""
    best, called = min(told, key=lambda pair: pair.rate_p_holm or 0.0), names(study)
    rate = 100 * (best.rate.value or 0.0)
    return (
        f"Per million parameters changed: {answer}. {called[best.more]} loses {number(abs(rate))} points of accuracy "
        f"{'more' if rate > 0 else 'less'} a million than {called[best.less]} ({p_value(best.rate_p_holm)})."
    )


def bounds(study: Study, figures: Sequence[Bound], what: str) -> str:
    """The figures with their limits: of many, the largest."""
    if not figures:
        return "-"
    called = names(study)
    if all(bound.value.value is None for bound in figures):
        return "-"
    largest = max(figures, key=lambda bound: (bound.value.value or 0.0) - bound.limit)
    shown = [largest] if len(figures) > _FEW else figures
    most = f", the largest of {count(len(figures))}" if len(figures) > _FEW else ""
    return f"{what}{most}: " + "; ".join(_bound(bound, called) for bound in shown) + "."


def _bound(bound: Bound, called: dict[str, str]) -> str:
    value = estimate(bound.value.value, bound.value.low, bound.value.high)
    return f"{called.get(bound.of, bound.of)} {value}, limit {share(bound.limit)}"


def why_bounds(answer: str, figures: Sequence[Bound]) -> str:
    """What decides."""
    if not figures:
        return NO_CELLS
    if any(bound.value.value is None for bound in figures):
        return "The original itself knows no more than the baseline."
    if answer == HOLDS:
        return "Every interval lies below its limit."
    if answer == CANNOT_TELL:
        return "An interval reaches over its limit."
    return "An interval, adjusted for the number of figures, lies above its limit."
