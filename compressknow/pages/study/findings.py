"""Ten findings of the paper as tests on a study's data, by method too, and their answers in words.

None is assumed: each holds, does not hold, or cannot be told. Each test below says what decides; all are paired by
fact, over all probes together, and by relation. All claims of the table of findings and the table by method are
adjusted together (Holm), so that the chance that any is false is at most 5 %; likewise, those per million parameters.
Amounts: low 10-30 %, medium above 30 to 50 %, high above 50 % (the paper's p_low, p_medium and p_high, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compressknow.base.format import clean, count, number, share, share_against, write_p_value, write_percent
from compressknow.pages.card.verdict import join_words
from compressknow.pages.records import write_estimate
from compressknow.pages.study import claims
from compressknow.pages.study.records import MODULES, STRUCTURED, UNSTRUCTURED, Study, StudyCell

NOT_EVALUATED = "not asked of this family"
FAMILIES = {"masked": "encoder-only", "seq2seq": "encoder-decoder", "causal": "decoder-only"}
# Amounts above the first number, up to the second; 10 itself is low (amounts have six digits).
LOW, MEDIUM, HIGH = (10 - 1e-6, 30), (30, 50), (50, 100)
MINIMAL = 0.10  # a decline of less than a tenth of the original's accuracy is minimal (F1)
NEAR = 0.20  # with less than a fifth of the knowledge left, a model is near zero or the baseline (F5, F10)
MOST = 90  # the paper's largest amount in percent, at which a model must be near the baseline (F5)
_ALL = tuple(FAMILIES)
_ATTENTION, _FEED_FORWARD, _OVERALL, _FINAL = "attention", "feed-forward", "overall", "final"
_AGAINST = {scope: f"against {scope}" for scope in (_ATTENTION, _FEED_FORWARD)}
_FEW = 3  # comparisons or figures that are described one by one; of more, only the number and the clearest
NO_CELLS = "The study has no cells for it."


@dataclass(frozen=True, slots=True)
class Finding:
    """Finding of the paper, and whether it holds in this study."""

    id: str  # F1 to F10
    claim: str
    families: tuple[str, ...]  # those of the paper's claim: ``masked`` (encoder-only), ``seq2seq``, ``causal``
    answer: str = NOT_EVALUATED  # or ``holds``, ``does not hold``, ``cannot tell``
    statistic: str = "-"  # the figures behind the answer, in words
    why: str = ""  # which of these decides
    per_million: str = ""  # the answer per million parameters changed; empty if nothing is compared
    comparisons: tuple[claims.CellComparison, ...] = ()  # the figures themselves
    bounds: tuple[claims.Bound, ...] = ()
    p_holm: float | None = None  # of all bounds together, adjusted over all claims of the table; decides
    numbers: str = ""  # the clearest of these figures, in a few words

    @property
    def has_cells(self) -> bool:
        return bool(self.comparisons or self.bounds)


PRUNING, QUANTIZATION = "pruning", "quantization"

# Findings by id, by kind (one of the two above) and name of a method or scheme, as in `StudyCell`.
FindingsByMethod = Mapping[tuple[str, str], Mapping[str, Finding]]


def evaluate_findings(study: Study) -> tuple[tuple[Finding, ...], FindingsByMethod]:
    """Return all ten and, if the study has several methods, those with cells of each, tested as if of the paper's."""
    studies = {("", ""): study} | _split_by_method(study)
    applicable = [each for each in _TESTS if study.original.family in each[0].families]
    adjusted = iter(claims.adjust_claims([test(each) for each in studies.values() for _, test in applicable]))
    by_study = {
        of: {finding.id: _word_finding(each, finding, next(adjusted)) for finding, _ in applicable}
        for of, each in studies.items()
    }
    of_paper = by_study.pop(("", ""))
    by_method = {of: {id: each for id, each in findings.items() if each.has_cells} for of, findings in by_study.items()}
    for finding, _ in _TESTS:
        families = " and ".join(FAMILIES[family] for family in finding.families)
        of_paper.setdefault(finding.id, replace(finding, why=f"The paper claims it for {families} models."))
    in_order = tuple(of_paper[finding.id] for finding, _ in _TESTS)
    return in_order, {of: findings for of, findings in by_method.items() if findings}


