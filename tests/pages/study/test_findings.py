"""The findings of the paper, on studies in which each evidently holds, does not hold, or is unclear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp

from compressknow.comparison.intervals import average_estimates, compare_rates
from compressknow.comparison.records import Estimate
from compressknow.pages.study.claims import answer_claim, compare_cells, measure_decline, measure_remaining
from compressknow.pages.study.findings import Finding, evaluate_findings
from compressknow.pages.study.records import Study
from compressknow.pages.study.summary import find_cliffs, rank_cells, write_verdict
from tests.comparison.test_clusters import draw_chances
from tests.pages.study.studies import Cell, ProbeSpec, gp, gpq, gq, make_study, make_whole_grid

ATT, FF, ALL = "attention", "feed-forward", "overall"
STRUCTURED = "ln-structured"
# The original knows 200 of 300 facts; these are what better and worse cells answer right.
INTACT, GOOD, BAD, WORSE, DEAD = range(200), range(180), range(140), range(90), range(3)
MANY = ProbeSpec(n=1000, known=800)
CAUSAL_TASK = ProbeSpec(probes=("lm-eval:boolq",), n=400, known=350, entry={"chance": 0.5, "majority": 0.62})


def gps(scope: str, right: range, *amounts: float) -> list[Cell]:
    """Return pruned cells, one per amount."""
    return [gp(scope, amount, right) for amount in amounts]


def gps_by_method(plain: range, structured: range, *amounts: float) -> list[Cell]:
    return [cell for a in amounts for cell in (gp("final", a, plain), gp("final", a, structured, STRUCTURED))]


# Finding, family, cells, probes if not the default, and answer.
HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "cannot tell"
CASES = [
    ("F1", "masked", [*gps(ATT, range(795), 0.1), *gps(ALL, range(790), 0.2, 0.3)], MANY, HOLDS),
    ("F1", "masked", [*gps(ATT, range(795), 0.1, 0.3), *gps(ALL, range(790), 0.2)], MANY, UNCLEAR),  # ends before 30 %
    ("F1", "masked", [*gps(ATT, range(795), 0.1, 0.3), *gps(ALL, range(500), 0.2)], MANY, FAILS),
    ("F1", "masked", gps(ATT, range(725), 0.1), MANY, UNCLEAR),
    ("F1", "masked", gps(ATT, range(700), 0.1), MANY, FAILS),
    ("F1", "masked", [*gps(ATT, range(700), 0.1), *gps(ATT, range(795), 0.2)], MANY, UNCLEAR),  # one of two by chance
    ("F1", "masked", gps(ATT, range(100), 0.4), MANY, UNCLEAR),  # of another level
    ("F2", "masked", [*gps(ATT, GOOD, 0.4, 0.5), *gps(FF, BAD, 0.4, 0.5)], None, HOLDS),
    ("F2", "masked", [*gps(ATT, BAD, 0.4, 0.5), *gps(FF, GOOD, 0.4, 0.5)], None, FAILS),
    ("F2", "masked", [*gps(ATT, GOOD, 0.4), *gps(FF, BAD, 0.4), *gps(ATT, BAD, 0.5), *gps(FF, GOOD, 0.5)], None, FAILS),
    ("F2", "masked", [*gps(ATT, GOOD, 0.4), *gps(FF, range(179), 0.4)], None, UNCLEAR),
    ("F2", "masked", [*gps(ATT, GOOD, 0.3), *gps(FF, BAD, 0.3)], None, UNCLEAR),  # 30 % is low
    ("F2", "masked", [gpq(ATT, 0.4, GOOD), gpq(FF, 0.4, BAD)], None, UNCLEAR),  # quantized too
    ("F3", "causal", [*gps(ATT, BAD, 0.4, 0.5), *gps(FF, GOOD, 0.4, 0.5)], None, HOLDS),
    ("F3", "seq2seq", [*gps(ATT, GOOD, 0.4, 0.5), *gps(FF, BAD, 0.4, 0.5)], None, FAILS),
    ("F3", "causal", [*gps(ATT, GOOD, 0.4), *gps(FF, GOOD, 0.4)], None, UNCLEAR),
    ("F4", "masked", [*gps(ATT, INTACT, 0.2), *gps(FF, GOOD, 0.2), *gps(ALL, BAD, 0.2)], None, HOLDS),
    ("F4", "masked", [*gps(ATT, INTACT, 0.2), *gps(FF, BAD, 0.2), *gps(ALL, GOOD, 0.2)], None, FAILS),
    ("F4", "masked", [*gps(ATT, INTACT, 0.2), *gps(FF, BAD, 0.2), *gps(ALL, BAD, 0.2)], None, UNCLEAR),
    ("F4", "masked", [*gps(ATT, INTACT, 0.2), *gps(ALL, BAD, 0.2)], None, UNCLEAR),  # no feed-forward
    # It is enough that one of the two cells knows more than the baseline, which answers 248 right.
    ("F4", "causal", [*gps(ATT, range(350), 0.2), *gps(FF, range(350), 0.2), *gps(ALL, DEAD, 0.2)], CAUSAL_TASK, HOLDS),
    ("F5", "masked", [*gps(ALL, BAD, 0.5), *gps(ALL, range(20), 0.6), *gps(ALL, DEAD, 0.8, 0.9)], None, HOLDS),
    ("F5", "masked", [*gps(ALL, GOOD, 0.6, 0.7, 0.8), *gps(ALL, BAD, 0.9)], None, FAILS),
    ("F5", "masked", gps(ALL, range(20), 0.9), None, UNCLEAR),
    ("F5", "masked", [*gps(ALL, range(20), 0.6), *gps(ALL, DEAD, 0.8)], None, UNCLEAR),  # ends before 90 %
    ("F5", "masked", gps(ALL, GOOD, 0.6, 0.7, 0.8), None, UNCLEAR),  # so does this
    ("F5", "masked", gps(ALL, DEAD, 0.4, 0.5), None, UNCLEAR),
    ("F6", "causal", [gq(ATT, GOOD), gq(FF, BAD)], None, HOLDS),
    ("F6", "causal", [gq(ATT, BAD), gq(FF, GOOD)], None, FAILS),
    ("F6", "causal", [gq(ATT, GOOD), gq(FF, range(178))], None, UNCLEAR),
    ("F6", "causal", [gq(ATT, GOOD, "int8"), gq(FF, BAD, "int8-paper")], None, UNCLEAR),  # not of one scheme
    ("F7", "masked", [gq(ATT, INTACT), gq(FF, GOOD), gq(ALL, BAD)], None, HOLDS),
    ("F7", "masked", [gq(ATT, INTACT), gq(FF, BAD), gq(ALL, GOOD)], None, FAILS),
    ("F7", "masked", [gq(ATT, INTACT), gq(FF, GOOD), gq(ALL, GOOD)], None, UNCLEAR),
    ("F8", "masked", [gpq(s, a, r) for s, r in ((ATT, GOOD), (FF, BAD)) for a in (0.2, 0.4)], None, HOLDS),
    ("F8", "seq2seq", [gpq(s, a, r) for s, r in ((ATT, GOOD), (FF, BAD)) for a in (0.2, 0.4)], None, FAILS),
    ("F8", "seq2seq", [gpq(ATT, 0.2, GOOD), gpq(FF, 0.2, BAD), gpq(ATT, 0.4, WORSE), gpq(FF, 0.4, BAD)], None, HOLDS),
    ("F8", "causal", [gpq(ATT, 0.2, GOOD), gpq(FF, 0.2, BAD)], None, UNCLEAR),  # nothing at 40 %
    ("F9", "masked", gps_by_method(GOOD, BAD, 0.2, 0.4), None, HOLDS),
    ("F9", "masked", gps_by_method(BAD, GOOD, 0.2, 0.4), None, FAILS),
    ("F9", "masked", gps_by_method(GOOD, GOOD, 0.2, 0.4), None, UNCLEAR),
    ("F10", "causal", gps_by_method(DEAD, DEAD, 0.2), None, HOLDS),
    ("F10", "causal", gps_by_method(BAD, DEAD, 0.2), None, FAILS),
    ("F10", "causal", gps_by_method(range(38), DEAD, 0.2), None, UNCLEAR),
    # Half right is no knowledge of a task with two answers.
    ("F10", "seq2seq", gps_by_method(range(200), range(205), 0.2), CAUSAL_TASK, HOLDS),
]


def evaluate(study: Study, id: str) -> Finding:
    return next(finding for finding in evaluate_findings(study)[0] if finding.id == id)


@pytest.mark.parametrize(("id", "family", "cells", "spec", "answer"), CASES)
def test_finding_has_the_evident_answer(
    id: str, family: str, cells: list[Cell], spec: ProbeSpec | None, answer: str
) -> None:
    finding = evaluate(make_study(cells, family, spec), id)
    assert finding.answer == answer, (finding.why, finding.statistic)
    assert finding.why


def test_finding_that_does_not_hold_quotes_the_contradiction() -> None:
    as_claimed = [*gps(ATT, GOOD, 0.4, 0.42, 0.44), *gps(FF, WORSE, 0.4, 0.42, 0.44)]
    finding = evaluate(make_study([*as_claimed, *gps(ATT, BAD, 0.5), *gps(FF, GOOD, 0.5)]), "F2")
    assert finding.answer == FAILS
    assert "3 of 4 comparisons as claimed, 1 against it; Att_GP 50% 46.7 % right, FF_GP 50% 60.0 %" in finding.numbers
    assert "The clearest of those against it: Att_GP 50% answers 140 of 300 right" in finding.statistic
    assert "does not hold. FF_GP 50% loses" in finding.per_million
    assert "fewer points of accuracy per million than Att_GP 50%" in finding.per_million
    # Of several figures, it is the one farthest above its limit: 50 % of 20 %, and not 52.5 % of 25 %.
    finding = evaluate(make_study([gp(ALL, 0.6, range(110)), gp(ALL, 0.9, range(100))]), "F5")
    assert "Overall_GP 90% 50.0 %" in finding.numbers


def test_adjusted_p_of_limits_is_named_since_the_intervals_are_not_adjusted() -> None:
    # One of 58 known facts is lost: each interval lies below 10 %, but there are several claims.
    cells = [gp(scope, 0.3, range(57)) for scope in (ALL, ATT, FF)] + [gq(scope, range(58)) for scope in (ALL, ATT, FF)]
    finding = evaluate(make_study(cells, spec=ProbeSpec(n=60, known=58)), "F1")
    assert finding.answer == UNCLEAR
    assert all((bound.value.high or 1) < bound.limit and (bound.p or 1) < 0.05 for bound in finding.bounds)
    assert finding.p_holm == pytest.approx(6 * max(bound.p or 1 for bound in finding.bounds))
    assert finding.numbers.endswith("1.7 % (−5.1 to 9.5 %), limit 10.0 %; adjusted p = 0.25")
    assert "(p = 0.25, adjusted over all claims; the intervals are not)" in finding.why


def test_figure_just_below_its_limit_does_not_read_as_the_limit() -> None:
    study = make_study(gps(ALL, range(2261), 0.3), spec=ProbeSpec(n=2600, known=2511))
    assert "9.96 % (" in (numbers := evaluate(study, "F1").numbers)
    assert "limit 10.0 %" in numbers


@pytest.mark.parametrize(
    ("amounts", "of"), [((0.9,), "overall pruned by 90 %"), ((0.6, 0.9), "overall pruned by 60 to 90 %, on average")]
)
def test_single_amount_is_not_described_as_an_average(amounts: Sequence[float], of: str) -> None:
    finding = evaluate(make_study(gps(ALL, DEAD, *amounts)), "F5")
    assert finding.bounds[0].of == of


@pytest.mark.parametrize(
    ("family", "ids"),
    [("masked", {"F3", "F10"}), ("causal", {"F2", "F9"}), ("seq2seq", {"F2", "F9"})],
)
def test_findings_apply_to_the_families_that_the_paper_names(family: str, ids: set[str]) -> None:
    cells = [*gps(ATT, GOOD, 0.4), *gps(FF, BAD, 0.4), *gps_by_method(GOOD, BAD, 0.2)]
    findings = evaluate_findings(make_study(cells, family))[0]
    assert [finding.id for finding in findings] == [f"F{i}" for i in range(1, 11)]
    assert {finding.id for finding in findings if finding.answer == "not asked of this family"} == ids


def test_study_without_cells_answers_no_finding() -> None:
    study = make_study([], "masked")
    answers = {finding.answer for finding in evaluate_findings(study)[0]}
    assert answers == {"cannot tell", "not asked of this family"}
    assert evaluate(study, "F4").why == "The study has no cells for it."


def test_cells_that_are_not_plain_are_ignored() -> None:
    cells = [Cell(ATT, GOOD, None, "int8", None, plain=False), gq(FF, BAD, "int8")]
    assert evaluate(make_study(cells), "F6").comparisons == ()


def test_comparison_is_mcnemar_on_the_same_facts() -> None:
    # Only the first cell answers facts 0 to 6 right, only the second fact 7: p = 2 (1 + 8) / 2^8.
    study = make_study([gp(ATT, 0.4, {*range(8, 100), *range(7)}), gp(FF, 0.4, {*range(8, 100), 7})])
    finding = evaluate(study, "F2")
    (pair,) = finding.comparisons
    assert (pair.counts.both, pair.counts.lost, pair.counts.gained, pair.counts.neither) == (92, 7, 1, 200)
    assert pair.p == pytest.approx(18 / 256)
    assert "99 of 300 right" in finding.statistic
    assert "7 only the first, 1 only the second (p = 0.07)" in finding.statistic


def test_p_values_are_adjusted_over_all_findings() -> None:
    # One comparison would be significant (2 / 2^6 = 0.03); two are not, whether of one finding or of two.
    cells = [cell for a in (0.4, 0.5) for cell in (gp(ATT, a, range(186)), gp(FF, a, range(180)))]
    finding = evaluate(make_study(cells), "F2")
    assert [pair.p for pair in finding.comparisons] == [pytest.approx(2 / 64)] * 2
    assert [pair.p_holm for pair in finding.comparisons] == [pytest.approx(4 / 64)] * 2
    assert finding.answer == "cannot tell"
    assert evaluate(make_study(cells[:2]), "F2").answer == "holds"
    both = make_study([*cells[:2], gq(ATT, range(186)), gq(FF, range(180))])
    assert [evaluate(both, name).answer for name in ("F2", "F6")] == ["cannot tell", "cannot tell"]
    # A comparison of cells that know nothing is not counted.
    dead = make_study([*cells[:2], gp(ATT, 0.5, ()), gp(FF, 0.5, ())])
    assert [pair.p_holm for pair in evaluate(dead, "F2").comparisons] == [pytest.approx(2 / 64), None]


def test_finding_is_tested_over_relations() -> None:
    # Only one of the cells answers 30 facts right: two of each of 15 relations, or all of three relations.
    for lost, answer in ((range(30), "holds"), ([i for i in range(200) if i % 20 < 3], "cannot tell")):
        cells = [gp(ATT, 0.4, range(200)), gp(FF, 0.4, {*range(200)} - {*lost})]
        finding = evaluate(make_study(cells, spec=ProbeSpec(relations=20)), "F2")
        assert (finding.comparisons[0].counts.lost, finding.answer) == (30, answer)


def test_figures_have_intervals_over_relations() -> None:
    # 30 facts are lost, two of each of 15 relations, or all of three.
    kept = ({*range(200)} - {*lost} for lost in (range(30), [i for i in range(200) if i % 20 < 3]))
    study = make_study([gp(ALL, 0.2, right) for right in kept], spec=ProbeSpec(relations=20))
    for measure in (measure_decline, measure_remaining):
        spread, concentrated = (measure(study, cell)(0.95) for cell in study.cells)
        assert spread.value == concentrated.value
        assert concentrated.high - concentrated.low > 1.5 * (spread.high - spread.low)


@pytest.mark.parametrize("icc", [0.001, 0.1, 0.3])
def test_study_of_equally_good_cells_rarely_makes_a_claim(icc: float) -> None:
    """All modules are equally good, and their answers are drawn by relation."""
    random = np.random.default_rng(11)
    cells = [gp(scope, amount, range(1)) for amount in (0.4, 0.5, 0.6) for scope in (ATT, FF, ALL)]
    study = make_study([*cells, *(gq(scope, range(1)) for scope in (ATT, FF, ALL))], spec=ProbeSpec(relations=20))
    wrong = 0
    for _ in range(SIMULATED):
        by_chance = (replace(cell, correct={"lama:trex": draw_answers(random, icc)}) for cell in study.cells)
        findings = evaluate_findings(replace(study, cells=tuple(by_chance)))[0]
        wrong += any(finding.answer != "cannot tell" for finding in findings if finding.comparisons)
    assert wrong / SIMULATED <= 0.06


SIMULATED = 150


def draw_answers(random: np.random.Generator, icc: float) -> tuple[bool, ...]:
    """Draw answers of which 80 % are right on average, with a share per relation; `icc` is their correlation."""
    share = random.beta(0.8 * (1 / icc - 1), 0.2 * (1 / icc - 1), 20)
    return tuple((random.random(300) < np.tile(share, 15)).tolist())


def test_cells_no_better_than_the_baseline_decide_nothing() -> None:
    # In a task with two answers, neither always "yes" nor tossing a coin is knowledge.
    cells = [*gps(ATT, range(190), 0.2), *gps(FF, range(190), 0.2), *gps(ALL, range(150, 400), 0.2)]
    finding = evaluate(make_study(cells, "causal", CAUSAL_TASK), "F4")
    assert all(pair.p is not None and pair.p < 0.01 and pair.at_floor for pair in finding.comparisons)
    assert finding.answer == "cannot tell"
    assert finding.why == "No cell knows clearly more than the baseline: there is nothing left to compare."
    # If any text may be the answer, the same accuracy is knowledge.
    assert evaluate(make_study(cells, "causal", ProbeSpec(n=400, known=350)), "F4").answer == "does not hold"


def test_modules_of_different_sizes_are_compared_per_million_parameters() -> None:
    # 40 % of 21 M lose 20 of 300 facts, 40 % of 64 M lose 40: fewer in total, more per million.
    finding = evaluate(make_study([gp(ATT, 0.4, range(180)), gp(FF, 0.4, range(160))]), "F2")
    assert finding.answer == "holds"
    (pair,) = finding.comparisons
    assert pair.rate.value == pytest.approx(40 / 300 / (0.4 * 64) - 20 / 300 / (0.4 * 21))
    assert finding.per_million.startswith("Per million parameters changed:")
    assert "FF_GP 40% loses 0.273 fewer points of accuracy per million than Att_GP 40%" in finding.per_million
    # Quantizing changes all weights, including those that were pruned before.
    study = make_study([gp(ATT, 0.4, GOOD), gpq(ATT, 0.4, GOOD)])
    assert [cell.changed for cell in study.cells] == [8_400_000, 21_000_000]


def test_rate_difference_matches_a_t_test() -> None:
    # The second's loss per million minus the first's, by fact: -1, 0, 0.5, 1.5; each fact is a cluster.
    clusters = np.arange(4)
    estimate, p = compare_rates(np.array([1, 0, 0, -1]), np.array([0, 0, 1, 1]), clusters, (1, 2))
    expected = ttest_1samp([-1, 0, 0.5, 1.5], 0)
    assert estimate.value == pytest.approx(0.25)
    assert estimate.high == pytest.approx(expected.confidence_interval().high)
    assert p == pytest.approx(expected.pvalue)
    # Two clusters of two facts: the mean of each.
    estimate, p = compare_rates(np.array([1, 0, 0, -1]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), (1, 2))
    assert p == pytest.approx(ttest_1samp([-0.5, 1], 0).pvalue)
    # The common rate, 2 facts per 3 million parameters, predicts 4/3 facts for the first, which lost none.
    _, p = compare_rates(np.zeros(5), np.array([1, 1, 1, -1, 0]), np.arange(5), (2, 1))
    inflation = (4 / 3 / 2**2 + 4) / 4
    assert p == pytest.approx(2 * student_t.sf(ttest_1samp([1, 1, 1, -1, 0], 0).statistic / inflation**0.5, 4))
    same = np.zeros(2)
    assert compare_rates(same, same, clusters[:2], (1, 2))[1] == 1.0
    assert compare_rates(same, same, clusters[:2], (0, 2))[0].value is None


def test_average_of_one_estimate_is_itself_and_none_if_any_is_none() -> None:
    study = make_study([gp(ATT, 0.4, GOOD)]).cells[0].comparison.probes[0]
    assert average_estimates([study.kept]).value == pytest.approx(0.9)
    assert average_estimates([study.kept, study.kept_above_chance]).value is None
    assert average_estimates([study.kept, Estimate(0.5)]) == Estimate(pytest.approx(0.7))


def test_claim_holds_only_if_each_part_does() -> None:
    assert answer_claim([("a", 1), ("b", 0)], ["a", "b"]) == "cannot tell"
    assert answer_claim([("a", 1), ("b", 1), ("b", 0)], ["a", "b"]) == "holds"
    assert answer_claim([("a", 1), ("b", -1)], ["a", "b"]) == "does not hold"
    assert answer_claim([], [""]) == "cannot tell"


@pytest.mark.parametrize("icc", [0.0, 0.1, 0.3])
def test_equal_rates_are_rarely_told_apart(icc: float) -> None:
    random, cluster, p_values = np.random.default_rng(2), np.tile(np.arange(20), 10), []
    for _ in range(400):
        # One loses 1 % of the facts, the other 5 %.
        lost = [random.random(200) < np.tile(draw_chances(random, loss, icc, 20), 10) for loss in (0.01, 0.05)]
        p_values.append(compare_rates(*(side.astype(int) for side in lost), cluster, (10, 50))[1] or 1.0)
    assert np.mean(np.array(p_values) < 0.05) < 0.05
    # Holm's method needs this for the smallest of many p-values.
    assert np.mean(np.array(p_values) < 0.005) < 0.01


def test_comparison_skips_probes_that_one_cell_lacks() -> None:
    study = make_study([gp(ATT, 0.4, GOOD), gp(FF, 0.4, BAD)], spec=ProbeSpec(probes=("a", "b")))
    less, more = study.cells
    pair = compare_cells(study, less, replace(more, correct={"a": more.correct["a"]}))
    assert pair.counts.n == 300


def test_right_answers_to_all_probes_together_are_compared_with_luck() -> None:
    # 340 of 600, in a task with two answers and in free text; luck explains 186.
    study = make_study(
        [*gps(ATT, range(170), 0.2), *gps(ALL, range(150), 0.2)], spec=ProbeSpec(known=290, probes=("a", "b"))
    )
    study = replace(study, probes=(replace(study.probes[0], chance=0.5, majority=0.62), study.probes[1]))
    assert not compare_cells(study, *study.cells).at_floor


@pytest.mark.parametrize(
    ("chance", "majority", "expected"),
    [(None, 0.4, 0.0), (0.01, 0.3, 0.01), (0.5, 0.621, 0.621), (0.5, None, 0.5), (0.5, 0.46, 0.5), (0.2, 0.3, 0.3)],
)
def test_floor_is_zero_guessing_or_the_majority_baseline(
    chance: float | None, majority: float | None, expected: float
) -> None:
    study = make_study([], spec=ProbeSpec(entry={"chance": chance, "majority": majority}))
    assert study.probes[0].floor == expected


def test_remaining_accuracy_is_measured_from_the_baseline() -> None:
    study = make_study(gps(ALL, range(299), 0.2), "causal", CAUSAL_TASK)
    # (299 - 0.62 x 400) / (350 - 0.62 x 400) is half.
    assert measure_remaining(study, study.cells[0])(0.95).value == pytest.approx(0.5, abs=0.001)
    assert measure_decline(study, study.cells[0])(0.95).value == pytest.approx(51 / 350)
    no_better = make_study(gps(ALL, range(100), 0.2), "causal", ProbeSpec(n=400, known=250, entry=CAUSAL_TASK.entry))
    assert measure_remaining(no_better, no_better.cells[0])(0.95).value is None
    nothing = make_study(gps(ALL, range(0), 0.2), "causal", ProbeSpec(known=0))
    assert measure_remaining(nothing, nothing.cells[0])(0.95).value is None


def test_modules_are_ranked_by_level() -> None:
    cells = [*gps(ATT, INTACT, 0.1, 0.3), *gps(FF, GOOD, 0.1, 0.3), *gps(ALL, BAD, 0.1, 0.3)]
    cells += [*gps(ATT, BAD, 0.4, 0.5), *gps(FF, range(141), 0.4, 0.5)]
    cells += [*gps(ATT, DEAD, 0.7), *gps(FF, BAD, 0.7, 0.8)]
    low, medium, high = rank_cells(make_study(cells))["modules"]
    assert (low.level, low.best, low.clear, low.amounts) == ("10 to 30 %", ATT, True, (10, 30))
    assert low.kept == {ATT: 1.0, FF: 0.9, ALL: 0.7}
    assert (medium.best, medium.clear, list(medium.kept)) == (FF, False, [FF, ATT])
    assert (high.best, high.clear, high.amounts) == (FF, True, (70,))
    # p = 0.03 is clear for a single level, but not for each of two.
    cells = [cell for a in (0.1, 0.5) for cell in (gp(ATT, a, range(186)), gp(FF, a, range(180)))]
    for some, clear in ((cells[:2], [True]), (cells, [False, False])):
        assert [each.clear for each in rank_cells(make_study(some))["modules"]] == clear


def test_level_with_one_module_has_no_ranking() -> None:
    assert rank_cells(make_study([*gps(ATT, GOOD, 0.2), *gps(FF, GOOD, 0.3)]))["modules"] == ()


def test_cliff_is_the_first_amount_that_keeps_less_than_90_percent() -> None:
    amounts = ((INTACT, 0.1), (GOOD, 0.3), (BAD, 0.5), (range(102), 0.6))
    cells = [*(gp(ATT, amount, right) for right, amount in amounts), gp(FF, 0.2, INTACT)]
    (cliff,) = find_cliffs(make_study(cells))
    assert (cliff.module, cliff.below, cliff.kept, cliff.before) == (ATT, 50, 0.7, 30)
    # 0.19 for ten points is steeper than 0.20 for twenty.
    assert cliff.steepest == (50, 60)
    assert cliff.fall == pytest.approx(0.19)
    (none,) = find_cliffs(make_study([*gps(FF, INTACT, 0.1, 0.2)]))
    assert (none.below, none.kept, none.before) == (None, None, 20)
    # Of 171 of 200 facts, the 95 % interval ends below 90 %, but not the 98.3 % one (a study may have three cliffs).
    # That of 185 facts begins below.
    cliffs = [find_cliffs(make_study(gps(ATT, range(n), 0.1, 0.2)))[0] for n in (167, 171, 185, 199)]
    assert [(each.below, each.clear) for each in cliffs] == [(10, True), (10, False), (None, False), (None, True)]


def test_verdict_names_the_best_modules_and_the_cliffs() -> None:
    verdict = write_verdict(make_whole_grid())
    assert verdict.startswith(
        "tiny-bert: pruned by 10 to 30 %, no module clearly hurts least; "
        "pruned by 30 to 50 % and more than 50 %, attention hurts least; "
    )
    assert verdict.endswith("though not clearly, from 30 % (overall), 50 % (attention) and 40 % (feed-forward) on.")


def test_verdict_mentions_a_larger_amount_that_keeps_more() -> None:
    study = make_study([*gps(ATT, BAD, 0.4), *gps(ATT, INTACT, 0.5), *gps(FF, BAD, 0.4, 0.5)])
    assert write_verdict(study).endswith(
        "less than 90 % is kept from 40 % (feed-forward) on; "
        "less than 90 % is kept at 40 % (attention), but more at a larger amount."
    )
    assert [cliff.lasts for cliff in find_cliffs(study)] == [False, True]


def test_verdict_tells_a_clear_cliff_from_an_estimate() -> None:
    study = make_study([*gps(ALL, BAD, 0.5, 0.6), *gps(ATT, range(178), 0.5, 0.6)])
    assert [cliff.clear for cliff in find_cliffs(study)] == [True, False]
    assert write_verdict(study).endswith(
        "less than 90 % is kept from 50 % (overall) on; "
        "the estimate is below 90 %, though not clearly, from 50 % (attention) on."
    )
    intact, unclear = (write_verdict(make_study(gps(ATT, range(n), 0.1, 0.2))) for n in (199, 185))
    assert intact == "tiny-bert: no amount in the grid keeps less than 90 %."
    assert unclear == "tiny-bert: no estimate is below 90 %."


def test_verdict_without_pruning_names_the_best_and_worst_cells() -> None:
    assert write_verdict(make_study([gq(ATT, GOOD), gq(FF, BAD)])) == (
        "Of 2 compressed forms of tiny-bert, Att_GQ keeps most (90.0 %) and FF_GQ least (70.0 %)."
    )
    assert write_verdict(make_study([gq(ATT, GOOD), gq(FF, GOOD)])) == (
        "Each of the 2 compressed forms of tiny-bert keeps 90.0 % of what it knew."
    )
    assert write_verdict(make_study([])).startswith("Nothing can be said about what tiny-bert keeps")
