"""The typed records of a study: one original, the same facts asked of many compressed forms of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressknow.report.records import Comparison, ModelFacts


@dataclass(frozen=True, slots=True)
class StudyProbe:
    """What one probe is, and what the original knows of it.

    Attributes
    ----------
    average : ``micro`` or ``macro`` over relations: how the probe's protocol averages.
    accuracy : of the original, so averaged.
    majority : accuracy of always giving each relation's most frequent object; None where there is no such baseline.
    chance : expected accuracy of guessing; None where any text may be answered.
    correct : by fact, whether the original answers it right.
    """

    name: str
    n: int
    average: str
    accuracy: float
    majority: float | None
    chance: float | None
    correct: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class StudyCell:
    """One compressed form of the original.

    Attributes
    ----------
    key : unique in the study, of letters, digits, dots, hyphens: names its files.
    setup : the paper's name of it (``Att_GPQ 20%``), or a description by the same words.
    scope : ``attention``, ``feed-forward``, ``overall``, ``final``, ``self-attention``, ..., several joined by ``+``.
    method : the pruning method as a recipe names it (``l1-unstructured``), or None where nothing is pruned.
    amount : share of the weights that is pruned (0 to 1), or None.
    scheme : the int8 scheme (``int8``, ``int8-paper``, ``int8-weights``), or None.
    plain : the cell is made by scope, method, amount and scheme alone, over the whole scope at once: one of those that
        the paper's figures draw. False for cells narrowed by layers or patterns, pruned by layer, or of several steps.
    in_scope : parameters that the recipe acts on; `pruned` and `quantized` those that it changed.
    nonzero : weights that are not zero, of the whole model; `bytes` on disk, where pruned weights are dense;
        `sparse_bytes` what a sparse store would take: the non-zero weights at their width plus one bit a weight.
    correct : by probe, by fact in the order of `StudyProbe.correct`, whether it is answered right.
    """

    key: str
    setup: str
    scope: str
    method: str | None
    amount: float | None
    scheme: str | None
    plain: bool
    in_scope: int
    pruned: int
    quantized: int
    nonzero: int
    bytes: int
    sparse_bytes: int
    comparison: Comparison
    correct: Mapping[str, tuple[bool, ...]]


@dataclass(frozen=True, slots=True)
class FailedCell:
    """A cell that could not be made or asked, and why."""

    key: str
    setup: str
    why: str


@dataclass(frozen=True, slots=True)
class Study:
    """A whole study, in the order of its grid."""

    original: ModelFacts
    probes: tuple[StudyProbe, ...]
    cells: tuple[StudyCell, ...]
    failed: tuple[FailedCell, ...]
    versions: Mapping[str, str]
    command: str | None
    method: tuple[str, ...]  # sentences: how it was asked and judged, and the limits of that
