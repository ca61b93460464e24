"""What to do to a checkpoint: steps in order, built by flags, read from TOML or from a manifest, stored in one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from compressknow.errors import UsageError, did_you_mean
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.model.scopes import DEFAULT_SCOPES, check_patterns, check_scope_names, layer_ranges
from compressknow.model.structure import ModuleMap
from compressknow.reading import MANIFEST, read_json, read_toml


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
    # Numbers, booleans and texts are written as in JSON, but that TOML wants DEL escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


PruneMethod = Literal["l1-unstructured", "ln-structured", "random-unstructured", "random-structured"]
Scheme = Literal["int8", "int8-paper", "int8-weights"]
PRUNE_METHODS: tuple[PruneMethod, ...] = get_args(PruneMethod)
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
# Options of `convert`, in Python and on the command line, that a recipe says instead.
RECIPE_OPTIONS = (
    *("scope", "include", "exclude", "layers", "prune", "prune_method", "per_layer", "norm", "dim", "seed"),
    *("quantize", "module_map"),
)

# The paper's words for a scope (sections 2.2-2.5, figure 8), and ours for the one that it does not have.
PAPER_SCOPES = {
    "blocks": "Blocks",
    "attention": "Att",
    "feed-forward": "FF",
    "overall": "Overall",
    "self-attention": "SelfAtt",
    "cross-attention": "CrossAtt",
    "encoder-attention": "EncoderAtt",
    "decoder-attention": "DecoderAtt",
}


@dataclass(frozen=True)
class Where:
    """The Linear weights that a step acts on: a union of scopes, narrowed by module names and block numbers.

    A text of `scope` may name several, with commas between them. What no model could have is refused here, before any
    is looked at.
    """

    scope: tuple[str, ...] = DEFAULT_SCOPES
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str | None = None

    def __post_init__(self) -> None:
        scopes = tuple(dict.fromkeys(name.strip() for text in self.scope for name in text.split(",")))
        check_scope_names(scopes)
        check_patterns(self.include, self.exclude)
        if self.layers is not None:
            layer_ranges(self.layers)
        object.__setattr__(self, "scope", scopes)

    @property
    def label(self) -> str:
        named = "+".join(PAPER_SCOPES.get(scope, scope) for scope in self.scope)
        narrowed = [f"layers {self.layers}"] if self.layers else []
        narrowed += [f"include {pattern}" for pattern in self.include]
        narrowed += [f"exclude {pattern}" for pattern in self.exclude]
        return named + (f"[{', '.join(narrowed)}]" if narrowed else "")


@dataclass(frozen=True)
class Prune:
    """Zero `amount` (0-1, both excluded) of the weights.

    `l1-unstructured` and `random-unstructured` choose single weights, over all of the scope together or, with
    `per_layer`, in each tensor by itself. The structured methods take whole output channels (`dim` 0) or input channels
    (`dim` 1) of each layer, and of each expert in a fused stack, however its matrix is stored; `ln-structured` those of
    the smallest L`norm`. `seed` is for the random methods. Semantics are those of torch.nn.utils.prune.
    """

    amount: float
    method: PruneMethod = "l1-unstructured"
    where: Where = Where()
    per_layer: bool = False
    norm: float = 1
    dim: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.amount) or not 0 < self.amount < 1:
            raise UsageError(
                f"The pruning amount must lie between 0 and 1, both excluded: {self.amount!r}.",
                hint=f"{_as_a_share(self.amount)}0.2 prunes 20 % of the weights; leave pruning out to prune none.",
            )
        if self.method not in PRUNE_METHODS:
            near = did_you_mean(str(self.method), PRUNE_METHODS)
            hint = f"{near}There is {', '.join(PRUNE_METHODS)}."
            raise UsageError(f"Unknown pruning method {self.method!r}.", hint=hint)
        if not _is_number(self.norm) or not self.norm > 0:
            raise UsageError(f"The norm must be a number above 0 (inf for the largest magnitude): {self.norm!r}.")
        if not _is_whole(self.dim) or self.dim not in (0, 1):
            raise UsageError(f"The dimension must be 0 (output channels) or 1 (input channels): {self.dim!r}.")
        if not _is_whole(self.seed) or self.seed < 0:
            raise UsageError(f"The seed must be a whole number of at least 0: {self.seed!r}.")

    @property
    def structured(self) -> bool:
        return self.method.endswith("-structured")

    @property
    def is_global(self) -> bool:
        """Whether one choice is made over all tensors of the scope together."""
        return not self.structured and not self.per_layer

    @property
    def label(self) -> str:
        """`L1-structured`, `L1-unstructured` as the paper writes them."""
        name = self.method.replace("ln-", f"L{self.norm:g}-").replace("l1-", "L1-")
        return name + (f" dim {self.dim}" if self.structured and self.dim else "")


@dataclass(frozen=True)
class Quantize:
    """Store weights as int8 by one of the schemes of `compressknow.compress.quantize.SCHEME_ARGS`."""

    scheme: Scheme = "int8"
    where: Where = Where()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            hint = f"{did_you_mean(str(self.scheme), SCHEMES)}There is {', '.join(SCHEMES)}."
            raise UsageError(f"Unknown scheme {self.scheme!r}.", hint=hint)


Step = Prune | Quantize


@dataclass(frozen=True)
class Recipe:
    """Steps in order. A weight is pruned by one step and quantized by one step at most, in that order."""

    steps: tuple[Step, ...]
    module_map: ModuleMap = "structural"

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError("Nothing to do.", hint="Give --prune AMOUNT, --quantize SCHEME or both.")
        if self.module_map not in get_args(ModuleMap):
            raise UsageError(f"Unknown module map {self.module_map!r}.", hint="There is structural and paper.")
        kinds = [isinstance(step, Quantize) for step in self.steps]
        if kinds != sorted(kinds):
            raise UsageError("A recipe prunes before it quantizes.", hint="Put the quantize steps last.")

    @property
    def setup(self) -> str:
        """The paper's name where the recipe is one of its setups (`Att_GPQ 20%`, `FLP L1-structured 40%`), else a
        description by the same words."""
        return " + ".join(_setup_parts(self.steps))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` takes them back."""
        return {"module_map": self.module_map, "steps": [_step_to_dict(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Raises UsageError where a key is unknown, missing or of the wrong type; `origin` names the file."""
        unknown = sorted(set(values) - {"module_map", "steps"})
        steps = values.get("steps")
        if unknown or not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            wrong = f"unknown key {unknown[0]!r}" if unknown else "no list of [[steps]]"
            raise UsageError(f"{origin}: {wrong}.", hint="See examples/recipes for the format.")
        parsed = tuple(_step_from_dict(step, f"{origin}, step {i + 1}") for i, step in enumerate(steps))
        return cls(parsed, values.get("module_map", "structural"))


def recipe_of(
    where: Where,
    *,
    prune: float | None = None,
    prune_method: PruneMethod = "l1-unstructured",
    per_layer: bool = False,
    norm: float = 1,
    dim: int = 0,
    seed: int = 0,
    quantize: Scheme | None = None,
    module_map: ModuleMap = "structural",
) -> Recipe:
    """The recipe of single options: prune, quantize or both, in one place. See `Prune` and `Quantize`."""
    steps: list[Step] = []
    if prune is not None:
        steps.append(Prune(prune, prune_method, where, per_layer, norm, dim, seed))
    if quantize is not None:
        steps.append(Quantize(quantize, where))
    return Recipe(tuple(steps), module_map)


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
    return Recipe.from_dict(values, str(path))


def _step_to_dict(step: Step) -> dict[str, Any]:
    values = {f.name: getattr(step, f.name) for f in fields(step) if f.name != "where"}
    action = {"prune": values.pop("amount")} if isinstance(step, Prune) else {"quantize": values.pop("scheme")}
    if isinstance(step, Prune) and math.isinf(step.norm):
        values["norm"] = "inf"
    where = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(step.where).items()}
    return {**action, **{key: value for key, value in (values | where).items() if value is not None}}


def _step_from_dict(values: dict[str, Any], origin: str) -> Step:
    kind: type[Prune] | type[Quantize]
    values = dict(values)
    if ("prune" in values) == ("quantize" in values):
        raise UsageError(f"{origin}: a step has either prune = AMOUNT or quantize = SCHEME.")
    if "prune" in values:
        kind, values["amount"] = Prune, values.pop("prune")
    else:
        kind, values["scheme"] = Quantize, values.pop("quantize")
    if values.get("norm") == "inf":
        values["norm"] = math.inf
    names = {f.name for f in fields(Where)}
    where = {key: _strings(values.pop(key), key, origin) for key in sorted(names & set(values))}
    known = {f.name for f in fields(kind)} - {"where"}
    if unknown := sorted(set(values) - known):
        near = did_you_mean(unknown[0], sorted(known | names))
        hint = f"{near}There is {', '.join(sorted(known | names))}."
        raise UsageError(f"{origin}: unknown key {unknown[0]!r}.", hint=hint)
    if not isinstance(values.get("per_layer", False), bool):
        raise UsageError(f"{origin}: per_layer must be true or false.")
    return kind(**values, where=Where(**where))


def _strings(value: Any, key: str, origin: str) -> Any:
    if key == "layers" and isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, str):
        return (value,)
    if key != "layers" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UsageError(f"{origin}: {key} must be {'text such as 0-5' if key == 'layers' else 'a list of text'}.")


def _as_a_share(amount: Any) -> str:
    """A number that was meant as percent."""
    return f"Did you mean {amount:g}%, which is {amount / 100:g}? " if _is_number(amount) and 1 <= amount < 100 else ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _setup_parts(steps: tuple[Step, ...]) -> list[str]:
    prunes = [step for step in steps if isinstance(step, Prune)]
    quantizes = [step for step in steps if isinstance(step, Quantize)]
    if len(prunes) == 1 and len(quantizes) == 1 and prunes[0].where == quantizes[0].where and prunes[0].is_global:
        return [f"{prunes[0].where.label}_GPQ {_prune_text(prunes[0])}"]
    return [_prune_setup(step) for step in prunes] + [f"{step.where.label}_GQ" for step in quantizes]


def _prune_setup(step: Prune) -> str:
    if step.where == Where(("final",)):
        return f"FLP {step.label} {_percent(step)}"
    if step.is_global:
        return f"{step.where.label}_GP {_prune_text(step)}"
    return f"{step.where.label} {step.label}{' per layer' if step.per_layer else ''} {_percent(step)}"


def _prune_text(step: Prune) -> str:
    return _percent(step) if step.method == "l1-unstructured" else f"{step.label} {_percent(step)}"


def _percent(step: Prune) -> str:
    return f"{step.amount * 100:.6g}%"
