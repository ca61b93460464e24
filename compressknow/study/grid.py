"""Cells of a study: the recipes of a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, count, product
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UnsupportedError, UnusedOptions, UsageError, suggest_word
from compressknow.base.format import slugify
from compressknow.base.reading import read_toml
from compressknow.compress.calibrate.text import TOKENS, check_text, hash_text
from compressknow.compress.parameters import list_options
from compressknow.compress.pruning import METHODS
from compressknow.compress.recipe import OPTIONS, STEPS, Recipe, build_recipe, list_parameters
from compressknow.compress.schemes import SCHEMES
from compressknow.compress.steps import ROUNDINGS, Calibration, DropBlocks, DropNeurons, Prune, Quantize, Step, Where
from compressknow.model.structure import DEFAULT_SCOPES, ModuleMap, Structure, list_scopes
from compressknow.pages.study.records import ATTENTION_KINDS, STRUCTURED, UNSTRUCTURED

if TYPE_CHECKING:
    from compressknow.compress.convert import VariantMaker

# Sections 2.3 to 2.6 of the paper and its figure 8.
MODULES = ("attention", "feed-forward", "overall")
AMOUNTS = tuple(tenths / 10 for tenths in range(1, 10))
FEW_AMOUNTS = (0.2, 0.4)
PAPER_SCHEME = "int8-paper"
PAPER, METHODS_GRID = BUILT_IN = "paper", "methods"
# The grid of methods: pruning methods and amounts; the amount before int4; alpha of smoothing as in Xiao et al.
PRUNED_BY = (METHODS.first, "wanda", "sparsegpt")
METHOD_AMOUNTS, HALF, SMOOTH = (0.2, 0.3, 0.4, 0.5, 0.6), 0.5, 0.5

AXES = (*(each.key for each in OPTIONS.values() if each.axis), "seed")
# Keys of a prune or quantize step besides its amount or scheme, and of a calibration.
PRUNED, ROUNDED, CALIBRATED = (
    tuple(each.key for each in list_options(part) if each.key not in STEPS) for part in (Prune, Quantize, Calibration)
)
LOOKS = "Add a method such as wanda, rounding gptq, or smooth."
DRAWS = "Add a method such as random-unstructured or wanda, or rounding gptq."
FORMAT = """A grid file has an [axes] table of lists, and [[cells]] named one by one:

[axes]
scope = ["attention", "feed-forward"]
prune = [0.2, 0.4]
quantize = ["none", "int8"]

[[cells]]
name = "heads-only"
scope = "attention"
layers = "0-5"
prune = 0.5"""


@dataclass(frozen=True)
class Cell:
    """Recipe of a study. `key` is unique and names its folder: letters, digits, dots and hyphens. `text_sha256` is the
    hash of its calibration file, if any, so that a changed file makes another cell."""

    key: str
    recipe: Recipe
    text_sha256: str | None = None

    @property
    def plain(self) -> bool:
        """Return whether scope, `pruning`, amount and `quantization` describe the recipe fully, as figures require."""
        wheres = {step.where for step in self.recipe.steps}
        narrowed = any(replace(where, scope=DEFAULT_SCOPES) != Where() for where in wheres)
        kinds = [type(step) for step in self.recipe.steps]
        return len(wheres) == 1 and not narrowed and not self.recipe.removals and len(kinds) == len(set(kinds))

    @property
    def amount(self) -> float | None:
        """Return the share that is pruned (0 to 1); None if steps prune by different shares, or none prunes."""
        amounts = {step.amount for step in self.recipe.steps if isinstance(step, Prune)}
        return amounts.pop() if len(amounts) == 1 else None

    @property
    def pruning(self) -> str | None:
        """Return the pruning method with its unusual parameters, such as ``wanda pattern 2:4``."""
        steps = [step for step in self.recipe.steps if isinstance(step, Prune)]
        return _join(" ".join([step.method, *step.chosen.describe_changed()]) for step in steps) or None

    @property
    def quantization(self) -> str | None:
        """Return the scheme with its unusual parameters, such as ``int4 group_size 64 gptq``."""
        steps = [step for step in self.recipe.steps if isinstance(step, Quantize)]
        return _join(" ".join([step.scheme, *step.further]) for step in steps) or None

    @property
    def settings(self) -> dict[str, Any]:
        """Return all settings of the recipe by the names of a grid's axes; values of steps that differ are joined."""
        values: dict[str, list[Any]] = {}
        for name, value in (pair for step in self.recipe.steps for pair in _collect_settings(step).items()):
            values.setdefault(name, []).append(value)
        values["module_map"] = [self.recipe.module_map]
        if (text := self.recipe.calibration) is not None:
            values |= {"calibration": [text.text], "calibration_tokens": [text.tokens]}
            values.setdefault("seed", []).append(text.seed)
        return {name: each[0] if len(set(each)) == 1 else _join(map(str, each)) for name, each in values.items()}


