"""Search for the smallest file that keeps enough: some facts steer it, others select, a third part grades."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from compressknow._version import __version__
from compressknow.base.errors import GateNotMet, UsageError
from compressknow.base.files import write_whole
from compressknow.base.format import count, share
from compressknow.base.progress import Begin, Listener
from compressknow.base.system import move
from compressknow.comparison.intervals import FEWEST_SIGNS
from compressknow.comparison.records import Estimate
from compressknow.compress.staging import clean, discard
from compressknow.engine.identity import Located, describe, get_record_path
from compressknow.engine.language_model import CPU
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.facts import Fact, Probe, strip_wording
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.records import FactsInText
from compressknow.evaluate.runtimes import Runtime
from compressknow.evaluate.sources import Opened, find_source, list_usable
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.pages.card.make import compare, read_model_facts
from compressknow.pages.card.warnings import estimate_rounding_kept
from compressknow.pages.search import Search, Trial
from compressknow.study.allocation import Allocation
from compressknow.study.cells import CELLS, ORIGINAL, AddNoiseFloor, StudyModel, grade
from compressknow.study.forms import GGUF, Form, Request

# Parts of the facts: to search with, to select by and to grade by.
_THIRDS = 3
# Facts of a probe to search with, at most. They steer, and decide nothing: each file that is tried takes so much longer
# with more. With fewer, less than a quarter of searches find a file where relations differ much (ICC 0.3).
SEARCHED = 450


class Parts(NamedTuple):
    """Facts of a probe, each in one part: those that guide the search, those held out from it to choose the winner by,
    and those held out from that choice too. The share that the winner keeps of these is what it keeps of others."""

    search: Probe
    selection: Probe
    grading: Probe

    @property
    def held_out(self) -> Probe:
        """Return what is held out, where nothing is to be chosen by it."""
        return replace(self.grading, facts=(*self.selection.facts, *self.grading.facts))


def split_facts(probe: Opened, seed: int) -> Parts:
    """Return a third of the facts to select by, a third to grade by, and of a third some to search with, by the seed.

    Whole relations, of each domain as many facts, where each third gets enough of them: facts of one relation are lost
    together, so that a file that was lucky with a relation is lucky with all its facts. Else facts of each relation.
    """
    source = find_source(probe.name)
    if not isinstance(probe, Probe) or (source and not source.held_out):
        can = [kind for kind, source in list_usable() if source.held_out]
        raise UsageError(
            f"A search needs facts that it can hold out; {probe.name} has none.",
            hint=f"Search with {' or '.join(can)}, and evaluate the winner on {probe.name} afterwards.",
        )
    whole = len({fact.relation for fact in probe.facts}) >= _THIRDS * FEWEST_SIGNS
    parts = _deal(probe.facts, seed, whole=whole)
    if not all(parts):
        raise UsageError(f"{probe.name} has too few facts to hold two thirds of them out.", hint="Raise --limit.")
    search, selection, grading = (replace(probe, facts=facts) for facts in parts)
    # All wordings of a fact, or none.
    single = {name: replace(fact, id=name) for fact in search.facts for name in [_get_id(fact)]}
    drawn = {fact.id for fact in replace(probe, facts=tuple(single.values())).sample(SEARCHED, seed).facts}
    some = tuple(fact for fact in search.facts if _get_id(fact) in drawn)
    return Parts(replace(search, facts=some), selection, grading)


def _deal(facts: Sequence[Fact], seed: int, *, whole: bool) -> list[tuple[Fact, ...]]:
    """Deal facts into three equal parts, all wordings of each into one: `whole` relations, in the order of domains, or
    the facts of each relation one by one."""
    units: dict[tuple[str, str], set[str]] = {}
    # A relation whose facts are of several domains is of that of its first one: it is dealt whole all the same.
    domains = {fact.relation: fact.subject for fact in reversed(facts)}
    for fact in facts:
        name = _get_id(fact)
        unit = (domains[fact.relation] or "", fact.relation) if whole else (fact.relation, name)
        units.setdefault(unit, set()).add(name)
    parts: list[set[str]] = [set() for _ in range(_THIRDS)]
    for group, own in groupby(sorted(units.items()), key=lambda unit: unit[0][0]):
        members = [names for _, names in own]
        random.Random(f"{seed}:{group}").shuffle(members)
        for names in members:
            # The smallest part, the first of several: what comes next evens out.
            min(parts, key=len).update(names)
    return [tuple(fact for fact in facts if _get_id(fact) in part) for part in parts]


def _get_id(fact: Fact) -> str:
    """Return the id of the fact, whatever its wording."""
    return fact.id if fact.template is None else strip_wording(fact.id)


class EvaluationSet:
    """One part of the facts, with running texts that are read beside them, and what the original answers to them;
    making it evaluates the original. `folder` keeps all answers. Facts that grade have noise floors of the original,
    whose distributions are kept then; of others, files are asked those alone that the original knows: what a file keeps
    shows in them.

    `reference` are the original's answers as they were given, to each wording; `original` the same as they count.
    """

    def __init__(
        self,
        study_model: StudyModel,
        probes: Sequence[Opened],
        folder: Path,
        on_progress: Listener | None,
        known: str,
        *,
        noise_floors: Collection[AddNoiseFloor] = (),
    ) -> None:
        self.known_as, self._folder = known, folder
        self._evaluate = partial(study_model.evaluate, on_progress=on_progress, whole=bool(noise_floors))
        self.reference = self._evaluate(
            study_model.original, probes, folder / ORIGINAL, reference=None, noise_floors=noise_floors
        )
        self.original = grade(self.reference, known)
        self._asked, self._answered = probes, self.reference
        if not noise_floors and self.known:
            right = {(answer.probe, answer.fact_id) for answer in self.original.answers if answer.correct}
            some = [
                replace(probe, facts=tuple(fact for fact in probe.facts if (probe.name, _get_id(fact)) in right))
                for probe in probes
                if isinstance(probe, Probe)
            ]
            asked = [probe for probe in some if probe.facts]
            self._asked, self._answered = asked, self.reference.restrict(asked)

    @property
    def known(self) -> int:
        """Count the facts that the original knows."""
        return sum(answer.correct for answer in self.original.answers)

    def evaluate(self, handle: ModelHandle) -> Answers:
        """Return a model's answers as they were given, and what it read, like `reference`.

        Raises CompressknowError where it cannot be evaluated.
        """
        folder = self._folder / CELLS / handle.sha256[:16]
        return self._evaluate(handle, self._asked, folder, reference=self._answered)

    def check_enough_known(self, keep: float) -> None:
        """Raise GateNotMet where not even a file that keeps all is certain to keep as much."""
        if (best := self.estimate_kept(self._answered, LEVEL).low or 0.0) < keep:
            raise GateNotMet(
                f"No file can be certain to keep {100 * keep:g} %: the model knows {count(self.known)} of the facts "
                "that select it.",
                f"If it kept all of them, only {share(best)} would be certain.",
                "Use more facts (a larger --limit), or lower --keep.",
            )

    def estimate_kept(self, answers: Answers, level: float = 0.95) -> Estimate:
        """Return the share of the original's knowledge that these answers keep, with its interval of that level."""
        before, after = (grade(side, self.known_as) for side in (self._answered, answers))
        return compare(before, after, show_facts=False).kept_at(level)


