"""The paper's findings by method, in words: whether they change with what prunes, and with what quantizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compressknow.format import plain
from compressknow.pages.study.findings import PRUNING, QUANTIZATION, MethodFindings
from compressknow.pages.study.summary import listed
from compressknow.pages.study.tests import DOES_NOT_HOLD, HOLDS


def ids(found: Sequence[MethodFindings]) -> tuple[str, ...]:
    """The findings that any of them has, in order."""
    known = {finding.id for each in found for finding in each.findings}
    return tuple(sorted(known, key=lambda id: int(id.removeprefix("F"))))


def changes(found: Sequence[MethodFindings]) -> tuple[str, ...]:
    """In words, the findings that hold with one method and not with another; that there is none, where none is."""
    told = [
        f"{id} changes with the {'method that prunes' if kind == PRUNING else 'scheme'}: {_answers(id, of_kind)}."
        for kind, of_kind in _by_kind(found)
        for id in ids(of_kind)
        if {HOLDS, DOES_NOT_HOLD} <= {each.answer(id) for each in of_kind}
    ]
    return tuple(told) if told or not found else ("No finding holds with one method and fails with another.",)


def _by_kind(found: Sequence[MethodFindings]) -> Iterator[tuple[str, list[MethodFindings]]]:
    for kind in (PRUNING, QUANTIZATION):
        yield kind, [each for each in found if each.kind == kind]


def _answers(id: str, found: Sequence[MethodFindings]) -> str:
    named = {
        answer: [plain(each.name, 60) for each in found if each.answer(id) == answer]
        for answer in (HOLDS, DOES_NOT_HOLD)
    }
    return f"it holds with {listed(named[HOLDS])}, and does not hold with {listed(named[DOES_NOT_HOLD])}"
