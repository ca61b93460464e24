"""Optuna as the optimiser of a search: the smallest size of which the lower end of the interval keeps enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
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
    journal: Path,
    trials: int,
    together: int,
    seed: int,
    original: int,
    note: Callable[[Cell, Answers, str], Tried],
) -> None:
    study = _study(journal, f"{minimize}, {keep:g} kept, seed {seed}", seed, space)
    earlier = [
        space.recipe(_choice_of(trial.params, space)) for trial in study.trials if trial.state.name == "COMPLETE"
    ]
    for cell, answers in ask([cell_of(recipe) for recipe in dict.fromkeys(earlier) if recipe is not None]):
        note(cell, answers, "search")
    while (left := trials - sum(trial.state.is_finished() for trial in study.trials)) > 0:
        asked = [study.ask() for _ in range(min(together, left))]
        recipes = [(trial, space.recipe(_choice(trial, space))) for trial in asked]
        cells = {recipe: cell_of(recipe) for _, recipe in recipes if recipe is not None}
        found = {cell.recipe: note(cell, answers, "search") for cell, answers in ask(list(cells.values()))}
        for trial, recipe in recipes:
            if recipe is None:
                _tell(study, trial, original, keep - 1.0)
            else:
                _tell(study, trial, found[recipe].sizes[minimize], keep - (found[recipe].kept.low or 0.0))


def _study(journal: Path, name: str, seed: int, space: Space) -> optuna.Study:
    """The optimiser's record on disk: a search that was stopped goes on with it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    is_new = name not in optuna.get_all_study_names(storage)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(storage=storage, study_name=name, sampler=sampler, load_if_exists=True)
    for trial in study.trials if not is_new else ():
        if trial.state == optuna.trial.TrialState.RUNNING:
            # A run that was killed has left it.
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    for choice in space.beginnings() if is_new else ():
        study.enqueue_trial(_parameters(choice))
    return study


def _tell(study: optuna.Study, trial: optuna.Trial, size: int, missing: float) -> None:
    """`missing` is what it lacks of the share to be kept: a trial will do where that is not positive."""
    trial.set_constraint("missing", missing)
    study.tell(trial, float(size))


def _choice(trial: optuna.Trial, space: Space) -> Choice:
    for scope in space.scopes:
        trial.suggest_int(scope, 0, MOST, step=STEP)
    trial.suggest_categorical("tilt", TILTS)
    trial.suggest_categorical("scheme", (NONE, *space.schemes))
    trial.suggest_categorical("quantized", (NONE, *space.quantized))
    return _choice_of(trial.params, space)


def _choice_of(parameters: Mapping[str, Any], space: Space) -> Choice:
    amounts = tuple((scope, parameters[scope]) for scope in space.scopes)
    return Choice(amounts, parameters["tilt"], parameters["scheme"], parameters["quantized"])


def _parameters(choice: Choice) -> dict[str, Any]:
    return dict(choice.amounts) | {"tilt": choice.tilt, "scheme": choice.scheme, "quantized": choice.quantized}
