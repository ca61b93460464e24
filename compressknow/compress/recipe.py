"""Recipes: steps in order, from options, TOML or a manifest, and named as in the paper."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from compressknow.base.errors import UnusedOptions, UsageError, suggest_word
from compressknow.base.reading import MANIFEST, group_by, read_json, read_toml
from compressknow.compress.parameters import Parameter, has_options, list_options, option
from compressknow.compress.pruning import METHODS
from compressknow.compress.schemes import SCHEMES
from compressknow.compress.steps import (
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
from compressknow.model.manifest import MANIFEST_NAME, SEAL, hash_manifest
from compressknow.model.structure import ModuleMap, check_module_map

# The table of a recipe file that is for GGUF files: see `compressknow.gguf.choice`.
EXPORT = "export"
# By the key that identifies a step, in the order of a recipe.
STEPS: dict[str, type[Step]] = {
    "drop_blocks": DropBlocks,
    "drop_neurons": DropNeurons,
    "prune": Prune,
    "quantize": Quantize,
}
_ORDER = tuple(STEPS.values())


@has_options
class Recipe:
    """Steps in order: drop blocks, drop neurons, prune, quantize, with at most one prune and one quantize step per
    weight. There is a `calibration` if and only if a step looks at activations."""

    steps: tuple[Step, ...]
    module_map: ModuleMap = option(
        default="structural",
        help="structural (default) or paper, the authors' split.",
        kind=ModuleMap,
        choices=get_args(ModuleMap),
    )
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError(
                "Nothing to do.", hint="Give --prune AMOUNT, --quantize SCHEME, --drop-blocks or --drop-neurons."
            )
        calibrated = any(step.calibrated for step in self.steps)
        if calibrated and self.calibration is None:
            object.__setattr__(self, "calibration", Calibration())
        if self.calibration is not None and not calibrated:
            raise UnusedOptions(
                "There is nothing to calibrate: no step looks at activations.",
                hint="Leave it out, or use --prune-method wanda or sparsegpt, --rounding gptq, --smooth, "
                "--drop-blocks N or --drop-neurons.",
                names=("calibration", "calibration_tokens"),
            )
        check_module_map(self.module_map)
        kinds = [_ORDER.index(type(step)) for step in self.steps]
        if kinds != sorted(kinds):
            if min(kinds) < _ORDER.index(Prune):
                what = "A recipe drops blocks first, then neurons, before it prunes and quantizes."
                raise UsageError(what, hint="Put the steps into this order.")
            raise UsageError("A recipe prunes before it quantizes.", hint="Put the quantize steps last.")

    @property
    def removals(self) -> tuple[DropBlocks | DropNeurons, ...]:
        """Return the steps that make the model smaller."""
        return tuple(step for step in self.steps if isinstance(step, DropBlocks | DropNeurons))

    @property
    def smooths(self) -> bool:
        """Return whether a step moves outliers of activations into weights."""
        return any(isinstance(step, Quantize) and step.smooth is not None for step in self.steps)

    @property
    def setup(self) -> str:
        """Return the paper's name for the setup (`Att_GPQ 20%`, `FLP L1-structured 40%`), or a similar description."""
        prunes = [step for step in self.steps if isinstance(step, Prune)]
        quantizes = [step for step in self.steps if isinstance(step, Quantize)]
        names = [_name_prune(step) for step in prunes] + [f"{step.where.label}_{step.label}" for step in quantizes]
        if len(prunes) == len(quantizes) == 1 and prunes[0].where == quantizes[0].where and prunes[0].is_global:
            quantized = quantizes[0].label.removeprefix("GQ")
            names = [f"{prunes[0].where.label}_GPQ {_name_amount(prunes[0])}{quantized}"]
        return " + ".join([*(step.label for step in self.removals), *names])

    @property
    def unnamed_schemes(self) -> tuple[str, ...]:
        """Return the schemes that `setup` does not name, those of 8 bits."""
        steps = (step for step in self.steps if isinstance(step, Quantize) and not step.is_named)
        return tuple(dict.fromkeys(step.scheme for step in steps))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; `from_dict` reads them."""
        calibration = {} if self.calibration is None else {"calibration": asdict(self.calibration)}
        return {"module_map": self.module_map, **calibration, "steps": [_step_to_dict(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Read plain values; `origin` names the file. Raises UsageError for unknown, missing or wrong keys."""
        unknown = sorted(set(values) - {"module_map", "steps", "calibration"})
        steps = values.get("steps")
        if unknown or not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            wrong = f"unknown key {unknown[0]!r}" if unknown else "no list of [[steps]]"
            raise UsageError(f"{origin}: {wrong}.", hint="See examples/recipes for the format.")
        try:
            parsed = tuple(_step_from_dict(step, f"{origin}, step {i + 1}") for i, step in enumerate(steps))
            calibration = read_calibration(values.get("calibration"), f"{origin}, calibration")
            return cls(parsed, values.get("module_map", "structural"), calibration)
        except UsageError as error:
            if error.what.startswith(origin):
                raise
            raise UsageError(f"{origin}: {error.what}", error.why, error.hint) from None


