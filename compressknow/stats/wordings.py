"""Facts that were put in several wordings: the figures of each wording, and how far they agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from compressknow.evaluate.answers import Answer
from compressknow.evaluate.wordings import by_fact
from compressknow.stats.intervals import proportion
from compressknow.stats.records import Counts, Wording, Wordings

# Of each wording, by whether the original and the compressed model are right.
Judged = tuple[bool, bool]


def wordings_of(original: Sequence[Answer], compressed: Sequence[Answer]) -> Wordings | None:
    """The figures of each wording of a probe, before they are put together; None where there is one."""
    after = {answer.fact_id: answer for answer in compressed}
    pairs = [(answer, after[answer.fact_id]) for answer in original if answer.fact_id in after]
    templates = sorted({answer.template for answer, _ in pairs if answer.template is not None})
    if len(templates) < 2:
        return None
    judged = {
        number: [(one.correct, other.correct) for one, other in pairs if one.template == number] for number in templates
    }
    sides = zip(*pairs, strict=True)
    one, other = (consistency(side) for side in sides)
    return Wordings(tuple(_wording(number, judged[number]) for number in templates), (one, other))


def consistency(answers: Iterable[Answer]) -> float | None:
    """Share of pairs of wordings of one fact that are answered alike, over the facts that were put in two or more
    (Elazar et al. 2021, "Measuring and Improving Consistency in Pretrained Language Models", section 3). None where
    there is none.
    """
    shares = []
    for wordings in by_fact(answers).values():
        alike = [one.predicted == other.predicted for one, other in combinations(wordings, 2)]
        if alike:
            shares.append(sum(alike) / len(alike))
    return math.fsum(shares) / len(shares) if shares else None


def _wording(number: int, judged: Sequence[Judged]) -> Wording:
    found: Mapping[Judged, int] = Counter(judged)
    both, lost, gained, neither = (found[cell] for cell in ((True, True), (True, False), (False, True), (False, False)))
    counts = Counts(both, lost, gained, neither)
    return Wording(number, counts, proportion(counts.both, counts.known_before))
