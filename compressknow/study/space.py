"""The recipes that a search may choose, and Optuna, which chooses the next of them from what the last ones came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from compressknow.compress.options import recipe_of
from compressknow.compress.pruning import METHODS
from compressknow.compress.recipe import Recipe
from compressknow.compress.schemes import SCHEMES
from compressknow.compress.steps import ROUNDINGS, Calibration, Prune, Quantize, Step, Where
from compressknow.errors import UnsupportedError
from compressknow.model.scopes import scope_names
from compressknow.model.structure import ModuleMap, Structure
from compressknow.study.grid import fitting

if TYPE_CHECKING:
    import optuna


PRUNED = ("attention", "feed-forward")
MODULES = (*PRUNED, "overall")
# Both without the final layer: to quantize one that is tied to the embedding makes the model larger.
BOTH = "attention+feed-forward"
NONE = "none"
# In per cent; finer steps than this no few hundred facts tell apart.
MOST, STEP, TILTS = 80, 5, (0, 10, 20, 30)
BANDS = 4
# What each band is pruned by to see how much it bears.
TRIED = 0.5


@dataclass(frozen=True)
class Band:
    """Neighbouring layers of one scope, which are pruned alike: `layers` such as ``0-6``."""

    scope: str
    layers: str

    def pruned(self, amount: float, method: str = METHODS.first) -> Prune:
        return Prune(amount, method, Where((self.scope,), layers=self.layers))


@dataclass(frozen=True)
class Choice:
    """A point of the space; amounts and `tilt` in per cent.

    Attributes
    ----------
    amounts : by scope, pruned of a layer that bears as much as the middle one.
    tilt : pruned more of the layers that bear most, and less of those that bear least.
    scheme, quantized : scheme and its scope, or ``none`` both.
    """

    amounts: tuple[tuple[str, int], ...]
    tilt: int
    scheme: str
    quantized: str
    method: str = METHODS.first
    rounding: str = ROUNDINGS[0]


@dataclass(frozen=True)
class Ways:
    """What a search may choose beside schemes: methods that prune, roundings, and the text of those that look at
    activations."""

    methods: tuple[str, ...] = (METHODS.first,)
    roundings: tuple[str, ...] = (ROUNDINGS[0],)
    calibration: Calibration = field(default_factory=Calibration)


class Space:
    """The recipes that a search may choose for a model.

    Parameters
    ----------
    schemes : that may be chosen, beside none; with the nearest values of their parameters that the model can have.

    ways : what may be chosen beside them.

    Raises UnsupportedError where it can have none.
    """

    def __init__(
        self, structure: Structure, schemes: Sequence[str], module_map: ModuleMap, ways: Ways | None = None
    ) -> None:
        self.ways = ways or Ways()
        self._here = scope_names(structure)
        self.scopes = tuple(scope for scope in PRUNED if scope in self._here)
        self.quantized = (*self.scopes, BOTH, "overall") if len(self.scopes) > 1 else (*self.scopes, "overall")
        self.schemes, self.module_map = tuple(schemes), module_map
        self._parameters = {scheme: _fitting(structure, scheme) for scheme in self.schemes}
        self.bands = tuple(band for scope in self.scopes for band in _bands(structure, scope))
        self._rank: dict[Band, float] = {}

    def one_band_each(self) -> dict[Recipe, Band]:
        """Recipes that show how much each band bears."""
        return {Recipe((band.pruned(TRIED),), self.module_map): band for band in self.bands}

    def references(self) -> tuple[Recipe, ...]:
        """Setups of the paper to set a search's result beside: GP, GQ and GPQ of each module."""
        recipes = []
        for scope in (scope for scope in MODULES if scope in self._here):
            amounts = (0.1, 0.2, 0.3, 0.4, 0.5) if scope == "overall" else (0.2, 0.4)
            # The first of the schemes alone, if there is one.
            for scheme in (None, *self.schemes[:1]):
                parameters = self._parameters.get(scheme or NONE)
                recipes += [
                    recipe_of(
                        Where((scope,)),
                        prune=amount,
                        quantize=scheme,
                        module_map=self.module_map,
                        parameters=parameters,
                    )
                    for amount in ((None, *amounts) if scheme else amounts)
                ]
        return tuple(recipes)

    def learn(self, harm: Mapping[Band, float]) -> None:
        """Rank the bands of each scope by what pruning each did, from +1 (bears most) to -1 (bears least)."""
        for _, group in groupby(self.bands, key=lambda band: band.scope):
            order = sorted(group, key=lambda band: harm[band])
            for place, band in enumerate(order):
                self._rank[band] = 1 - 2 * place / max(1, len(order) - 1) if len(order) > 1 else 0.0

    def recipe(self, choice: Choice) -> Recipe | None:
        """The recipe of a choice, or None where it leaves the model as it is."""
        steps: list[Step] = [step for scope, amount in choice.amounts for step in self._pruned(scope, amount, choice)]
        if choice.scheme != NONE and choice.quantized != NONE:
            where = Where(tuple(choice.quantized.split("+")))
            rounding = ROUNDINGS[0] if SCHEMES[choice.scheme].rounds == "batch" else choice.rounding
            steps.append(Quantize(choice.scheme, where, self._parameters[choice.scheme], rounding))
        text = self.ways.calibration if any(step.calibrated for step in steps) else None
        return Recipe(tuple(steps), self.module_map, text) if steps else None

    def _pruned(self, scope: str, amount: int, choice: Choice) -> Iterator[Prune]:
        if not amount:
            return
        bands = [band for band in self.bands if band.scope == scope]
        if not choice.tilt or len(bands) < 2:
            # One threshold over all of the scope.
            yield Prune(amount / 100, choice.method, Where((scope,)))
            return
        for band in bands:
            tilted = amount + choice.tilt * self._rank.get(band, 0.0)
            stepped = min(MOST, STEP * round(tilted / STEP))
            if stepped > 0:
                yield band.pruned(stepped / 100, choice.method)

    def beginnings(self) -> Iterator[Choice]:
        """Choices to begin with: all pruned by one amount and quantized, the ones that people would try."""
        for amount in (0, 10, 20, 30):
            for scheme in (*self.schemes, NONE):
                if amount or scheme != NONE:
                    amounts = tuple((scope, amount) for scope in self.scopes)
                    yield Choice(
                        amounts,
                        0,
                        scheme,
                        NONE if scheme == NONE else self.quantized[-2],
                        self.ways.methods[0],
                        self.ways.roundings[0],
                    )


