"""The paper's ten findings as tests on a study's data, by method too, and their answers in words.

None is assumed: each holds, does not hold, or cannot be told. What decides is said with each test below; all are paired
by fact, over all probes together, and go by relation. All that the table of findings and the table by method claim
is adjusted together (Holm): the chance that a study says anything that is not so is 5 % at most. Amounts: low 10-30 %,
medium above 30 to 50 %, high above 50 % (the paper's p_low, p_medium and p_high, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compressknow.base.format import count, estimate, number, p_value, share
from compressknow.base.format import percent as percent_of
from compressknow.pages.study.records import (
    MODULES,
    STRUCTURED,
    UNSTRUCTURED,
    Study,
    StudyCell,
    methods,
    names,
    percent,
    pruned,
    pruned_and_quantized,
    quantized,
    schemes,
)
from compressknow.pages.study.tests import (
    CANNOT_TELL,
    HOLDS,
    Bound,
    CheckpointComparison,
    Claim,
    adjusted,
    average,
    bound,
    decline,
    left,
    paired_test,
)

NOT_EVALUATED = "not asked of this family"
FAMILIES = {"masked": "encoder-only", "seq2seq": "encoder-decoder", "causal": "decoder-only"}
LOW, MEDIUM, HIGH = (10, 30), (30, 50), (50, 100)
MINIMAL = 0.10  # a decline below a tenth of the original's accuracy is called minimal (F1)
NEAR = 0.20  # with less than a fifth of the knowledge left, a model is near zero or the baseline (F5, F10)
_ALL = tuple(FAMILIES)
_FALL = "Relative fall in accuracy"
_LEFT = "Left of what the original knows beyond the baseline"
_IN_SHORT = {_FALL: "relative fall", _LEFT: "left beyond the baseline"}
_ATTENTION, _FEED_FORWARD, _OVERALL, _FINAL = "attention", "feed-forward", "overall", "final"
_FEW = 3  # comparisons that are told one by one; of more, their number and the one that separates best
NO_CELLS = "The study has no cells for it."


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of the paper, and whether it holds of this study.

    Attributes
    ----------
    id : F1 to F10, as in section 9 of the design.
    families : of which the paper claims it: ``masked`` (encoder-only), ``seq2seq``, ``causal``.
    answer : ``holds``, ``does not hold``, ``cannot tell`` or ``not asked of this family``.
    statistic : the figures behind the answer, in words.
    why : what in them decides.
    per_million : the same question by million parameters changed, in words; empty where nothing is compared.
    numbers : the clearest of those figures, in a few words.
    contrasts, bounds : the figures themselves.
    """

    id: str
    claim: str
    families: tuple[str, ...]
    answer: str
    statistic: str
    why: str
    per_million: str = ""
    paired_tests: tuple[CheckpointComparison, ...] = ()
    bounds: tuple[Bound, ...] = ()
    numbers: str = ""


@dataclass(frozen=True, slots=True)
class _Claim:
    id: str
    text: str
    families: tuple[str, ...]
    test: Callable[[Study], Claim]
    what: str = ""  # the figure that is held to a limit


@dataclass(frozen=True, slots=True)
class MethodFindings:
    """The findings that the study has cells of one method for.

    Attributes
    ----------
    kind : ``pruning`` or ``quantization``; `name` is the method's or the scheme's, as in `StudyCell`.
    """

    kind: str
    name: str
    findings: tuple[Finding, ...]

    def answer(self, id: str) -> str | None:
        """Return the answer to one of them; None where there are no cells for it."""
        return next((finding.answer for finding in self.findings if finding.id == id), None)


PRUNING, QUANTIZATION = "pruning", "quantization"


def findings(study: Study) -> tuple[Finding, ...]:
    """Return all ten, in order. Needs plain cells by scope; what is missing makes a finding "cannot tell"."""
    return _tables(study)[0]


def by_method(study: Study) -> tuple[MethodFindings, ...]:
    """Return the findings of the cells of one method alone, in the place of the paper's: of each method that modules
    are pruned by, and each scheme; of kinds of which the study has several.
    """
    return _tables(study)[1]