def _join(of_steps: Iterable[str]) -> str:
    values = list(of_steps)
    return " + ".join(values[:1] if len(set(values)) == 1 else values)


def _collect_settings(step: Step) -> dict[str, Any]:
    values_by_key = {each.key: getattr(step, each.field) for each in list_options(type(step))}
    if isinstance(step, DropBlocks | DropNeurons):
        return values_by_key
    where = step.where
    values: dict[str, Any] = {"scope": "+".join(where.scope), "layers": where.layers or "all"}
    values |= {"include": ", ".join(where.include) or None, "exclude": ", ".join(where.exclude) or None}
    # Tables have the method before the amount.
    values |= {"method": step.method} if isinstance(step, Prune) else {}
    # JSON has no infinity.
    return (
        values | values_by_key | {name: "inf" if each == inf else each for name, each in step.chosen.values().items()}
    )


def list_cells(
    grid: str | Path | Mapping[str, Any],
    opened: Callable[[], VariantMaker],
    *,
    module_map: ModuleMap | None = None,
    quantize: str | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
) -> tuple[Cell, ...]:
    """Return the cells of ``paper``, ``methods``, a TOML file or the content of one; `opened` returns the model, if it
    is needed. Raises UsageError if the grid is invalid, or for options that do not apply to it; and as `hash_text`
    does."""
    text = {"calibration": calibration, "calibration_tokens": calibration_tokens}
    supported = {PAPER: ("module_map", "quantize"), METHODS_GRID: ("module_map", *CALIBRATED)}.get(str(grid), ())
    for name, value in {"module_map": module_map, "quantize": quantize, **text}.items():
        if value is not None and name not in supported:
            raise UnusedOptions(
                f"--{name.replace('_', '-')} does not apply to the grid {grid}.",
                hint=f"Set {name} in a grid file instead." if str(grid) in BUILT_IN else f"Set {name} in the file.",
                names=[name],
            )
    if calibration is not None:
        check_text(Calibration(calibration, calibration_tokens or TOKENS))
    chosen = module_map or "paper"
    if str(grid) == PAPER:
        return build_paper_grid(opened().structure(chosen), module_map=chosen, scheme=quantize or PAPER_SCHEME)
    if str(grid) == METHODS_GRID:
        cells = build_methods_grid(opened(), chosen, text)
    else:
        cells = build_grid(grid, "The grid") if isinstance(grid, Mapping) else read_grid(Path(grid))
    texts = {each: hash_text(each) if each else None for each in dict.fromkeys(c.recipe.calibration for c in cells)}
    return tuple(replace(cell, text_sha256=texts[cell.recipe.calibration]) for cell in cells)


