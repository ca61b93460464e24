"""The facts of a search: those that guide it, those held out to choose the winner by, and those that grade it."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from compressknow.errors import UsageError
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.facts import Fact, Probe, fact_of
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.sources import Opened, source_of, usable
from compressknow.pages.card.make import compare
from compressknow.quiet import Listener
from compressknow.stats.clusters import FEWEST_SIGNS
from compressknow.stats.records import Estimate
from compressknow.study.cells import NoiseFloor, StudyModel
from compressknow.study.folder import CELLS, ORIGINAL, judged


class Parts(NamedTuple):
    """The facts of a probe, each in one part.

    Attributes
    ----------
    search : guide the search.
    selection : held out from it, to choose the winner by.
    grading : held out from that choice too: the share that the winner keeps of them is what it keeps of others.
    """

    search: Probe
    selection: Probe
    grading: Probe

    @property
    def held_out(self) -> Probe:
        """What is held out, where nothing is to be chosen by it."""
        return replace(self.grading, facts=(*self.selection.facts, *self.grading.facts))


def parts_of(probe: Opened, seed: int) -> Parts:
    """Return a third of the facts to search with, a third to select by and a third to grade by, drawn by the seed.

    Whole relations, of each domain as many facts, where each third gets enough of them: facts of one relation are lost
    together, so that a file that was lucky with a relation is lucky with all its facts. Else facts of each relation.
    """
    source = source_of(probe.name)
    if not isinstance(probe, Probe) or (source and not source.held_out):
        can = [kind for kind, source in usable() if source.held_out]
        raise UsageError(
            f"A search needs facts that it can hold out; {probe.name} has none.",
            hint=f"Search with {' or '.join(can)}, and evaluate the winner on {probe.name} afterwards.",
        )
    whole = len({fact.relation for fact in probe.facts}) >= _THIRDS * FEWEST_SIGNS
    parts = _deal(probe.facts, _THIRDS, seed, whole=whole)
    if not all(parts):
        raise UsageError(f"{probe.name} has too few facts to hold two thirds of them out.", hint="Raise --limit.")
    return Parts(*(replace(probe, facts=facts) for facts in parts))


_THIRDS = 3


def _deal(facts: Sequence[Fact], number: int, seed: int, *, whole: bool) -> list[tuple[Fact, ...]]:
    """Deal facts into so many equal parts, all wordings of each into one, in their order; `whole` relations, in the
    order of domains, or the facts of each relation one by one.
    """
    units: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        name = _named(fact)
        units.setdefault((fact.subject or "", fact.relation) if whole else (fact.relation, name), set()).add(name)
    by_group: dict[str, list[set[str]]] = {}
    for (group, _), names in sorted(units.items()):
        by_group.setdefault(group, []).append(names)
    parts: list[set[str]] = [set() for _ in range(number)]
    for group, members in sorted(by_group.items()):
        random.Random(f"{seed}:{group}").shuffle(members)
        for names in members:
            # The smallest part, the first of several: what comes next evens out.
            min(parts, key=len).update(names)
    return [tuple(fact for fact in facts if _named(fact) in part) for part in parts]


def _named(fact: Fact) -> str:
    """The id of the fact, whatever its wording."""
    return fact.id if fact.template is None else fact_of(fact.id)


@dataclass(frozen=True)
class EvaluationSet:
    """One part of the facts, and what the original answers to them.

    Attributes
    ----------
    probes : the facts, and running texts that are read beside them.
    folder : keeps all answers.
    reference : the original's answers as they were given, to each wording; `original` the same as they count.
    known_as : what counts as known.
    """

    study_model: StudyModel
    probes: tuple[Opened, ...]
    folder: Path
    reference: Answers
    original: Answers
    known_as: str

    @classmethod
    def of(
        cls,
        study_model: StudyModel,
        probes: Sequence[Opened],
        folder: Path,
        on_progress: Listener | None,
        known: str,
        *,
        noise_floors: Collection[NoiseFloor] = (),
    ) -> EvaluationSet:
        """Evaluate the original, with these noise floors if the facts grade; their distributions are kept then."""
        reference = study_model.evaluate_original(
            probes, folder / ORIGINAL, on_progress, noise_floors=noise_floors, whole=bool(noise_floors)
        )
        return cls(study_model, tuple(probes), folder, reference, judged(reference, known), known)

    @property
    def facts(self) -> list[Probe]:
        """The probes of facts."""
        return [probe for probe in self.probes if isinstance(probe, Probe)]

    @property
    def known(self) -> int:
        """How many facts the original knows."""
        return sum(answer.correct for answer in self.original.answers)

    def answers(self, handle: ModelHandle, on_progress: Listener | None, *, whole: bool = False) -> Answers:
        """A model's answers as they were given, and what it read, like `reference`.

        Raises CompressknowError where it cannot be evaluated.
        """
        folder = self.folder / CELLS / handle.sha256[:16]
        return self.study_model.evaluate(handle, self.probes, folder, self.reference, on_progress, whole=whole)

    def kept(self, answers: Answers, level: float = 0.95) -> Estimate:
        """The share of the original's knowledge that these answers keep, with its interval of that level."""
        return compare(self.original, judged(answers, self.known_as), show_facts=False).kept_at(level)
