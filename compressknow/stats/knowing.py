"""What the original's grades of knowing became in the compressed model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from compressknow.evaluate.answers import GRADES, Answer
from compressknow.stats.records import Knowing


def knowing_of(pairs: Sequence[tuple[Answer, Answer]]) -> Knowing | None:
    """The grades of facts, paired; None where some answer has none (lm-eval's tasks, answers of older versions)."""
    if not pairs or any(answer.grade is None for pair in pairs for answer in pair):
        return None
    before, after = zip(*pairs, strict=True)
    moved = Counter((str(one.grade), str(other.grade)) for one, other in pairs)
    lost = [other for one, other in pairs if one.correct and not other.correct]
    shown = [answer for answer in lost if answer.with_example is not None]
    return Knowing(
        original=_counted(before),
        compressed=_counted(after),
        moved={(one, other): moved[one, other] for one in GRADES for other in GRADES},
        written=(_written(before), _written(after)),
        shown=len(shown),
        back=sum(answer.with_example == answer.gold for answer in shown),
    )


def _counted(answers: Iterable[Answer]) -> dict[str, int]:
    found = Counter(answer.grade for answer in answers)
    return {grade: found[grade] for grade in GRADES}


def _written(answers: Iterable[Answer]) -> bool:
    return any(answer.produced is not None for answer in answers)