def _tables(study: Study) -> tuple[tuple[Finding, ...], tuple[MethodFindings, ...]]:
    pruning, quantization = methods(study), schemes(study)
    # The cells that a method prunes, as those of the paper's method.
    alone = {
        (PRUNING, name): tuple(replace(cell, pruning=UNSTRUCTURED) for cell in study.cells if cell.pruning == name)
        for name in (pruning if len(pruning) > 1 else ())
    } | {
        (QUANTIZATION, name): tuple(cell for cell in study.cells if cell.quantization == name)
        for name in (quantization if len(quantization) > 1 else ())
    }
    studies = {("", ""): study} | {of: replace(study, cells=cells) for of, cells in alone.items()}
    asked = [claim for claim in _CLAIMS if study.original.family in claim.families]
    tested = [replace(claim.test(each), key=(claim.id, *of)) for of, each in studies.items() for claim in asked]
    together = iter(adjusted(tested))
    by_study = {of: tuple(_finding(each, claim, next(together)) for claim in asked) for of, each in studies.items()}
    own = {finding.id: finding for finding in by_study.pop(("", ""))}
    told = (MethodFindings(*of, tuple(f for f in each if f.paired_tests or f.bounds)) for of, each in by_study.items())
    return tuple(own.get(claim.id) or _not_asked(claim) for claim in _CLAIMS), tuple(t for t in told if t.findings)


def _not_asked(claim: _Claim) -> Finding:
    named = " and ".join(FAMILIES[family] for family in claim.families)
    return Finding(claim.id, claim.text, claim.families, NOT_EVALUATED, "-", f"The paper says it of {named} models.")


def low_decline(study: Study) -> Claim:
    """F1: pruned by 10 to 30 %, each scope by itself, the decline is minimal.

    Holds where for every such cell the interval of the relative fall in accuracy lies below `MINIMAL` (each must pass
    by itself, so that nothing is adjusted for their number); does not hold where that of one, adjusted for their
    number, lies above.
    """
    cells = [cell for scope in MODULES for cell in _within(pruned(study, scope), (LOW[0] - 1, LOW[1])).values()]
    bounds = [bound(cell.key, decline(study, cell), MINIMAL) for cell in cells]
    return _limited(bounds)


def medium_attention_less(study: Study) -> Claim:
    """F2: pruned by more than 30 and up to 50 %, attention hurts less than feed-forward at equal amounts.

    A paired test of the two cells at each amount; see `tests.decide`.
    """
    return _compared(_at_equal_amounts(study, _ATTENTION, _FEED_FORWARD))


def medium_attention_more(study: Study) -> Claim:
    """F3: the other way round, likewise."""
    return _compared(_at_equal_amounts(study, _FEED_FORWARD, _ATTENTION))


def overall_pruned_most(study: Study) -> Claim:
    """F4: overall hurts more than attention and more than feed-forward, at equal amounts, from 10 to 90 %.

    A paired test for each amount and rival. Both rivals must be shown to hurt less, at one amount at least.
    """
    overall = pruned(study, _OVERALL)
    pairs = [
        paired_test(study, cell, overall[amount], f"against {scope}")
        for scope in (_ATTENTION, _FEED_FORWARD)
        for amount, cell in pruned(study, scope).items()
        if amount in overall
    ]
    return _compared(pairs, (f"against {_ATTENTION}", f"against {_FEED_FORWARD}"))


def high_rapid(study: Study) -> Claim:
    """F5: overall pruned by more than 50 %, knowledge falls rapidly, towards zero or the majority baseline.

    Two figures of what is left beyond such a baseline must both be below their limits, their whole intervals: the mean
    over the amounts above 50 % below the mean share of weights left (knowledge goes faster than weights), and what is
    left at the largest amount below `NEAR`.
    """
    cells = list(_within(pruned(study, _OVERALL), HIGH).values())
    if not cells:
        return _limited([])
    weights = sum(1 - percent(cell) / 100 for cell in cells) / len(cells)
    amounts = f"{percent(cells[0]):g} to {percent(cells[-1]):g} %" if len(cells) > 1 else f"{percent(cells[0]):g} %"
    mean = average([left(study, cell) for cell in cells])
    bounds = [
        bound(f"overall pruned by {amounts}, on average", mean, weights),
        bound(cells[-1].key, left(study, cells[-1]), NEAR),
    ]
    return _limited(bounds)


def attention_quantized_less(study: Study) -> Claim:
    """F6: quantized, attention hurts less than feed-forward: a paired test for each scheme."""
    return _compared(_by_scheme(study, _ATTENTION, _FEED_FORWARD))