def _split_by_method(study: Study) -> dict[tuple[str, str], Study]:
    parts = {}
    if len(methods := study.list_methods()) > 1:
        for name in methods:
            # The tests look for the paper's method, so pretend that the cells have it.
            cells = tuple(replace(cell, pruning=UNSTRUCTURED) for cell in study.cells if cell.pruning == name)
            parts[PRUNING, name] = replace(study, cells=cells)
    if len(schemes := study.list_schemes()) > 1:
        for name in schemes:
            cells = tuple(cell for cell in study.cells if cell.quantization == name)
            parts[QUANTIZATION, name] = replace(study, cells=cells)
    return parts


def _claim_low_decline(study: Study) -> claims.Claim:
    """Claim F1: pruned by 10 to 30 %, each scope by itself, the decline is minimal.

    The interval of the relative fall in accuracy must lie below `MINIMAL` for every such cell. One of these must be the
    largest, overall by 30 %, because the losses of smaller ones say nothing about it.
    """
    by_scope = {scope: limit_amounts(study.select_pruned(scope), LOW) for scope in MODULES}
    cells = [cell for by_amount in by_scope.values() for cell in by_amount.values()]
    return claims.Claim(
        bounds=tuple(claims.hold_to_limit(cell.key, claims.measure_decline(study, cell), MINIMAL) for cell in cells),
        missing="" if LOW[1] in by_scope[_OVERALL] else f"overall pruned by {LOW[1]} %",
    )


def _claim_order(
    study: Study, select: Callable[[Study, str], Mapping[Any, StudyCell]], less: Mapping[str, str], more: str
) -> claims.Claim:
    """Claim F2, F3, F4, F6, F7, F9: pruned by equal amounts, or quantized by one scheme, each scope (F9: method) of
    `less` hurts less than `more`. A paired test compares the two cells at each amount, or of each scheme, that `select`
    returns; see `claims.answer_claim`. Each of `less`, which has the part of the claim, must be shown at one or
    more."""
    others = select(study, more)
    comparisons = [
        claims.compare_cells(study, cell, others[key], part)
        for name, part in less.items()
        for key, cell in select(study, name).items()
        if key in others
    ]
    return claims.Claim(tuple(comparisons), tuple(less.values()))


def _select_medium(study: Study, scope: str) -> dict[float, StudyCell]:
    return limit_amounts(study.select_pruned(scope), MEDIUM)


def _select_final(study: Study, method: str) -> dict[float, StudyCell]:
    return study.select_pruned(_FINAL, method)


def _claim_high_rapid(study: Study) -> claims.Claim:
    """Claim F5: overall pruned by more than 50 %, knowledge falls rapidly, towards zero or the majority baseline.

    The whole intervals of two figures of the knowledge left beyond that baseline must be below their limits: the mean
    over the amounts above 50 % below the mean share of weights left (knowledge goes faster than weights), and what is
    left at `MOST` below `NEAR`. A grid that ends earlier does not show where the fall leads.
    """
    by_amount = limit_amounts(study.select_pruned(_OVERALL), HIGH)
    if MOST not in by_amount:
        return claims.Claim()
    cells = list(by_amount.values())
    weights = sum(1 - cell.percent / 100 for cell in cells) / len(cells)
    first, last = cells[0], cells[-1]
    amounts = f"{first.percent:g} to {last.percent:g} %, on average" if len(cells) > 1 else f"{first.percent:g} %"
    mean = claims.average([claims.measure_remaining(study, cell) for cell in cells])
    return claims.Claim(
        bounds=(
            claims.hold_to_limit(f"overall pruned by {amounts}", mean, weights),
            claims.hold_to_limit(by_amount[MOST].key, claims.measure_remaining(study, by_amount[MOST]), NEAR),
        )
    )


def _claim_attention_pruned_and_quantized(study: Study) -> claims.Claim:
    """Claim F8: pruned by 20 % and quantized, attention hurts less than feed-forward; at 40 % too, except in
    encoder-decoder models, where it hurts more. This must be shown at both amounts, for one scheme or more."""
    order = (_ATTENTION, _FEED_FORWARD)
    reverse = order[::-1] if study.original.family == "seq2seq" else order
    comparisons = []
    for amount, scopes in ((20, order), (40, reverse)):
        for scheme in study.list_schemes():
            less, more = (study.select_pruned(scope, scheme=scheme) for scope in scopes)
            if amount in less and amount in more:
                comparisons.append(claims.compare_cells(study, less[amount], more[amount], f"at {amount} %"))
    return claims.Claim(tuple(comparisons), ("at 20 %", "at 40 %"))


