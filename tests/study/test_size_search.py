"""The search itself, on files that a formula gives: no model, no disk, no probe."""

from __future__ import annotations

from itertools import pairwise

import pytest

from compressknow.comparison.records import Estimate
from compressknow.pages.search import Trial
from compressknow.study.allocation import Allocation
from compressknow.study.search import APART, CONFIRMED, HALVINGS, Candidate, SizeSearch

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
    search = SizeSearch(0.9, (FLOOR, CEILING), choose, evaluated)
    search.explore()
    return search, evaluated


@pytest.mark.parametrize("enough", [1_050_000, 1_400_000, 1_800_000, 2_600_000])
def test_a_few_files_find_the_smallest_that_keeps_enough(enough: int) -> None:
    search, evaluated = explored(enough)
    assert len(evaluated.given) <= HALVINGS + 1
    smallest = min(each.nbytes for each in evaluated.given if each.nbytes >= enough)
    assert enough <= smallest <= 1.03 * enough
    assert len({each.nbytes for each in evaluated.given}) == len(evaluated.given) == len(search.tried)


def test_ends_are_tried_if_all_or_no_files_keep_enough() -> None:
    assert explored(0)[1].given[-1] == choose(FLOOR)
    assert explored(2 * CEILING)[1].given[-1] == choose(CEILING)


def confirm_with(search: SizeSearch, low: float, last: float) -> list[Allocation]:
    """Confirm where the last file that may be put to the held-out facts keeps `last`, and others `low`."""
    put: list[Allocation] = []

    def confirm(found: Allocation) -> Estimate:
        put.append(found)
        own = last if len(put) == CONFIRMED else low
        return Estimate(own, own, 1.0)

    search.confirm(confirm)
    return put


@pytest.mark.parametrize("enough", [1_050_000, 1_800_000])
def test_smallest_file_is_confirmed_first_and_then_those_that_lose_less(enough: int) -> None:
    search, evaluated = explored(enough)
    before = len(evaluated.given)
    put = confirm_with(search, 0.8, 0.95)
    assert put[0].nbytes == min(each.nbytes for each in evaluated.given[:before] if each.nbytes >= enough)
    assert len(put) == CONFIRMED
    for step, (small, large) in enumerate(pairwise(put), 1):
        # Never far beyond what it takes: one that was tried is put there where it is near, else one is made.
        assert APART ** (step + 1) * small.loss <= large.loss <= APART**step * small.loss
    assert all(found in [each.allocation for each in search.tried] for found in put)
    assert search.winner is search.confirmed[-1]
    assert search.winner.allocation == put[-1]


def test_smallest_tried_file_that_loses_enough_less_is_confirmed_next() -> None:
    search, evaluated = explored(1_800_000)
    first = min(each.nbytes for each in evaluated.given if each.nbytes >= 1_800_000)
    # From here on files lose half as much.
    least = next(n for n in range(first, CEILING, 1000) if choose(n).loss <= APART * choose(first).loss)
    near = [choose(round(share * least)) for share in (1.025, 1.01, 1.02)]
    search.tried += [Candidate(found, evaluated(found)) for found in near]
    assert confirm_with(search, 0.8, 0.95)[1] == near[1]


def test_largest_file_is_confirmed_last() -> None:
    search, _ = explored(2_900_000)
    put = confirm_with(search, 0.8, 0.8)
    assert put[-1] == choose(CEILING)
    assert len(put) <= CONFIRMED
    assert search.winner is None


def test_file_that_keeps_most_is_confirmed_if_none_keeps_enough() -> None:
    search, _ = explored(2 * CEILING)
    search.confirm(lambda _: Estimate(0.9, 0.8, 1.0))
    (closest,) = search.confirmed
    assert closest.trial.kept.low == max(each.trial.kept.low for each in search.tried)
    assert search.winner is None


def test_equal_files_are_evaluated_once() -> None:
    evaluated = Evaluated(0)
    search = SizeSearch(0.9, (FLOOR, FLOOR), lambda _: choose(FLOOR), evaluated)
    search.explore()
    assert len(evaluated.given) == len(search.tried) == 1
