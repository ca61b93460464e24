"""The search for the cheapest recipe that keeps enough: explored on some facts, selected by others, graded by a third
part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compressknow.compress.recipe import Recipe
from compressknow.compress.schemes import SCHEMES
from compressknow.compress.steps import Quantize
from compressknow.errors import UsageError
from compressknow.evaluate.answers import Answers
from compressknow.pages.card.make import compare, model_facts
from compressknow.pages.card.rounding import kept_by_rounding
from compressknow.pages.search import SIZES, Search, Trial
from compressknow.stats.records import Estimate
from compressknow.study.space import Optimizer, Space
from compressknow.study.split import EvaluationSet, cell_of

# Trials that a cluster is given at once.
TOGETHER = 8
# Recipes, and of what kind their trials are (see `Trial`) -> each with its trial, as they come.
Evaluate = Callable[[Sequence[Recipe], str], Iterable[tuple[Recipe, Trial]]]
# A recipe, and the level of the interval -> what it keeps of the held-out facts.
Confirm = Callable[[Recipe, float], Estimate]
# How many recipes may be tried on the held-out facts: each makes the interval that they are judged by wider.
CONFIRMED = 5
# A recipe is evaluated no further where the first facts say at this level that it keeps less than is asked for.
SURE = 0.99


class RecipeSearch:
    """What a search has tried so far, and what comes of it. It reads and writes nothing: `evaluate` does the work.

    Parameters
    ----------
    space : the recipes to choose from.
    evaluate : makes trials of recipes, on the facts of the search; no recipe is given to it twice.
    sizes : of the original, as `Trial.sizes`.
    together : how many recipes are chosen before the next result is known: more than one on a cluster.

    Attributes
    ----------
    confirmed : the trials that were put to the held-out facts, the cheapest first.
    level : of the intervals that these were held to.
    """

    def __init__(
        self, space: Space, criterion: Criterion, evaluate: Evaluate, sizes: Mapping[str, int], *, together: int = 1
    ) -> None:
        self.criterion, self.sizes = criterion, sizes
        self.confirmed: tuple[Trial, ...] = ()
        self.level = level(())
        self._space, self._evaluate, self._together = space, evaluate, together
        self._chosen: list[Recipe] = []
        self._trials: dict[Recipe, Trial] = {}

    @property
    def trials(self) -> tuple[Trial, ...]:
        """In the order in which they were chosen: on a cluster they come in another each time."""
        return tuple(self._trials[recipe] for recipe in dict.fromkeys(self._chosen))

    @property
    def winner(self) -> Trial | None:
        """The cheapest that keeps enough of the held-out facts too."""
        return next((trial for trial in self.confirmed if meets(trial.held_out, self.criterion.keep)), None)

    def explore(self, trials: int, seed: int) -> None:
        """The paper's setups, then the layers one band after the other, then so many trials of the optimizer."""
        self._try(self._space.references(), "paper")
        bands = self._space.one_band_each()
        tried = self._try(list(bands), "layers")
        self._space.learn({band: tried[recipe].harm or 0.0 for recipe, band in bands.items()})
        optimizer = Optimizer(self._space, seed)
        for start in range(0, trials, self._together):
            self._optimize(optimizer, min(self._together, trials - start))

    def confirm(self, confirm: Confirm) -> None:
        """Put the promising trials to the held-out facts, the cheapest first, until one keeps enough there too."""
        candidates = promising(self.trials, self.criterion)
        self.level = level(candidates)
        for trial in candidates:
            kept = confirm(Recipe.from_dict(dict(trial.recipe)), self.level)
            self.confirmed += (replace(trial, held_out=kept),)
            if self.winner:
                return

    def _try(self, recipes: Sequence[Recipe], kind: str) -> dict[Recipe, Trial]:
        self._chosen += recipes
        new = [recipe for recipe in dict.fromkeys(recipes) if recipe not in self._trials]
        if new:
            self._trials.update(self._evaluate(new, kind))
        return {recipe: self._trials[recipe] for recipe in recipes}

    def _optimize(self, optimizer: Optimizer, number: int) -> None:
        """Let the optimizer choose so many, and tell it what came of them."""
        chosen = optimizer.choose(number)
        tried = self._try([recipe for _, recipe in chosen if recipe is not None], "search")
        keep, minimize = self.criterion.keep, self.criterion.minimize
        for trial, recipe in chosen:
            if recipe is None:
                optimizer.tell(trial, self.sizes[minimize], keep - 1.0)
            else:
                kept = tried[recipe].kept
                # Less than a byte or a weight: of two of one size the one that keeps more is the better.
                lost = 1 - (kept.value or 0.0)
                optimizer.tell(trial, tried[recipe].sizes[minimize] + lost, keep - (kept.low or 0.0))


