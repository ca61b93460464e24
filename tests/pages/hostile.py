"""Cards in which every text tries to break out of the page."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from compressknow.pages.records import Card

HOSTILE_TEXTS = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "</svg></style></script></title><b>",
    "\" onmouseover=\"alert(1)' x='",
    "a|b `c` ``d`` [x](http://example.org) ![y](z) **bold** <http://example.org> https://example.org www.example.org",
    "1. x\n# heading\n- item\n\n---\n```\nblock",
    "{{ 7 * 7 }}{% raw %} ${x} $x^2$ \\(x\\) &lt;i&gt; &#60;",
    "\u202egnikcattA\u2066 \u200fשלום 5 %\x00\x1b[31m\ud800",
    "x" * 10_000,
)
# Read by the code and not shown.
_UNCHANGED = {"show_facts", "sha256"}


def replace_texts(card: Card, text: str) -> Card:
    """Return the card with each of its texts replaced by `text`."""
    return _walk(card, lambda _: text)


def number_texts(card: Card, text: str) -> Card:
    """Return the card with each of its texts replaced by a different number and `text`."""
    numbers = itertools.count()
    return _walk(card, lambda _: f"{next(numbers)} {text}")


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in fields(value) if each.name not in _UNCHANGED]
        return replace(value, **{name: _walk(getattr(value, name), change) for name in names})
    if isinstance(value, tuple):
        return tuple(_walk(each, change) for each in value)
    if isinstance(value, dict):
        # Keys of recipes and groups are read by name; their values may be any text.
        return {key: _walk(each, change) for key, each in value.items()}
    return [_walk(each, change) for each in value] if isinstance(value, list) else value