def overall_quantized_most(study: Study) -> Claim:
    """F7: quantized, overall hurts more than attention and more than feed-forward.

    Both rivals must be shown to hurt less, under one scheme at least.
    """
    parts = {scope: f"against {scope}" for scope in (_ATTENTION, _FEED_FORWARD)}
    pairs = [pair for scope, part in parts.items() for pair in _by_scheme(study, scope, _OVERALL, part)]
    return _compared(pairs, tuple(parts.values()))


def pruned_and_quantized_attention(study: Study) -> Claim:
    """F8: pruned by 20 % and quantized, attention hurts less than feed-forward; at 40 % too, except in encoder-decoder
    models, where it hurts more.

    A paired test for each amount and scheme. Both amounts must be shown, under one scheme at least.
    """
    order = (_ATTENTION, _FEED_FORWARD)
    reverse = order[::-1] if study.original.family == "seq2seq" else order
    pairs = [
        paired_test(study, less[amount], more[amount], f"at {amount} %")
        for amount, scopes in ((20, order), (40, reverse))
        for less, more in (tuple(pruned_and_quantized(study, s, scheme) for s in scopes) for scheme in schemes(study))
        if amount in less and amount in more
    ]
    return _compared(pairs, ("at 20 %", "at 40 %"))


def final_structured_more(study: Study) -> Claim:
    """F9: the final layer pruned L1-structured hurts more than L1-unstructured: a paired test at each equal amount."""
    single, rows = pruned(study, _FINAL, UNSTRUCTURED), pruned(study, _FINAL, STRUCTURED)
    pairs = [paired_test(study, cell, rows[amount]) for amount, cell in single.items() if amount in rows]
    return _compared(pairs)


def final_near_baseline(study: Study) -> Claim:
    """F10: the final layer pruned by 20 % leaves less than `NEAR` of what the original knows beyond the baseline.

    By every method that the study has, its whole interval; does not hold where that of one, adjusted, lies above.
    """
    cells = [pruned(study, _FINAL, method).get(20) for method in (UNSTRUCTURED, STRUCTURED)]
    found = [cell for cell in cells if cell]
    bounds = [bound(cell.key, left(study, cell), NEAR) for cell in found]
    return _limited(bounds)


def _within(cells: Mapping[float, StudyCell], limits: tuple[float, float]) -> dict[float, StudyCell]:
    """Those above the lower limit and up to the upper."""
    return {amount: cell for amount, cell in cells.items() if limits[0] < amount <= limits[1]}


def _at_equal_amounts(study: Study, less: str, more: str) -> Iterator[CheckpointComparison]:
    others = pruned(study, more)
    for amount, cell in _within(pruned(study, less), MEDIUM).items():
        if amount in others:
            yield paired_test(study, cell, others[amount])


def _by_scheme(study: Study, less: str, more: str, part: str = "") -> Iterator[CheckpointComparison]:
    others = quantized(study, more)
    for scheme, cell in quantized(study, less).items():
        if scheme in others:
            yield paired_test(study, cell, others[scheme], part)


def _compared(pairs: Iterable[CheckpointComparison], parts: tuple[str, ...] = ("",)) -> Claim:
    return Claim((), tuple(pairs), parts)


def _limited(bounds: Sequence[Bound]) -> Claim:
    return Claim((), bounds=tuple(bounds))


def _finding(study: Study, claim: _Claim, tested: Claim) -> Finding:
    """Put the answer to a claim, and what decides, into words."""
    answer, pairs, bounds = tested.answer, tested.paired_tests, tested.bounds
    if claim.what:
        words = bounds_in_words(study, bounds, claim.what), why_bounds(answer, bounds), ""
        numbers = bounds_in_short(study, bounds, claim.what)
    else:
        rates = per_million_in_words(study, tested.answer_per_million, pairs)
        words = tests_in_words(study, pairs), why_tests(answer, pairs, tested.parts), rates
        numbers = tests_in_short(study, pairs)
    return Finding(claim.id, claim.text, claim.families, answer, *words, pairs, bounds, numbers)


