"""Which cell of a study is which: by scope, amount and scheme, and what to call it.

Only plain cells are looked for: those that the paper's tables and figures have a place for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from compressknow.report.study.records import Study, StudyCell, StudyProbe
from compressknow.report.text import plain

UNSTRUCTURED, STRUCTURED = "l1-unstructured", "ln-structured"
MODULES = ("overall", "attention", "feed-forward")
ATTENTION_KINDS = ("self-attention", "cross-attention", "encoder-attention", "decoder-attention")
# Among so few answers a model that always says the same scores as a majority does; among more it scores as guessing.
_FEW_ANSWERS = 5


def pruned(study: Study, scope: str, method: str = UNSTRUCTURED) -> dict[float, StudyCell]:
    """The cells of a scope that are pruned and not quantized, by amount in percent, ascending."""
    found = {percent(c): c for c in _plain(study, scope) if c.method == method and c.scheme is None}
    return dict(sorted(found.items()))


def quantized(study: Study, scope: str) -> dict[str, StudyCell]:
    """The cells of a scope that are quantized and not pruned, by scheme."""
    return {c.scheme: c for c in _plain(study, scope) if c.method is None and c.scheme is not None}


def pruned_and_quantized(study: Study, scope: str, scheme: str) -> dict[float, StudyCell]:
    """The cells of a scope that are pruned and then quantized by that scheme, by amount in percent, ascending."""
    found = {percent(c): c for c in _plain(study, scope) if c.method == UNSTRUCTURED and c.scheme == scheme}
    return dict(sorted(found.items()))


def schemes(study: Study) -> tuple[str, ...]:
    """The int8 schemes of the study's plain cells, in the order of the grid."""
    return tuple(dict.fromkeys(c.scheme for c in study.cells if c.plain and c.scheme is not None))


def percent(cell: StudyCell) -> float:
    """The amount pruned in percent, rounded where floats hold no more: 30, not 30.000000000000004."""
    return round(100 * (cell.amount or 0.0), 6)


def names(study: Study) -> dict[str, str]:
    """By key, what to call each cell: its setup, with the scheme where there are several, with its key where that
    does not tell it from another either.
    """
    several = len({cell.scheme for cell in study.cells} - {None}) > 1
    called = {
        cell.key: plain(cell.setup, 80) + (f" ({plain(cell.scheme, 20)})" if several and cell.scheme else "")
        for cell in study.cells
    }
    repeated = Counter(called.values())
    return {key: f"{name} [{plain(key, 60)}]" if repeated[name] > 1 else name for key, name in called.items()}


def floor(probe: StudyProbe) -> float:
    """The accuracy of a model that has forgotten everything: the paper's "zero or the majority baseline".

    That of always the same answer where there are few to choose from (BoolQ, PIQA, WinoGrande), else that of guessing,
    or 0 where any text may be answered.
    """
    if probe.chance is None:
        return 0.0
    few = probe.chance >= 1 / _FEW_ANSWERS
    return max(probe.chance, probe.majority or 0.0) if few else probe.chance


def _plain(study: Study, scope: str) -> Iterator[StudyCell]:
    return (cell for cell in study.cells if cell.plain and cell.scope == scope)