def _claim_final_near_baseline(study: Study) -> claims.Claim:
    """Claim F10: the final layer pruned by 20 % leaves less than `NEAR` of what the original knows beyond the baseline:
    the whole interval is below for every method of the study. The claim fails if one, adjusted, is above."""
    cells = [_select_final(study, method).get(20) for method in (UNSTRUCTURED, STRUCTURED)]
    bounds = [claims.hold_to_limit(cell.key, claims.measure_remaining(study, cell), NEAR) for cell in cells if cell]
    return claims.Claim(bounds=tuple(bounds))


def limit_amounts(cells: Mapping[float, StudyCell], limits: tuple[float, float]) -> dict[float, StudyCell]:
    """Return the cells above the lower limit, up to the upper one."""
    return {amount: cell for amount, cell in cells.items() if limits[0] < amount <= limits[1]}


# The paper's ten findings, and the test of each.
_TESTS: tuple[tuple[Finding, Callable[[Study], claims.Claim]], ...] = (
    (Finding("F1", "Pruned by 10 to 30 %, the decline is minimal", _ALL), _claim_low_decline),
    (
        Finding("F2", "Pruned by 30 to 50 %, attention hurts less than feed-forward", ("masked",)),
        partial(_claim_order, select=_select_medium, less={_ATTENTION: ""}, more=_FEED_FORWARD),
    ),
    (
        Finding("F3", "Pruned by 30 to 50 %, attention hurts more than feed-forward", ("seq2seq", "causal")),
        partial(_claim_order, select=_select_medium, less={_FEED_FORWARD: ""}, more=_ATTENTION),
    ),
    (
        Finding("F4", "Pruning all modules together hurts most", _ALL),
        partial(_claim_order, select=Study.select_pruned, less=_AGAINST, more=_OVERALL),
    ),
    (
        Finding("F5", "Above 50 % knowledge falls rapidly, towards zero or the majority baseline", _ALL),
        _claim_high_rapid,
    ),
    (
        Finding("F6", "Quantizing attention hurts less than feed-forward", _ALL),
        partial(_claim_order, select=Study.select_quantized, less={_ATTENTION: ""}, more=_FEED_FORWARD),
    ),
    (
        Finding("F7", "Quantizing everything hurts most", _ALL),
        partial(_claim_order, select=Study.select_quantized, less=_AGAINST, more=_OVERALL),
    ),
    (
        Finding(
            "F8",
            "Pruned by 20 % and quantized, attention hurts less than feed-forward; by 40 % too in encoder-only and "
            "decoder-only models, the other way round in encoder-decoder models",
            _ALL,
        ),
        _claim_attention_pruned_and_quantized,
    ),
    (
        Finding("F9", "In the final layer, L1-structured hurts more than L1-unstructured", ("masked",)),
        partial(_claim_order, select=_select_final, less={UNSTRUCTURED: ""}, more=STRUCTURED),
    ),
    (
        Finding(
            "F10",
            "With the final layer pruned by 20 %, accuracy is already near the majority baseline",
            ("seq2seq", "causal"),
        ),
        _claim_final_near_baseline,
    ),
)
# The figure that a finding compares with a limit.
_LEFT = "left of what the original knows beyond the baseline"
_FIGURES = {"F1": "relative fall in accuracy over all facts", "F5": _LEFT, "F10": _LEFT}


