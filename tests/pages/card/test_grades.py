"""Grades by domain over all probes, with their uncertainty."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressknow.comparison.records import Counts
from compressknow.pages.card.make import compare
from compressknow.pages.card.verdict import find_grade, grade_domains
from tests.pages.answering import compare_rows, make_answer, make_answers, make_entry, make_rows

PROBES = ("atlas", "lm-eval:piqa")


@pytest.mark.parametrize(
    ("kept", "known", "grade"),
    [
        (100, 100, "A+"),
        (99, 100, "A+"),
        (98_999, 100_000, "A"),
        (97, 100, "A"),
        (969, 1000, "B"),
        (93, 100, "B"),
        (929, 1000, "C"),
        (85, 100, "C"),
        (849, 1000, "D"),
        (70, 100, "D"),
        (699, 1000, "F"),
        (0, 5, "F"),
        (0, 0, "-"),
    ],
)
def test_thresholds_are_exact(kept: int, known: int, grade: str) -> None:
    assert find_grade(kept, known) == grade


def test_domain_is_graded_over_all_probes() -> None:
    probes = [compare_rows(*make_rows(both=8, lost=2)) for _ in range(2)]
    (grade,) = grade_domains(probes)
    assert (grade.subject, grade.counts, grade.grade) == ("geography", Counts(16, 4), "D")
    # The only relation of a domain is one cluster if the probe has others.
    rows = [make_answer(n, True, subject=f"domain {n // 4}", relation=f"r{n // 4}") for n in range(8)]
    assert [grade.clusters for grade in grade_domains([compare_rows(rows, rows)])] == [(Counts(4),)] * 2


def test_task_of_one_relation_weighs_in_its_domain_as_in_all_facts() -> None:
    """The items of a task must not weigh as a single relation next to the relations of a data set."""
    atlas = [make_rows(both=18, lost=2, relation=f"r{number}", probe="atlas") for number in range(12)]
    task = make_rows(both=900, lost=100, relation="piqa", probe="lm-eval:piqa")
    before, after = (
        make_answers(
            [replace(row, fact_id=f"{n}") for n, row in enumerate(rows)], probes={p: make_entry() for p in PROBES}
        )
        for rows in ([row for each in (*atlas, task) for row in each[side]] for side in (0, 1))
    )
    compared = compare(before, after, show_facts=False)
    (grade,) = compared.grades
    assert grade.kept == compared.kept


def test_domains_come_in_the_order_of_the_report_card_and_tasks_last() -> None:
    rows = [make_answer(n, True, subject=s) for n, s in enumerate(["boolq", "common sense", "geography"])]
    graded = grade_domains([compare_rows(rows, rows)])
    assert [grade.subject for grade in graded] == ["geography", "common sense", "boolq"]


def test_few_facts_give_a_range_of_grades() -> None:
    (grade,) = grade_domains([compare_rows(*make_rows(both=19, lost=1))])
    assert (grade.grade, grade.range) == ("B", "A+ to D")


def test_many_facts_give_a_single_grade() -> None:
    (grade,) = grade_domains([compare_rows(*make_rows(both=1000))])
    assert (grade.grade, grade.range) == ("A+", None)


def test_domain_without_known_facts_is_not_graded() -> None:
    (grade,) = grade_domains([compare_rows(*make_rows(neither=5))])
    assert (grade.grade, grade.range) == ("-", None)


@given(st.integers(0, 60), st.integers(0, 60))
def test_grade_lies_within_its_range(both: int, lost: int) -> None:
    order = ["A+", "A", "B", "C", "D", "F"]
    for grade in grade_domains([compare_rows(*make_rows(both, lost))]):
        best, worst = (grade.range or f"{grade.grade} to {grade.grade}").split(" to ")
        assert order.index(best) <= order.index(grade.grade) <= order.index(worst)


def test_share_is_not_rounded_to_another_grade() -> None:
    (grade,) = grade_domains([compare_rows(*make_rows(9296, 704))])
    assert (grade.grade, grade.written) == ("C", "92.96 % (92.4 to 93.4 %)")
    (grade,) = grade_domains([compare_rows(*make_rows(93, 7))])
    assert (grade.grade, grade.written) == ("B", "93.0 % (86.3 to 96.6 %)")
