"""Search for the smallest file that keeps enough: facts guide it, others select the winner, a third part grades it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from math import ceil, sqrt
from pathlib import Path
from typing import Any, NamedTuple

from compressknow._version import __version__
from compressknow.base.errors import GateNotMet, UsageError
from compressknow.base.files import write_whole
from compressknow.base.format import count, share
from compressknow.base.progress import Begin, Listener
from compressknow.base.reading import hash_json
from compressknow.base.system import move
from compressknow.comparison.intervals import FEWEST_SIGNS, compute_normal_quantile
from compressknow.comparison.records import Estimate
from compressknow.compress.staging import clean, discard
from compressknow.engine.identity import LocatedModel, describe, get_record_path
from compressknow.engine.language_model import CPU
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.facts import Fact, Probe, strip_wording
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.records import FactsInText
from compressknow.evaluate.runtimes import Runtime
from compressknow.evaluate.sources import Opened, find_source, list_usable
from compressknow.pages.card.make import compare, read_model_facts
from compressknow.pages.card.warnings import estimate_rounding_kept
from compressknow.pages.search import Search, Trial
from compressknow.study.allocation import Allocation
from compressknow.study.cells import CELLS, ORIGINAL, AddNoiseFloor, StudyModel, grade
from compressknow.study.formats import GGUF, FileFormat, SearchRequest, is_made

_THIRDS = 3  # the facts are split into parts to search with, to select by and to grade by
# Maximum facts of a probe to search with. They guide the search without deciding it, and each file takes longer with
# more of them. With fewer, less than a quarter of searches succeed if relations differ a lot (ICC 0.3).
SEARCHED = 450


class Parts(NamedTuple):
    """Facts of a probe, split into those that guide the search, those held out to select the winner by, and those held
    out from that too, so that the share that the winner keeps of them is unbiased."""

    search: Probe
    selection: Probe
    grading: Probe

    @property
    def held_out(self) -> Probe:
        """Return all held-out facts, for grading when nothing is selected."""
        return replace(self.grading, facts=(*self.selection.facts, *self.grading.facts))


def split_facts(probe: Opened, seed: int) -> Parts:
    """Split facts by the seed: a third to select by, a third to grade by, and some of the remaining third to search
    with. Whole relations are dealt, evenly over domains, if each third gets enough of them, because facts of one are
    lost together; otherwise, facts of each relation."""
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
    # Keep all wordings of a fact, or none.
    single = {name: replace(fact, id=name) for fact in search.facts for name in [_get_id(fact)]}
    drawn = {fact.id for fact in replace(probe, facts=tuple(single.values())).sample(SEARCHED, seed).facts}
    some = tuple(fact for fact in search.facts if _get_id(fact) in drawn)
    return Parts(replace(search, facts=some), selection, grading)


def _deal(facts: Sequence[Fact], seed: int, *, whole: bool) -> list[tuple[Fact, ...]]:
    """Deal facts into equal parts: `whole` relations, by domain, or single facts, with all wordings, by relation."""
    units: dict[tuple[str, str], set[str]] = {}
    # A relation with facts of several domains counts for the domain of its first fact, because it is dealt whole.
    domains = {fact.relation: fact.subject for fact in reversed(facts)}
    for fact in facts:
        name = _get_id(fact)
        unit = (domains[fact.relation] or "", fact.relation) if whole else (fact.relation, name)
        units.setdefault(unit, set()).add(name)
    parts: list[set[str]] = [set() for _ in range(_THIRDS)]
    for group, of_group in groupby(sorted(units.items()), key=lambda unit: unit[0][0]):
        members = [names for _, names in of_group]
        random.Random(f"{seed}:{group}").shuffle(members)
        for names in members:
            # The smallest part so far, which evens out sizes.
            min(parts, key=len).update(names)
    return [tuple(fact for fact in facts if _get_id(fact) in part) for part in parts]


def _get_id(fact: Fact) -> str:
    """Return the id of the fact, without its wording."""
    return fact.id if fact.template is None else strip_wording(fact.id)


class EvaluationSet:
    """One part of the facts, with running texts to read along, and the original's answers to them.

    Creating it evaluates the original; all answers are stored in `folder`. With `noise_floors` (facts that grade), the
    original's noise floors are measured and its distributions kept. Without, files are only evaluated on facts that the
    original knows, which suffice to see what they keep.

    `reference` are the original's answers, to each wording; `original` the same in the reading of `known`.
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
        self._probes, self._answered = probes, self.reference
        if not noise_floors and self.known:
            right = {(answer.probe, answer.fact_id) for answer in self.original.answers if answer.correct}
            some = [
                replace(probe, facts=tuple(fact for fact in probe.facts if (probe.name, _get_id(fact)) in right))
                for probe in probes
                if isinstance(probe, Probe)
            ]
            known_probes = [probe for probe in some if probe.facts]
            self._probes, self._answered = known_probes, self.reference.restrict(known_probes)

    @property
    def known(self) -> int:
        """Count the facts that the original knows."""
        return sum(answer.correct for answer in self.original.answers)

    def evaluate(self, handle: ModelHandle) -> Answers:
        """Evaluate a model; return its answers as in `reference`. Raises CompressknowError if that is impossible."""
        folder = self._folder / CELLS / handle.sha256[:16]
        return self._evaluate(handle, self._probes, folder, reference=self._answered)

    @property
    def provable(self) -> float:
        """Return the share that a file would be certain to keep if it kept all facts."""
        return self.estimate_kept(self._answered, LEVEL).low or 0.0

    def check_enough_known(self, keep: float) -> None:
        """Raise GateNotMet if not even a file that keeps all facts would be certain to keep that share."""
        if (best := self.provable) < keep:
            # An interval of n of n facts begins at n / (n + z^2), or with Student's t for facts of few relations.
            square = self.known * (1 - best) / best if best else compute_normal_quantile(LEVEL) ** 2
            needed = ceil(square * keep / (1 - keep))
            ratio = needed / self.known if self.known else 0.0
            times = f", {ratio:.1f} times as many" if 0 < ratio < 100 else ""
            raise GateNotMet(
                f"No file can be certain to keep {100 * keep:g} %: the model knows {count(self.known)} of the facts "
                "that select it.",
                f"If it kept all of them, only {share(best)} would be certain. About {count(needed)} are needed{times},"
                " or fewer of more relations.",
                "Use more facts (a larger --limit), or lower --keep.",
            )

    def estimate_kept(self, answers: Answers, level: float = 0.95) -> Estimate:
        """Return the share of the original's knowledge that these answers keep, with its interval of that level."""
        before, after = (grade(side, self.known_as) for side in (self._answered, answers))
        return compare(before, after, show_facts=False).kept_at(level)


