"""A recipe as TOML, as `compressknow convert --recipe` takes it."""

from __future__ import annotations

import json
from typing import Any


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