# Sizes that are evaluated: so many halvings of the predicted loss, and then an end that was not reached.
HALVINGS = 7
# Budgets so near each other, as a share, are one.
CLOSE = 0.005
# Sizes so near each other, as a share, are not told apart by the facts of the search.
NEAR = 0.03
# How many files may be put to the held-out facts: each makes the interval that they are judged by wider. One that is
# put there after another is predicted to lose that much less, or would fall short too; the third, so much less squared,
# for none comes after it. (What comes next depends on the one before, and on nothing that it kept: else the intervals
# would not hold.)
CONFIRMED, APART = 3, 0.5
# Of the intervals by which files are tried and selected (Bonferroni). Of one file it would be 99 %: the share kept is
# skewed where a few relations lose much, so that an interval's lower end lies too high more often than its level says.
# `benchmarks/inference.py` counts how often a file that keeps exactly what is asked for is selected all the same.
LEVEL = 1 - 0.01 / CONFIRMED


@dataclass(frozen=True)
class Candidate:
    """File that was evaluated: its types, and its record."""

    found: Allocation
    trial: Trial


class SizeSearch:
    """Trials of a search, and what comes of them. It reads and writes nothing: `choose` gives the types of a file of so
    many bytes, `evaluate` makes a file and its trial, on the facts of the search; none is made twice.

    `sizes` are the bytes of the smallest file and of the largest. `tried` are in the order in which they were chosen,
    `confirmed` those that were put to the held-out facts, the smallest first.
    """

    def __init__(
        self,
        keep: float,
        sizes: tuple[int, int],
        choose: Callable[[int], Allocation],
        evaluate: Callable[[Allocation], Trial],
    ) -> None:
        self.keep = keep
        self.tried: list[Candidate] = []
        self.confirmed: list[Candidate] = []
        self._sizes, self._choose, self._evaluate = sizes, choose, evaluate

    @property
    def winner(self) -> Candidate | None:
        """Return the smallest that keeps enough of the held-out facts too."""
        return next((each for each in self.confirmed if is_enough(each.trial.held_out, self.keep)), None)

    def explore(self) -> None:
        """Halve the predicted losses between those of two sizes, towards the largest that keeps enough."""
        worst, best = ends = [self._choose(nbytes) for nbytes in self._sizes]
        for _ in range(HALVINGS):
            if best.nbytes <= (1 + NEAR) * worst.nbytes:
                break
            middle = self._find_losing(sqrt(worst.loss * best.loss), worst.nbytes, best.nbytes)
            if any(each.found.types == middle.types for each in self.tried):
                break
            if is_enough(self._try_file(middle).trial.kept, self.keep):
                best = middle
            else:
                worst = middle
        if best is ends[1]:
            self._try_file(best)
        elif worst is ends[0]:
            self._try_file(worst)

    def confirm(self, confirm: Callable[[Allocation], Estimate]) -> None:
        """Put the smallest file that keeps enough to the held-out facts, and then larger ones, until one keeps enough
        there too. Where none keeps enough of the facts of the search, begin with the one that keeps most."""
        by_size = sorted(self.tried, key=lambda each: each.found.nbytes, reverse=True)
        enough = [each for each in by_size if is_enough(each.trial.kept, self.keep)]
        each = enough[-1] if enough else max(by_size, key=_get_lowest)
        while True:
            self.confirmed.append(replace(each, trial=replace(each.trial, held_out=confirm(each.found))))
            safer = self._find_safer(each.found)
            if self.winner or len(self.confirmed) == CONFIRMED or safer is None:
                return
            each = self._try_file(safer)

    def _find_safer(self, found: Allocation) -> Allocation | None:
        """Return the smallest file that loses so much less that it may keep enough where this one does not, a tried one
        where one is near; None where this is the largest."""
        largest = self._choose(self._sizes[1])
        if largest.loss >= found.loss:
            return None
        loss = APART ** len(self.confirmed) * found.loss
        safer = self._find_losing(loss, found.nbytes, largest.nbytes)
        near = [each.found for each in self.tried if 1 <= each.found.nbytes / safer.nbytes <= 1 + NEAR]
        return min(near, key=lambda each: each.nbytes, default=safer)

    def _find_losing(self, loss: float, low: int, high: int) -> Allocation:
        """Return the smallest file between two sizes that loses no more."""
        while high - low > CLOSE * low:
            middle = (low + high) // 2
            if self._choose(middle).loss <= loss:
                high = middle
            else:
                low = middle
        return self._choose(high)

    def _try_file(self, found: Allocation) -> Candidate:
        if all(each.found.types != found.types for each in self.tried):
            self.tried.append(Candidate(found, self._evaluate(found)))
        return next(each for each in self.tried if each.found.types == found.types)