def evaluating(
    searched: EvaluationSet, criterion: Criterion, on_result: Callable[[Trial], object] | None = None
) -> Evaluate:
    """What evaluates recipes on the facts of a search; those that fall short of the first facts on these alone."""

    def evaluate(recipes: Sequence[Recipe], kind: str) -> Iterator[tuple[Recipe, Trial]]:
        cells = [cell_of(recipe) for recipe in recipes]
        for cell, answers in searched.evaluate(cells, lambda first: may_meet(searched.original, first, criterion.keep)):
            trial = trial_of(searched.original, cell.recipe, answers, kind)
            if on_result:
                on_result(trial)
            yield cell.recipe, trial

    return evaluate


def confirming(held_out: EvaluationSet) -> Confirm:
    """What evaluates a recipe on the held-out facts."""

    def confirm(recipe: Recipe, level: float) -> Estimate:
        ((_, answers),) = held_out.evaluate([cell_of(recipe)])
        return kept_of(held_out.original, answers, level)

    return confirm


def trial_of(original: Answers, recipe: Recipe, answers: Answers, kind: str) -> Trial:
    """The record of a recipe that was evaluated."""
    comparison = compare(original, answers, show_facts=False)
    moved = [probe.movement for probe in comparison.probes if probe.movement]
    total, model = sum(movement.n for movement in moved), answers.record.model
    return Trial(
        setup=_name(recipe),
        kind=kind,
        recipe=recipe.to_dict(),
        kept=comparison.kept,
        facts=len(answers.answers),
        sizes={
            "sparse-bytes": model.totals["sparse_bytes"],
            "bytes": model.bytes or 0,
            "nonzero": model.totals["nonzero"],
        },
        harm=sum(movement.n * movement.kl_mean for movement in moved) / total if total else None,
        harm_is_lower_bound=any(movement.is_lower_bound for movement in moved),
    )


def _name(recipe: Recipe) -> str:
    """The setup, and the scheme where it is not the usual one: the paper has one scheme and does not name it."""
    schemes = {step.scheme for step in recipe.steps if isinstance(step, Quantize) and not step.is_named} - {
        SCHEMES.first
    }
    return f"{recipe.setup} ({', '.join(sorted(schemes))})" if schemes else recipe.setup


def sizes_of_original(original: Answers) -> dict[str, int]:
    """A dense model's sparse size is its size; what is zero in it already is not counted."""
    model = original.record.model
    return {"sparse-bytes": model.bytes or 0, "bytes": model.bytes or 0, "nonzero": model.parameters or 0}


def search_of(
    search: RecipeSearch,
    searched: EvaluationSet,
    selection: EvaluationSet,
    grading: EvaluationSet,
    *,
    seed: int,
    command: str | None,
) -> Search:
    """Return the record of a search that has ended; what it found is evaluated on the facts that grade it."""
    keep, winner = search.criterion.keep, search.winner
    failed = [trial.recipe for trial in search.confirmed if not meets(trial.held_out, keep)]
    naive = [t for t in search.trials if _is_naive(t) and meets(t.kept, keep) and t.recipe not in failed]
    itself = compare(grading.original, grading.original, show_facts=False)
    if winner:
        ((_, answers),) = grading.evaluate([cell_of(Recipe.from_dict(dict(winner.recipe)))])
        winner = replace(winner, graded=compare(grading.original, answers, show_facts=False).kept)
    nearest = max(search.confirmed, key=lambda t: (t.held_out and t.held_out.low) or 0.0, default=None)
    return Search(
        original=model_facts(searched.original.record.model),
        keep=keep,
        minimize=search.criterion.minimize,
        probes=tuple(probe.name for probe in selection.probes),
        searched=len(searched.original.answers),
        first=sum(len(searched.original.of(probe.name)) for probe in searched.first),
        held_out=len(selection.original.answers),
        graded=len(grading.original.answers),
        known_searched=searched.known,
        known_held_out=selection.known,
        known_graded=grading.known,
        level=search.level,
        sizes=search.sizes,
        tried=search.trials,
        confirmed=search.confirmed,
        winner=winner,
        closest=None if winner else nearest,
        naive=min(naive, key=lambda t: cheapness(t, search.criterion), default=None),
        seed=seed,
        versions=dict(searched.original.record.versions),
        command=command,
        known=selection.known_as,
        rounding=kept_by_rounding(itself.probes),
        templates=max(probe.templates or 1 for probe in selection.probes),
    )


def _is_naive(trial: Trial) -> bool:
    """Everything pruned by one amount, quantized or not."""
    return trial.kind == "paper" and all(step["scope"] == ["overall"] for step in trial.recipe["steps"])


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
    return compare(original, answers, show_facts=False).kept_at(level)


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
    """Return the level of the intervals of the held-out facts, where so many may be tried on them (Bonferroni).

    Of one it is 99 %: the share kept is skewed where a few relations lose much, so that an interval's lower end lies
    too high more often than its level says. So a recipe that keeps exactly what is asked for is selected in 5 of 100
    searches at most (`benchmarks/inference.py`).
    """
    return 1 - 0.01 / max(1, len(candidates))