def _word_finding(study: Study, finding: Finding, tested: claims.Claim) -> Finding:
    """Write the answer to a finding, and what decides it, in words."""
    names, answer, pairs, bounds = study.name_cells(), tested.answer, tested.comparisons, tested.bounds
    if not pairs and not bounds:
        return replace(finding, answer=answer, why=NO_CELLS)
    if bounds:
        figure = _FIGURES[finding.id]
        known = [bound for bound in bounds if bound.value.value is not None]
        # Without it, an interval that leaves out the limit would seem to contradict the answer.
        adjusted = "" if tested.missing or tested.p_holm is None else f"; adjusted {write_p_value(tested.p_holm)}"
        return replace(
            finding,
            answer=answer,
            statistic=_describe_bounds(bounds, figure, names),
            why=_explain_bounds(tested),
            bounds=bounds,
            p_holm=tested.p_holm,
            numbers=f"{figure}: {_describe_bound(_find_largest(known), names)}{adjusted}" if known else "",
        )
    return replace(
        finding,
        answer=answer,
        statistic=_describe_comparisons(pairs, names),
        why=_explain_comparisons(answer, pairs, tested.parts),
        per_million=_describe_rates(pairs, tested.parts, names),
        comparisons=pairs,
        numbers=_summarize_comparisons(pairs, names),
    )


def _describe_comparisons(pairs: Sequence[claims.CellComparison], names: Mapping[str, str]) -> str:
    """Describe each of a few comparisons with its numbers; of many, count how they answer and describe the clearest."""
    if len(pairs) <= _FEW:
        return " ".join(_describe_comparison(pair, names) for pair in pairs)
    as_claimed, against = _count_directions(pairs)
    floor = sum(p.at_floor for p in pairs)
    parts = [
        f"{count(as_claimed)} as claimed",
        f"{count(against)} against the claim",
        f"{count(len(pairs) - as_claimed - against - floor)} not significant",
        *([f"{count(floor)} not counted, because neither cell is clearly above the baseline"] if floor else []),
    ]
    clearest = f"The clearest{' of those against it' if against else ''}"
    described = _describe_comparison(_find_clearest(pairs), names)
    return f"{count(len(pairs))} comparisons: {', '.join(parts)}. {clearest}: {described}"


def _describe_comparison(pair: claims.CellComparison, names: Mapping[str, str]) -> str:
    """Describe how many facts each cell answers right, how many only one does, and p."""
    c = pair.counts
    sentence = (
        f"{names[pair.less]} answers {count(c.known_before)} of {count(c.n)} right, {names[pair.more]} "
        f"{count(c.known_after)}: {count(c.lost)} only the first, {count(c.gained)} only the second"
    )
    if pair.at_floor:
        return f"{sentence}; neither is clearly above the baseline, so it does not count."
    return f"{sentence} ({write_p_value(pair.p_holm)})."


def _find_clearest(pairs: Sequence[claims.CellComparison]) -> claims.CellComparison:
    """Return the clearest comparison that contradicts the claim; if none does, the clearest of all."""
    against = [pair for pair in pairs if pair.direction < 0]
    return min(against or pairs, key=lambda pair: 2.0 if pair.p_holm is None else pair.p_holm)


def _count_directions(pairs: Sequence[claims.CellComparison]) -> tuple[int, int]:
    """Return how many comparisons agree with the claim significantly, and how many contradict it."""
    return sum(p.direction > 0 for p in pairs), sum(p.direction < 0 for p in pairs)


def _summarize_comparisons(pairs: Sequence[claims.CellComparison], names: Mapping[str, str]) -> str:
    """Count the comparisons that decide, and write what the two cells of the clearest one answer right."""
    best, (as_claimed, against) = _find_clearest(pairs), _count_directions(pairs)
    tally = f"{count(as_claimed)} of {count(len(pairs))} comparisons as claimed, {count(against)} against it; "
    c, p = best.counts, "both near the baseline" if best.at_floor else write_p_value(best.p_holm)
    less, more = write_percent(c.known_before, c.n), write_percent(c.known_after, c.n)
    right = f"{names[best.less]} {less} right, {names[best.more]} {more}, {p}"
    return f"{tally if len(pairs) > 1 else ''}{right}"


def _explain_comparisons(answer: str, pairs: Sequence[claims.CellComparison], parts: Sequence[str]) -> str:
    if answer == claims.HOLDS:
        return "Every significant comparison agrees with the claim."
    if answer == claims.DOES_NOT_HOLD:
        return "A significant comparison contradicts the claim."
    open_parts = [part for part in parts if not any(p.direction > 0 and p.part == part for p in pairs)]
    missing = [part for part in open_parts if not any(pair.part == part for pair in pairs)]
    if missing and missing != [""]:
        return f"The study has no cells to compare {' and '.join(missing)}."
    if all(pair.at_floor for pair in pairs):
        return "No cell knows clearly more than the baseline: there is nothing left to compare."
    where = f" {' and '.join(open_parts)}" if open_parts != [""] else ""
    return f"Chance could explain the differences{where}."


