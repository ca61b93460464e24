"""The facts of a search in two halves: those that guide it, and those that are held out to judge what it finds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from compressknow.errors import CompressknowError, UsageError
from compressknow.probe.answers import Answers
from compressknow.probe.facts import Fact, Probe
from compressknow.probe.run import Bar
from compressknow.probe.tasks import Task
from compressknow.study.answering import Subject
from compressknow.study.folder import CELLS, ORIGINAL
from compressknow.study.grid import Cell
from compressknow.study.results import CellResult
from compressknow.study.running import Batch, Run


def halves_of(probe: Probe | Task, seed: int) -> tuple[Probe, Probe]:
    """The facts to search with, and those that are held out: half of each relation, drawn by the seed."""
    if not isinstance(probe, Probe):
        raise UsageError(
            f"A search needs facts that it can hold out, and {probe.name} is a task of lm-eval.",
            hint="Search with atlas, LAMA, BEAR or facts of your own; ask the winner the task afterwards.",
        )
    relations: dict[str, list[Fact]] = {}
    for fact in probe.facts:
        relations.setdefault(fact.relation, []).append(fact)
    drawn: set[str] = set()
    odd = 0
    for name, facts in sorted(relations.items()):
        ids = sorted(fact.id for fact in facts)
        random.Random(f"{seed}:{name}").shuffle(ids)
        # Of an odd number of facts the one more goes to either half in turn.
        drawn.update(ids[: (len(ids) + odd) // 2])
        odd = (odd + len(ids)) % 2
    parts = (tuple(f for f in probe.facts if (f.id in drawn) is half) for half in (True, False))
    first, second = (replace(probe, facts=part) for part in parts)
    if not first.facts or not second.facts:
        raise UsageError(f"{probe.name} has too few facts to hold half of them out.", hint="Raise --limit.")
    return first, second


@dataclass(frozen=True)
class Asked:
    """One half of the facts, and what the original answers to them."""

    subject: Subject
    probes: tuple[Probe, ...]
    folder: Path
    original: Answers
    run: Run

    @classmethod
    def of(cls, subject: Subject, probes: Sequence[Probe], folder: Path, bar: Bar | None, run: Run) -> Asked:
        original = subject.ask_original(probes, folder / ORIGINAL, bar)
        return cls(subject, tuple(probes), folder, original, run)

    @property
    def known(self) -> int:
        return sum(answer.correct for answer in self.original.answers)

    def ask(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Answers]]:
        """Each cell's answers, as they come. Raises CompressknowError where one cannot be made or asked."""
        batch = Batch(self.subject, cells, self.probes, self.folder / CELLS, self.original)
        with closing(self.run(batch)) as results:
            for result in results:
                yield _cell_and_answers(result)


def _cell_and_answers(result: CellResult) -> tuple[Cell, Answers]:
    if result.answers is None:
        raise CompressknowError(f"{result.cell.recipe.setup} failed.", why=result.why)
    return result.cell, result.answers
