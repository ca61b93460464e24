"""Parameters of pruning methods and schemes, and options of `convert`: declared once, for Python, the command line,
recipes and grids.

A field of a method's or a scheme's class is a parameter::

    class FirstColumns(PruningMethod):
        width: int = parameter(default=1, help="Columns per group.", must="at least 1", fits=lambda n: n > 0)

A field of a step (`compressknow.compress.steps`) is an option::

    @has_options
    class Quantize:
        rounding: str = option(default="nearest", help="nearest, or gptq.", choices=ROUNDINGS)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import PurePath
from typing import Any, Self, TypeVar, dataclass_transform

from compressknow.base.errors import UsageError, suggest_word

# Names with another meaning in a recipe, a grid or `convert`.
TAKEN = frozenset(
    (
        *("prune", "amount", "method", "quantize", "scheme", "steps", "module_map", "recipe", "parameters", "name"),
        *("scope", "include", "exclude", "layers", "where", "model", "output", "prune_method", "threads"),
        *("rounding", "smooth", "calibration", "calibration_tokens", "drop_blocks", "drop_neurons", "push", "private"),
        *("revision", "trust_remote_code", "dry_run", "overwrite", "json", "as_json", "on_progress", "help", "debug"),
    )
)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
T = TypeVar("T")


@dataclass(frozen=True)
class Parameter:
    """Parameter of a method or scheme: `kind` is bool, int, float or str; `fits` checks further conditions, which
    `must` describes."""

    name: str
    kind: type
    default: Any
    help: str
    must: str = ""
    fits: Callable[[Any], bool] = lambda _: True

    @property
    def option(self) -> str:
        """Return its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any) -> Any:
        """Return the value, with ``inf`` as a number. Raises UsageError if it is of another kind, or does not fit."""
        value = make_plain(value)
        if self.kind is float and value == "inf":
            value = math.inf
        if value is None and self.default is None:
            return value
        if not is_of(self.kind, value) or not self.fits(value):
            raise UsageError(f"{self.name} must be {self.must or _KINDS[self.kind]}: {value!r}.")
        return value


def parameter(
    *, default: Any, help: str, kind: type | None = None, must: str = "", fits: Callable[[Any], bool] = lambda _: True
) -> Any:
    """Declare a field as a parameter. Its kind defaults to that of the default; None is allowed only as the default."""
    return field(default=default, metadata={"parameter": (kind or type(default), help, must, fits)})


@dataclass(frozen=True)
class Option(Parameter):
    """Option of `convert`, which a step declares.

    Attributes
    ----------
    name, default : in Python and on the command line.
    kind : bool, int, float, str, ``int | str`` or a Literal.
    step, field, field_default : the class that declares it, its attribute, and the attribute's default.
    key : its name in recipes and, if it is an `axis`, in grids.
    metavar : placeholder of its value on the help page.
    is_share, multiple : whether a percentage such as ``20%`` is accepted, and whether it may be given several times.
    minimum : the smallest whole number that it can be.
    """

    kind: Any
    step: type = object
    field: str = ""
    field_default: Any = None
    key: str = ""
    choices: Iterable[str] = ()
    metavar: str | None = None
    is_share: bool = False
    multiple: bool = False
    minimum: int | None = None
    axis: bool = True


def option(*, default: Any = MISSING, help: str, **more: Any) -> Any:
    """Declare a field of a step as an option; `more` is as in `Option`. Name, key and the command line's default
    (`option_default`) default to those of the field."""
    return field(default=default, metadata={"option": {"help": help, **more}})


@dataclass_transform(frozen_default=True, field_specifiers=(option, field))
def has_options(kind: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields may be options."""
    return dataclass(frozen=True)(kind)


def list_options(step: type) -> tuple[Option, ...]:
    """List the options that the fields of a step declare, in order."""
    options = []
    for each in fields(step):
        if "option" in each.metadata:
            default = None if each.default is MISSING else each.default
            values = {"name": each.name, "kind": str, "option_default": default, **each.metadata["option"]}
            values = {"key": values["name"], "default": values.pop("option_default"), **values}
            options.append(Option(**values, step=step, field=each.name, field_default=default))
    return tuple(options)


@dataclass_transform(frozen_default=True, field_specifiers=(parameter,))
class Parametric:
    """Base of methods and schemes, whose parameters are the fields of their class, a frozen dataclass."""

    name = ""
    help = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True)(cls)
        for each in cls.parameters():
            if each.name in TAKEN:
                raise TypeError(f"No parameter can be called {each.name}.")
            if each.kind not in _KINDS:
                raise TypeError(f"The parameter {each.name} is neither bool, int, float nor str.")

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """List its parameters in the order of their declaration."""
        declared = []
        for each in fields(cls):  # type: ignore[arg-type]  # every subclass is a dataclass
            if "parameter" not in each.metadata:
                raise TypeError(f"{each.name} has a type, and is not a parameter(...): leave out the type.")
            kind, *rest = each.metadata["parameter"]
            declared.append(Parameter(each.name, kind, each.default, *rest))
        return tuple(declared)

    def values(self) -> dict[str, Any]:
        """Return the value of each parameter, by name."""
        return {each.name: getattr(self, each.name) for each in self.parameters()}

    def changed(self) -> dict[str, Any]:
        """Return the values that are not the default, by name."""
        return {p.name: value for p in self.parameters() if (value := getattr(self, p.name)) != p.default}

    def describe_changed(self) -> list[str]:
        """Return each value that is not the default as text: name and value, or only the name of a flag."""
        return [name if value is True else f"{name} {value}" for name, value in self.changed().items()]

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with these values. Raises UsageError if one has no such parameter, or does not fit."""
        known = {each.name: each for each in self.parameters()}
        if unknown := sorted(set(values) - set(known)):
            choices = f"It has {', '.join(known)}." if known else "It has none."
            suggestion = suggest_word(unknown[0], known)
            raise UsageError(f"{self.name} has no parameter {unknown[0]!r}.", hint=suggestion + choices)
        return dataclasses.replace(  # type: ignore[type-var]
            self, **{name: known[name].check(value) for name, value in values.items()}
        )


def make_plain(value: Any) -> Any:
    """Convert a scalar of NumPy or torch to Python's and a path to text; return other values unchanged."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return str(value) if isinstance(value, PurePath) else value


def make_fields_plain(step: Any) -> None:
    """Convert the values of a frozen dataclass with `make_plain`, in its `__post_init__`."""
    for each in fields(step):
        object.__setattr__(step, each.name, make_plain(getattr(step, each.name)))


def check_threads(threads: Any) -> None:
    """Raise UsageError if a number of threads is not a whole number of at least 1, or None for one per core."""
    if threads is not None and not (is_of(int, make_plain(threads)) and threads > 0):
        what = f"threads must be a whole number of at least 1: {threads!r}."
        raise UsageError(what, hint="Leave it out for one per core.")


def is_of(kind: type, value: Any) -> bool:
    """Return whether a value is of a parameter's kind: a bool is not a number, but an int is a float too."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
