"""Words of the command line, as the verbs take them in Python: an option is a parameter of the same name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ForwardRef, ParamSpec, TypedDict, TypeVar

from compressknow.base.errors import CompressknowError, suggest_word

if TYPE_CHECKING:
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options

P = ParamSpec("P")
R = TypeVar("R")


class Words(TypedDict, total=False):
    """Options of what is evaluated and how a model is run, as `compressknow.Options` and `compressknow.Settings` have
    them.

    `map` says which columns of a table are which, by key or as ``KEY=COLUMN``; `no_noise_floor` leaves that out.
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


class ServingWords(Words, total=False):
    """Words with what runs a model; `model_name` is its name on a server."""

    runtime: str | None
    model_name: str | None
    parallel: int
    timeout: float


# Words that the records have other names for.
_RENAMED = {"map": "columns", "model_name": "model"}


def build_records(
    words: Mapping[str, Any], options: Options | None = None, settings: Settings | None = None
) -> tuple[Options, Settings]:
    """Return the records of some words, which come before what `options` and `settings` say."""
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options
    from compressknow.evaluate.sources.columns import parse_columns

    named = {_RENAMED.get(name, name): value for name, value in words.items()}
    if "no_noise_floor" in named:
        named["noise_floor"] = not named.pop("no_noise_floor")
    of_settings = {each.name for each in fields(Settings)}
    running = {name: value for name, value in named.items() if name in of_settings}
    facts = {name: value for name, value in named.items() if name not in of_settings}
    for name in ("data", "tasks"):
        if facts.get(name) is not None:
            facts[name] = Path(facts[name])
    if not isinstance(facts.get("columns", {}), Mapping):
        columns = facts["columns"]
        facts["columns"] = parse_columns([columns] if isinstance(columns, str) else columns)
    if "protocol" in facts:
        facts["protocol"] = facts["protocol"].lower()
    return replace(options or Options(), **facts), replace(settings or Settings(), **running)


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Show every word in the signature of a verb, and name parameters, not options, in its errors. Raises TypeError for
    an unknown word, with the one that was probably meant."""
    signature = _spell_out(inspect.signature(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := next((name for name in kwargs if name not in signature.parameters), None):
            near = suggest_word(unknown, signature.parameters)
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown!r}. {near}".rstrip())
        try:
            return function(*args, **kwargs)
        except CompressknowError as error:
            error.name_parameters({name: each.default is False for name, each in signature.parameters.items()})
            raise

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _spell_out(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature with each word as a parameter, with the default of the records, as `help` shows it."""
    *named, last = signature.parameters.values()
    if last.kind is not inspect.Parameter.VAR_KEYWORD:
        return signature
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options

    words = next(kind for kind in (ServingWords, Words) if kind.__name__ in str(last.annotation))
    defaults = vars(Options()) | vars(Settings())
    defaults["no_noise_floor"] = not defaults["noise_floor"]
    for name, kind in words.__annotations__.items():
        kind = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
        default = defaults[_RENAMED.get(name, name)]
        named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return signature.replace(parameters=named)


def list_files(output: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that an output names: one by itself, or several."""
    return [Path(path) for path in ([output] if isinstance(output, str | Path) else output)]


def list_rules(rules: Mapping[str, str] | Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return which weights get which type: a mapping, or pairs."""
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    return tuple((which, chosen) for which, chosen in pairs)
