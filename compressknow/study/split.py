"""The facts of a search: those that guide it, and those that are held out to judge what it finds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from compressknow.compress.recipe import Recipe
from compressknow.errors import CompressknowError, UsageError
from compressknow.probe.answers import Answers
from compressknow.probe.facts import Fact, Probe, fact_of
from compressknow.probe.grades import RECOGNIZED
from compressknow.probe.sources import Opened, source_of, usable
from compressknow.probe.text.running import RunningText
from compressknow.quiet import Listener
from compressknow.study.cells import StudyModel
from compressknow.study.folder import CELLS, ORIGINAL, CellResult, judged
from compressknow.study.grid import Cell, key_of
from compressknow.study.running import Batch, Run

# Of the facts to search with, the share that is evaluated first; fewer than so many facts tell too little to stop at.
FIRST, FEWEST_FIRST = 0.2, 50


class Parts(NamedTuple):
    """The facts of a probe, each in one part.

    Attributes
    ----------
    first : for every recipe, as a probe with a name of its own; None where there are few facts.
    rest : for the recipes that may still keep enough after these.
    held_out : not used in the search.
    """

    first: Probe | None
    rest: Probe
    held_out: Probe


def parts_of(probe: Opened, seed: int) -> Parts:
    """Half of the facts to search with, and half that are held out: of each relation as many, drawn by the seed."""
    source = source_of(probe.name)
    if not isinstance(probe, Probe) or (source and not source.held_out):
        can = [kind for kind, source in usable() if source.held_out]
        raise UsageError(
            f"A search needs facts that it can hold out; {probe.name} has none.",
            hint=f"Search with {' or '.join(can)}, and evaluate the winner on {probe.name} afterwards.",
        )
    searched, held_out = _cut(probe.facts, 0.5, seed)
    if not searched or not held_out:
        raise UsageError(f"{probe.name} has too few facts to hold half of them out.", hint="Raise --limit.")
    first, rest = _cut(searched, FIRST, seed)
    if len(set(map(_named, first))) < FEWEST_FIRST:
        return Parts(None, replace(probe, facts=searched), replace(probe, facts=held_out))
    # A second probe beside that of the rest: their answers are kept apart, and none is evaluated twice.
    name = f"first of {probe.name}"
    named = replace(probe, name=name, facts=tuple(replace(fact, probe=name) for fact in first))
    return Parts(named, replace(probe, facts=rest), replace(probe, facts=held_out))


def _cut(facts: Sequence[Fact], share: float, seed: int) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """A share of each relation's facts, all wordings of each, and the others, in their order."""
    relations: dict[str, set[str]] = {}
    for fact in facts:
        relations.setdefault(fact.relation, set()).add(_named(fact))
    drawn: set[str] = set()
    counted = 0
    for name, ids in sorted(relations.items()):
        shuffled = sorted(ids)
        random.Random(f"{seed}:{name}").shuffle(shuffled)
        # What a relation's share leaves of a whole fact is carried over to the next one.
        counted += len(ids)
        drawn.update(shuffled[: int(share * counted) - len(drawn)])
    first, others = (tuple(fact for fact in facts if (_named(fact) in drawn) is part) for part in (True, False))
    return first, others


def _named(fact: Fact) -> str:
    """The id of the fact, whatever its wording."""
    return fact.id if fact.template is None else fact_of(fact.id)


@dataclass(frozen=True)
class EvaluationSet:
    """One half of the facts, and what the original answers to them.

    Attributes
    ----------
    first : the probes to evaluate first.
    reference : the original's answers as they were given, to each wording; `original` the same as they count.
    known_as : what counts as known.
    texts : running texts that are read beside the facts.
    """

    study_model: StudyModel
    probes: tuple[Probe, ...]
    first: tuple[Probe, ...]
    folder: Path
    reference: Answers
    original: Answers
    known_as: str
    run: Run
    texts: tuple[RunningText, ...] = ()

    @classmethod
    def of(
        cls,
        study_model: StudyModel,
        probes: Sequence[Probe],
        folder: Path,
        on_progress: Listener | None,
        run: Run,
        first: Sequence[Probe | None] = (),
        *,
        known: str = RECOGNIZED,
        noise_floor: bool = True,
    ) -> EvaluationSet:
        begun = tuple(probe for probe in first if probe)
        whole = (*begun, *probes)
        reference = study_model.evaluate_original(whole, folder / ORIGINAL, on_progress, noise_floor=noise_floor)
        return cls(study_model, whole, begun, folder, reference, judged(reference, known), known, run)

    @property
    def known(self) -> int:
        return sum(answer.correct for answer in self.original.answers)

    def evaluate(
        self, cells: Sequence[Cell], hopeful: Callable[[Answers], bool] | None = None
    ) -> Iterator[tuple[Cell, Answers]]:
        """Each cell's answers as they count, as they come; the first ones alone of those that are not `hopeful` after
        these.

        Raises CompressknowError where a cell cannot be made or evaluated.
        """
        if hopeful and self.first:
            going_on = []
            for cell, answers in self._judged(cells, self.first):
                if hopeful(answers):
                    going_on.append(cell)
                else:
                    yield cell, answers
            cells = going_on
        yield from self._judged(cells, self.probes)

    def beside(self, texts: Sequence[RunningText], on_progress: Listener | None) -> EvaluationSet:
        """The same with running texts, which the original reads; they count for nothing in `original`."""
        if not texts:
            return self
        probes: tuple[Opened, ...] = (*self.probes, *texts)
        reference = self.study_model.evaluate_original(probes, self.folder / ORIGINAL, on_progress)
        return replace(self, texts=tuple(texts), reference=reference)

    def given(self, cell: Cell) -> Answers:
        """A cell's answers as they were given, and what it read, like `reference`.

        Raises CompressknowError as `evaluate` does.
        """
        ((_, answers),) = self._evaluate([cell], (*self.probes, *self.texts))
        return answers

    def _judged(self, cells: Sequence[Cell], probes: Sequence[Probe]) -> Iterator[tuple[Cell, Answers]]:
        return ((cell, judged(answers, self.known_as)) for cell, answers in self._evaluate(cells, probes))

    def _evaluate(self, cells: Sequence[Cell], probes: Sequence[Opened]) -> Iterator[tuple[Cell, Answers]]:
        batch = Batch(self.study_model, cells, probes, self.folder / CELLS, self.reference)
        with closing(self.run(batch)) as results:
            for result in results:
                yield _cell_and_answers(result)


def cell_of(recipe: Recipe) -> Cell:
    """The cell that a recipe makes, with a name of its steps."""
    # A recipe of many steps has a long name; its folder's hash tells it apart.
    return Cell(key_of(recipe)[:60].rstrip("-."), recipe)


def _cell_and_answers(result: CellResult) -> tuple[Cell, Answers]:
    if result.answers is None:
        raise CompressknowError(f"{result.cell.recipe.setup} failed.", why=result.why)
    return result.cell, result.answers