def _describe_rates(pairs: Sequence[claims.CellComparison], parts: Sequence[str], names: Mapping[str, str]) -> str:
    """Write the answer per million parameters changed, with the clearest comparison."""
    known = [pair for pair in pairs if pair.rate_p_holm is not None and pair.rate.value is not None]
    if not known:
        return ""
    # Pairs that contradict the claim decide.
    against = [pair for pair in known if pair.rate_direction < 0]
    best = min(against or known, key=lambda pair: pair.rate_p_holm or 0.0)
    rate = 100 * (best.rate.value or 0.0)
    answer = claims.answer_claim([(pair.part, pair.rate_direction) for pair in pairs], parts)
    how = f"{number(abs(rate))} {'more' if rate > 0 else 'fewer'} points of accuracy per million than"
    return (
        f"Per million parameters changed: {answer}. {names[best.more]} loses "
        f"{how if rate else 'as much per million as'} {names[best.less]} ({write_p_value(best.rate_p_holm)})."
    )


def _describe_bounds(bounds: Sequence[claims.Bound], figure: str, names: Mapping[str, str]) -> str:
    """Describe the figures with their limits; of many, only the largest."""
    if all(bound.value.value is None for bound in bounds):
        return "-"
    shown = [_find_largest(bounds)] if len(bounds) > _FEW else bounds
    most = f", the largest of {count(len(bounds))}" if len(bounds) > _FEW else ""
    return f"{figure.capitalize()}{most}: " + "; ".join(_describe_bound(bound, names) for bound in shown) + "."


def _find_largest(bounds: Sequence[claims.Bound]) -> claims.Bound:
    """Return the figure that is farthest above its limit, or closest below."""
    return max(bounds, key=lambda bound: (bound.value.value or 0.0) - bound.limit)


def _describe_bound(bound: claims.Bound, names: Mapping[str, str]) -> str:
    value = write_estimate(bound.value, partial(share_against, limits=[bound.limit]))
    return f"{names.get(bound.of, bound.of)} {value}, limit {share(bound.limit)}"


def _explain_bounds(tested: claims.Claim) -> str:
    if any(bound.value.value is None for bound in tested.bounds):
        return "The original itself knows no more than the baseline."
    if tested.answer == claims.CANNOT_TELL and tested.missing:
        return f"No figure is clearly above its limit, but the study has no cell of {tested.missing}."
    why = {
        claims.HOLDS: "Every figure is clearly below its limit",
        claims.DOES_NOT_HOLD: "A figure is clearly above its limit",
        claims.CANNOT_TELL: "Chance could explain on which side of its limit a figure is",
    }[tested.answer]
    return f"{why} ({write_p_value(tested.p_holm)}, adjusted over all claims; the intervals are not)."


def list_ids(findings: Iterable[Mapping[str, Finding]]) -> list[str]:
    """Return the ids of findings that any method has, in order."""
    return sorted({id for each in findings for id in each}, key=lambda id: int(id.removeprefix("F")))


def describe_changes(by_method: FindingsByMethod) -> list[str]:
    """Name the findings that hold with one method and fail with another, or say that there are none."""
    sentences = []
    for kind, name in ((PRUNING, "method that prunes"), (QUANTIZATION, "scheme")):
        of_kind = {method: findings for (each, method), findings in by_method.items() if each == kind}
        for id in list_ids(of_kind.values()):
            answers = {method: findings[id].answer for method, findings in of_kind.items() if id in findings}
            holds, fails = (
                [clean(method, 60) for method, answer in answers.items() if answer == wanted]
                for wanted in (claims.HOLDS, claims.DOES_NOT_HOLD)
            )
            if holds and fails:
                sentences.append(
                    f"{id} changes with the {name}: it holds with {join_words(holds)}, and does not hold with "
                    f"{join_words(fails)}."
                )
    if by_method and not sentences:
        return ["No finding holds with one method and fails with another."]
    return sentences