def build_paper_grid(
    structure: Structure, *, module_map: ModuleMap = "paper", scheme: str = PAPER_SCHEME
) -> tuple[Cell, ...]:
    """Return the paper's grid, without scopes that the model lacks: GP 10-90 %, GQ and GPQ 20/40 % of attention,
    feed-forward and overall, the final layer pruned by 20/40 % (L1-structured and L1-unstructured), and, for
    encoder-decoder models, each kind of attention (figure 8). By default, module map and scheme are those of the
    authors' code; the scheme's parameters are as close to its defaults as fits all layers."""
    quantized: dict[str, Any] = {"quantize": scheme, "parameters": fit_parameters(structure, scheme) or {}}

    def recipe(scope: str, **options: Any) -> Recipe:
        return build_recipe(Where((scope,)), module_map=module_map, **options)

    recipes = [recipe(scope, prune=amount) for scope in MODULES for amount in AMOUNTS]
    kinds = ATTENTION_KINDS if "cross-attention" in list_scopes(structure) else ()
    for scope in (*MODULES, *kinds):
        recipes.append(recipe(scope, **quantized))
        recipes += [recipe(scope, prune=amount, **quantized) for amount in FEW_AMOUNTS]
    for method in (STRUCTURED, UNSTRUCTURED):
        recipes += [recipe("final", prune=amount, prune_method=method) for amount in FEW_AMOUNTS]
    scopes = set(list_scopes(structure))
    return _build_cells((None, r) for r in recipes if set(r.steps[0].where.scope) <= scopes)


def build_methods_grid(model: VariantMaker, module_map: ModuleMap, text: Mapping[str, Any]) -> tuple[Cell, ...]:
    """Return attention, feed-forward and overall, each pruned by 20 to 60 % (L1, Wanda, SparseGPT), quantized (int8,
    int8 smoothed, int4 to nearest and by GPTQ), and pruned by half and quantized to int4 by GPTQ, as far as the model
    supports it. int4 has the largest groups that divide all layers. `text` has the calibration arguments of
    `build_recipe`."""
    structure = model.structure(module_map)
    groups = fit_parameters(structure, "int4")

    def recipe(scope: str, **step: Any) -> Recipe:
        built = build_recipe(Where((scope,)), module_map=module_map, **step)
        return build_recipe(Where((scope,)), module_map=module_map, **step, **text) if built.calibration else built

    scopes = [scope for scope in MODULES if scope in list_scopes(structure)]
    pruned = product(PRUNED_BY, scopes, METHOD_AMOUNTS)
    recipes = [recipe(scope, prune=amount, prune_method=method) for method, scope, amount in pruned]
    ways: list[dict[str, Any]] = [{"quantize": "int8"}, {"quantize": "int8", "smooth": SMOOTH}]
    if groups is not None:
        int4 = {"quantize": "int4", "parameters": groups}
        gptq = int4 | {"rounding": "gptq"}
        ways += [int4, gptq, *({"prune": HALF, "prune_method": method} | gptq for method in PRUNED_BY)]
    recipes += [recipe(scope, **way) for way, scope in product(ways, scopes)]
    possible = []
    for each in recipes:
        with suppress(UnsupportedError):
            model.plan(each)
            possible.append(each)
    return _build_cells((None, each) for each in possible)


def fit_parameters(structure: Structure, scheme: str) -> dict[str, Any] | None:
    """Return parameters of a scheme that fit all of a model's layers; None if there are none."""
    shapes = {weight.shape for weight in structure.linears if weight.group not in (None, "vision")}
    with SCHEMES.explain_failures(scheme):
        return SCHEMES[scheme].fit(shapes)


def read_grid(path: Path) -> tuple[Cell, ...]:
    """Read the cells of a grid file (TOML), as `build_grid` makes them. Raises UsageError if it cannot be read."""
    try:
        values = read_toml(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such grid.", hint="Pass paper, methods or a TOML file.") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a grid: {error}", hint=FORMAT) from None
    return build_grid(values, str(path))


def build_grid(values: Mapping[str, Any], name: str) -> tuple[Cell, ...]:
    """Return the product of a grid's axes, and its named cells. Raises UsageError if there are none, or bad keys."""
    if unknown := sorted(set(values) - {"axes", "cells"}):
        raise UsageError(f"{name}: unknown key {unknown[0]!r}.", hint=FORMAT)
    axes, named = values.get("axes", {}), values.get("cells", [])
    if not isinstance(axes, dict) or not isinstance(named, list) or not all(isinstance(cell, dict) for cell in named):
        raise UsageError(f"{name}: [axes] is a table, and [[cells]] are tables.", hint=FORMAT)
    of_cells = (_parse_cell(cell, f"{name}, cell {i}") for i, cell in enumerate(named, 1))
    cells = _build_cells(chain(_expand_axes(axes, f"{name}, [axes]"), of_cells))
    if not cells:
        raise UsageError(f"{name} has no cell: nothing is pruned or quantized in it.", hint=FORMAT)
    return cells


