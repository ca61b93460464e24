"""The search itself, on files that a formula gives: no model, no disk, no probe."""

from __future__ import annotations

from itertools import pairwise

import pytest

from compressknow.comparison.records import Estimate
from compressknow.pages.search import Trial
from compressknow.study.allocation import Allocation
from compressknow.study.search import APART, CONFIRMED, HALVINGS, SizeSearch, select_promising

FLOOR, CEILING = 1_000_000, 3_000_000


def choose(budget: int) -> Allocation:
    """Eight times the bytes lose a thousandth; types change every 1,000 bytes."""
    nbytes = budget // 1000 * 1000
    return Allocation({"weight": str(nbytes)}, nbytes, (FLOOR / nbytes) ** 6)


class Evaluated:
    """What makes trials of files of at least so many bytes that keep enough, and which it was given."""

    def __init__(self, enough: float) -> None:
        self.enough = enough
        self.given: list[Allocation] = []

    def __call__(self, found: Allocation) -> Trial:
        self.given.append(found)
        low = 0.95 if found.nbytes >= self.enough else 0.85
        return Trial("", found.types, found.nbytes, found.loss, Estimate(low + 0.02, low, 1.0))


def explored(enough: float) -> tuple[SizeSearch, Evaluated]:
    evaluated = Evaluated(enough)
    search = SizeSearch(0.9, choose, evaluated)
    search.explore(FLOOR, CEILING)
    return search, evaluated


@pytest.mark.parametrize("enough", [1_050_000, 1_400_000, 1_800_000, 2_600_000])
def test_a_few_files_find_the_smallest_that_keeps_enough(enough: int) -> None:
    search, evaluated = explored(enough)
    assert len(evaluated.given) <= HALVINGS + 1
    smallest = min(each.nbytes for each in evaluated.given if each.nbytes >= enough)
    assert enough <= smallest <= 1.03 * enough
    assert len({each.nbytes for each in evaluated.given}) == len(evaluated.given) == len(search.tried)


def test_the_ends_are_tried_where_all_or_none_keeps_enough() -> None:
    assert explored(0)[1].given[-1] == choose(FLOOR)
    search, evaluated = explored(2 * CEILING)
    assert evaluated.given[-1] == choose(CEILING)
    assert [each.found for each in select_promising(search.tried, 0.9)] != []


def test_the_smallest_is_put_to_the_held_out_facts_first_and_others_far_from_it_then() -> None:
    search, _ = explored(1_050_000)
    put: list[Allocation] = []

    def confirm(found: Allocation) -> Estimate:
        put.append(found)
        low = 0.95 if len(put) == CONFIRMED else 0.8
        return Estimate(low, low, 1.0)

    search.confirm(confirm)
    enough = sorted(each.found.nbytes for each in search.tried if each.trial.kept.low >= 0.9)
    assert put[0].nbytes == enough[0]
    assert len(put) == CONFIRMED < len(enough)
    assert all(after.loss <= APART * before.loss for before, after in pairwise(put))
    assert search.winner is search.confirmed[-1]
    assert search.winner.found == put[-1]


def test_where_nothing_keeps_enough_the_one_that_keeps_most_is_told() -> None:
    search, _ = explored(2 * CEILING)
    search.confirm(lambda _: Estimate(0.9, 0.8, 1.0))
    (closest,) = search.confirmed
    assert closest.trial.kept.low == max(each.trial.kept.low for each in search.tried)
    assert search.winner is None


def test_files_of_one_choice_are_evaluated_once() -> None:
    evaluated = Evaluated(0)
    search = SizeSearch(0.9, lambda _: choose(FLOOR), evaluated)
    search.explore(FLOOR, FLOOR)
    assert len(evaluated.given) == len(search.tried) == 1
