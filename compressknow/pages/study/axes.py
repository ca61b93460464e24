"""The axes of a study's own grid: forms that differ in one setting alone, side by side.

What the paper's figures show already (plain cells by scope, amount and method) is left to these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from compressknow.compress.pruning import METHODS
from compressknow.compress.schemes import SCHEMES
from compressknow.format import plain
from compressknow.pages.study.records import ATTENTION_KINDS, MODULES, Setting, Study, StudyCell

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
