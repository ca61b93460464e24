"""What a recipe must show: on the facts of the search that it may be the winner, on the held-out facts that it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressknow.errors import UsageError
from compressknow.probe.answers import Answers
from compressknow.report.card.make import compare
from compressknow.report.search.records import SIZES, Trial
from compressknow.stats.intervals import proportion
from compressknow.stats.records import Estimate

# How many recipes may be tried on the held-out facts: each makes the interval that they are judged by wider.
CONFIRMED = 5
# A recipe is evaluated no further where the first facts say at this level that it keeps less than is asked for.
SURE = 0.99


@dataclass(frozen=True)
class Criterion:
    """What is asked for: the share of knowledge to keep, and what is to be small."""

    keep: float
    minimize: str = "bytes"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(
                f"The share of knowledge to keep must lie between 0 and 1: {self.keep:g}.",
                hint="Write 95 % as 0.95 or 95%.",
            )
        if self.minimize not in SIZES:
            raise UsageError(f"Unknown size {self.minimize!r}.", hint=f"There is {', '.join(SIZES)}.")


def meets(kept: Estimate | None, keep: float) -> bool:
    return kept is not None and kept.low is not None and kept.low >= keep


def kept_of(original: Answers, answers: Answers, level: float) -> Estimate:
    """The share of the original's knowledge that these answers keep, with its interval of that level."""
    counts = compare(original, answers, show_facts=False).counts
    return proportion(counts.both, counts.known_before, level)


def may_meet(original: Answers, answers: Answers, keep: float) -> bool:
    """Whether the first facts leave it open that as much is kept."""
    high = kept_of(original, answers, SURE).high
    return high is None or high >= keep


def cheapness(trial: Trial, criterion: Criterion) -> tuple[int, float, float]:
    """What to sort by, the best first: the size; of one size what is kept, and then how far the answers moved."""
    return trial.sizes[criterion.minimize], -(trial.kept.low or 0.0), trial.harm or 0.0


def promising(trials: Sequence[Trial], criterion: Criterion) -> list[Trial]:
    """Those to confirm on held-out facts, the cheapest first: they keep enough of the facts of the search. Where none
    does, the one that keeps most, to be told.
    """
    candidates = sorted((t for t in trials if t.kept.value is not None), key=lambda t: cheapness(t, criterion))
    enough = [t for t in candidates if meets(t.kept, criterion.keep)][:CONFIRMED]
    return enough or sorted(candidates, key=lambda t: -(t.kept.low or 0.0))[:1]


def level(candidates: Sequence[Trial]) -> float:
    """Of the intervals of the held-out facts, where so many may be tried on them (Bonferroni)."""
    return 1 - 0.05 / max(1, len(candidates))
