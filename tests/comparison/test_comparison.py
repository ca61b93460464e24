"""Figures of one probe from the answers of two models, and pairs that cannot be compared."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressknow.base.errors import CompressknowError
from compressknow.comparison.paired import list_changed_facts
from compressknow.comparison.records import Counts, Estimate, ProbeFigures
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.grades import DEMOTED, GONE, PRODUCED, RECOGNIZED
from tests.pages.answering import compare_rows, make_answer, make_entry, make_rows


def compare(rows: Any, **changes: Any) -> ProbeFigures:
    return compare_rows(*rows, make_entry(**changes))


class TestCounts:
    def test_figures_follow_from_the_counts(self) -> None:
        figures = compare(make_rows(both=8, lost=2, gained=1, neither=9))
        assert figures.counts == Counts(8, 2, 1, 9)
        assert figures.kept.value == 0.8
        assert figures.accuracy_original.value == 0.5
        assert figures.accuracy_compressed.value == 0.45
        assert figures.difference.value == pytest.approx(-0.05)
        assert figures.certainty.p == 1.0  # 2 against 1

    def test_answers_are_paired_by_fact_not_by_order(self) -> None:
        before, after = make_rows(both=3, lost=2, gained=1, neither=4)
        assert compare((before, after[::-1])).counts == Counts(3, 2, 1, 4)

    def test_without_facts_figures_are_missing(self) -> None:
        figures = compare([[], []])
        assert figures.counts == Counts()
        assert figures.kept == figures.difference == figures.macro_difference == Estimate(None)
        assert figures.certainty.p is figures.answer_changed is None
        assert figures.movement is figures.mrr is figures.confidence is None

    @settings(max_examples=30, deadline=None)
    @given(st.tuples(*[st.integers(0, 30)] * 4), st.randoms(use_true_random=False))
    def test_order_does_not_matter_and_groups_add_up(self, cells: tuple[int, ...], shuffler: random.Random) -> None:
        rows = make_rows(*cells)
        rows = tuple([replace(row, popularity=float(number)) for number, row in enumerate(side)] for side in rows)
        figures = compare(rows)
        for side in rows:
            shuffler.shuffle(side)
        assert compare(rows) == figures
        for groups in (figures.by_relation, figures.by_subject, figures.by_popularity):
            assert sum((group.counts for group in groups), Counts()) == (figures.counts if groups else Counts())


class TestAnswers:
    def test_another_wrong_answer_is_a_changed_answer(self) -> None:
        before, after = make_rows(both=1, neither=3)
        after[1] = replace(after[1], predicted="Bern")
        assert compare((before, after)).answer_changed == 0.25

    def test_ranks_before_and_after(self) -> None:
        before, after = make_rows(both=1, lost=2, neither=1)
        after[2] = replace(after[2], rank=6)
        figures = compare((before, after))
        assert figures.mrr == pytest.approx(((1 + 1 + 1 + 0.5) / 4, (1 + 0.5 + 1 / 6 + 0.5) / 4))
        assert figures.p_at_5 == (1.0, 0.75)
        assert figures.lost_still_in_top5 == 1

    def test_few_choices_have_no_top_five(self) -> None:
        figures = compare(make_rows(both=2, lost=2, choices=2))
        assert figures.p_at_5 is figures.lost_still_in_top5 is None
        assert figures.mrr == (1.0, 0.75)
        # But the top five of a probe in which some facts have more.
        rows = make_rows(both=2, lost=2)
        assert compare([[replace(row, choices=2) for row in side[:3]] + side[3:] for side in rows]).p_at_5 == (1, 1)

    def test_change_of_the_gold_log_probability(self) -> None:
        figures = compare(make_rows(both=1, lost=1))
        assert figures.logp_change["p50"] == pytest.approx(-0.5)
        assert compare(make_rows(both=1, logp_gold=None)).logp_change is None

    def test_confidence_is_the_probability_of_the_predicted_answer(self) -> None:
        figures = compare(make_rows(both=20))
        probability = math.exp(-0.5)
        assert figures.confidence.ece == pytest.approx((1 - probability, 1 - probability))
        assert figures.confidence.brier == pytest.approx(((1 - probability) ** 2,) * 2)

    @pytest.mark.parametrize("choices", [2, 153])
    def test_confidence_is_relative_to_all_choices(self, choices: int) -> None:
        logp = (-40.0, -40.0 + math.log(1 / 6))
        figures = compare(make_rows(both=20, choices=choices, top5_logp=logp, total_logp=-40.0 + math.log(4 / 3)))
        assert figures.confidence.ece == pytest.approx((0.25, 0.25))
        assert figures.confidence.brier == pytest.approx((0.0625, 0.0625))

    def test_answers_without_a_total_have_confidence_for_up_to_five_choices(self) -> None:
        logp = (-40.0, -40.0 + math.log(1 / 3))
        figures = compare(make_rows(both=20, choices=2, top5=("yes", "no"), top5_logp=logp, total_logp=None))
        assert figures.confidence.ece == pytest.approx((0.25, 0.25))
        older = compare(make_rows(both=20, total_logp=None))
        assert older.confidence is None

    def test_nan_log_probabilities_give_no_nan_figures(self) -> None:
        before, after = make_rows(both=25)
        after[:2] = [replace(row, logp_gold=math.nan, top5_logp=(math.nan,) * 5) for row in after[:2]]
        figures = compare((before, after))
        confidence = figures.confidence
        assert all(map(math.isfinite, (*confidence.ece, *confidence.brier, *figures.logp_change.values())))

    def test_free_answers_have_no_confidence(self) -> None:
        assert compare(make_rows(both=20, choices=None)).confidence is None
        assert compare(make_rows(both=20, top5_logp=())).confidence is None


class TestChance:
    def test_kept_above_chance_uses_the_choices_of_known_facts(self) -> None:
        before, after = make_rows(both=3, lost=1, neither=4)
        for side in (before, after):
            side[:4] = [replace(row, choices=2) for row in side[:4]]
        figures = compare((before, after))
        assert figures.kept_above_chance.value == pytest.approx((0.75 - 0.5) / 0.5)
        assert figures.by_subject[0].chance == pytest.approx((4 * 0.5 + 4 * 0.125) / 8)

    def test_free_answers_have_no_chance(self) -> None:
        figures = compare(make_rows(both=3, lost=1, choices=None))
        assert figures.kept_above_chance == Estimate(None)
        assert figures.by_relation[0].chance is None

    def test_baselines_are_those_of_the_probe(self) -> None:
        figures = compare(make_rows(both=1), chance=0.5, majority=0.621)
        assert (figures.chance, figures.majority) == (0.5, 0.621)


class TestDrop:
    def test_micro_drop_by_hand(self) -> None:
        figures = compare(make_rows(both=6, lost=2, neither=2))
        assert (figures.drop_absolute, figures.drop_relative) == (0.2, 0.25)

    def test_macro_drop_where_the_probe_has_macro_average(self) -> None:
        before, after = make_rows(both=1, lost=1, neither=2)
        for side in (before, after):
            side[:] = [replace(row, relation="big" if number else "small") for number, row in enumerate(side)]
        # small: 1 of 1 before and after; big: 1 of 3 before, 0 after.
        figures = compare((before, after), average="macro")
        assert figures.macro_original.value == pytest.approx(2 / 3)
        assert (figures.drop_absolute, figures.drop_relative) == pytest.approx((1 / 6, 0.25))

    def test_equal_means_are_no_drop(self) -> None:
        joined = [], []
        for relation, kinds in (("a", (3, 1, 2, 0)), ("b", (0, 3, 2, 1)), ("c", (1, 3, 3, 3))):
            answers = make_rows(**dict(zip(("both", "lost", "gained", "neither"), kinds, strict=True)))
            for rows, new in zip(joined, answers, strict=True):
                rows += [replace(row, relation=relation, fact_id=relation + row.fact_id) for row in new]
        figures = compare(joined, average="macro")
        assert figures.macro_original.value != figures.macro_compressed.value  # They differ in the last bit.
        assert (figures.drop_absolute, figures.drop_relative) == (0, 0)

    def test_without_known_facts_there_is_no_relative_drop(self) -> None:
        assert compare(make_rows(neither=3)).drop_relative is None


class TestMovement:
    def test_equal_distributions_have_no_divergence(self) -> None:
        movement = compare(make_rows(both=5)).movement
        assert (movement.n, movement.kl_mean, movement.kl_max) == (5, 0, 0)

    def test_by_hand(self) -> None:
        before, after = make_rows(both=2)
        after[1] = replace(after[1], first_logp=np.log([0.25, 0.25]).astype(np.float32))
        movement = compare((before, after)).movement
        assert movement.kl_max == pytest.approx(0.25 * math.log(2), rel=1e-6)
        assert movement.kl_mean == movement.kl_median == pytest.approx(movement.kl_max / 2)
        assert movement.rest == pytest.approx((0.25, (0.25 + 0.5) / 2))

    @pytest.mark.parametrize(("tokens", "is_lower_bound"), [(20, True), (21, False), (255, False), (256, True)])
    def test_distributions_cut_to_the_requested_tokens_give_a_lower_bound(
        self, tokens: int, is_lower_bound: bool
    ) -> None:
        """Servers return 20 tokens, other runtimes 256; any other number is a whole vocabulary but one token."""
        rows = make_rows(both=1, first_ids=tuple(range(tokens)), first_logp=(math.log(0.5 / tokens),) * tokens)
        assert compare(rows).movement.rest == (pytest.approx((0.5, 0.5)) if is_lower_bound else None)
        mixed = tuple([*side, small[1]] for side, small in zip(rows, make_rows(both=2), strict=True))
        assert compare(mixed).movement.is_lower_bound is is_lower_bound

    def test_no_divergence_over_different_tokens(self) -> None:
        rows = make_rows(both=2)
        assert compare_rows(*rows, make_entry(), make_entry(reference="b" * 64)).movement is None
        before, after = rows
        after[0] = replace(after[0], first_ids=(5, 8))
        movement = compare((before, after)).movement
        assert (movement.n, movement.rest) == (1, pytest.approx((0.25, 0.25)))

    def test_divergence_over_all_tokens_counts_only_if_each_fact_has_it(self) -> None:
        before, after = make_rows(both=2)
        after[0] = replace(after[0], first_kl=0.5)
        assert compare((before, after)).movement.kl_max == 0
        after[1] = replace(after[1], first_kl=0.1)
        movement = compare((before, after)).movement
        assert (movement.kl_mean, movement.rest) == (pytest.approx(0.3), None)

    def test_no_divergence_without_distributions(self) -> None:
        assert compare(make_rows(both=2, first_ids=(), first_logp=()), reference=None).movement is None

    def test_nan_distributions_are_not_counted(self) -> None:
        before, after = make_rows(both=2)
        after[0] = replace(after[0], first_logp=(math.nan, math.nan))
        assert compare((before, after)).movement.n == 1


class TestGrades:
    before = (PRODUCED, RECOGNIZED, PRODUCED, PRODUCED, PRODUCED, GONE)
    after = (PRODUCED, PRODUCED, DEMOTED, DEMOTED, GONE, GONE)
    # Of the lost facts, one is produced after an example, and one is not; the last fact was not lost.
    texts = (None, None, "Paris", "Oslo", None, "Paris")

    def make_graded_rows(self) -> tuple[list[Answer], list[Answer]]:
        before, after = make_rows(both=2, lost=3, neither=1)
        return (
            [replace(row, grade=grade) for row, grade in zip(before, self.before, strict=True)],
            [
                replace(row, grade=grade, with_example=text)
                for row, grade, text in zip(after, self.after, self.texts, strict=True)
            ],
        )

    def test_grades_are_counted_in_each_model_and_as_they_moved(self) -> None:
        knowing = compare(self.make_graded_rows()).knowing
        assert knowing.original == {PRODUCED: 4, RECOGNIZED: 1, DEMOTED: 0, GONE: 1}
        assert knowing.compressed == {PRODUCED: 2, RECOGNIZED: 0, DEMOTED: 2, GONE: 2}
        moved = {pair: facts for pair, facts in knowing.moved.items() if facts}
        assert moved == Counter(zip(self.before, self.after, strict=True))
        assert (knowing.shown, knowing.back) == (2, 1)

    def test_answers_without_grades_are_not_counted(self) -> None:
        before, after = self.make_graded_rows()
        assert compare((before, [*after[:-1], replace(after[-1], grade=None)])).knowing is None


class TestGroups:
    def test_relations_are_sorted_by_name_and_have_holm_p_values(self) -> None:
        before, after = (
            [replace(a, relation=f"relation-{n % 2}") for n, a in enumerate(side)] for side in make_rows(4, 16)
        )
        figures = compare((before, after))
        assert [group.name for group in figures.by_relation] == ["relation-0", "relation-1"]
        assert [group.p for group in figures.by_relation] == pytest.approx([2 / 2**8] * 2)
        assert [group.p_holm for group in figures.by_relation] == pytest.approx([4 / 2**8] * 2)

    def test_subjects_are_in_the_order_of_the_report_card(self) -> None:
        rows = [make_answer(n, True, subject=s) for n, s in enumerate(["zoology", "science", "geography", "boolq"])]
        assert [group.name for group in compare((rows, rows)).by_subject] == [
            "geography",
            "science",
            "boolq",
            "zoology",
        ]

    def test_popularity_bins_begin_with_the_most_popular(self) -> None:
        rows = [make_answer(number, True, popularity=float(number)) for number in range(60)]
        bins = compare((rows, rows)).by_popularity
        assert [(group.name, group.counts.n) for group in bins] == [
            ("top 33 %", 20),
            ("33 to 67 %", 20),
            ("bottom 33 %", 20),
        ]
        assert compare(make_rows(both=60)).by_popularity == ()


class TestChangedFacts:
    def test_lost_facts_are_sorted_by_subject_relation_and_largest_fall(self) -> None:
        falls = [("science", "r", -1.0), ("geography", "b", -1.0), ("geography", "a", -1.0), ("geography", "a", -9.0)]
        before = [make_answer(n, True, subject=s, relation=r, logp_gold=0.0) for n, (s, r, _) in enumerate(falls)]
        after = [make_answer(n, False, subject=s, relation=r, logp_gold=fall) for n, (s, r, fall) in enumerate(falls)]
        lost, gained = list_changed_facts(zip(before, after, strict=True))
        assert [fact.fact_id for fact in lost] == ["fact-0003", "fact-0002", "fact-0001", "fact-0000"]
        assert gained == ()

    def test_changed_facts_have_both_answers(self) -> None:
        before, after = make_rows(gained=1)
        _, (fact,) = list_changed_facts(zip(before, after, strict=True))
        assert (fact.before, fact.after, fact.gold) == ("Rome", "Paris", "Paris")
        assert (fact.rank_before, fact.rank_after) == (2, 1)

    @pytest.mark.parametrize(("text", "recovers"), [("Paris", True), ("Oslo", False), (None, None)])
    def test_a_lost_fact_has_both_grades_and_whether_an_example_recovers_it(
        self, text: str | None, recovers: bool | None
    ) -> None:
        (before,), (after,) = make_rows(lost=1)
        pair = replace(before, grade=PRODUCED), replace(after, grade=DEMOTED, with_example=text)
        (fact,), _ = list_changed_facts([pair])
        assert (fact.grade_before, fact.grade_after) == (PRODUCED, DEMOTED)
        assert fact.with_example is recovers

    def test_gained_facts_are_sorted_by_largest_rise_with_unknown_changes_last(self) -> None:
        before, after = make_rows(gained=3, relation="r")
        before[0] = replace(before[0], logp_gold=None)
        before[2] = replace(before[2], logp_gold=-7.0)
        _, gained = list_changed_facts(zip(before, after, strict=True))
        assert [fact.fact_id for fact in gained] == ["fact-0002", "fact-0001", "fact-0000"]


class TestIncomparable:
    def test_refuses_other_protocols(self) -> None:
        rows = make_rows(both=1)
        with pytest.raises(
            CompressknowError, match=r"evaluated on atlas in the same way.*\n.*protocol closed/1 and paper/1"
        ):
            compare_rows(*rows, make_entry(), make_entry(protocol="paper/1", fingerprint="e" * 64))

    def test_refuses_other_prompts(self) -> None:
        rows = make_rows(both=1)
        with pytest.raises(CompressknowError, match=r"--limit None and 50"):
            compare_rows(*rows, make_entry(), make_entry(fingerprint="e" * 64, limit=50))
        with pytest.raises(CompressknowError, match=r"prompts or candidates themselves"):
            compare_rows(*rows, make_entry(), make_entry(fingerprint="e" * 64))

    def test_refuses_other_facts(self) -> None:
        before, after = make_rows(both=3)
        with pytest.raises(
            CompressknowError, match=r"2 only the original, 0 only the compressed model \(such as 'fact-0001'"
        ):
            compare((before, after[:1]))
