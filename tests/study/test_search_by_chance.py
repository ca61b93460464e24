"""Searches of files that keep exactly what is asked for: their answers are drawn by relation, the rest is real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest

from compressknow.comparison.intervals import share_by_cluster
from compressknow.comparison.records import Estimate
from compressknow.evaluate.facts import BLANK, Fact, Probe
from compressknow.pages.search import Trial
from compressknow.study.allocation import Allocation
from compressknow.study.search import APART, CONFIRMED, LEVEL, SEARCHED, Candidate, SizeSearch, split_facts
from tests.comparison.test_clusters import draw_chances


class Split(NamedTuple):
    """Facts of each relation in each third, [relations]."""

    searched: np.ndarray
    selection: np.ndarray
    grading: np.ndarray


def count_facts_by_part(relations: int, facts: int, seed: int) -> Split:
    made = (
        Fact(f"{relation}-{fact}", "drawn", f"relation {relation:02}", "language", "X", "Y", f"X is {BLANK}.")
        for relation in range(relations)
        for fact in range(facts)
    )
    parts = split_facts(Probe("drawn", "drawn", tuple(made)), seed)
    return Split(*(_by_relation(each.facts, relations) for each in parts))


def _by_relation(facts: Sequence[Fact], relations: int) -> np.ndarray:
    return np.bincount([int(fact.relation.split()[-1]) for fact in facts], minlength=relations)


class Searched(SizeSearch):
    """A search that has tried files of which each relation's facts are kept by a chance of the relation.

    Parameters
    ----------
    chances : of each file and relation, [files, relations].
    found : the search's own facts say that each keeps enough; else they are drawn too.
    """

    def __init__(
        self, drawn: np.random.Generator, parts: Split, chances: np.ndarray, keep: float, *, found: bool
    ) -> None:
        super().__init__(
            keep,
            (STEP, STEP * len(chances)),
            lambda nbytes: _file(nbytes // STEP - 1),
            lambda _: _trial(Estimate(None)),
        )
        self._drawn, self._parts, self._chances = drawn, parts, chances
        for place, each in enumerate(chances):
            kept = Estimate(1.0, 1.0, 1.0) if found else self.kept_of(parts.searched, each, LEVEL)
            self.tried.append(Candidate(_file(place), _trial(kept)))
        self.confirm(lambda file: self.kept_of(parts.selection, chances[file.nbytes // STEP - 1], LEVEL))

    def kept_of(self, facts: np.ndarray, chances: np.ndarray, level: float = 0.95) -> Estimate:
        both = self._drawn.binomial(facts, chances)
        return share_by_cluster(both.tolist(), facts.tolist(), level)

    def graded(self) -> Estimate | None:
        """Return what the winner keeps of the facts that grade; None without one."""
        if not self.winner:
            return None
        return self.kept_of(self._parts.grading, self._chances[self.winner.allocation.nbytes // STEP - 1])


# Bytes from one file to the next.
STEP = 1000


def _file(place: int) -> Allocation:
    """One of files that lose so much less than the one before that each may be put to the held-out facts."""
    return Allocation({"weight": str(place)}, STEP * (place + 1), (APART - 0.01) ** place)


def _trial(kept: Estimate) -> Trial:
    return Trial("", {}, 0, 0.0, kept)


def simulate_searches(
    number: int, parts: Split, icc: float, *, share: float, keep: float, files: int, found: bool = True
) -> Iterator[Searched]:
    """Make so many searches of files that keep this share of all facts that there could be."""
    drawn = np.random.default_rng(23)
    for _ in range(number):
        chances = np.stack([draw_chances(drawn, share, icc, len(parts.searched)) for _ in range(files)])
        yield Searched(drawn, parts, chances, keep, found=found)


SIMULATED = 400
PARTS = count_facts_by_part(63, 64, seed=0)


def test_thirds_have_whole_relations_if_there_are_enough() -> None:
    assert all(set(part.tolist()) == {0, 64} and part.sum() == 21 * 64 for part in PARTS[1:])
    assert (PARTS.searched > 0).sum() == 21
    assert PARTS.searched.sum() == SEARCHED
    assert all((part > 0).all() for part in count_facts_by_part(20, 20, seed=0))


@pytest.mark.parametrize(("share", "files"), [(0.95, 1), (0.9, 1), (0.9, CONFIRMED)])
@pytest.mark.parametrize("icc", [0.0, 0.1, 0.3])
def test_file_that_keeps_exactly_the_share_to_keep_is_rarely_selected(icc: float, share: float, files: int) -> None:
    made = simulate_searches(SIMULATED, PARTS, icc, share=share, keep=share, files=files)
    # Of several files that keep more, of relations that differ as much, it is more often (docs/statistics.md).
    assert sum(search.winner is not None for search in made) / SIMULATED <= 0.06


@pytest.mark.parametrize("icc", [0.0, 0.1, 0.3])
def test_reported_interval_covers_what_the_winner_keeps(icc: float) -> None:
    """Of eight files that keep more than is asked for, the one that was luckiest is told no better than it is."""
    made = simulate_searches(SIMULATED, PARTS, icc, share=0.9, keep=0.8, files=8, found=False)
    graded = [kept for search in made if (kept := search.graded())]
    assert len(graded) > SIMULATED / 4
    assert sum(kept.low <= 0.9 <= kept.high for kept in graded) / len(graded) >= 0.9