def read_calibration(values: Any, origin: str) -> Calibration | None:
    """Read a recipe's `calibration`, a table or just its `text`. Raises UsageError if it is neither."""
    if values is None:
        return None
    known = [each.name for each in fields(Calibration)]
    values = {"text": values} if isinstance(values, str) else values
    if not isinstance(values, dict):
        raise UsageError(f"{origin} must be a text, or a table of {', '.join(known)}.")
    check_keys(values, known, origin)
    return Calibration(**values)


def check_keys(values: Mapping[str, Any], known: Sequence[str], origin: str) -> None:
    """Raise UsageError if a table has a key that is not known."""
    if unknown := sorted(set(values) - set(known)):
        hint = f"{suggest_word(unknown[0], known)}Choose from {', '.join(known)}."
        raise UsageError(f"{origin}: unknown key {unknown[0]!r}.", hint=hint)


def read_values(path: Path, hint: str) -> dict[str, Any]:
    """Return the values of a JSON or TOML file, none if it is a list. Raises UsageError, with this `hint`, if it is
    missing, or if it cannot be read."""
    try:
        values = read_json(path, MANIFEST) if path.suffix == ".json" else read_toml(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe.", hint=hint) from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a recipe: {error}") from None
    return values if isinstance(values, dict) else {}


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file, a manifest, or a converted folder that holds one. Raises UsageError if there is
    none, or if the manifest was edited."""
    if path.is_dir():
        path = path / MANIFEST_NAME
    values = read_values(path, "Give a TOML file, a manifest or a converted folder.")
    # The hash in the record of an export, which has no list of tensors, is that of its file.
    if "tensors" in values and SEAL in values and values[SEAL] != hash_manifest(values):
        raise UsageError(
            f"{path} was edited: its sha256 does not match its contents, so its recipe cannot be trusted.",
            hint="Copy or download it again. To use the recipe as it is, copy it into a file of its own.",
        )
    values = values.get("recipe", values)
    # `export` reads its own table.
    values = {key: value for key, value in values.items() if key != EXPORT}
    return Recipe.from_dict(values, str(path))


def _step_to_dict(step: Step) -> dict[str, Any]:
    (action, amount), *modifiers = _list_fields(type(step), by="key").items()
    values = {action: getattr(step, amount)}
    if isinstance(step, Prune):
        values |= {"method": step.method, **{name: getattr(step, name) for name in SHARED}}
    if isinstance(step, Prune | Quantize):
        values |= step.parameters
    values |= {key: value for key, name in modifiers if (value := getattr(step, name)) != getattr(type(step), name)}
    if isinstance(step, Prune | Quantize):
        values |= {key: list(each) if isinstance(each, tuple) else each for key, each in asdict(step.where).items()}
    elif step.where != Where():
        values["scope"] = list(step.where.scope)
    values = {key: value for key, value in values.items() if value is not None}
    # JSON has no infinity.
    return {key: "inf" if isinstance(value, float) and math.isinf(value) else value for key, value in values.items()}


def _list_fields(step: type[Step], by: Literal["key", "name"]) -> dict[str, str]:
    """Return the fields of a step, its action first, by their keys in a recipe or the names of their options."""
    labels = {each.field: getattr(each, by) for each in list_options(step)}
    names = [each.name for each in fields(step) if each.name not in ("where", "parameters")]
    return {labels.get(name, name): name for name in names}


def _step_from_dict(values: dict[str, Any], origin: str) -> Step:
    values = dict(values)
    actions = sorted(STEPS.keys() & values.keys())
    if len(actions) != 1:
        raise UsageError(
            f"{origin}: a step has either prune = AMOUNT or quantize = SCHEME, or drop_blocks or drop_neurons.",
            hint=f"This one has {', '.join(sorted(values)) or 'no key'}.",
        )
    kind = STEPS[actions[0]]
    where_keys = [f.name for f in fields(Where)]
    where = Where(**{key: values.pop(key) for key in where_keys if key in values})
    keys = _list_fields(kind, by="key")
    step = kind(**{name: values.pop(key) for key, name in keys.items() if key in values}, where=where)
    known = {"scope", *keys} - {actions[0]}
    if isinstance(step, Prune | Quantize):
        known |= {*where_keys, *(each.name for each in step.chosen.parameters())}
    check_keys(values, sorted(known), origin)
    return replace(step, parameters=values) if isinstance(step, Prune | Quantize) else step


def _name_prune(step: Prune) -> str:
    percent = f"{step.amount * 100:.6g}%"
    if step.where == Where(("final",)):
        return f"FLP {step.label} {percent}"
    if step.is_global:
        return f"{step.where.label}_GP {_name_amount(step)}"
    return f"{step.where.label} {step.label}{' per layer' if step.per_layer else ''} {percent}"


def _name_amount(step: Prune) -> str:
    # The paper's own method is not named.
    method = "" if step.chosen == METHODS[METHODS.first] else f"{step.label} "
    return f"{method}{step.amount * 100:.6g}%"


# The options of `convert` that a recipe can set too, by name, in the order of the help page.
OPTIONS = {each.name: each for kind in (Where, *_ORDER, Calibration, Recipe) for each in list_options(kind)}


def list_parameters() -> dict[str, list[Parameter]]:
    """List the parameters of all usable methods and schemes, by name, which several may share."""
    usable = (*METHODS.usable()[0].values(), *SCHEMES.usable()[0].values())
    return group_by((parameter for each in usable for parameter in each.parameters()), lambda each: each.name)


def build_recipe(where: Where, *, parameters: Mapping[str, Any] | None = None, **options: Any) -> Recipe:
    """Build a recipe from single options: at most one step of each kind, all with the same `where`. The keys of
    `options` are in `OPTIONS`, without those of `where`, or in `SHARED`; None means not given. The method and the
    scheme each take the `parameters` that they have."""
    options = {name: value for name, value in options.items() if value is not None}
    # Removal steps can be restricted only to one side of an encoder-decoder model.
    side = Where(where.scope) if set(where.scope) <= set(SIDES) else Where()
    steps: list[Step] = []
    for action, kind in STEPS.items():
        if action in options:
            values = {field: options[name] for name, field in _list_fields(kind, by="name").items() if name in options}
            steps.append(kind(**values, where=where if kind in (Prune, Quantize) else side))
    if steps and where != side and not any(isinstance(step, Prune | Quantize) for step in steps):
        idle = [each for each in list_options(Where) if getattr(where, each.field) != getattr(side, each.field)]
        raise UnusedOptions(
            f"{idle[0].option} does not restrict what is dropped.",
            "Only --scope encoder and --scope decoder do; everything else applies to --prune and --quantize.",
            "Leave it out. To choose the blocks, name them: --drop-blocks 20-23.",
            names=[each.name for each in idle],
        )
    _check_has_step(options)
    text = {each.field: options[each.name] for each in list_options(Calibration) if each.name in options}
    calibrates = text or any(step.calibrated for step in steps)
    parameters = parameters or {}
    if steps:
        # Every prune step has these fields, even if its method has no such parameters.
        numbers = {name: options[name] for name in ("per_layer", "norm", "dim") if name in options}
        shared = {name: value for name, value in numbers.items() if value != getattr(Prune, name)}
        chosen = [step.chosen for step in steps if isinstance(step, Prune | Quantize)]
        known = {parameter.name: parameter.option for each in chosen for parameter in each.parameters()}
        if unknown := sorted((shared.keys() | parameters.keys()) - known.keys()):
            names = " and ".join(each.name for each in chosen) or "a step that drops blocks or neurons"
            option = f"--{str(unknown[0]).replace('_', '-')}"
            usable = {**METHODS.usable()[0], **SCHEMES.usable()[0]}
            owners = [name for name, each in usable.items() if unknown[0] in each.values()]
            hints = [f"It needs {' or '.join(owners)}." if owners else suggest_word(option, known.values()).rstrip()]
            hints += [f"Choose from {', '.join(sorted(known.values()))}."] if known else []
            raise UnusedOptions(
                f"{option} is not a parameter of {names}.", hint=" ".join(filter(None, hints)), names=[unknown[0]]
            )
    values = {**options, **parameters}
    for index, step in enumerate(steps):
        if isinstance(step, Prune | Quantize):
            taken = {each.name: values[each.name] for each in step.chosen.parameters() if each.name in values}
            steps[index] = replace(step, parameters=taken)
    return Recipe(
        tuple(steps),
        options.get("module_map", Recipe.module_map),
        Calibration(**text, seed=options.get("seed", 0)) if calibrates else None,
    )


def check_recipe_conflicts(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UsageError if an option that the recipe replaces is not at its default."""
    if conflicts := sorted(name for name, default in defaults.items() if _unify(options[name]) != _unify(default)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in conflicts)
        raise UsageError(f"--recipe cannot be combined with {flags}.")