def _expand_axes(axes: Mapping[str, Any], where: str) -> Iterator[tuple[None, Recipe]]:
    for name, axis in axes.items():
        if not isinstance(axis, list) or not axis:
            raise UsageError(f"{where}: the axis {name} must be a list, and not empty.", hint=FORMAT)
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    _check_keys(axes, points, where)
    for point in map(_drop_idle, points):
        if _has(point, "prune") or _has(point, "quantize"):
            yield None, _build_recipe(point, where)


def _check_keys(
    values: Mapping[str, Any], points: Sequence[Mapping[str, Any]], where: str, more: Sequence[str] = ()
) -> None:
    """Raise UsageError for keys that are neither a recipe's nor in `more`, or that apply to none of these points."""
    parameters = set().union(*map(_list_own_parameters, points))
    keys = [*more, *AXES, *(name for name in list_parameters() if name in parameters.difference(AXES))]
    if unknown := sorted(set(values) - set(keys)):
        owners = " or ".join(name for name in (*METHODS, *SCHEMES) if unknown[0] in _get_parameters(name))
        near = f"It needs {owners}. " if owners else suggest_word(unknown[0], keys)
        raise UsageError(f"{where}: {unknown[0]!r} is not a key here.", hint=f"{near}Choose from {', '.join(keys)}.")
    for conditional, applies, to, hint in _APPLY:
        idle = [key for key in conditional if _has(values, key)]
        if idle and not any(map(applies, points)):
            raise UsageError(f"{where}: {idle[0]} applies to {to}.", hint=hint)