def _get_lowest(each: Candidate) -> float:
    """Return the least that a file keeps."""
    kept = each.trial.held_out or each.trial.kept
    return kept.low or 0.0


def is_enough(kept: Estimate | None, keep: float) -> bool:
    """Return whether as much is kept for sure."""
    return kept is not None and kept.low is not None and kept.low >= keep


def build_search(
    request: Request,
    form: Form,
    search: SizeSearch | None,
    guided: EvaluationSet,
    selection: EvaluationSet | None,
    grading: EvaluationSet,
    in_calibration: FactsInText | None,
    *,
    seed: int,
    command: str | None,
) -> Search:
    """Return the record of a search, but for its winner; without a search and facts that select, of a size.
    `in_calibration` are the facts that grade and stand in the text that guided it."""
    original, itself = guided.original, compare(grading.original, grading.original, show_facts=False)
    confirmed = search.confirmed if search else []
    nearest = max(confirmed, key=_get_lowest, default=None)
    return Search(
        original=read_model_facts(original.record.model),
        form=form.name,
        keep=request.keep,
        budget=request.size,
        by=form.label,
        probes=tuple(original.probes),
        searched=len(original.answers),
        held_out=len(selection.original.answers) if selection else 0,
        graded=len(grading.original.answers),
        known_searched=guided.known,
        known_held_out=selection.known if selection else 0,
        known_graded=grading.known,
        level=LEVEL,
        bytes=original.record.model.bytes or 0,
        tried=tuple(each.trial for each in search.tried) if search else (),
        confirmed=tuple(each.trial for each in confirmed),
        winner=None,
        closest=nearest.trial if nearest and search and not search.winner else None,
        recipe=None,
        seed=seed,
        versions=dict(original.record.versions),
        command=command,
        known=guided.known_as,
        templates=max(entry.templates or 1 for entry in original.record.probes.values()),
        rounding=estimate_rounding_kept(itself.probes).value,
        in_calibration=in_calibration,
    )


