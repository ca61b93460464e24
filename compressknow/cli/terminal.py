"""The one place that prints: nothing reaches a terminal that would do more there than show itself.

Names of folders, values of configs, facts and the errors of others may hold escape sequences, or marks that turn the
direction of writing round. In text such characters are named, in JSON they are escaped.
"""

from __future__ import annotations

import re
from typing import Any

import click

from compressknow.report.text import is_seen, json_text, plain_lines


def show(text: str = "", *, err: bool = False) -> None:
    """Print text and a line's end; characters without a form of their own are named."""
    click.echo(plain_lines(text.replace("\t", " ").replace("\r\n", "\n")), err=err)


def show_json(values: Any) -> None:
    """Print values as JSON."""
    show_json_text(json_text(values))


def show_json_text(text: str) -> None:
    """Print a JSON text; what `show` would name is escaped, so that it stands for the same values."""
    # Outside its strings JSON holds nothing of the kind but its line ends.
    click.echo(re.sub(r"[^\x20-\x7e\n]", _escaped, text.rstrip("\n")))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if is_seen(character):
        return character
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