def _drop_idle(point: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a point of the axes without keys that do not apply to its scheme and method."""
    rounds = SCHEMES[point["quantize"]].rounds if point.get("quantize") in SCHEMES else "token"
    idle = (*(["rounding"] if rounds == "batch" else []), *(["smooth"] if rounds != "token" else []))
    point = {name: value for name, value in point.items() if name not in idle}
    for keys, applies, *_ in _APPLY:
        if not applies(point):
            point = {name: value for name, value in point.items() if name not in keys}
    return point


def _is_calibrated(point: Mapping[str, Any]) -> bool:
    """Return whether a point's method or rounding looks at activations."""
    method = point.get("method", METHODS.first)
    looks = method in METHODS and METHODS[method].needs in ("norms", "products") and _has(point, "prune")
    return looks or point.get("rounding") in ROUNDINGS[1:] or _has(point, "smooth")


def _is_seeded(point: Mapping[str, Any]) -> bool:
    """Return whether a seed affects a point."""
    return "seed" in _list_own_parameters(point) or _is_calibrated(point)


# Keys that apply only to some points: the condition, in code and in words, and a hint on how to meet it.
_APPLY: tuple[tuple[Sequence[str], Callable[[Mapping[str, Any]], bool], str, str], ...] = (
    (PRUNED, lambda point: _has(point, "prune"), "pruning, and nothing is pruned", "Add prune."),
    (ROUNDED, lambda point: _has(point, "quantize"), "quantization, and nothing is quantized", "Add quantize."),
    (CALIBRATED, _is_calibrated, "methods that look at activations, and there is none", LOOKS),
    (("seed",), _is_seeded, "what is drawn or calibrated, and nothing is", DRAWS),
)


def _list_own_parameters(point: Mapping[str, Any]) -> set[str]:
    """Return the parameters of a point's method, if it prunes, and of its scheme."""
    method = point.get("method", METHODS.first) if _has(point, "prune") else None
    return _get_parameters(method) | _get_parameters(point.get("quantize"))


def _get_parameters(name: Any) -> set[str]:
    """Return the parameters of the method or scheme of that name; empty if there is none."""
    things = [registry[name] for registry in (METHODS, SCHEMES) if name in registry]
    return {each.name for thing in things for each in thing.parameters()}


def _parse_cell(cell: Mapping[str, Any], where: str) -> tuple[str | None, Recipe]:
    point = dict(cell)
    name = point.pop("name", None)
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{where}: its name must be a string.", hint=FORMAT)
    if "steps" in point:
        return name, Recipe.from_dict(point, where)
    _check_keys(point, [point], where, ("name", "steps"))
    if not _has(point, "prune") and not _has(point, "quantize"):
        raise UsageError(f"{where}: it neither prunes nor quantizes.", hint=FORMAT)
    return name, _build_recipe(point, where)


def _build_recipe(point: Mapping[str, Any], where: str) -> Recipe:
    # Layer 0 and seed 0 are values.
    values = {
        name: point[name] for name in point if _has(point, name) or (name in ("layers", "seed") and not point[name])
    }
    # "none" leaves a parameter out.
    parameters = {name: value for name, value in point.items() if value != "none"}
    place = _select(values, *(each.key for each in list_options(Where)))
    steps = []
    if "prune" in values:
        of_method = _get_parameters(values.get("method", METHODS.first)).difference(AXES)
        steps.append(_select(values, "prune", *PRUNED, "seed") | _select(parameters, *of_method) | place)
    if "quantize" in values:
        of_scheme = _get_parameters(values["quantize"])
        steps.append(_select(values, "quantize", *ROUNDED) | _select(parameters, *of_scheme) | place)
    more = _select(values, "module_map") | _build_calibration(values, where)
    return Recipe.from_dict({"steps": steps} | more, where)


def _build_calibration(point: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a recipe's calibration entry as a table of the fields of `Calibration`; empty if it has none."""
    calibration = point.get("calibration", {})
    table = dict(calibration) if isinstance(calibration, Mapping) else {"text": calibration}
    for name, key in (("tokens", "calibration_tokens"), ("seed", "seed")):
        if key in point and name in table:
            raise UsageError(f"{where}: calibration already has {name}.", hint=f"Leave out {key}.")
        table |= {name: point[key]} if key in point else {}
    return {"calibration": table} if table and _is_calibrated(point) else {}


def _select(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _has(point: Mapping[str, Any], name: str) -> bool:
    """Return whether a key has an effect. TOML has no null, so 0 means no pruning and "none" no quantization."""
    return point.get(name) not in (None, "none", 0)


def _build_cells(recipes: Iterable[tuple[str | None, Recipe]]) -> tuple[Cell, ...]:
    """Return the cells of distinct recipes, under unique keys: their names, if they have any."""
    cells: dict[str, Cell] = {}
    names: dict[Recipe, str | None] = {}
    for name, recipe in recipes:
        names[recipe] = names.get(recipe) or name
    for recipe, name in names.items():
        key = slugify(name) if name else name_recipe(recipe)
        numbered = (f"{key}-{number}" for number in count(2))
        unique = next(each for each in chain([key], numbered) if each not in cells)
        cells[unique] = Cell(unique, recipe)
    return tuple(cells.values())


def name_recipe(recipe: Recipe) -> str:
    """Return a name for a recipe's folder.

    >>> name_recipe(build_recipe(Where(("attention",)), prune=0.2, quantize="int8"))
    'att-gpq-20-int8'
    """
    parts = [slugify(recipe.setup), *recipe.unnamed_schemes]
    usual = Calibration()
    calibration = recipe.calibration or usual
    if calibration.text != usual.text:
        parts.append(slugify(Path(calibration.text).name))
    if calibration.tokens != usual.tokens:
        parts.append(f"{calibration.tokens}-tokens")
    seeds = dict.fromkeys([calibration.seed, *(step.seed for step in recipe.steps if isinstance(step, Prune))])
    parts += [f"seed-{seed}" for seed in seeds if seed != usual.seed]
    # A file name has at most 255 bytes, and each part may have nearly as many.
    return slugify("-".join(parts))
