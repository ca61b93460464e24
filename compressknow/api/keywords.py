"""Keyword arguments that the public functions share: each option of the command line, under the same name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ForwardRef, ParamSpec, TypedDict, TypeVar

from compressknow.base.errors import CompressknowError, UsageError, suggest_word
from compressknow.compress.parameters import check_threads, make_plain

if TYPE_CHECKING:
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options

# Types of an argument, by its annotation, and what they are called.
_TYPES: dict[Any, tuple[Any, str]] = {
    "str | Path": (str | PathLike, "a name or a path"),
    "str | Path | None": (str | PathLike | None, "a name or a path"),
    "str | Path | Mapping[str, Any]": (str | PathLike | Mapping, "a name, a path or a dict"),
    "Mapping[str, Any] | None": (Mapping | None, "a dict"),
    "float | None": (Real | None, "a number"),
}
# Maximum characters of a value that a message shows.
_LONGEST = 80
P = ParamSpec("P")
R = TypeVar("R")


class RunKeywords(TypedDict, total=False):
    """Keywords for what is evaluated, and how: the fields of `compressknow.Options` and `compressknow.Settings`.

    `map` assigns the columns of a table, by key or as ``KEY=COLUMN``; `no_noise_floor` skips the noise floor.
    """

    data: str | Path | None
    seed: int
    protocol: str
    template: int
    templates: int
    limit: int | None
    context: int | None
    map: Mapping[str, str] | str | Sequence[str]
    split: str | None
    tasks: str | Path | None
    device: str
    dtype: str | None
    batch_size: int
    trust_remote_code: bool
    no_noise_floor: bool


class ServerKeywords(RunKeywords, total=False):
    """The same, with what runs a model; `model_name` is its name on a server."""

    runtime: str | None
    model_name: str | None
    parallel: int
    timeout: float


# Keywords whose fields have different names.
_RENAMED = {"map": "columns", "model_name": "model"}


def build_run_options(
    keywords: Mapping[str, Any], options: Options | None = None, settings: Settings | None = None
) -> tuple[Options, Settings]:
    """Return options and settings, with `keywords` taking precedence over their fields."""
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options
    from compressknow.evaluate.sources.columns import parse_columns

    check_type("options", options, Options | None, "a compressknow.Options")
    check_type("settings", settings, Settings | None, "a compressknow.Settings")
    named = {_RENAMED.get(name, name): value for name, value in keywords.items()}
    if "no_noise_floor" in named:
        named["noise_floor"] = not named.pop("no_noise_floor")
    of_settings = {each.name for each in fields(Settings)}
    running = {name: value for name, value in named.items() if name in of_settings}
    facts = {name: value for name, value in named.items() if name not in of_settings}
    if not isinstance(facts.get("columns", {}), Mapping):
        columns = [facts["columns"]] if isinstance(facts["columns"], str) else facts["columns"]
        check_type("map", columns, Sequence, "a mapping, or texts like KEY=COLUMN")
        for column in columns:
            check_type("map", column, str, "a mapping, or texts like KEY=COLUMN")
        facts["columns"] = parse_columns(columns)
    if "protocol" in facts:
        facts["protocol"] = str(facts["protocol"]).lower()
    return replace(options or Options(), **facts), replace(settings or Settings(), **running)


def check_type(name: str, value: object, kinds: Any, what: str) -> None:
    """Raise UsageError if an argument is of none of these kinds, or an empty text."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, str) and not value:
        raise UsageError(f"{option} is empty.", hint="Is a variable of your script not set?")
    if not isinstance(value, kinds):
        text = repr(value)
        # A loaded model would fill a page.
        shown = text if len(text) <= _LONGEST and "\n" not in text else f"{type(value).__name__} object"
        is_loaded = "path" in what and type(value).__module__ != "builtins"
        hint = "Give the folder that it is stored in." if is_loaded else None
        raise UsageError(f"{option} must be {what}: {shown}.", hint=hint)


def api_function(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: its signature lists every keyword, and its errors name parameters, not options.
    An unknown keyword is a TypeError that suggests the one probably meant."""
    signature = _list_keywords(inspect.signature(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := next((name for name in kwargs if name not in signature.parameters), None):
            near = suggest_word(unknown, signature.parameters)
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown!r}. {near}".rstrip())
        try:
            for name, value in (*zip(signature.parameters, args, strict=False), *kwargs.items()):
                if kinds := _TYPES.get(signature.parameters[name].annotation):
                    check_type(name, make_plain(value), *kinds)
                if name == "threads":
                    check_threads(value)
            return function(*args, **kwargs)
        except CompressknowError as error:
            flags = {name: each.default is False for name, each in signature.parameters.items()}
            # Those of other packages are not in the signature.
            error.name_parameters(dict.fromkeys(getattr(error, "names", ()), False) | flags)
            raise

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _list_keywords(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature with each shared keyword as a parameter of its own, with its default, for `help`."""
    *named, last = signature.parameters.values()
    if last.kind is not inspect.Parameter.VAR_KEYWORD:
        return signature
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options

    keywords = next(kind for kind in (ServerKeywords, RunKeywords) if kind.__name__ in str(last.annotation))
    defaults = vars(Options()) | vars(Settings())
    defaults["no_noise_floor"] = not defaults["noise_floor"]
    for name, kind in keywords.__annotations__.items():
        kind = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
        default = defaults[_RENAMED.get(name, name)]
        named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return signature.replace(parameters=named)


def list_paths(name: str, paths: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """Return the path, or several, given as the parameter `name`, as a list. Raises UsageError if one is no path."""
    listed = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
    for path in listed:
        check_type(name, path, str | PathLike, "a name or a path")
    return listed


def list_files(output: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return one output file, or several, as a list."""
    return list(map(Path, list_paths("output", output)))


def list_rules(name: str, rules: Mapping[str, str] | Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return rules for the types of weights, given as a mapping or as pairs, as pairs. Raises UsageError for others."""
    what = "a dict of types by scope or pattern, or pairs of both"
    check_type(name, rules, Mapping | Sequence, what)
    pairs = tuple(rules.items() if isinstance(rules, Mapping) else rules)
    for pair in pairs:
        check_type(name, pair, tuple | list, what)
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UsageError(f"--{name.replace('_', '-')} must be {what}: {pair!r}.")
    return tuple((which, chosen) for which, chosen in pairs)
