"""The typed records of a study: one original, its compressed forms, which cell is which, and the axes of its grid.

What the paper's figures show already (plain cells by scope, amount and method) is left to these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from compressknow.base.format import count, estimate, plain, size
from compressknow.base.notebook import Summary, Tabular
from compressknow.compress.pruning import METHODS
from compressknow.compress.schemes import SCHEMES
from compressknow.evaluate.grades import RECOGNIZED
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


METHOD, SCHEME, AMOUNT, SCOPE = "method", "quantize", "prune", "scope"
# What a cell's other columns say, in the order in which a reader asks.
TOLD = (SCOPE, METHOD, AMOUNT, SCHEME)
_CALIBRATED = {"calibration", "calibration_tokens", "seed"}
_OF_FIGURES = (SCOPE, METHOD, AMOUNT)
_DRAWN = (*MODULES, *ATTENTION_KINDS, "final")


@dataclass(frozen=True, slots=True)
class Group:
    """Cells alike but for one setting, by its value, ascending where it is a number; `name` says what they share and
    other groups of the axis do not."""

    name: str
    cells: Mapping[str, StudyCell]


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting that varies while all else stays, and the groups of cells in which it does."""

    name: str
    groups: tuple[Group, ...]

    @property
    def chart(self) -> str:
        """The name of the chart that shows it."""
        return f"axis-{self.name.replace('_', '-')}"


def varying(study: Study) -> tuple[str, ...]:
    """The settings, beside those that a setup says, of which the study has several values."""
    return tuple(name for name, values in _values(study).items() if len(values) > 1 and name not in TOLD)


def axes(study: Study) -> tuple[Axis, ...]:
    """One for each setting that some cells differ in and in nothing else, by their order in recipes."""
    found = (_axis(study, name) for name, values in _values(study).items() if len(values) > 1)
    return tuple(axis for axis in found if axis.groups)


def _values(study: Study) -> dict[str, set[Setting]]:
    values: dict[str, set[Setting]] = {}
    for cell in study.cells:
        for name, value in cell.settings.items():
            values.setdefault(name, set()).add(value)
    return values


def _axis(study: Study, name: str) -> Axis:
    cells = [(cell, _rest(cell, name)) for cell in study.cells if name in cell.settings]
    # What does not look at activations has no calibration: it stands beside every cell that does, whatever its text.
    rests = sorted({frozenset(rest.items()) for _, rest in cells}, key=len, reverse=True)
    whole = [rest for i, rest in enumerate(rests) if not any(_fits(rest, other) for other in rests[:i])]
    groups = [(dict(rest), [cell for cell, its in cells if _fits(frozenset(its.items()), rest)]) for rest in whole]
    order = {cell.key: place for place, cell in enumerate(study.cells)}
    groups = [(rest, of) for rest, of in groups if _is_compared(name, of)]
    groups.sort(key=lambda group: [order[cell.key] for cell in group[1]])
    rest_of_all = [rest for rest, _ in groups]
    return Axis(name, tuple(Group(_told(rest, rest_of_all), _by_value(of, name)) for rest, of in groups))


def _fits(rest: frozenset[tuple[str, Setting]], other: frozenset[tuple[str, Setting]]) -> bool:
    return rest <= other and {name for name, _ in other - rest} <= _CALIBRATED


def _is_compared(name: str, cells: Sequence[StudyCell]) -> bool:
    drawn = name in _OF_FIGURES and all(cell.plain and cell.scope in _DRAWN for cell in cells)
    return not drawn and len({cell.settings[name] for cell in cells}) > 1


def _rest(cell: StudyCell, name: str) -> dict[str, Setting]:
    """All that a cell has beside an axis and, of a method or scheme, beside its own parameters."""
    left_out = {name} | (_parameters(name) if name in (METHOD, SCHEME) else set())
    return {key: value for key, value in cell.settings.items() if key not in left_out}


@cache
def _parameters(name: str) -> frozenset[str]:
    own = {"rounding", "smooth"} if name == SCHEME else set()
    things = (METHODS if name == METHOD else SCHEMES).usable()[0].values()
    return frozenset(own | {each.name for thing in things for each in thing.parameters()})


def _by_value(cells: Sequence[StudyCell], name: str) -> dict[str, StudyCell]:
    numbers = [cell.settings[name] for cell in cells]
    if all(isinstance(value, int | float) for value in numbers):
        cells = sorted(cells, key=lambda cell: float(cell.settings[name] or 0))
    return {_value(cell, name): cell for cell in cells}


def _value(cell: StudyCell, name: str) -> str:
    """With the parameters of a method or scheme."""
    told = {METHOD: cell.pruning, SCHEME: cell.quantization}.get(name)
    return plain(told, 60) if told else setting(name, cell.settings[name])


def setting(name: str, value: Setting) -> str:
    """In words."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{100 * value:.6g} %" if name in (AMOUNT, "drop_neurons") else f"{value:,.6g}"
    return plain(value, 60)


def _told(rest: Mapping[str, Setting], of_all: Sequence[Mapping[str, Setting]]) -> str:
    differs = [name for name in rest if len({each.get(name) for each in of_all}) > 1]
    return ", ".join(_part(name, rest[name]) for name in sorted(differs, key=_place))


def _place(name: str) -> int:
    return TOLD.index(name) if name in TOLD else len(TOLD)


def _part(name: str, value: Setting) -> str:
    return setting(name, value) if name in TOLD else f"{plain(name, 30)} {setting(name, value)}"


def alike(axis: Axis) -> Iterator[dict[str, list[StudyCell]]]:
    """By value, the cells of all groups that have the same values and knew something, in the same order."""
    found: dict[frozenset[str], dict[str, list[StudyCell]]] = {}
    for group in axis.groups:
        known = {value: cell for value, cell in group.cells.items() if cell.comparison.kept.value is not None}
        of_values = found.setdefault(frozenset(known), {value: [] for value in known})
        for value, cell in known.items():
            of_values[value].append(cell)
    yield from (each for each in found.values() if len(each) > 1)
