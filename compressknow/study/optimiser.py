"""Optuna as the optimiser of a search: the smallest size of which the lower end of the interval keeps enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from compressknow.errors import CompressknowError
from compressknow.probe.answers import Answers
from compressknow.report.search.records import Tried
from compressknow.study.grid import Cell
from compressknow.study.space import MOST, NONE, STEP, TILTS, Choice, Space, cell_of

if TYPE_CHECKING:
    import optuna

# Each cell's answers, as they come.
Ask = Callable[[Sequence[Cell]], Iterable[tuple[Cell, Answers]]]
# Trials that a cluster is given at once.
TOGETHER = 8


def require_optuna() -> None:
    """Raise CompressknowError where it is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise CompressknowError("Optuna is not installed.", hint="pip install 'compressknow[search]'") from None


def optimize(
    ask: Ask,
    minimize: str,
    keep: float,
    space: Space,
    trials: int,
    together: int,
    seed: int,
    original: int,
    note: Callable[[Cell, Answers, str], Tried],
) -> None:
    """Let Optuna choose recipes, `together` at a time, and tell it what came of them.

    Its state is kept nowhere: from one seed and the same results it makes the same choices. So a search that was
    stopped makes them again, finds the answers to the first of them on disk, and ends as if it had not been stopped.
    """
    study = _study(seed, space)
    for start in range(0, trials, together):
        asked = [study.ask() for _ in range(min(together, trials - start))]
        recipes = [(trial, space.recipe(_choice(trial, space))) for trial in asked]
        cells = {recipe: cell_of(recipe) for _, recipe in recipes if recipe is not None}
        found = {cell.recipe: note(cell, answers, "search") for cell, answers in ask(list(cells.values()))}
        for trial, recipe in recipes:
            if recipe is None:
                _tell(study, trial, original, keep - 1.0)
            else:
                kept = found[recipe].kept
                # Less than a byte or a weight: of two of one size the one that keeps more is the better.
                lost = 1 - (kept.value or 0.0)
                _tell(study, trial, found[recipe].sizes[minimize] + lost, keep - (kept.low or 0.0))


def _study(seed: int, space: Space) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for choice in space.beginnings():
        study.enqueue_trial(_parameters(choice))
    return study


def _tell(study: optuna.Study, trial: optuna.Trial, size: float, missing: float) -> None:
    """`missing` is what it lacks of the share to be kept: a trial will do where that is not positive."""
    trial.set_constraint("missing", missing)
    study.tell(trial, size)


def _choice(trial: optuna.Trial, space: Space) -> Choice:
    for scope in space.scopes:
        trial.suggest_int(scope, 0, MOST, step=STEP)
    trial.suggest_categorical("tilt", TILTS)
    trial.suggest_categorical("scheme", (NONE, *space.schemes))
    trial.suggest_categorical("quantized", (NONE, *space.quantized))
    chosen = trial.params
    amounts = tuple((scope, chosen[scope]) for scope in space.scopes)
    return Choice(amounts, chosen["tilt"], chosen["scheme"], chosen["quantized"])


def _parameters(choice: Choice) -> dict[str, Any]:
    return dict(choice.amounts) | {"tilt": choice.tilt, "scheme": choice.scheme, "quantized": choice.quantized}