_CLAIMS = (
    _Claim("F1", "Pruned by 10 to 30 %, the decline is minimal", _ALL, low_decline, _FALL),
    _Claim(
        "F2",
        "Pruned by 30 to 50 %, attention hurts less than feed-forward",
        ("masked",),
        medium_attention_less,
    ),
    _Claim(
        "F3",
        "Pruned by 30 to 50 %, attention hurts more than feed-forward",
        ("seq2seq", "causal"),
        medium_attention_more,
    ),
    _Claim("F4", "Pruning all modules together hurts most", _ALL, overall_pruned_most),
    _Claim("F5", "Above 50 % knowledge falls rapidly, towards zero or the majority baseline", _ALL, high_rapid, _LEFT),
    _Claim("F6", "Quantizing attention hurts less than feed-forward", _ALL, attention_quantized_less),
    _Claim("F7", "Quantizing everything hurts most", _ALL, overall_quantized_most),
    _Claim(
        "F8",
        "Pruned by 20 % and quantized, attention hurts less than feed-forward; by 40 % too in encoder-only and "
        "decoder-only models, the other way round in encoder-decoder models",
        _ALL,
        pruned_and_quantized_attention,
    ),
    _Claim(
        "F9", "In the final layer, L1-structured hurts more than L1-unstructured", ("masked",), final_structured_more
    ),
    _Claim(
        "F10",
        "With the final layer pruned by 20 %, accuracy is already near the majority baseline",
        ("seq2seq", "causal"),
        final_near_baseline,
        _LEFT,
    ),
)


def tests_in_words(study: Study, pairs: Sequence[CheckpointComparison]) -> str:
    """Each of a few comparisons with its numbers; of many, how many separate their cells, and the clearest."""
    if not pairs:
        return "-"
    called = names(study)
    if len(pairs) <= _FEW:
        return " ".join(test_in_words(pair, called) for pair in pairs)
    return f"{_numbers(pairs)} The clearest: {test_in_words(_clearest(pairs), called)}"


def _clearest(pairs: Sequence[CheckpointComparison]) -> CheckpointComparison:
    return min(pairs, key=lambda pair: 2.0 if pair.p_holm is None else pair.p_holm)


def tests_in_short(study: Study, pairs: Sequence[CheckpointComparison]) -> str:
    """How many of the comparisons separate their cells, and what the two of the clearest answer right."""
    if not pairs:
        return ""
    best, called = _clearest(pairs), names(study)
    as_claimed, against = sum(p.direction > 0 for p in pairs), sum(p.direction < 0 for p in pairs)
    tally = f"{count(as_claimed)} of {count(len(pairs))} comparisons as claimed, {count(against)} against it; "
    c, p = best.counts, "both near the baseline" if best.at_floor else p_value(best.p_holm)
    right = (
        f"{called[best.less]} {percent_of(c.known_before, c.n)} right, {called[best.more]} "
        f"{percent_of(c.known_after, c.n)}, {p}"
    )
    return f"{tally if len(pairs) > 1 else ''}{right}"


def test_in_words(pair: CheckpointComparison, called: dict[str, str]) -> str:
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


def why_tests(answer: str, pairs: Sequence[CheckpointComparison], parts: Sequence[str]) -> str:
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


def per_million_in_words(study: Study, answer: str, pairs: Sequence[CheckpointComparison]) -> str:
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


def bounds_in_words(study: Study, figures: Sequence[Bound], what: str) -> str:
    """The figures with their limits: of many, the largest."""
    if not figures:
        return "-"
    called = names(study)
    if all(bound.value.value is None for bound in figures):
        return "-"
    shown = [_largest(figures)] if len(figures) > _FEW else figures
    most = f", the largest of {count(len(figures))}" if len(figures) > _FEW else ""
    return f"{what}{most}: " + "; ".join(_bound(bound, called) for bound in shown) + "."


def bounds_in_short(study: Study, figures: Sequence[Bound], what: str) -> str:
    """The figure that lies highest above its limit, or nearest below."""
    told = [bound for bound in figures if bound.value.value is not None]
    return f"{_IN_SHORT[what]}: {_bound(_largest(told), names(study))}" if told else ""


def _largest(figures: Sequence[Bound]) -> Bound:
    return max(figures, key=lambda bound: (bound.value.value or 0.0) - bound.limit)


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
        return "Every figure is clearly below its limit."
    if answer == CANNOT_TELL:
        return "Chance could explain on which side of its limit a figure lies."
    return "A figure is clearly above its limit."
