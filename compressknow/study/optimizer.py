"""Optuna, which chooses the next recipes of a search from what the last ones came to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressknow.compress.recipe import Recipe
from compressknow.study.space import MOST, NONE, STEP, TILTS, Choice, Space

if TYPE_CHECKING:
    import optuna


class Optimizer:
    """Chooses recipes of a space, small ones that keep enough.

    Its state is kept nowhere: from one seed and the same results it makes the same choices. So a search that was
    stopped makes them again, finds the answers to the first of them on disk, and ends as if it had not been stopped.
    """

    def __init__(self, space: Space, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        for choice in space.beginnings():
            self._study.enqueue_trial(_parameters(choice))

    def choose(self, number: int) -> list[tuple[optuna.Trial, Recipe | None]]:
        """The next so many; None leaves the model as it is."""
        trials = [self._study.ask() for _ in range(number)]
        return [(trial, self._space.recipe(_choice(trial, self._space))) for trial in trials]

    def tell(self, trial: optuna.Trial, size: float, missing: float) -> None:
        """`missing` is what it lacks of the share to be kept: a trial will do where that is not positive."""
        trial.set_constraint("missing", missing)
        self._study.tell(trial, size)


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
