"""Group items by a key."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


def group_by(items: Iterable[Item], get_key: Callable[[Item], Key | None]) -> dict[Key, list[Item]]:
    """Return the items of each key, in the order in which keys first occur; items whose key is None are left out.

    >>> group_by(["one", "two", "three", ""], lambda word: len(word) or None)
    {3: ['one', 'two'], 5: ['three']}
    """
    groups: dict[Key, list[Item]] = {}
    for item in items:
        if (key := get_key(item)) is not None:
            groups.setdefault(key, []).append(item)
    return groups
