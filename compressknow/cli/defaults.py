"""Options that a project sets once: ``compressknow.toml``, or ``[tool.compressknow]`` in ``pyproject.toml``.

Of the folder that a command runs in and those above it, the nearest such file counts. An option on the command line
comes before the file; in the file, the table of a command before what stands above all tables; then the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from compressknow.base.errors import UsageError, did_you_mean

FILE, PROJECT = "compressknow.toml", "pyproject.toml"
# A file that came with someone's repository is not asked to run its code, to replace files or to upload any.
_COMMAND_LINE_ALONE = {
    *("trust_remote_code", "converter", "tasks", "ray", "overwrite", "output", "into_model_card"),
    *("push", "private", "debug", "help", "version"),
}


def project_defaults(
    name: str, command: click.Command, commands: Iterable[str], open_command: Callable[[str], click.Command | None]
) -> dict[str, Any]:
    """Return the values that the project's file has for the options of a command, as click takes them.

    Parameters
    ----------
    commands : the names of all of them; `open_command` imports one.

    Raises UsageError for a file that is no TOML, and for a key that is no option.
    """
    if (nearest := _find_file(Path.cwd())) is None:
        return {}
    file, values = nearest
    options = _options_of(command)
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key in tables:
        if key not in commands:
            raise UsageError(
                f"{file}: there is no command {key}.", hint=f"{did_you_mean(key, commands)}Rename the table."
            )
    shared = {_to_parameter(key): value for key, value in values.items() if key not in tables}
    own = {_to_parameter(key): value for key, value in tables.get(name, {}).items()}
    for key in [*shared, *own]:
        if key in _COMMAND_LINE_ALONE:
            raise UsageError(f"{file}: {key} is for the command line alone.", hint="Take it out of the file.")
    if unknown := next((key for key in own if key not in options), None):
        raise UsageError(
            f"{file}: {name} has no option {unknown}.", hint=f"{did_you_mean(unknown, options)}See {name} --help."
        )
    for key in shared.keys() - options.keys():
        # Of another command: only what none has is a mistake.
        if not any(key in _options_of(other) for other in map(open_command, commands) if other is not None):
            raise UsageError(f"{file}: no command has an option {key}.", hint="Mend the name, or take it out.")
    values = {key: value for key, value in {**shared, **own}.items() if key in options}
    return {key: _resolve_paths(value, options[key], file.parent) for key, value in values.items()}


def _options_of(command: click.Command) -> dict[str, click.Option]:
    return {str(each.name): each for each in command.params if isinstance(each, click.Option)}


def _find_file(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    for place in (folder, *folder.parents):
        if (place / FILE).is_file():
            return place / FILE, _read(place / FILE)
        if (place / PROJECT).is_file():
            values = _read(place / PROJECT).get("tool", {}).get("compressknow")
            if isinstance(values, dict):
                return place / PROJECT, values
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if file.name == PROJECT:
            # It is other tools' to complain of.
            return {}
        raise UsageError(f"{file} is no TOML.", why=str(error), hint="Mend it, or remove it.") from None


def _to_parameter(key: str) -> str:
    return key.replace("-", "_")


def _resolve_paths(value: Any, option: click.Option, folder: Path) -> Any:
    """Return a path as seen from the file's folder; several values as a list."""
    values = value if isinstance(value, list) else [value]
    if isinstance(option.type, click.Path):
        values = [str(folder / each) if isinstance(each, str) else each for each in values]
    return values if option.multiple or isinstance(value, list) else values[0]
