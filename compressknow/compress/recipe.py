"""What to do to a checkpoint: steps in order, built by flags, read from TOML or from a manifest, stored in one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args

from compressknow.compress.parameters import Parameter
from compressknow.compress.pruning import METHODS, PruningMethod
from compressknow.compress.schemes import SCHEMES, Scheme
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
    if isinstance(value, Mapping):
        return f"{{{', '.join(_lines(dict(value)))}}}"
    # Numbers, booleans and texts are written as in JSON, but that TOML wants DEL escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# Parameters that every prune step says, whatever its method has of them.
SHARED = ("per_layer", "norm", "dim", "seed")
# Options of `convert`, in Python and on the command line, that a recipe says instead.
RECIPE_OPTIONS = (
    *("scope", "include", "exclude", "layers", "drop_blocks", "drop_neurons", "prune", "prune_method", *SHARED),
    *("quantize", "rounding", "smooth", "calibration", "calibration_tokens", "module_map", "parameters"),
)
# The table of a recipe's file that says how a GGUF file is made: see `compressknow.export.choice`.
EXPORT = "export"
# How weights are brought to a scheme's grid.
ROUNDINGS = ("nearest", "gptq")
# The paper has one scheme, of 8 bits, and does not name it.
PAPER_BITS = 8

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


# The scopes that narrow what is dropped: blocks and neurons are of a side of the model, not of a kind of layer.
SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class DropBlocks:
    """Leave whole transformer blocks out, of each stack by itself.

    `blocks` is how many (those whose output is most like their input on the calibration text), or a text that names
    them by number: ``20-23``, ``0-2,5``, ``7``. `where` has the scope ``encoder`` or ``decoder``, or is as it is by
    default: all stacks of the language model.
    """

    blocks: int | str
    where: Where = Where()

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str):
            layer_ranges(self.blocks)
        elif not _is_whole(self.blocks) or self.blocks < 1:
            raise UsageError(
                f"{self.blocks!r} is no number of blocks to drop.", hint="Give a number such as 4, or blocks: 20-23."
            )
        _refuse_narrow(self.where, "drop_blocks")

    @property
    def calibrated(self) -> bool:
        """Whether the calibration text decides which blocks go."""
        return self.named is None

    @property
    def named(self) -> tuple[int, ...] | None:
        """The blocks that it names, ascending; None where it says how many."""
        if not isinstance(self.blocks, str):
            return None
        return tuple(sorted({number for numbers in layer_ranges(self.blocks).values() for number in numbers}))

    @property
    def label(self) -> str:
        """`Drop4`: how many blocks go."""
        return f"Drop{self.blocks if self.named is None else len(self.named)}{_side(self.where)}"


@dataclass(frozen=True)
class DropNeurons:
    """Leave hidden units of the feed-forward blocks out: `amount` (0-1, both excluded) of them, the same number in each
    block.

    What is kept is rounded to the nearest multiple of `multiple`. By default that is the largest power of two up to 128
    that divides the width at least eight times, so that what took columns in groups before (int4, kernels) still can.
    `where` is as for `DropBlocks`.
    """

    amount: float
    multiple: int | None = None
    where: Where = Where()

    def __post_init__(self) -> None:
        if not _is_number(self.amount) or not 0 < self.amount < 1:
            raise UsageError(
                f"The amount of neurons to drop must be greater than 0 and less than 1: {self.amount!r}.",
                hint=f"{_as_a_share(self.amount)}0.2 drops 20 % of the neurons of each feed-forward block.",
            )
        if self.multiple is not None and (not _is_whole(self.multiple) or self.multiple < 1):
            raise UsageError(
                f"multiple must be a whole number of at least 1: {self.multiple!r}.", hint="1 is the exact amount."
            )
        _refuse_narrow(self.where, "drop_neurons")

    @property
    def calibrated(self) -> bool:
        """The calibration text decides which neurons go."""
        return True

    @property
    def label(self) -> str:
        """`DropNeurons 20%`."""
        return f"DropNeurons{_side(self.where)} {self.amount * 100:.6g}%"


def _refuse_narrow(where: Where, key: str) -> None:
    if where != Where() and (where != Where(where.scope) or not set(where.scope) <= set(SIDES)):
        raise UsageError(
            f"{key} takes no other scope than encoder or decoder, and no include, exclude or layers.",
            hint="Put what prunes and quantizes into steps of their own.",
        )


def _side(where: Where) -> str:
    return "" if where == Where() else f"[{'+'.join(where.scope)}]"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Prune:
    """Zero `amount` (0-1, both excluded) of the weights, which `method` chooses: see `compressknow.compress.pruning`.

    `l1-unstructured` and `random-unstructured` choose single weights, over all of the scope together or, with
    `per_layer`, in each tensor by itself. The structured methods take whole output channels (`dim` 0) or input channels
    (`dim` 1) of each layer, and of each expert in a fused stack, however its matrix is stored; `ln-structured` those of
    the smallest L`norm`. `seed` is for the random methods. `parameters` are those of other methods, by name. Semantics
    are those of torch.nn.utils.prune.
    """

    amount: float
    method: str = METHODS.first
    where: Where = Where()
    per_layer: bool = False
    norm: float = 1
    dim: int = 0
    seed: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _is_number(self.amount) or not 0 < self.amount < 1:
            raise UsageError(
                f"The pruning amount must be greater than 0 and less than 1: {self.amount!r}.",
                hint=f"{_as_a_share(self.amount)}0.2 prunes 20 % of the weights; leave pruning out to prune none.",
            )
        if self.method not in METHODS:
            near = did_you_mean(str(self.method), METHODS)
            raise UsageError(f"Unknown pruning method {self.method!r}.", hint=f"{near}There is {', '.join(METHODS)}.")
        given = dict(self.parameters)
        for each in _shared_parameters():
            object.__setattr__(self, each.name, each.check(given.pop(each.name, getattr(self, each.name))))
        object.__setattr__(self, "parameters", given)
        object.__setattr__(self, "parameters", _own(self.chosen))
        with METHODS.answering(self.method):
            self.chosen.check(self.amount)

    @cached_property
    def chosen(self) -> PruningMethod:
        """The method, with its parameters."""
        method = METHODS[self.method]
        has = {each.name for each in method.parameters()}
        return method.with_values({name: getattr(self, name) for name in SHARED if name in has} | dict(self.parameters))

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations."""
        return self.chosen.needs in ("norms", "products")

    @property
    def structured(self) -> bool:
        """Whether whole channels fall."""
        return self.chosen.structured

    @property
    def is_global(self) -> bool:
        """Whether one choice is made over all tensors of the scope together."""
        return self.chosen.over_scope

    @property
    def label(self) -> str:
        """`L1-structured`, `L1-unstructured` as the paper writes them."""
        return self.chosen.label


