"""Cells of a study by what was done to them, and the axes of its grid: settings that vary while all else stays.

Axes leave out what the paper's figures show already (plain cells by scope, amount and method).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from compressknow.base.format import plain
from compressknow.compress.pruning import METHODS
from compressknow.compress.schemes import SCHEMES
from compressknow.pages.study.records import AMOUNT, MAIN_SETTINGS, METHOD, SCHEME, SCOPE, Setting, Study, StudyCell

# The methods that the paper prunes by.
UNSTRUCTURED, STRUCTURED = "l1-unstructured", "ln-structured"
MODULES = ("overall", "attention", "feed-forward")
IN_WORDS = {"overall": "everything", "attention": "attention", "feed-forward": "feed-forward"}
ATTENTION_KINDS = ("self-attention", "cross-attention", "encoder-attention", "decoder-attention")
_IN_FIGURES = (*MODULES, *ATTENTION_KINDS, "final")
_CALIBRATION = {"calibration", "calibration_tokens", "seed"}

Rest = frozenset[tuple[str, Setting]]


def select_pruned(
    study: Study, scope: str, method: str = UNSTRUCTURED, scheme: str | None = None
) -> dict[float, StudyCell]:
    """Return the cells of a scope that are pruned, and then quantized by the scheme where one is named, by amount in
    percent, ascending.
    """
    cells = [c for c in _select_plain(study, scope) if (c.pruning, c.quantization) == (method, scheme)]
    return {cell.percent: cell for cell in sorted(cells, key=lambda cell: cell.percent)}


def select_quantized(study: Study, scope: str) -> dict[str, StudyCell]:
    """Return the cells of a scope that are quantized and not pruned, by scheme."""
    cells = (c for c in _select_plain(study, scope) if c.pruning is None)
    return {c.quantization: c for c in cells if c.quantization is not None}


def _select_plain(study: Study, scope: str) -> Iterator[StudyCell]:
    return (cell for cell in study.cells if cell.plain and cell.scope == scope)


def list_schemes(study: Study) -> tuple[str, ...]:
    """Return the schemes of the study's plain cells, each with what is not as usual of it, in the order of the grid."""
    return tuple(dict.fromkeys(c.quantization for c in study.cells if c.plain and c.quantization is not None))


def list_methods(study: Study) -> tuple[str, ...]:
    """Return the methods that the study's modules are pruned by, likewise."""
    cells = (c for c in study.cells if c.plain and c.scope in MODULES)
    return tuple(dict.fromkeys(c.pruning for c in cells if c.pruning is not None))


def label_method(method: str) -> str:
    """Return what setups call a method, where all of it is as usual."""
    return METHODS[method].label if method in METHODS else method


def name_cells(study: Study) -> dict[str, str]:
    """Return what to call each cell, by key: its setup, with the scheme where there are several, with its key where
    that does not tell it from another either.
    """
    several = len({cell.scheme for cell in study.cells} - {None}) > 1
    names = {cell.key: plain(cell.setup, 80) for cell in study.cells}
    for cell in study.cells:
        if several and cell.scheme and cell.scheme not in cell.setup.split():
            names[cell.key] += f" ({plain(cell.scheme, 20)})"
    repeated = Counter(names.values())
    return {key: f"{name} [{plain(key, 60)}]" if repeated[name] > 1 else name for key, name in names.items()}


@dataclass(frozen=True, slots=True)
class Axis:
    """Setting that varies while all else stays, and the groups of cells in which it does.

    A group is the name of what its cells share and those of other groups do not, and the cells by the setting's value,
    ascending where it is a number.
    """

    name: str
    groups: tuple[tuple[str, Mapping[str, StudyCell]], ...]

    @property
    def chart(self) -> str:
        """Name of the chart that shows it."""
        return f"axis-{self.name.replace('_', '-')}"


def find_axes(study: Study) -> tuple[Axis, ...]:
    """Return an axis for each setting that some cells differ in and in nothing else, by their order in recipes."""
    axes = (_make_axis(study, name) for name in _list_varying(study))
    return tuple(axis for axis in axes if axis.groups)