def _unify(value: Any) -> Any:
    # One scope equals a sequence of one, and an empty sequence equals None; zero does not.
    if isinstance(value, list | tuple | dict):
        return tuple(value) or None
    return (value,) if isinstance(value, str) else value


def format_options(recipe: Recipe) -> list[str] | None:
    """Return the options of `convert` that give this recipe; None if only a file can.

    >>> format_options(Recipe((Prune(0.1, where=Where(("attention",))), Quantize("int8", Where(("attention",))))))
    ['--scope', 'attention', '--prune', '0.1', '--quantize', 'int8']
    """
    options: dict[str, Any] = {}
    for step in recipe.steps:
        options |= _get_options(step)
        if isinstance(step, Prune | Quantize):
            options |= step.chosen.changed()
        if isinstance(step, Prune):
            options |= {name: getattr(step, name) for name in SHARED}
    if recipe.calibration:
        options |= _get_options(recipe.calibration)
    parameters = {name: options.pop(name) for name in list(options) if name not in (*OPTIONS, *SHARED)}
    where = next((step.where for step in recipe.steps if isinstance(step, Prune | Quantize)), recipe.steps[0].where)
    options |= _get_options(recipe)
    try:
        if build_recipe(where, parameters=parameters, **options) != recipe:
            return None
    except UsageError:
        return None
    declared = list_parameters()
    # On the command line, only a flag that is on by default can be turned off.
    if any(value is False and declared[name][0].default is not True for name, value in parameters.items()):
        return None
    defaults = {name: each.field_default for name, each in OPTIONS.items()}
    defaults |= {name: getattr(Prune, name) for name in SHARED}
    options = _get_options(where) | _get_options(recipe) | options | parameters
    changed = ((name, value) for name, value in options.items() if name in STEPS or value != defaults.get(name))
    return [word for name, value in changed for word in _format_option(name, value)]


