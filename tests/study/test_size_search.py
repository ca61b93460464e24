"""The search algorithm, on files given by a formula, without a model or a probe."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from compressknow.comparison.records import Estimate
from compressknow.pages.search import Trial
from compressknow.study.allocation import Allocation
from compressknow.study.search import APART, CONFIRMED, HALVINGS, Candidate, SizeSearch

FLOOR, CEILING = 1_000_000, 3_000_000


def choose(budget: int) -> Allocation:
    """Return the file of a budget: its size is a multiple of 1,000 bytes, and its loss falls with the sixth power."""
    nbytes = budget // 1000 * 1000
    return Allocation({"weight": str(nbytes)}, nbytes, (FLOOR / nbytes) ** 6)


class Evaluator:
    """Evaluation in which files of at least `enough` bytes keep enough; it records the files."""

    def __init__(self, enough: float) -> None:
        self.enough = enough
        self.files: list[Allocation] = []

    def __call__(self, file: Allocation) -> Trial:
        self.files.append(file)
        # Only the lower end counts.
        value, low = (0.97, 0.95) if file.nbytes >= self.enough else (0.99, 0.85)
        return Trial("", file.types, file.nbytes, file.loss, Estimate(value, low - file.loss / 1000, 1.0))


def explore(enough: float) -> tuple[SizeSearch, list[Allocation]]:
    """Return a search that has explored, and the files that it evaluated."""
    evaluate = Evaluator(enough)
    search = SizeSearch(0.9, (FLOOR, CEILING), choose, evaluate)
    search.explore()
    return search, evaluate.files


@pytest.mark.parametrize("enough", [1_050_000, 1_400_000, 1_800_000, 2_600_000])
def test_a_few_files_find_the_smallest_that_keeps_enough(enough: int) -> None:
    search, files = explore(enough)
    assert len(files) <= HALVINGS + 1
    smallest = min(file.nbytes for file in files if file.nbytes >= enough)
    assert enough <= smallest <= 1.03 * enough
    assert len({file.nbytes for file in files}) == len(files) == len(search.tried)


def test_ends_are_tried_if_all_or_no_files_keep_enough() -> None:
    assert explore(0)[1][-1] == choose(FLOOR)
    assert explore(2 * CEILING)[1][-1] == choose(CEILING)


def confirm_with(search: SizeSearch, low: float, last: float) -> list[Allocation]:
    """Confirm files of which the last that may be confirmed keeps `last`, and the others `low`; return them."""
    files: list[Allocation] = []

    def confirm(file: Allocation) -> Estimate:
        files.append(file)
        kept = last if len(files) == CONFIRMED else low
        return Estimate(kept, kept, 1.0)

    search.confirm(confirm)
    return files


@pytest.mark.parametrize("enough", [1_050_000, 1_800_000])
def test_smallest_file_is_confirmed_first_and_then_those_that_lose_less(enough: int) -> None:
    search, files = explore(enough)
    smallest = min(file.nbytes for file in files if file.nbytes >= enough)
    confirmed = confirm_with(search, 0.8, 0.95)
    assert confirmed[0].nbytes == smallest
    assert len(confirmed) == CONFIRMED
    for step, (small, large) in enumerate(pairwise(confirmed), 1):
        # A tried file is confirmed if it loses little less than needed; otherwise a new one is made.
        assert APART ** (step + 1) * small.loss <= large.loss <= APART**step * small.loss
    assert all(file in [each.allocation for each in search.tried] for file in confirmed)
    assert search.winner is search.confirmed[-1]
    assert search.winner.allocation == confirmed[-1]


def test_smallest_tried_file_that_loses_enough_less_is_confirmed_next() -> None:
    search, files = explore(1_800_000)
    first = min(file.nbytes for file in files if file.nbytes >= 1_800_000)
    # The smallest size at which files lose enough less.
    size = next(n for n in range(first, CEILING, 1000) if choose(n).loss <= APART * choose(first).loss)
    close = [choose(round(share * size)) for share in (1.025, 1.01, 1.02, 0.99)]
    search.tried += [Candidate(file, Evaluator(1_800_000)(file)) for file in close]
    assert confirm_with(search, 0.8, 0.95)[1] == close[1]


def test_largest_file_is_confirmed_last() -> None:
    search, _ = explore(2_900_000)
    confirmed = confirm_with(search, 0.8, 0.8)
    assert confirmed[-1] == choose(CEILING)
    assert len(confirmed) <= CONFIRMED
    assert search.winner is None


def test_file_that_keeps_most_is_confirmed_if_none_keeps_enough() -> None:
    search, _ = explore(2 * CEILING)
    most = search.tried[1]
    search.tried[1] = replace(most, trial=replace(most.trial, kept=Estimate(0.88, 0.87, 1.0)))
    search.confirm(lambda _: Estimate(0.9, 0.8, 1.0))
    assert search.confirmed[0].allocation == most.allocation
    assert search.winner is None


def test_a_file_must_keep_all_search_facts_if_these_are_too_few_for_the_share() -> None:
    """Otherwise none would keep enough, and the largest would be taken."""
    evaluate = Evaluator(1_400_000)
    search = SizeSearch(0.9, (FLOOR, CEILING), choose, lambda file: keep_all(evaluate(file)), provable=0.8)
    search.explore()
    confirmed = confirm_with(search, 0.95, 0.95)
    assert [1_400_000 <= file.nbytes <= 1.03 * 1_400_000 for file in confirmed] == [True]


def keep_all(trial: Trial) -> Trial:
    """Return a trial on facts of which a file keeps all, 80 % for certain, or not all."""
    keeps_all = (trial.kept.low or 0.0) > 0.9
    return replace(trial, kept=Estimate(1.0, 0.8, 1.0) if keeps_all else Estimate(0.97, 0.7, 1.0))


def test_sizes_are_bisected_where_predictions_jump() -> None:
    """The largest file loses a thousandth of the next smaller one: no file loses about their mean."""

    def choose_or_jump(budget: int) -> Allocation:
        file = choose(budget)
        return file if budget < CEILING else replace(file, loss=file.loss / 1000)

    evaluate = Evaluator(2_000_000)
    search = SizeSearch(0.9, (FLOOR, CEILING), choose_or_jump, evaluate)
    search.explore()
    smallest = min(file.nbytes for file in evaluate.files if file.nbytes >= 2_000_000)
    assert smallest <= 1.04 * 2_000_000
    assert len(evaluate.files) <= HALVINGS + 1


def test_equal_files_are_evaluated_once() -> None:
    evaluate = Evaluator(0)
    search = SizeSearch(0.9, (FLOOR, FLOOR), lambda _: choose(FLOOR), evaluate)
    search.explore()
    assert len(evaluate.files) == len(search.tried) == 1