def list_varying_settings(study: Study) -> tuple[str, ...]:
    """Return the settings, beside those that a setup says, of which the study has several values."""
    return tuple(name for name in _list_varying(study) if name not in MAIN_SETTINGS)


def _list_varying(study: Study) -> list[str]:
    values: dict[str, set[Setting]] = {}
    for cell in study.cells:
        for name, value in cell.settings.items():
            values.setdefault(name, set()).add(value)
    return [name for name, different in values.items() if len(different) > 1]


def _make_axis(study: Study, name: str) -> Axis:
    # All that a cell has beside the axis and, of a method or scheme, beside its own parameters.
    left_out = {name} | (_list_parameters(name) if name in (METHOD, SCHEME) else set())
    cells = [
        (cell, frozenset((key, value) for key, value in cell.settings.items() if key not in left_out))
        for cell in study.cells
        if name in cell.settings
    ]
    # What does not look at activations has no calibration: it stands beside every cell that does, whatever its text.
    rests = sorted({rest for _, rest in cells}, key=len, reverse=True)
    widest = [rest for i, rest in enumerate(rests) if not any(_fits(rest, other) for other in rests[:i])]
    groups = []
    for wide in widest:
        members = [cell for cell, rest in cells if _fits(rest, wide)]
        in_figures = name in (SCOPE, METHOD, AMOUNT) and all(c.plain and c.scope in _IN_FIGURES for c in members)
        if not in_figures and len({cell.settings[name] for cell in members}) > 1:
            groups.append((dict(sorted(wide)), members))
    order = {cell.key: place for place, cell in enumerate(study.cells)}
    groups.sort(key=lambda group: [order[cell.key] for cell in group[1]])
    rest_of_all = [rest for rest, _ in groups]
    return Axis(name, tuple((_name_group(rest, rest_of_all), _sort_by_value(of, name)) for rest, of in groups))


@cache
def _list_parameters(name: str) -> frozenset[str]:
    own = {"rounding", "smooth"} if name == SCHEME else set()
    things = (METHODS if name == METHOD else SCHEMES).usable()[0].values()
    return frozenset(own | {each.name for thing in things for each in thing.parameters()})


def _fits(rest: Rest, other: Rest) -> bool:
    return rest <= other and {name for name, _ in other - rest} <= _CALIBRATION


def _sort_by_value(cells: Sequence[StudyCell], name: str) -> dict[str, StudyCell]:
    if all(isinstance(cell.settings[name], int | float) for cell in cells):
        cells = sorted(cells, key=lambda cell: float(cell.settings[name] or 0))
    by_value = {}
    for cell in cells:
        with_parameters = {METHOD: cell.pruning, SCHEME: cell.quantization}.get(name)
        value = plain(with_parameters, 60) if with_parameters else format_setting(name, cell.settings[name])
        by_value[value] = cell
    return by_value


def format_setting(name: str, value: Setting) -> str:
    """Return the value of a setting as text."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{100 * value:.6g} %" if name in (AMOUNT, "drop_neurons") else f"{value:,.6g}"
    return plain(value, 60)


def _name_group(rest: Mapping[str, Setting], of_all: Sequence[Mapping[str, Setting]]) -> str:
    differing = [name for name in rest if len({each.get(name) for each in of_all}) > 1]
    main = [format_setting(name, rest[name]) for name in MAIN_SETTINGS if name in differing]
    others = [name for name in differing if name not in MAIN_SETTINGS]
    return ", ".join([*main, *(f"{plain(name, 30)} {format_setting(name, rest[name])}" for name in others)])


def pair_groups(axis: Axis) -> Iterator[dict[str, list[StudyCell]]]:
    """Yield, for groups that have the same values, their cells by value in the same order; only those that knew
    something.
    """
    alike: dict[frozenset[str], dict[str, list[StudyCell]]] = {}
    for _, group in axis.groups:
        known = {value: cell for value, cell in group.items() if cell.comparison.kept.value is not None}
        cells = alike.setdefault(frozenset(known), {value: [] for value in known})
        for value, cell in known.items():
            cells[value].append(cell)
    yield from (each for each in alike.values() if len(each) > 1)