@dataclass(frozen=True)
class Quantize:
    """Store weights by one of the schemes of `compressknow.compress.schemes`, with its `parameters` by name.

    `rounding` brings them to its grid: ``nearest``, or ``gptq`` (Frantar et al. 2022), column by column, the error
    carried on to what is not yet rounded. `smooth` (0-1, of schemes that round activations by token) moves that much of
    the activations' outliers into the weights (Xiao et al. 2023, alpha).
    """

    scheme: str = SCHEMES.first
    where: Where = Where()
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rounding: str = ROUNDINGS[0]
    smooth: float | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            hint = f"{did_you_mean(str(self.scheme), SCHEMES)}There is {', '.join(SCHEMES)}."
            raise UsageError(f"Unknown scheme {self.scheme!r}.", hint=hint)
        object.__setattr__(self, "parameters", _own(self.chosen))
        self._check_rounding()
        self._check_smooth()

    def _check_rounding(self) -> None:
        if self.rounding not in ROUNDINGS:
            near = did_you_mean(str(self.rounding), ROUNDINGS)
            raise UsageError(f"Unknown rounding {self.rounding!r}.", hint=f"{near}There is {', '.join(ROUNDINGS)}.")
        if self.rounding != "nearest" and self.chosen.rounds == "batch":
            raise UsageError(
                f"{self.scheme} is rounded to nearest alone.",
                hint="It is there to repeat the paper; use int8, int8-weights or int4 with gptq.",
            )

    def _check_smooth(self) -> None:
        if self.smooth is None:
            return
        if not _is_number(self.smooth) or not 0 < self.smooth <= 1:
            raise UsageError(f"smooth must be greater than 0 and at most 1: {self.smooth!r}.", hint="0.5 is usual.")
        if self.chosen.rounds != "token":
            raise UsageError(
                f"{self.scheme} has nothing to smooth: it rounds no activations by token.", hint="Use it with int8."
            )

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations."""
        return self.rounding != "nearest" or self.smooth is not None

    @cached_property
    def chosen(self) -> Scheme:
        """The scheme, with its parameters."""
        return SCHEMES[self.scheme].with_values(self.parameters)

    @property
    def label(self) -> str:
        """What the paper calls it, and what is not as usual. It says no scheme: a scheme of 8 bits goes without
        saying."""
        return " ".join(["GQ", *([self.scheme] if self.is_named else []), *self.further])

    @property
    def is_named(self) -> bool:
        """Whether the setup says the scheme."""
        return self.chosen.bits != PAPER_BITS

    @property
    def further(self) -> list[str]:
        """What is not as usual beside the scheme, in words."""
        further = [f"{name} {value}" for name, value in self.chosen.changed().items()]
        further += [self.rounding] if self.rounding != ROUNDINGS[0] else []
        return further + ([f"smooth {self.smooth:g}"] if self.smooth is not None else [])


def _own(chosen: PruningMethod | Scheme) -> dict[str, Any]:
    """The parameters that a step says only where its method or scheme has them."""
    return {name: value for name, value in chosen.values().items() if name not in SHARED}


@cache
def _shared_parameters() -> tuple[Parameter, ...]:
    known = {each.name: each for method in METHODS.built_in().values() for each in method.parameters()}
    return tuple(known[name] for name in SHARED)


@dataclass(frozen=True)
class Calibration:
    """The text that the model runs over, for steps that look at activations.

    `text` is ``self`` (the model's own samples), the path of a .txt or .jsonl file, or ``hf:DATASET``; `tokens` of it
    are taken, drawn by `seed`.
    """

    text: str = "self"
    tokens: int = 32_768
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise UsageError(
                f"{self.text!r} is no calibration text.", hint="Give self, FILE.txt, FILE.jsonl or hf:DATASET."
            )
        for name, least in (("tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"calibration: {name} must be a whole number of at least {least}: {value!r}.")


Step = DropBlocks | DropNeurons | Prune | Quantize
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


def _as_a_share(amount: Any) -> str:
    """A number that was meant as percent."""
    return f"Did you mean {amount:g}%, which is {amount / 100:g}? " if _is_number(amount) and 1 <= amount < 100 else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