def _fitting(structure: Structure, scheme: str) -> dict[str, Any]:
    """Parameters of a scheme by which all of a model's layers can be stored."""
    fit = fitting(structure, scheme)
    if fit is None:
        shapes = {weight.shape for weight in structure.linears if weight.group not in (None, "vision")}
        reason = next(filter(None, map(SCHEMES[scheme].misfit, sorted(shapes))))
        raise UnsupportedError(
            f"{structure.architecture} has a layer that cannot be quantized to {scheme}.",
            why=reason,
            hint="Search without it, or convert with --scope or --exclude.",
        )
    return fit


def _bands(structure: Structure, scope: str) -> Iterator[Band]:
    """The layers of a scope in at most `BANDS` bands of equal size."""
    layers = sorted({w.layer for w in structure.linears if w.group == scope and w.layer is not None})
    number = min(BANDS, len(layers))
    for band in range(number):
        part = layers[band * len(layers) // number : (band + 1) * len(layers) // number]
        yield Band(scope, f"{part[0]}-{part[-1]}")


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
    method, rounding = (_one_of(trial, name, getattr(space.ways, f"{name}s")) for name in ("method", "rounding"))
    return Choice(amounts, chosen["tilt"], chosen["scheme"], chosen["quantized"], method, rounding)


def _one_of(trial: optuna.Trial, name: str, several: Sequence[str]) -> str:
    """What there is no choice of is no parameter: a search chooses as it would without."""
    return str(trial.suggest_categorical(name, several)) if len(several) > 1 else several[0]


def _parameters(choice: Choice) -> dict[str, Any]:
    said = {"tilt": choice.tilt, "scheme": choice.scheme, "quantized": choice.quantized}
    return dict(choice.amounts) | said | {"method": choice.method, "rounding": choice.rounding}
