"""The facts of a search: those that guide it, those held out to choose the winner by, and those that grade it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from compressknow.compress.recipe import Recipe
from compressknow.errors import CompressknowError, UsageError
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.facts import Fact, Probe, fact_of
from compressknow.evaluate.grades import RECOGNIZED
from compressknow.evaluate.sources import Opened, source_of, usable
from compressknow.evaluate.text.running import RunningText
from compressknow.quiet import Listener
from compressknow.stats.clusters import FEWEST_SIGNS
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
    selection : held out from the search, to choose the winner by.
    grading : held out from that choice too: the share that the winner keeps of them is what it keeps of others.
    """

    first: Probe | None
    rest: Probe
    selection: Probe
    grading: Probe


def parts_of(probe: Opened, seed: int) -> Parts:
    """Return a third of the facts to search with, a third to select by and a third to grade by, drawn by the seed.

    Whole relations, of each domain as many facts, where each third gets enough of them: facts of one relation are lost
    together, so that a recipe that was lucky with a relation is lucky with all its facts. Else facts of each relation.
    """
    source = source_of(probe.name)
    if not isinstance(probe, Probe) or (source and not source.held_out):
        can = [kind for kind, source in usable() if source.held_out]
        raise UsageError(
            f"A search needs facts that it can hold out; {probe.name} has none.",
            hint=f"Search with {' or '.join(can)}, and evaluate the winner on {probe.name} afterwards.",
        )
    whole = len({fact.relation for fact in probe.facts}) >= len(_THIRDS) * FEWEST_SIGNS
    searched, *held_out = _deal(probe.facts, _THIRDS, seed, whole=whole)
    if not searched or not all(held_out):
        raise UsageError(f"{probe.name} has too few facts to hold two thirds of them out.", hint="Raise --limit.")
    selection, grading = (replace(probe, facts=facts) for facts in held_out)
    first, rest = _deal(searched, (FIRST, 1 - FIRST), seed, whole=False)
    if len(set(map(_named, first))) < FEWEST_FIRST:
        return Parts(None, replace(probe, facts=searched), selection, grading)
    # A second probe beside that of the rest: their answers are kept apart, and none is evaluated twice.
    name = f"first of {probe.name}"
    named = replace(probe, name=name, facts=tuple(replace(fact, probe=name) for fact in first))
    return Parts(named, replace(probe, facts=rest), selection, grading)


_THIRDS = (1 / 3, 1 / 3, 1 / 3)


def _deal(facts: Sequence[Fact], shares: Sequence[float], seed: int, *, whole: bool) -> list[tuple[Fact, ...]]:
    """Deal facts into parts of these shares, all wordings of each into one, in their order; `whole` relations, in the
    order of domains, or the facts of each relation one by one.
    """
    units: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        name = _named(fact)
        units.setdefault((fact.subject or "", fact.relation) if whole else (fact.relation, name), set()).add(name)
    by_group: dict[str, list[set[str]]] = {}
    for (group, _), names in sorted(units.items()):
        by_group.setdefault(group, []).append(names)
    parts: list[set[str]] = [set() for _ in shares]
    dealt = 0
    for group, members in sorted(by_group.items()):
        random.Random(f"{seed}:{group}").shuffle(members)
        for names in members:
            dealt += len(names)
            # The part that has least of its share, the first of several: what comes next evens out.
            behind = [share * dealt - len(part) for share, part in zip(shares, parts, strict=True)]
            parts[behind.index(max(behind))] |= names
    return [tuple(fact for fact in facts if _named(fact) in part) for part in parts]


def _named(fact: Fact) -> str:
    """The id of the fact, whatever its wording."""
    return fact.id if fact.template is None else fact_of(fact.id)


@dataclass(frozen=True)
class EvaluationSet:
    """One part of the facts, and what the original answers to them.

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
