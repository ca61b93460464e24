"""Options that say a recipe, and the parameters that methods and schemes declare for options, recipes and grids alike.

A field of the class is a parameter::

    class FirstColumns(PruningMethod):
        width: int = parameter(default=1, help="Columns that go together.", must="be at least 1", fits=lambda n: n > 0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from compressknow.base.errors import UsageError, did_you_mean
from compressknow.compress.pruning import METHODS
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import (
    ROUNDINGS,
    SHARED,
    SIDES,
    Calibration,
    DropBlocks,
    DropNeurons,
    Prune,
    Quantize,
    Step,
    Where,
)
from compressknow.model.scopes import DEFAULT_SCOPES
from compressknow.model.structure import ModuleMap

# Options of `convert`, in Python and on the command line, that a recipe says instead.
RECIPE_OPTIONS = (
    *("scope", "include", "exclude", "layers", "drop_blocks", "drop_neurons", "prune", "prune_method", *SHARED),
    *("quantize", "rounding", "smooth", "calibration", "calibration_tokens", "module_map", "parameters"),
)


def recipe_of(
    where: Where,
    *,
    prune: float | None = None,
    prune_method: str = METHODS.first,
    quantize: str | None = None,
    module_map: ModuleMap = "structural",
    parameters: Mapping[str, Any] | None = None,
    **shared: Any,
) -> Recipe:
    """The recipe of single options, at most one step of a kind, in one place. See `DropBlocks`, `DropNeurons`, `Prune`
    and `Quantize`.

    Parameters
    ----------
    parameters : of the method and of the scheme; each takes those that it has.
    shared : `per_layer`, `norm`, `dim` and `seed`; `rounding` and `smooth`; `calibration` and `calibration_tokens`;
        `drop_blocks` and `drop_neurons`.
    """
    given = dict(parameters or {})
    removals = _removals(where, shared.pop("drop_blocks", None), shared.pop("drop_neurons", None))
    rounded = {name: shared.pop(name) for name in ("rounding", "smooth") if shared.get(name) is not None}
    text, tokens = shared.pop("calibration", None), shared.pop("calibration_tokens", None)
    steps: list[Prune | Quantize] = []
    if prune is not None:
        steps.append(Prune(prune, prune_method, where, **{n: v for n, v in shared.items() if n in SHARED}))
    if quantize is not None:
        steps.append(Quantize(quantize, where, **rounded))
    elif rounded.get("smooth") is not None or rounded.get("rounding", "nearest") != "nearest":
        raise UsageError("There is nothing to round.", hint="--rounding and --smooth go with --quantize SCHEME.")
    calibration = _calibration_of(text, tokens, shared.get("seed", 0), [*removals, *steps])
    _refuse_strangers(given, steps)
    chosen = (replace(step, parameters=_taken(given, step)) for step in steps)
    return Recipe((*removals, *chosen), module_map, calibration)


def refuse_beside_recipe(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UsageError where an option that a recipe says instead is not what it is when left out; several values may
    come as any kind of sequence."""
    if beside := [name for name, default in defaults.items() if _plain(given[name]) != _plain(default)]:
        raise UsageError(f"A recipe cannot be combined with {', '.join(beside)}.")


def _plain(value: Any) -> Any:
    """One scope is as good as a sequence of it, and nothing chosen is None; zero is a choice."""
    if isinstance(value, list | tuple | dict):
        return tuple(value) or None
    return (value,) if isinstance(value, str) else value


def convert_options(recipe: Recipe) -> list[str] | None:
    """The options of `convert` that give this recipe; None where these cannot say it, and a file must.

    >>> convert_options(Recipe((Prune(0.1, where=Where(("attention",))), Quantize("int8", Where(("attention",))))))
    ['--scope', 'attention', '--prune', '0.1', '--quantize', 'int8']
    """
    given = {name: value for step in recipe.steps for name, value in _options_of(step).items()}
    if recipe.calibration:
        given |= {"calibration": recipe.calibration.text, "calibration_tokens": recipe.calibration.tokens}
    own = {name: given.pop(name) for name in list(given) if name not in RECIPE_OPTIONS}
    where = next((step.where for step in recipe.steps if isinstance(step, Prune | Quantize)), recipe.steps[0].where)
    try:
        if recipe_of(where, module_map=recipe.module_map, parameters=own, **given) != recipe:
            return None
    except UsageError:
        return None
    placed = {"scope": where.scope, "include": where.include, "exclude": where.exclude, "layers": where.layers}
    said = placed | {"module_map": recipe.module_map} | given | own
    return [word for name, value in said.items() if value != _USUAL.get(name) for word in _as_words(name, value)]


# What an option of `convert` says where it is left out.
_USUAL: dict[str, Any] = {
    **{"scope": DEFAULT_SCOPES, "module_map": "structural", "prune_method": METHODS.first, "rounding": ROUNDINGS[0]},
    **{"calibration": Calibration.text, "calibration_tokens": Calibration.tokens},
    **{"per_layer": False, "norm": 1, "dim": 0, "seed": 0},
}


def _options_of(step: Step) -> dict[str, Any]:
    """What says one step, by the names of `recipe_of`, with the parameters of its method or scheme among them."""
    if isinstance(step, DropBlocks):
        return {"drop_blocks": step.blocks}
    if isinstance(step, DropNeurons):
        return {"drop_neurons": step.amount}
    if isinstance(step, Quantize):
        return {"quantize": step.scheme, "rounding": step.rounding, "smooth": step.smooth, **step.chosen.changed()}
    shared = {name: getattr(step, name) for name in SHARED}
    return {"prune": step.amount, "prune_method": step.method, **step.chosen.changed(), **shared}


def _as_words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else []
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    return [word for each in values for word in (option, f"{each:g}" if isinstance(each, float) else str(each))]


def _removals(where: Where, blocks: int | str | None, neurons: float | None) -> list[Step]:
    """The steps that leave something out; of a scope, only the sides of an encoder-decoder model narrow them."""
    side = Where(where.scope) if set(where.scope) <= set(SIDES) else Where()
    dropped: list[Step] = [] if blocks is None else [DropBlocks(blocks, side)]
    return dropped if neurons is None else [*dropped, DropNeurons(neurons, where=side)]


def _calibration_of(text: str | None, tokens: int | None, seed: int, steps: Sequence[Step]) -> Calibration | None:
    """That of the options, where there are any or a step wants it."""
    given: dict[str, Any] = {name: value for name, value in (("text", text), ("tokens", tokens)) if value is not None}
    if not given and not any(step.calibrated for step in steps):
        return None
    return Calibration(**given, seed=seed)


def _taken(given: Mapping[str, Any], step: Prune | Quantize) -> dict[str, Any]:
    return {each.name: given[each.name] for each in step.chosen.parameters() if each.name in given}


def _refuse_strangers(given: Mapping[str, Any], steps: list[Prune | Quantize]) -> None:
    """Raise UsageError where a parameter is of no step."""
    known = {each.name for step in steps for each in step.chosen.parameters()}
    if strangers := sorted(set(given) - known):
        names = " and ".join(step.chosen.name for step in steps)
        near = did_you_mean(strangers[0], known)
        hint = f"{near}There is {', '.join(sorted(known))}." if known else None
        raise UsageError(f"{strangers[0]!r} is no parameter of {names}.", hint=hint)
