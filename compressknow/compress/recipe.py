"""Steps in order, read from TOML or from a manifest, stored in one, named as the paper names them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from compressknow.base.errors import UsageError, did_you_mean
from compressknow.base.reading import MANIFEST, read_json, read_toml
from compressknow.compress.pruning import METHODS
from compressknow.compress.steps import SHARED, Calibration, DropBlocks, DropNeurons, Prune, Quantize, Step, Where
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.model.structure import ModuleMap


def to_toml(recipe: dict[str, Any]) -> str:
    """The recipe as TOML; keys that hold nothing are left out.

    >>> print(to_toml({"module_map": "paper", "steps": [{"prune": 0.2, "scope": ["attention"], "include": []}]}))
    module_map = "paper"
    <BLANKLINE>
    [[steps]]
    prune = 0.2
    scope = ["attention"]
    """
    settings = {key: value for key, value in recipe.items() if key != "steps"}
    steps = [line for step in recipe["steps"] for line in ["", "[[steps]]", *_lines(step)]]
    return "\n".join(_lines(settings) + steps).strip()


def _lines(table: dict[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items() if value is not None and value != []]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_lines(dict(value)))}}}"
    # Numbers, booleans and texts are written as in JSON, but that TOML wants DEL escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# The table of a recipe's file that says how a GGUF file is made: see `compressknow.gguf.choice`.
EXPORT = "export"
# In the order in which a recipe has them, by the key that says what a step does.
STEPS: dict[str, type[Step]] = {
    "drop_blocks": DropBlocks,
    "drop_neurons": DropNeurons,
    "prune": Prune,
    "quantize": Quantize,
}
_ORDER = tuple(STEPS.values())


@dataclass(frozen=True)
class Recipe:
    """Steps in order: blocks are dropped, then neurons. What is left is pruned and quantized, each weight by one step
    of each kind at most.

    `calibration` is there where a step looks at activations, and nowhere else.
    """

    steps: tuple[Step, ...]
    module_map: ModuleMap = "structural"
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
            raise UsageError(
                "There is nothing to calibrate: no step looks at activations.",
                hint="Leave it out, or use --prune-method wanda or sparsegpt, --rounding gptq, --smooth, "
                "--drop-blocks N or --drop-neurons.",
            )
        if self.module_map not in get_args(ModuleMap):
            raise UsageError(f"Unknown module map {self.module_map!r}.", hint="There is structural and paper.")
        kinds = [_ORDER.index(type(step)) for step in self.steps]
        if kinds != sorted(kinds):
            if min(kinds) < _ORDER.index(Prune):
                what = "A recipe drops blocks first, then neurons, before it prunes and quantizes."
                raise UsageError(what, hint="Put the steps into this order.")
            raise UsageError("A recipe prunes before it quantizes.", hint="Put the quantize steps last.")

    @property
    def removals(self) -> tuple[DropBlocks | DropNeurons, ...]:
        """The steps that make the model smaller."""
        return tuple(step for step in self.steps if isinstance(step, DropBlocks | DropNeurons))

    @property
    def smooths(self) -> bool:
        """Whether a step moves outliers of activations into weights."""
        return any(isinstance(step, Quantize) and step.smooth is not None for step in self.steps)

    @property
    def setup(self) -> str:
        """The paper's name where the recipe is one of its setups (`Att_GPQ 20%`, `FLP L1-structured 40%`), else a
        description by the same words."""
        return " + ".join(_setup_parts(self.steps))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` takes them back."""
        calibration = {} if self.calibration is None else {"calibration": asdict(self.calibration)}
        return {"module_map": self.module_map, **calibration, "steps": [_step_to_dict(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Raises UsageError where a key is unknown, missing or of the wrong type; `origin` names the file."""
        unknown = sorted(set(values) - {"module_map", "steps", "calibration"})
        steps = values.get("steps")
        if unknown or not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            wrong = f"unknown key {unknown[0]!r}" if unknown else "no list of [[steps]]"
            raise UsageError(f"{origin}: {wrong}.", hint="See examples/recipes for the format.")
        parsed = tuple(_step_from_dict(step, f"{origin}, step {i + 1}") for i, step in enumerate(steps))
        calibration = calibration_from(values.get("calibration"), f"{origin}, calibration")
        return cls(parsed, values.get("module_map", "structural"), calibration)


def calibration_from(values: Any, origin: str) -> Calibration | None:
    """Of a recipe's key; a text alone says which text. Raises UsageError where it is of another form."""
    if values is None:
        return None
    known = {each.name for each in fields(Calibration)}
    given = {"text": values} if isinstance(values, str) else values
    if not isinstance(given, dict) or set(given) - known:
        raise UsageError(f"{origin}: there is {', '.join(sorted(known))}.")
    return Calibration(**given)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file, a manifest, or a converted folder that holds one."""
    if path.is_dir():
        path = path / MANIFEST_NAME
    try:
        values = read_json(path, MANIFEST) if path.suffix == ".json" else read_toml(path)
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such recipe.", hint="Give a TOML file, a manifest or a converted folder."
        ) from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a recipe: {error}") from None
    values = values.get("recipe", values) if isinstance(values, dict) else {}
    # What `export` reads of the same file.
    values = {key: value for key, value in values.items() if key != EXPORT}
    return Recipe.from_dict(values, str(path))


def _step_to_dict(step: Step) -> dict[str, Any]:
    if isinstance(step, DropBlocks | DropNeurons):
        return _removal_to_dict(step)
    action = {"prune": step.amount} if isinstance(step, Prune) else {"quantize": step.scheme}
    values = {"method": step.method, **{n: getattr(step, n) for n in SHARED}} if isinstance(step, Prune) else {}
    values |= step.parameters
    if isinstance(step, Quantize):
        values |= {} if step.rounding == "nearest" else {"rounding": step.rounding}
        values |= {} if step.smooth is None else {"smooth": step.smooth}
    where = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(step.where).items()}
    return {**action, **{key: _plain(value) for key, value in (values | where).items() if value is not None}}


def _removal_to_dict(step: DropBlocks | DropNeurons) -> dict[str, Any]:
    scope = {"scope": list(step.where.scope)} if step.where != Where() else {}
    if isinstance(step, DropBlocks):
        return {"drop_blocks": step.blocks, **scope}
    multiple = {} if step.multiple is None else {"multiple": step.multiple}
    return {"drop_neurons": step.amount, **multiple, **scope}


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _step_from_dict(values: dict[str, Any], origin: str) -> Step:
    values = dict(values)
    actions = sorted(STEPS.keys() & values.keys())
    if len(actions) != 1:
        raise UsageError(
            f"{origin}: a step has either prune = AMOUNT or quantize = SCHEME, or drop_blocks or drop_neurons."
        )
    names = {f.name for f in fields(Where)}
    where = Where(**{key: _strings(values.pop(key), key, origin) for key in sorted(names & set(values))})
    if actions[0].startswith("drop_"):
        return _removal_from_dict(actions[0], values, where, origin)
    if "prune" in values:
        amount, said = values.pop("prune"), {key: values.pop(key) for key in ("method", *SHARED) if key in values}
        if not isinstance(said.get("per_layer", False), bool):
            raise UsageError(f"{origin}: per_layer must be true or false.")
        empty: Prune | Quantize = Prune(amount, where=where, **said)
    else:
        said = {key: values.pop(key) for key in ("rounding", "smooth") if key in values}
        empty = Quantize(values.pop("quantize"), where, **said)
    known = {each.name for each in empty.chosen.parameters()}
    known |= {"method", *SHARED} if isinstance(empty, Prune) else {"rounding", "smooth"}
    if unknown := sorted(set(values) - known):
        near = did_you_mean(unknown[0], sorted(known | names))
        hint = f"{near}There is {', '.join(sorted(known | names))}."
        raise UsageError(f"{origin}: unknown key {unknown[0]!r}.", hint=hint)
    return replace(empty, parameters=values)


def _removal_from_dict(action: str, values: dict[str, Any], where: Where, origin: str) -> Step:
    what, multiple = values.pop(action), values.pop("multiple", None) if action == "drop_neurons" else None
    if values:
        raise UsageError(f"{origin}: unknown key {min(values)!r}.", hint=f"{did_you_mean(min(values), ['scope'])}")
    return DropBlocks(what, where) if action == "drop_blocks" else DropNeurons(what, multiple, where)


def _strings(value: Any, key: str, origin: str) -> Any:
    if key == "layers" and isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, str):
        return (value,)
    if key != "layers" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UsageError(f"{origin}: {key} must be {'text such as 0-5' if key == 'layers' else 'a list of text'}.")


def _setup_parts(steps: tuple[Step, ...]) -> list[str]:
    prunes = [step for step in steps if isinstance(step, Prune)]
    quantizes = [step for step in steps if isinstance(step, Quantize)]
    removals = [step.label for step in steps if isinstance(step, DropBlocks | DropNeurons)]
    return removals + _of_weights(prunes, quantizes)


def _of_weights(prunes: list[Prune], quantizes: list[Quantize]) -> list[str]:
    if len(prunes) == 1 and len(quantizes) == 1 and prunes[0].where == quantizes[0].where and prunes[0].is_global:
        quantized = quantizes[0].label.removeprefix("GQ")
        return [f"{prunes[0].where.label}_GPQ {_prune_text(prunes[0])}{quantized}"]
    return [_prune_setup(step) for step in prunes] + [f"{step.where.label}_{step.label}" for step in quantizes]


def _prune_setup(step: Prune) -> str:
    if step.where == Where(("final",)):
        return f"FLP {step.label} {_percent(step)}"
    if step.is_global:
        return f"{step.where.label}_GP {_prune_text(step)}"
    return f"{step.where.label} {step.label}{' per layer' if step.per_layer else ''} {_percent(step)}"


def _prune_text(step: Prune) -> str:
    # The paper's own method goes without saying.
    return _percent(step) if step.chosen == METHODS[METHODS.first] else f"{step.label} {_percent(step)}"


def _percent(step: Prune) -> str:
    return f"{step.amount * 100:.6g}%"