def _get_options(part: Step | Where | Calibration | Recipe) -> dict[str, Any]:
    return {each.name: getattr(part, each.field) for each in list_options(type(part))}


def _format_option(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    # Every digit counts: 1/3 is not 0.333333.
    texts = (str(each).removesuffix(".0") if isinstance(each, float) else str(each) for each in values)
    return [word for text in texts for word in (option, text)]


def _check_has_step(options: Mapping[str, Any]) -> None:
    """Raise UsageError if options set how to prune or round, but no option asks for it."""
    for verb, kind, further in (("prune", Prune, ("per_layer", "norm", "dim")), ("round", Quantize, ())):
        action, *others = list_options(kind)
        defaults = {each.name: each.default for each in others} | {name: getattr(kind, name) for name in further}
        if action.name not in options and any(options.get(name, value) != value for name, value in defaults.items()):
            *flags, last = (f"--{name.replace('_', '-')}" for name in defaults)
            hint = f"{', '.join(flags)} and {last} go with {action.option} {action.metavar}."
            raise UnusedOptions(f"There is nothing to {verb}.", hint=hint, names=defaults)


def to_toml(recipe: dict[str, Any]) -> str:
    """Return the recipe as TOML, without keys whose values are None or empty lists.

    >>> print(to_toml({"module_map": "paper", "steps": [{"prune": 0.2, "scope": ["attention"], "include": []}]}))
    module_map = "paper"
    <BLANKLINE>
    [[steps]]
    prune = 0.2
    scope = ["attention"]
    """
    settings = {key: value for key, value in recipe.items() if key != "steps"}
    steps = [line for step in recipe["steps"] for line in ["", "[[steps]]", *_write_toml_lines(step)]]
    return "\n".join(_write_toml_lines(settings) + steps).strip()


def _write_toml_lines(table: dict[str, Any]) -> list[str]:
    return [f"{key} = {_write_toml_value(value)}" for key, value in table.items() if value is not None and value != []]


def _write_toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_write_toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_write_toml_lines(dict(value)))}}}"
    # Numbers, booleans and strings are written as in JSON, except that TOML also requires DEL to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