# Files that are tried: one per halving of the predicted loss, and an end of the range if it was not reached.
HALVINGS = 7
CLOSE = 0.005  # budgets closer than this share count as equal
NEAR = 0.03  # sizes closer than this share cannot be told apart by the search facts
# Number of files that may be evaluated on the held-out facts: each widens the intervals that decide. The second is
# predicted to lose `APART` times as much as the first, or it would fail too; the third, which is the last, `APART`
# squared times as much as the second. (The next file depends on the one before, but not on what that kept; otherwise
# the intervals would not hold.)
CONFIRMED, APART = 3, 0.5
# Level of the intervals that decide on files (Bonferroni). For one file it would be 99 %: the share
# kept is skewed if a few relations lose a lot, so that an interval's lower end is too high more often than its level
# says. `benchmarks/inference.py` counts how often a file that keeps exactly the required share is selected
# nevertheless.
LEVEL = 1 - 0.01 / CONFIRMED


@dataclass(frozen=True)
class Candidate:
    """File that was evaluated: its types, and its record."""

    allocation: Allocation
    trial: Trial


class SizeSearch:
    """Search over sizes, without any input or output of its own: `choose` returns the types for a number of bytes, and
    `evaluate` makes that file and evaluates it on the search facts; no file is made twice.

    `sizes` are the bytes of the smallest and of the largest file. The search facts can show at most that `provable` is
    kept; if that is less than `keep`, a file must keep all of them. `tried` has the files in the order in which they
    were chosen, `confirmed` those that were evaluated on the held-out facts, the smallest first.
    """

    def __init__(
        self,
        keep: float,
        sizes: tuple[int, int],
        choose: Callable[[int], Allocation],
        evaluate: Callable[[Allocation], Trial],
        provable: float = 1.0,
    ) -> None:
        self.keep, self._keep_searched = keep, min(keep, provable)
        self.tried: list[Candidate] = []
        self.confirmed: list[Candidate] = []
        self._sizes, self._choose, self._evaluate = sizes, choose, evaluate

    @property
    def winner(self) -> Candidate | None:
        """Return the smallest file that also keeps enough of the held-out facts."""
        return next((each for each in self.confirmed if is_enough(each.trial.held_out, self.keep)), None)

    def explore(self) -> None:
        """Bisect the predicted loss for the largest that keeps enough; the size where no file loses about that much."""
        worst, best = ends = [self._choose(nbytes) for nbytes in self._sizes]
        for _ in range(HALVINGS):
            if best.nbytes <= (1 + NEAR) * worst.nbytes:
                break
            middle = self._find_losing(sqrt(worst.loss * best.loss), worst.nbytes, best.nbytes)
            tried = [each.allocation.types for each in self.tried]
            if middle.types in tried:
                # No file loses about that much: predictions jump where a few large weights, or all, change their type.
                middle = self._choose((worst.nbytes + best.nbytes) // 2)
            if middle.types in tried:
                break
            if is_enough(self._try_file(middle).trial.kept, self._keep_searched):
                best = middle
            else:
                worst = middle
        if best is ends[1]:
            self._try_file(best)
        elif worst is ends[0]:
            self._try_file(worst)

    def confirm(self, confirm: Callable[[Allocation], Estimate]) -> None:
        """Evaluate the smallest file that keeps enough on the held-out facts, then larger ones until one keeps enough
        there too. If none keeps enough of the search facts, begin with the one that keeps most."""
        by_size = sorted(self.tried, key=lambda each: each.allocation.nbytes)
        enough = (each for each in by_size if is_enough(each.trial.kept, self._keep_searched))
        each = next(enough, max(by_size, key=_get_lowest))
        while True:
            self.confirmed.append(replace(each, trial=replace(each.trial, held_out=confirm(each.allocation))))
            safer = self._find_safer(each.allocation)
            if self.winner or len(self.confirmed) == CONFIRMED or safer is None:
                return
            each = self._try_file(safer)

    def _find_safer(self, allocation: Allocation) -> Allocation | None:
        """Return the smallest file that loses so much less that it may keep enough although this one does not, if
        possible one that was tried; None if this is the largest."""
        largest = self._choose(self._sizes[1])
        if largest.loss >= allocation.loss:
            return None
        loss = APART ** len(self.confirmed) * allocation.loss
        safer = self._find_losing(loss, allocation.nbytes, largest.nbytes)
        near = [each.allocation for each in self.tried if 1 <= each.allocation.nbytes / safer.nbytes <= 1 + NEAR]
        return min(near, key=lambda each: each.nbytes, default=safer)

    def _find_losing(self, loss: float, low: int, high: int) -> Allocation:
        """Return the smallest file between two sizes that loses at most `loss`, else that of the larger size."""
        while high - low > CLOSE * low:
            middle = (low + high) // 2
            if self._choose(middle).loss <= loss:
                high = middle
            else:
                low = middle
        return self._choose(high)

    def _try_file(self, allocation: Allocation) -> Candidate:
        if all(each.allocation.types != allocation.types for each in self.tried):
            self.tried.append(Candidate(allocation, self._evaluate(allocation)))
        return next(each for each in self.tried if each.allocation.types == allocation.types)


def _get_lowest(each: Candidate) -> float:
    """Return the lower end of what a file keeps."""
    kept = each.trial.held_out or each.trial.kept
    return kept.low or 0.0


def is_enough(kept: Estimate | None, keep: float) -> bool:
    """Tell whether the interval shows that at least `keep` is kept."""
    return kept is not None and kept.low is not None and kept.low >= keep


def build_search(
    request: SearchRequest,
    form: FileFormat,
    search: SizeSearch | None,
    guided: EvaluationSet,
    selection: EvaluationSet | None,
    grading: EvaluationSet,
    in_calibration: FactsInText | None,
    *,
    seed: int,
    command: str | None,
) -> Search:
    """Return the record of a search, still without its winner; `search` and `selection` are None if a size was given.
    `in_calibration` counts the grading facts that occur in the text that guided it."""
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


# File names: a candidate's size, in its folder; and which candidate became the winner, next to these folders.
BYTES, PLACED = "bytes", "placed"


class Candidates:
    """Candidate files of a search, each made in a folder of its own."""

    def __init__(self, original: ModelHandle, form: FileFormat, folder: Path, begin: Begin) -> None:
        self.original, self.form, self.folder, self.begin = original, form, folder, begin
        # llama.cpp runs on the CPU, in the types of the file.
        settings = original.settings
        self.settings = replace(settings, device=CPU, dtype=None) if form.name == GGUF else settings

    def trial(self, allocation: Allocation, kept: Estimate) -> Trial:
        """Return the record of a file, which is made unless it was made before."""
        handle = CandidateHandle(self, allocation)
        record = handle.made.parent / BYTES
        if not record.exists():
            handle.make()
        nbytes = int(record.read_text(encoding="ascii"))
        return Trial(self.form.mix(allocation.types), dict(allocation.types), nbytes, allocation.loss, kept)

    def place(self, allocation: Allocation, target: Path) -> None:
        """Move a file to its final place, replacing an earlier one."""
        handle, placed = CandidateHandle(self, allocation), self.folder / PLACED
        if placed.exists() and placed.read_text(encoding="ascii") == handle.sha256 and target.exists():
            return
        placed.unlink(missing_ok=True)
        made = handle.make()
        clean(target)
        remove(target)
        if get_record_path(made).exists():  # First: a file without its record would be made again.
            move(get_record_path(made), get_record_path(target))
        move(made, target)
        write_whole(placed, handle.sha256.encode("ascii"))

    def remove(self) -> None:
        """Remove all files except the one that was placed; their sizes stay known."""
        for record in self.folder.glob(f"*/{BYTES}"):
            made = record.with_name(self.form.file_name)
            clean(made)
            remove(made)


class CandidateHandle(ModelHandle):
    """Candidate file that is only made when needed: stored answers are found by what it would be made of."""

    def __init__(self, candidates: Candidates, allocation: Allocation) -> None:
        self._candidates, self._allocation = candidates, allocation
        form, original = candidates.form, candidates.original
        # The hash is of what the file is made of, so that it need not exist.
        types = sorted(allocation.types.items())
        self.sha256 = hash_json([__version__, original.sha256, form.name, *form.list_decisive(), types])
        self.made = candidates.folder / self.sha256[:16] / form.file_name
        super().__init__(LocatedModel(form.name, self.made), candidates.settings)

    def make(self) -> Path:
        """Make the file unless it exists."""
        if not is_made(self.made):
            remove(self.made)
            self._candidates.form.make(self._allocation, self.made, self._candidates.begin)
        write_whole(self.made.parent / BYTES, str(describe(self.located)["bytes"]).encode("ascii"))
        return self.made

    @cached_property
    def loaded(self) -> Runtime:
        """Return the model, made and loaded."""
        self.make()
        return super().loaded

    def list_decisive(self, *, writes: bool) -> list[str]:
        """Return the original's, because small files are copies of the original's."""
        return self._candidates.original.list_decisive(writes=writes)

    def check_sound(self, on_progress: Listener | None = None) -> None:
        """Do nothing, because the file was made from a sound model."""

    def describe(self) -> dict[str, Any]:
        """Describe its files, if they exist."""
        return describe(self.located) if self.made.exists() else {}


def remove(place: Path) -> None:
    """Remove a file or folder that a search made, if it exists."""
    if place.is_dir():
        discard(place)
    else:
        place.unlink(missing_ok=True)
    get_record_path(place).unlink(missing_ok=True)
