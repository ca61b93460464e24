"""What a manifest says of removal, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from compressknow.format import count, size


def removed_in_words(removed: Mapping[str, Any] | None) -> Iterator[str]:
    """Sentences on the entry ``removed`` of a manifest; none where it has none.

    >>> blocks = {"stack": "model.layers", "key": "num_hidden_layers", "before": 8, "after": 5, "dropped": [2, 3, 6]}
    >>> *_, last = removed_in_words({"blocks": [blocks], "neurons": [], "parameters": 1200, "bytes": 2400})
    >>> next(removed_in_words({"blocks": [blocks], "neurons": [], "parameters": 1200, "bytes": 2400}))
    '3 of the 8 blocks of model.layers were dropped: 2-3, 6.'
    >>> last
    'The model has 1,200 parameters fewer (2.4 kB).'
    """
    if not removed:
        return
    for one in removed["blocks"]:
        number, why = (
            one["before"] - one["after"],
            ", which change their input least" if one.get("similarities") else "",
        )
        which = ranges(one["dropped"]) + why if one["dropped"] else "those that change their input least"
        were = "was" if number == 1 else "were"
        yield f"{number} of the {one['before']} blocks of {one['stack']} {were} dropped: {which}."
    for one in removed["neurons"]:
        networks = len(one["modules"])
        where = "The feed-forward block has" if networks == 1 else f"Each of the {networks} feed-forward blocks has"
        yield f"{where} {count(one['after'])} neurons instead of {count(one['before'])} ({one['key']})."
    yield f"The model has {count(removed['parameters'])} parameters fewer ({size(removed['bytes'])})."


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, as `--drop-blocks` and `--layers` take them.

    >>> ranges([0, 2, 3, 4, 7])
    '0, 2-4, 7'
    """
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