# In the folder of a file, how large it is; beside these folders, which of them has become the winner.
BYTES, PLACED = "bytes", "placed"


class Candidates:
    """Files of a search that are made of a model, in a folder of its own."""

    def __init__(self, original: ModelHandle, form: Form, folder: Path, begin: Begin) -> None:
        self.original, self.form, self.folder, self.begin = original, form, folder, begin
        # llama.cpp computes on the processor, as its files say.
        settings = original.settings
        self.settings = replace(settings, device=CPU, dtype=None) if form.name == GGUF else settings

    def trial(self, found: Allocation, kept: Estimate) -> Trial:
        """Return the record of a file, which is made unless it was before."""
        handle = CandidateHandle(self, found)
        record = handle.made.parent / BYTES
        if not record.exists():
            handle.make()
        nbytes = int(record.read_text(encoding="ascii"))
        return Trial(self.form.mix(found.types), dict(found.types), nbytes, found.loss, kept)

    def place(self, found: Allocation, target: Path) -> None:
        """Put a file at its place, instead of an earlier one."""
        handle, placed = CandidateHandle(self, found), self.folder / PLACED
        if placed.exists() and placed.read_text(encoding="ascii") == handle.sha256 and target.exists():
            return
        placed.unlink(missing_ok=True)
        made = handle.make()
        clean(target)
        remove(target)
        if get_record_path(made).exists():  # First: what has no record is made again.
            move(get_record_path(made), get_record_path(target))
        move(made, target)
        write_whole(placed, handle.sha256.encode("ascii"))

    def remove(self) -> None:
        """Remove all that are not at that place; how large they are stays known."""
        for record in self.folder.glob(f"*/{BYTES}"):
            made = record.with_name(self.form.place)
            clean(made)
            remove(made)


class CandidateHandle(ModelHandle):
    """File that is made when it is first needed: answers are found by what it would be made of."""

    def __init__(self, candidates: Candidates, found: Allocation) -> None:
        self._candidates, self._found = candidates, found
        form, original = candidates.form, candidates.original
        # No file is needed to tell one from another: the hash is of what it is made of.
        parts: list[Any] = [__version__, original.sha256, form.name, *form.decides(), sorted(found.types.items())]
        self.sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.made = candidates.folder / self.sha256[:16] / form.place
        super().__init__(Located(form.name, self.made), candidates.settings)

    def make(self) -> Path:
        """Make it unless it is there."""
        if not is_made(self.made):
            remove(self.made)
            self._candidates.form.make(self._found, self.made, self._candidates.begin)
        write_whole(self.made.parent / BYTES, str(describe(self.located)["bytes"]).encode("ascii"))
        return self.made

    @cached_property
    def loaded(self) -> Runtime:
        """Return it, made and in memory."""
        self.make()
        return super().loaded

    def list_decisive(self, *, writes: bool) -> list[str]:
        """Return that of the original, which its files are copies of, while they are there."""
        return self._candidates.original.list_decisive(writes=writes)

    def check_sound(self, on_progress: Listener | None = None) -> None:
        """Do nothing: it was made of what is sound."""

    def describe(self) -> dict[str, Any]:
        """Return what its files tell, while they are there."""
        return describe(self.located) if self.made.exists() else {}


def is_made(place: Path) -> bool:
    """Return whether a file, or folder, is one that was made here."""
    return get_record_path(place).is_file() if place.suffix else (place / MANIFEST_NAME).is_file()


def remove(place: Path) -> None:
    """Remove a file or folder that was made here, if it is there."""
    if place.is_dir():
        discard(place)
    else:
        place.unlink(missing_ok=True)
    get_record_path(place).unlink(missing_ok=True)
