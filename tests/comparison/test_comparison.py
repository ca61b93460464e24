"""One probe's figures from two models' answers, and the pairs that are refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressknow.base.errors import CompressknowError
from compressknow.comparison.paired import compare_probe, list_changed_facts
from compressknow.comparison.records import Counts, Estimate, ProbeFigures
from compressknow.evaluate.grades import DEMOTED, PRODUCED
from tests.pages.answering import make_answer, make_entry, make_rows


def compared(rows: Any, **changes: Any) -> ProbeFigures:
    return compare_probe(*rows, make_entry(**changes), make_entry(**changes), probe="atlas", ran_in="")


class TestCounts:
    def test_each_fact_is_of_one_kind(self) -> None:
        figures = compared(make_rows(both=8, lost=2, gained=1, neither=9))
        assert figures.counts == Counts(8, 2, 1, 9)
        assert figures.kept.value == 0.8
        assert figures.accuracy_original.value == 0.5
        assert figures.accuracy_compressed.value == 0.45
        assert figures.difference.value == pytest.approx(-0.05)
        assert figures.certainty.test.p == 1.0  # 2 against 1

    def test_paired_by_fact_not_by_place(self) -> None:
        before, after = make_rows(both=3, lost=2, gained=1, neither=4)
        assert compared((before, after[::-1])).counts == Counts(3, 2, 1, 4)

    def test_no_facts_give_no_figures_and_no_error(self) -> None:
        figures = compare_probe([], [], make_entry(), make_entry(), probe="atlas", ran_in="")
        assert figures.counts == Counts()
        assert figures.kept == figures.difference == figures.macro_difference == Estimate(None)
        assert figures.certainty.test.p is figures.answer_changed is None
        assert figures.movement is figures.mrr is figures.confidence is None

    @settings(max_examples=30, deadline=None)
    @given(st.tuples(*[st.integers(0, 30)] * 4), st.randoms(use_true_random=False))
    def test_any_order_gives_the_same_figures_and_groups_add_up(
        self, cells: tuple[int, ...], shuffler: random.Random
    ) -> None:
        rows = make_rows(*cells)
        rows = tuple([replace(row, popularity=float(number)) for number, row in enumerate(side)] for side in rows)
        figures = compare_probe(*rows, make_entry(), make_entry(), probe="atlas", ran_in="")
        for side in rows:
            shuffler.shuffle(side)
        assert compare_probe(*rows, make_entry(), make_entry(), probe="atlas", ran_in="") == figures
        for groups in (figures.by_relation, figures.by_subject, figures.by_popularity):
            assert sum((group.counts for group in groups), Counts()) == (figures.counts if groups else Counts())


class TestAnswers:
    def test_wrong_to_other_wrong_is_a_changed_answer(self) -> None:
        before, after = make_rows(both=1, neither=3)
        after[1] = replace(after[1], predicted="Bern")
        assert compared((before, after)).answer_changed == 0.25

    def test_ranks_before_and_after(self) -> None:
        before, after = make_rows(both=1, lost=2, neither=1)
        after[2] = replace(after[2], rank=6)
        figures = compared((before, after))
        assert figures.mrr == pytest.approx(((1 + 1 + 1 + 0.5) / 4, (1 + 0.5 + 1 / 6 + 0.5) / 4))
        assert figures.p_at_5 == (1.0, 0.75)
        assert figures.lost_still_in_top5 == 1

    def test_five_choices_are_all_in_the_top_five(self) -> None:
        figures = compared(make_rows(both=2, lost=2, choices=2))
        assert figures.p_at_5 is figures.lost_still_in_top5 is None
        assert figures.mrr == (1.0, 0.75)

    def test_change_of_the_golds_log_probability(self) -> None:
        figures = compared(make_rows(both=1, lost=1))
        assert figures.logp_change["p50"] == pytest.approx(-0.5)
        assert compared(make_rows(both=1, logp_gold=None)).logp_change is None

    def test_confidence_is_that_in_the_given_answer(self) -> None:
        figures = compared(make_rows(both=20))
        sure = math.exp(-0.5)
        assert figures.confidence.ece == pytest.approx((1 - sure, 1 - sure))
        assert figures.confidence.brier == pytest.approx(((1 - sure) ** 2,) * 2)

    @pytest.mark.parametrize("choices", [2, 153])
    def test_confidence_is_the_share_among_all_choices_however_unlikely_their_texts_are(self, choices: int) -> None:
        logp = (-40.0, -40.0 + math.log(1 / 6))
        figures = compared(make_rows(both=20, choices=choices, top5_logp=logp, total_logp=-40.0 + math.log(4 / 3)))
        assert figures.confidence.ece == pytest.approx((0.25, 0.25))
        assert figures.confidence.brier == pytest.approx((0.0625, 0.0625))

    def test_answers_of_older_versions_tell_it_of_five_choices_at_most(self) -> None:
        logp = (-40.0, -40.0 + math.log(1 / 3))
        figures = compared(make_rows(both=20, choices=2, top5=("yes", "no"), top5_logp=logp, total_logp=None))
        assert figures.confidence.ece == pytest.approx((0.25, 0.25))
        older = compared(make_rows(both=20, total_logp=None))
        assert older.confidence is None

    def test_a_model_that_broke_gives_no_figure_that_is_not_a_number(self) -> None:
        before, after = make_rows(both=25)
        after[:2] = [replace(row, logp_gold=math.nan, top5_logp=(math.nan,) * 5) for row in after[:2]]
        figures = compared((before, after))
        sure = figures.confidence
        assert all(map(math.isfinite, (*sure.ece, *sure.brier, *figures.logp_change.values())))

    def test_free_answers_have_no_confidence(self) -> None:
        assert compared(make_rows(both=20, choices=None)).confidence is None
        assert compared(make_rows(both=20, top5_logp=())).confidence is None


class TestChance:
    def test_kept_above_chance_uses_the_known_facts_choices(self) -> None:
        before, after = make_rows(both=3, lost=1, neither=4)
        for side in (before, after):
            side[:4] = [replace(row, choices=2) for row in side[:4]]
        figures = compared((before, after))
        assert figures.kept_above_chance.value == pytest.approx((0.75 - 0.5) / 0.5)
        assert figures.by_subject[0].chance == pytest.approx((4 * 0.5 + 4 * 0.125) / 8)

    def test_any_text_has_no_chance(self) -> None:
        figures = compared(make_rows(both=3, lost=1, choices=None))
        assert figures.kept_above_chance == Estimate(None)
        assert figures.by_relation[0].chance is None

    def test_baselines_are_those_of_the_probe(self) -> None:
        figures = compared(make_rows(both=1), chance=0.5, majority=0.621)
        assert (figures.chance, figures.majority) == (0.5, 0.621)


class TestDrop:
    def test_micro_by_hand(self) -> None:
        figures = compared(make_rows(both=6, lost=2, neither=2))
        assert (figures.drop_absolute, figures.drop_relative) == (0.2, 0.25)

    def test_macro_where_the_probe_is_averaged_so(self) -> None:
        before, after = make_rows(both=1, lost=1, neither=2)
        for side in (before, after):
            side[:] = [replace(row, relation="big" if number else "small") for number, row in enumerate(side)]
        # small: 1 of 1 before and after; big: 1 of 3 before, 0 after.
        figures = compared((before, after), average="macro")
        assert figures.macro_original.value == pytest.approx(2 / 3)
        assert (figures.drop_absolute, figures.drop_relative) == pytest.approx((1 / 6, 0.25))

    def test_means_that_even_out_have_not_dropped(self) -> None:
        joined = [], []
        for relation, kinds in (("a", (3, 1, 2, 0)), ("b", (0, 3, 2, 1)), ("c", (1, 3, 3, 3))):
            own = make_rows(**dict(zip(("both", "lost", "gained", "neither"), kinds, strict=True)))
            for rows, more in zip(joined, own, strict=True):
                rows += [replace(row, relation=relation, fact_id=relation + row.fact_id) for row in more]
        figures = compared(joined, average="macro")
        assert figures.macro_original.value != figures.macro_compressed.value  # By the last bit.
        assert (figures.drop_absolute, figures.drop_relative) == (0, 0)

    def test_nothing_known_has_no_relative_drop(self) -> None:
        assert compared(make_rows(neither=3)).drop_relative is None


class TestMovement:
    def test_same_distributions_have_not_moved(self) -> None:
        movement = compared(make_rows(both=5)).movement
        assert (movement.n, movement.kl_mean, movement.kl_max) == (5, 0, 0)

    def test_by_hand(self) -> None:
        before, after = make_rows(both=2)
        after[1] = replace(after[1], first_logp=np.log([0.25, 0.25]).astype(np.float32))
        movement = compared((before, after)).movement
        assert movement.kl_max == pytest.approx(0.25 * math.log(2), rel=1e-6)
        assert movement.kl_mean == movement.kl_median == pytest.approx(movement.kl_max / 2)
        assert movement.rest == pytest.approx((0.25, (0.25 + 0.5) / 2))

    @pytest.mark.parametrize(("tokens", "partly"), [(20, True), (21, False), (255, False), (256, True)])
    def test_as_many_tokens_as_are_asked_for_leave_a_rest_and_a_smaller_vocabulary_leaves_none(
        self, tokens: int, partly: bool
    ) -> None:
        """A server tells 20 tokens, other runtimes 256; what has fewer is a whole vocabulary but one."""
        rows = make_rows(both=1, first_ids=tuple(range(tokens)), first_logp=(math.log(0.5 / tokens),) * tokens)
        assert compared(rows).movement.rest == (pytest.approx((0.5, 0.5)) if partly else None)
        few = make_rows(both=2)
        both = tuple([*side, *replaced] for side, replaced in zip(rows, ([s[1]] for s in few), strict=True))
        assert compared(both).movement.is_lower_bound is partly

    def test_not_where_other_tokens_were_asked_for(self) -> None:
        rows = make_rows(both=2)
        assert (
            compare_probe(*rows, make_entry(), make_entry(reference="b" * 64), probe="atlas", ran_in="").movement
            is None
        )
        before, after = rows
        after[0] = replace(after[0], first_ids=(5, 8))
        assert compared((before, after)).movement.n == 1

    def test_not_where_there_is_no_distribution(self) -> None:
        assert compared(make_rows(both=2, first_ids=(), first_logp=()), reference=None).movement is None

    def test_broken_distributions_are_left_out_of_the_number(self) -> None:
        before, after = make_rows(both=2)
        after[0] = replace(after[0], first_logp=(math.nan, math.nan))
        assert compared((before, after)).movement.n == 1


class TestGroups:
    def test_relations_by_name_with_p_values_adjusted_for_their_number(self) -> None:
        before, after = (
            [replace(a, relation=f"relation-{n % 2}") for n, a in enumerate(side)] for side in make_rows(4, 16)
        )
        figures = compared((before, after))
        assert [group.name for group in figures.by_relation] == ["relation-0", "relation-1"]
        assert [group.p for group in figures.by_relation] == pytest.approx([2 / 2**8] * 2)
        assert [group.p_holm for group in figures.by_relation] == pytest.approx([4 / 2**8] * 2)

    def test_subjects_in_the_order_of_the_report_card(self) -> None:
        rows = [make_answer(n, True, subject=s) for n, s in enumerate(["zoology", "science", "geography", "boolq"])]
        assert [group.name for group in compared((rows, rows)).by_subject] == [
            "geography",
            "science",
            "boolq",
            "zoology",
        ]

    def test_popularity_from_head_to_tail(self) -> None:
        rows = [make_answer(number, True, popularity=float(number)) for number in range(60)]
        bins = compared((rows, rows)).by_popularity
        assert [(group.name, group.counts.n) for group in bins] == [
            ("top 33 %", 20),
            ("33 to 67 %", 20),
            ("bottom 33 %", 20),
        ]
        assert compared(make_rows(both=60)).by_popularity == ()


class TestChangedFacts:
    def test_by_subject_and_relation_then_the_farthest_fall_first(self) -> None:
        falls = [("science", "r", -1.0), ("geography", "b", -1.0), ("geography", "a", -1.0), ("geography", "a", -9.0)]
        before = [make_answer(n, True, subject=s, relation=r, logp_gold=0.0) for n, (s, r, _) in enumerate(falls)]
        after = [make_answer(n, False, subject=s, relation=r, logp_gold=fall) for n, (s, r, fall) in enumerate(falls)]
        lost, gained = list_changed_facts(zip(before, after, strict=True))
        assert [fact.fact_id for fact in lost] == ["fact-0003", "fact-0002", "fact-0001", "fact-0000"]
        assert gained == ()

    def test_says_what_both_models_answered(self) -> None:
        before, after = make_rows(gained=1)
        _, (fact,) = list_changed_facts(zip(before, after, strict=True))
        assert (fact.before, fact.after, fact.gold) == ("Rome", "Paris", "Paris")
        assert (fact.rank_before, fact.rank_after) == (2, 1)

    @pytest.mark.parametrize(("text", "comes_back"), [("Paris", True), ("Oslo", False), (None, None)])
    def test_a_lost_fact_has_both_grades_and_tells_whether_an_example_brings_it_back(
        self, text: str | None, comes_back: bool | None
    ) -> None:
        (before,), (after,) = make_rows(lost=1)
        pair = replace(before, grade=PRODUCED), replace(after, grade=DEMOTED, with_example=text)
        (fact,), _ = list_changed_facts([pair])
        assert (fact.grade_before, fact.grade_after) == (PRODUCED, DEMOTED)
        assert fact.with_example is comes_back

    def test_the_farthest_rise_first_and_unknown_changes_last(self) -> None:
        before, after = make_rows(gained=3, relation="r")
        before[0] = replace(before[0], logp_gold=None)
        before[2] = replace(before[2], logp_gold=-7.0)
        _, gained = list_changed_facts(zip(before, after, strict=True))
        assert [fact.fact_id for fact in gained] == ["fact-0002", "fact-0001", "fact-0000"]


class TestRefused:
    def test_other_protocols(self) -> None:
        rows = make_rows(both=1)
        with pytest.raises(
            CompressknowError, match=r"evaluated on atlas in the same way.*\n.*protocol closed/1 and paper/1"
        ):
            compare_probe(
                *rows, make_entry(), make_entry(protocol="paper/1", fingerprint="e" * 64), probe="atlas", ran_in=""
            )

    def test_other_questions(self) -> None:
        rows = make_rows(both=1)
        with pytest.raises(CompressknowError, match=r"--limit None and 50"):
            compare_probe(*rows, make_entry(), make_entry(fingerprint="e" * 64, limit=50), probe="atlas", ran_in="")
        with pytest.raises(CompressknowError, match=r"prompts or candidates themselves"):
            compare_probe(*rows, make_entry(), make_entry(fingerprint="e" * 64), probe="atlas", ran_in="")

    def test_other_facts(self) -> None:
        before, after = make_rows(both=3)
        with pytest.raises(
            CompressknowError, match=r"2 only the original, 0 only the compressed model \(such as 'fact-0001'"
        ):
            compare_probe(before, after[:1], make_entry(), make_entry(), probe="atlas", ran_in="")
