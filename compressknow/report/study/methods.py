"""The paper's findings by method: whether they change with what prunes, and with what quantizes.

Each is asked by the tests of `findings`, of the cells of one method alone, in the place of the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from compressknow.format import plain
from compressknow.report.study.findings import Finding, findings
from compressknow.report.study.records import UNSTRUCTURED, Study, StudyCell, methods, schemes
from compressknow.report.study.summary import listed
from compressknow.report.study.tests import DOES_NOT_HOLD, HOLDS

PRUNING, QUANTIZATION = "pruning", "quantization"


@dataclass(frozen=True, slots=True)
class MethodFindings:
    """The findings that the study has cells of one method for.

    Attributes
    ----------
    kind : ``pruning`` or ``quantization``; `name` is the method's or the scheme's, as in `StudyCell`.
    """

    kind: str
    name: str
    findings: tuple[Finding, ...]

    def answer(self, id: str) -> str | None:
        """To one of them; None where there are no cells for it."""
        return next((finding.answer for finding in self.findings if finding.id == id), None)


def by_method(study: Study) -> tuple[MethodFindings, ...]:
    """Of each method that modules are pruned by, and each scheme; of kinds of which the study has several."""
    pruning, quantization = methods(study), schemes(study)
    found = [_of(study, PRUNING, name) for name in pruning if len(pruning) > 1]
    found += [_of(study, QUANTIZATION, name) for name in quantization if len(quantization) > 1]
    return tuple(each for each in found if each.findings)


def _of(study: Study, kind: str, name: str) -> MethodFindings:
    cells = _as_the_papers(study, name) if kind == PRUNING else _quantized_by(study, name)
    alone = findings(replace(study, cells=tuple(cells)))
    return MethodFindings(kind, name, tuple(f for f in alone if f.paired_tests or f.bounds))


def _as_the_papers(study: Study, name: str) -> Iterator[StudyCell]:
    """The cells that a method prunes, as those of the paper's method."""
    return (replace(cell, pruning=UNSTRUCTURED) for cell in study.cells if cell.pruning == name)


def _quantized_by(study: Study, name: str) -> Iterator[StudyCell]:
    return (cell for cell in study.cells if cell.quantization == name)


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
