"""The typed records of a study: one original, many compressed forms of it, and which cell is which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressknow.compress.pruning import METHODS
from compressknow.evaluate.grades import RECOGNIZED
from compressknow.format import count, estimate, plain, size
from compressknow.notebook import Summary, Tabular
from compressknow.pages.records import Comparison, ModelFacts

Setting = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class StudyProbe:
    """What one probe is, and what the original knows of it.

    Attributes
    ----------
    average : ``micro`` or ``macro`` over relations: how the probe's protocol averages.
    accuracy : of the original, so averaged.
    majority : accuracy of always giving each relation's most frequent object; None where there is no such baseline.
    chance : expected accuracy of guessing; None where any text may be answered.
    correct : by fact, whether the original answers it right; `relations` by fact, which relation it is of.
    templates : in how many wordings each fact was put; a fact is right then if more than half of them are.
    """

    name: str
    n: int
    average: str
    accuracy: float
    majority: float | None
    chance: float | None
    correct: tuple[bool, ...]
    relations: tuple[str, ...]
    templates: int = 1


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
    scheme : the scheme as a recipe names it (``int8-paper``), or None.
    pruning, quantization : method and scheme with what is not as usual of them (``wanda pattern 2:4``, ``int4 gptq``),
        and the calibration text where the study has several: what a line or a bar of the figures is of.
    settings : all that the recipe says, by the names of a grid's axes (``layers``, ``rounding``, ``calibration``, ...):
        texts, numbers, booleans, or None for "none"; what does not apply is not there.
    plain : the cell is made by scope, pruning, amount and quantization alone, in one step each: one of those that the
        figures draw. False for cells narrowed by layers or patterns, or of several steps.
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
    pruning: str | None
    quantization: str | None
    settings: Mapping[str, Setting]
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
    """A cell that could not be made or evaluated, or that was refused, and why."""

    key: str
    setup: str
    why: str


@dataclass(frozen=True, slots=True, repr=False)
class Study(Tabular):
    """A whole study, in the order of its grid. Its rows are those of ``cells.csv``."""

    original: ModelFacts
    probes: tuple[StudyProbe, ...]
    cells: tuple[StudyCell, ...]
    failed: tuple[FailedCell, ...]
    versions: Mapping[str, str]
    command: str | None
    method: tuple[str, ...]  # sentences: how it was evaluated and judged, and the limits of that
    refused: tuple[FailedCell, ...] = ()  # that the model cannot have: trying again changes nothing
    known: str = RECOGNIZED  # what counts as known: that or better, or only "produced"

    def _rows(self) -> list[dict[str, Any]]:
        from compressknow.pages.study.pages import tidy_rows

        return tidy_rows(self)

    def _summary(self) -> Summary:
        failed = f", {count(len(self.failed))} failed" if self.failed else ""
        failed += f", {count(len(self.refused))} refused" if self.refused else ""
        probes = ", ".join(plain(probe.name, 40) for probe in self.probes)
        return Summary(
            f"Study: {plain(self.original.name, 60)}",
            f"{count(len(self.cells))} cells{failed}; evaluated on {probes or 'nothing'}.",
            ("Setup", "Kept (95 % interval)", "On disk", "Sparse"),
            tuple(map(_cell_row, self.cells)),
        )


def _cell_row(cell: StudyCell) -> tuple[str, ...]:
    kept = cell.comparison.kept
    return cell.setup, estimate(kept.value, kept.low, kept.high), size(cell.bytes), size(cell.sparse_bytes)


# The methods that the paper prunes by.
UNSTRUCTURED, STRUCTURED = "l1-unstructured", "ln-structured"
MODULES = ("overall", "attention", "feed-forward")
IN_WORDS = {"overall": "everything", "attention": "attention", "feed-forward": "feed-forward"}
ATTENTION_KINDS = ("self-attention", "cross-attention", "encoder-attention", "decoder-attention")
# Among so few answers a model that always says the same scores as a majority does; among more it scores as guessing.
_FEW_ANSWERS = 5


def pruned(study: Study, scope: str, method: str = UNSTRUCTURED) -> dict[float, StudyCell]:
    """The cells of a scope that are pruned and not quantized, by amount in percent, ascending."""
    found = {percent(c): c for c in _plain(study, scope) if c.pruning == method and c.quantization is None}
    return dict(sorted(found.items()))


def quantized(study: Study, scope: str) -> dict[str, StudyCell]:
    """The cells of a scope that are quantized and not pruned, by scheme."""
    return {c.quantization: c for c in _plain(study, scope) if c.pruning is None and c.quantization is not None}


def pruned_and_quantized(study: Study, scope: str, scheme: str, method: str = UNSTRUCTURED) -> dict[float, StudyCell]:
    """The cells of a scope that are pruned and then quantized by that scheme, by amount in percent, ascending."""
    found = {percent(c): c for c in _plain(study, scope) if c.pruning == method and c.quantization == scheme}
    return dict(sorted(found.items()))


def schemes(study: Study) -> tuple[str, ...]:
    """The schemes of the study's plain cells, each with what is not as usual of it, in the order of the grid."""
    return tuple(dict.fromkeys(c.quantization for c in study.cells if c.plain and c.quantization is not None))


def methods(study: Study) -> tuple[str, ...]:
    """Likewise the methods that the study's modules are pruned by."""
    cells = (c for c in study.cells if c.plain and c.scope in MODULES)
    return tuple(dict.fromkeys(c.pruning for c in cells if c.pruning is not None))


def called(method: str) -> str:
    """A method as setups call it, where it is as usual."""
    return METHODS[method].label if method in METHODS else method


def percent(cell: StudyCell) -> float:
    """The amount pruned in percent, rounded where floats hold no more: 30, not 30.000000000000004."""
    return round(100 * (cell.amount or 0.0), 6)


def names(study: Study) -> dict[str, str]:
    """By key, what to call each cell: its setup, with the scheme where there are several, with its key where that
    does not tell it from another either.
    """
    several = len({cell.scheme for cell in study.cells} - {None}) > 1
    called = {cell.key: plain(cell.setup, 80) + (_scheme(cell) if several else "") for cell in study.cells}
    repeated = Counter(called.values())
    return {key: f"{name} [{plain(key, 60)}]" if repeated[name] > 1 else name for key, name in called.items()}


def _scheme(cell: StudyCell) -> str:
    """The scheme, unless the setup says it or there is none."""
    return f" ({plain(cell.scheme, 20)})" if cell.scheme and cell.scheme not in cell.setup.split() else ""


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
