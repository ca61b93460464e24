"""Grades of knowing: what of the facts is said, picked, near or gone, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.evaluate.answers import GRADES
from compressknow.evaluate.grades import PRODUCED
from compressknow.format import count, percent, plain
from compressknow.pages.card.section import Context, Section
from compressknow.pages.parts import Note, Part
from compressknow.pages.tables import Table
from compressknow.stats.records import Knowing, ProbeFigures


class Grades(Section):
    """A table a probe, the original's grades by the compressed model's."""

    title = "Grades of knowing"
    order = 25
    glossary = (
        ("Produced", "the right answer is the model's first choice, and what it writes by itself begins with it."),
        ("Recognized", "the right answer is the model's first choice, but not what it writes."),
        (
            "Demoted",
            "not its first choice, but among its best five, or what it writes, by itself or after one solved example.",
        ),
        ("Gone", "none of these."),
    )
    method = (
        "What a model produces is decoded greedily after the prompt, or at the mask among its whole vocabulary (an "
        "object of several tokens at as many masks, from left to right). Facts that the original knew and the "
        "compressed model does not are evaluated once more, after one solved example of the same relation with another "
        "answer. Among five candidates or fewer, being among the best five does not count.",
    )

    def parts(self, context: Context) -> Iterator[Part]:
        graded = [(probe, probe.knowing) for probe in context.comparison.probes if probe.knowing]
        # A page of many models has no room for it; the JSON has it all.
        if not graded or context.limits.relations is not None:
            return
        for probe, knowing in graded:
            yield table_of(knowing, f"{plain(probe.probe, 60)}: the original's grades (rows), and what they became")
            if told := " ".join(_told(knowing)):
                yield Note(told)
        yield Note("The glossary says what each grade means.")

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return {"knowing": to_json(probe.knowing)}


def table_of(knowing: Knowing, caption: str, who: str = "Original") -> Table:
    """Facts by the grades of one model, `who`, in rows, and of the other in columns."""
    rows = [
        (grade, *(count(knowing.moved[grade, after]) for after in GRADES), count(knowing.original[grade]))
        for grade in GRADES
    ]
    total = ("all", *(count(knowing.compressed[grade]) for grade in GRADES), count(sum(knowing.original.values())))
    return Table(caption, (who, *GRADES, "all"), (*rows, total))


def _told(knowing: Knowing) -> Iterator[str]:
    if knowing.shown:
        back = f"{count(knowing.back)} ({percent(knowing.back, knowing.shown)})"
        yield f"One solved example brings back {back} of {count(knowing.shown)} lost facts that were put after it."
    for who, written in zip(("original", "compressed model"), knowing.written, strict=True):
        if not written:
            yield f"The {who} cannot write: {PRODUCED} is left out."


def to_json(knowing: Knowing | None) -> dict[str, Any] | None:
    """Under the names that others rely on: {"original", "compressed", "moved": {"GRADE>GRADE": facts}, ...}."""
    if knowing is None:
        return None
    return {
        "original": dict(knowing.original),
        "compressed": dict(knowing.compressed),
        "moved": {f"{before}>{after}": facts for (before, after), facts in knowing.moved.items()},
        "with_example": {"n": knowing.shown, "produced": knowing.back},
    }
