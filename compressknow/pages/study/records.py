"""Records of a study: one original and its compressed forms, the rows of a table, and axes.

An axis is a setting that varies while all others stay the same, except in what the paper's figures show: plain cells by
scope, amount and method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from compressknow.base.format import clean, count, slugify, write_size
from compressknow.base.notebook import Summary, Tabular
from compressknow.base.reading import group_by
from compressknow.comparison.intervals import run_mcnemar
from compressknow.comparison.records import ProbeFigures, TextFigures
from compressknow.compress.pruning import METHODS
from compressknow.compress.schemes import SCHEMES
from compressknow.evaluate.grades import RECOGNIZED
from compressknow.evaluate.records import ModelRecord
from compressknow.pages.as_json import replace_not_finite
from compressknow.pages.parts import get_headline_accuracy
from compressknow.pages.records import Comparison, write_estimate

Setting = str | int | float | bool | None
# Settings with columns of their own, in the order that readers need.
METHOD, SCHEME, AMOUNT, SCOPE = "method", "quantize", "prune", "scope"
MAIN_SETTINGS = (SCOPE, METHOD, AMOUNT, SCHEME)
# The pruning methods of the paper.
UNSTRUCTURED, STRUCTURED = "l1-unstructured", "ln-structured"
MODULES = ("overall", "attention", "feed-forward")
IN_WORDS = {"overall": "everything", "attention": "attention", "feed-forward": "feed-forward"}
ATTENTION_KINDS = ("self-attention", "cross-attention", "encoder-attention", "decoder-attention")
GPQ_AMOUNTS = (20, 40)  # in percent: amounts at which the paper also quantizes
_IN_FIGURES = (*MODULES, *ATTENTION_KINDS, "final")
_CALIBRATION = {"calibration", "calibration_tokens", "seed"}
_REMOVALS = {"drop_blocks", "drop_neurons"}
# Settings whose absence from a recipe is itself a difference.
_OPTIONAL = {*MAIN_SETTINGS, *_REMOVALS}
# With at most this many answers to choose from, a model that has forgotten everything scores the majority baseline;
# with more, it scores as by guessing.
_FEW_ANSWERS = 5


@dataclass(frozen=True, slots=True)
class StudyProbe:
    """Probe of a study, and what the original knows."""

    name: str
    n: int
    average: str  # ``micro`` or ``macro`` over relations: how the probe's protocol averages
    accuracy: float  # of the original, averaged in this way
    majority: float | None  # accuracy of always giving each relation's most frequent object, if there is one
    chance: float | None  # expected accuracy of guessing; None if any text is allowed
    correct: tuple[bool, ...]  # by fact, whether the original answers it right
    relations: tuple[str, ...]  # by fact, its relation
    templates: int = 1  # number of wordings of each fact, which is right if more than half of them are
    protocol: str = ""
    limit: int | None = None  # maximum number of facts, sampled with the seed; None for all
    seed: int = 0

    @property
    def floor(self) -> float:
        """Accuracy of a model that has forgotten everything: the majority baseline with few answers to choose from
        (BoolQ, PIQA, WinoGrande), else that of guessing, or 0 if any text is allowed."""
        if self.chance is None:
            return 0.0
        return max(self.chance, self.majority or 0.0) if self.chance >= 1 / _FEW_ANSWERS else self.chance


@dataclass(frozen=True, slots=True)
class StudyCell:
    """Compressed form of the original."""

    key: str  # unique in the study, of letters, digits, dots, hyphens: names its files
    setup: str  # the paper's name for it (``Att_GPQ 20%``), or a description in the same style
    scope: str  # ``attention``, ``feed-forward``, ``overall``, ``final``, ``self-attention``, ..., joined by ``+``
    method: str | None  # the pruning method as a recipe names it (``l1-unstructured``)
    amount: float | None  # share of the weights that is pruned (0 to 1); None if steps prune by different amounts
    scheme: str | None  # as a recipe names it (``int8-paper``)
    # Method and scheme with their unusual parameters (``wanda pattern 2:4``, ``int4 gptq``), and the calibration text
    # if the study has several: the name of a line or a bar in figures.
    pruning: str | None
    quantization: str | None
    # All settings of the recipe, by the names of a grid's axes (``layers``, ``rounding``, ``calibration``, ...); None
    # is "none", and settings that do not apply are missing.
    settings: Mapping[str, Setting]
    # Whether scope, pruning, amount and quantization describe it fully, as for cells in figures: one step of each kind,
    # not narrowed by layers or patterns, with the first module map of the study.
    plain: bool
    comparison: Comparison
    correct: Mapping[str, tuple[bool, ...]]  # by probe, by fact in the order of `StudyProbe.correct`

    @property
    def percent(self) -> float:
        """Amount pruned in percent, without floating-point error: 30, not 30.000000000000004."""
        return round(100 * (self.amount or 0.0), 6)

    @property
    def is_pruned_alone(self) -> bool:
        """Return whether only pruning changed it, so that by 0 % it is the original."""
        return self.quantization is None and not _REMOVALS & self.settings.keys()

    @property
    def totals(self) -> Mapping[str, int]:
        """Return the manifest's totals: counts of parameters, and `sparse_bytes`, the size of all non-zero values."""
        return self.comparison.model.totals

    @property
    def changed(self) -> int:
        """Parameters that the recipe changed: quantized ones, or pruned ones if nothing was quantized."""
        return self.totals["quantized"] or self.totals["pruned"]


@dataclass(frozen=True, slots=True)
class FailedCell:
    """Cell that could not be made or evaluated, or was refused, and why; other fields are as in `StudyCell`."""

    key: str
    setup: str
    why: str
    scope: str | None = None
    method: str | None = None
    amount: float | None = None
    scheme: str | None = None
    pruning: str | None = None
    quantization: str | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, repr=False)
class Study(Tabular):
    """Whole study, in the order of its grid. Its rows are those of ``cells.csv``."""

    original: ModelRecord
    probes: tuple[StudyProbe, ...]
    cells: tuple[StudyCell, ...]
    failed: tuple[FailedCell, ...]
    versions: Mapping[str, str]
    command: str | None
    method: tuple[str, ...]  # sentences on how models were evaluated and judged, and the limits of that
    refused: tuple[FailedCell, ...] = ()  # not supported by the model, so that a retry is pointless
    known: str = RECOGNIZED  # what counts as known: that or better, or only "produced"

    def select_pruned(
        self, scope: str, method: str = UNSTRUCTURED, scheme: str | None = None
    ) -> dict[float, StudyCell]:
        """Return a scope's plain cells with this pruning and quantization, by amount in percent, ascending."""
        cells = [c for c in self._select_plain(scope) if (c.pruning, c.quantization) == (method, scheme)]
        return {cell.percent: cell for cell in sorted(cells, key=lambda cell: cell.percent)}

    def select_quantized(self, scope: str) -> dict[str, StudyCell]:
        """Return a scope's plain cells that are quantized but not pruned, by scheme."""
        cells = (c for c in self._select_plain(scope) if c.pruning is None)
        return {c.quantization: c for c in cells if c.quantization is not None}

    def _select_plain(self, scope: str) -> Iterator[StudyCell]:
        return (cell for cell in self.cells if cell.plain and cell.scope == scope)

    def list_schemes(self) -> tuple[str, ...]:
        """Return the schemes of the plain cells with their unusual parameters, in the order of the grid."""
        return tuple(dict.fromkeys(c.quantization for c in self.cells if c.plain and c.quantization is not None))

    def list_methods(self) -> tuple[str, ...]:
        """Return the pruning methods of plain cells of modules, likewise."""
        cells = (c for c in self.cells if c.plain and c.scope in MODULES)
        return tuple(dict.fromkeys(c.pruning for c in cells if c.pruning is not None))

    def list_varying_settings(self) -> list[str]:
        """Return the settings that have several values among the cells."""
        settings = group_by((pair for cell in self.cells for pair in cell.settings.items()), lambda pair: pair[0])
        return [name for name, pairs in settings.items() if len(set(pairs)) > 1]

    def find_axes(self) -> tuple[Axis, ...]:
        """Return an axis for each setting in which some cells differ, and in nothing else, in the order of recipes."""
        axes = (_make_axis(self, name) for name in self.list_varying_settings())
        return tuple(axis for axis in axes if axis.groups)

    def name_cells(self) -> dict[str, str]:
        """Return what to call each cell, by key: its setup, with the scheme if there are several, and with its key if
        that is still ambiguous or the grid names the cell."""
        several = len({cell.scheme for cell in self.cells} - {None}) > 1
        names = {cell.key: clean(cell.setup, 80) for cell in self.cells}
        for cell in self.cells:
            if several and cell.scheme and cell.scheme not in cell.setup.split():
                names[cell.key] += f" ({clean(cell.scheme, 20)})"
        repeated = Counter(names.values())
        named = {cell.key for cell in self.cells if not cell.key.startswith(slugify(cell.setup))}
        ambiguous = {key for key, name in names.items() if repeated[name] > 1} | named
        return {key: f"{name} [{clean(key, 60)}]" if key in ambiguous else name for key, name in names.items()}

    def _rows(self) -> list[dict[str, Any]]:
        return tidy_rows(self)

    def _summary(self) -> Summary:
        failed = f", {count(len(self.failed))} failed" if self.failed else ""
        failed += f", {count(len(self.refused))} refused" if self.refused else ""
        probes = ", ".join(clean(probe.name, 40) for probe in self.probes)
        cells = "1 cell" if len(self.cells) == 1 else f"{count(len(self.cells))} cells"
        names, rows = self.name_cells(), []
        for cell in self.cells:
            sizes = write_size(cell.comparison.model.bytes), write_size(cell.totals["sparse_bytes"])
            rows.append((names[cell.key], write_estimate(cell.comparison.kept), *sizes))
        verdict = f"{cells}{failed}; evaluated on {probes or 'nothing'}."
        columns = ("Setup", "Kept (95 % interval)", "On disk", "Sparse")
        return Summary(f"Study: {clean(self.original.name, 60)}", verdict, columns, tuple(rows))


_TEXT, _SHARE, _COUNT, _FLAG = "string", "double", "int64", "bool"
# Columns and their types, in order. Shares and accuracies lie between 0 and 1; sizes are bytes, divergences nats.
COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(("key", "setup", "scope", "method"), _TEXT),
    "amount": _SHARE,
    **dict.fromkeys(("scheme", "pruning", "quantization", "probe", "known"), _TEXT),
    **dict.fromkeys(("n", "both", "lost", "gained", "neither"), _COUNT),
    **dict.fromkeys(("accuracy_original", "accuracy_compressed", "drop_absolute", "drop_relative"), _SHARE),
    **dict.fromkeys(("kept", "kept_low", "kept_high", "mcnemar_p", "p", "answer_changed", "kl_mean"), _SHARE),
    "kl_is_lower_bound": _FLAG,
    **dict.fromkeys(("perplexity_original", "perplexity_compressed"), _SHARE),
    **dict.fromkeys(("in_scope", "pruned", "quantized", "nonzero", "bytes", "sparse_bytes"), _COUNT),
    **dict.fromkeys(("status", "error"), _TEXT),
}
_SHOWN = {*MAIN_SETTINGS, *COLUMNS}
_LONGEST = 2000  # characters of an error


def tidy_rows(study: Study) -> list[dict[str, Any]]:
    """Return one row per cell and probe or running text, in the order of the grid; failed cells come last, and unknown
    values are None. In addition to `COLUMNS`, there is a column for each setting of any cell (``layers``, ...).
    Accuracies are averaged as the probe's protocol does; `status` is ``ok``, ``failed`` or ``refused``."""
    rows = []
    for cell in study.cells:
        rows += [_build_probe_row(cell, probe, study.known) for probe in cell.comparison.probes]
        rows += [_build_text_row(cell, figures) for figures in cell.comparison.texts]
    probes: list[str | None] = [probe.name for probe in study.probes]
    missing = [("failed", cell) for cell in study.failed] + [("refused", cell) for cell in study.refused]
    rows += [
        _build_recipe_columns(cell)
        | {"probe": clean(probe) if probe else None, "status": status, "error": clean(cell.why, _LONGEST)}
        for status, cell in missing
        for probe in probes or [None]
    ]
    # Settings without a column so far.
    cells: tuple[StudyCell | FailedCell, ...] = (*study.cells, *study.failed, *study.refused)
    further = dict.fromkeys(name for cell in cells for name in cell.settings if name not in _SHOWN)
    settings = {name: infer_type([cell.settings.get(name) for cell in cells]) for name in further}
    columns = [name for column in COLUMNS for name in (column, *(settings if column == "quantization" else ()))]
    # A column has one type: numbers become strings if others are strings.
    texts = [name for name, kind in settings.items() if kind == _TEXT]
    typed = (row | {name: clean(row[name]) for name in texts if row.get(name) is not None} for row in rows)
    return [{name: row.get(name) for name in columns} for row in typed]


def infer_type(values: Sequence[Setting]) -> str:
    """Return the narrowest type of a column that all values fit, by pyarrow's name."""
    kinds = {type(value) for value in values if value is not None}
    candidates = ((_FLAG, {bool}), (_COUNT, {int}), (_SHARE, {int, float}))
    return next((name for name, fitting in candidates if kinds and kinds <= fitting), _TEXT)


def _build_probe_row(cell: StudyCell, probe: ProbeFigures, known: str) -> dict[str, Any]:
    (before, after), kept, moved = get_headline_accuracy(probe), probe.kept, probe.movement
    return _build_cell_columns(cell) | {
        "probe": clean(probe.probe),
        "known": known,
        "n": probe.counts.n,
        **asdict(probe.counts),
        "accuracy_original": before.value,
        "accuracy_compressed": after.value,
        "drop_absolute": probe.drop_absolute,
        "drop_relative": probe.drop_relative,
        "kept": kept.value,
        "kept_low": kept.low,
        "kept_high": kept.high,
        "mcnemar_p": run_mcnemar(probe.counts),
        "p": probe.certainty.p,
        "answer_changed": probe.answer_changed,
        "kl_mean": moved.kl_mean if moved else None,
        "kl_is_lower_bound": moved.is_lower_bound if moved else None,
    }


def _build_text_row(cell: StudyCell, figures: TextFigures) -> dict[str, Any]:
    kl = figures.moved.kl if figures.moved else None
    values = {
        "perplexity_original": figures.original.value.value,
        "perplexity_compressed": figures.compressed.value.value,
        "kl_mean": kl.value if kl else None,
        "kl_is_lower_bound": False if kl else None,
    }
    return _build_cell_columns(cell) | {"probe": clean(figures.text)} | replace_not_finite(values)


def _build_cell_columns(cell: StudyCell) -> dict[str, Any]:
    counts = ("in_scope", "pruned", "quantized", "nonzero", "sparse_bytes")
    return {
        **_build_recipe_columns(cell),
        **{name: cell.totals[name] for name in counts},
        "bytes": cell.comparison.model.bytes,
        "status": "ok",
    }


def _build_recipe_columns(cell: StudyCell | FailedCell) -> dict[str, Any]:
    texts = ("key", "setup", "scope", "method", "scheme", "pruning", "quantization")
    return {
        # A parameter of another package may have the name of a figure, such as n or p, which keeps the column.
        **{name: value for name, value in cell.settings.items() if name not in COLUMNS},
        **{name: None if (text := getattr(cell, name)) is None else clean(text) for name in texts},
        "amount": cell.amount,
    }


Rest = frozenset[tuple[str, Setting]]


def label_method(method: str) -> str:
    """Return the name of a method in setups; a method with unusual parameters stays as it is."""
    return METHODS[method].label if method in METHODS else method


@dataclass(frozen=True, slots=True)
class Axis:
    """Setting that varies while all others stay the same, and the groups of cells in which it does: the name of what
    distinguishes a group, and its cells by the setting's value, ascending for numbers."""

    name: str
    groups: tuple[tuple[str, Mapping[str, StudyCell]], ...]

    @property
    def chart(self) -> str:
        """Name of the chart that shows it."""
        return f"axis-{self.name.replace('_', '-')}"

    @property
    def is_amount(self) -> bool:
        return self.name == AMOUNT

    def pair_groups(self) -> list[tuple[list[str], dict[str, list[StudyCell]]]]:
        """Return, for groups with the same two or more values, their names, and their cells with a share kept, by value
        in the same order."""
        known = [
            (name, {value: cell for value, cell in of.items() if cell.comparison.kept.value is not None})
            for name, of in self.groups
        ]
        return [
            ([name for name, _ in alike], {value: [of[value] for _, of in alike] for value in alike[0][1]})
            for alike in group_by(known, lambda group: frozenset(group[1]) if len(group[1]) > 1 else None).values()
        ]


def _make_axis(study: Study, name: str) -> Axis:
    # All settings of a cell except the axis and, for a method or scheme, its parameters.
    left_out = {name} | (_list_parameters(name) if name in (METHOD, SCHEME) else set())
    with_rest = [
        (cell, frozenset((key, value) for key, value in cell.settings.items() if key not in left_out))
        for cell in study.cells
    ]
    # Steps that prune by different amounts have no place among amounts.
    has_value = {cell.key for cell in study.cells if name in cell.settings and (name != AMOUNT or cell.amount)}
    cells = [(cell, rest) for cell, rest in with_rest if cell.key in has_value]
    # Methods without activations have no calibration, so compare them with cells of any calibration.
    rests = sorted({rest for _, rest in cells}, key=len, reverse=True)
    widest = [rest for i, rest in enumerate(rests) if not any(_is_fit(rest, other) for other in rests[:i])]
    groups, in_figures, has_methods = [], [], len(study.list_methods()) > 1
    for wide in widest:
        members = [cell for cell, rest in cells if _is_fit(rest, wide)]
        if len({cell.settings[name] for cell in members}) < 2:
            continue
        if name == AMOUNT:
            # The curve of a quantized model starts at what is quantized alone.
            lacking = {METHOD} | _list_parameters(METHOD) | _CALIBRATION
            members += [cell for cell, rest in with_rest if name not in cell.settings and _is_fit(rest, wide, lacking)]
        if name in (SCOPE, METHOD, AMOUNT) and all(_is_in_figures(cell, has_methods) for cell in members):
            in_figures.append((dict(sorted(wide)), members))
        else:
            groups.append((dict(sorted(wide)), members))
    if groups and name != AMOUNT:
        # What hurts least is tested over all; the cliff of each amount is its own, and stated already.
        groups += in_figures
        in_figures = []
    order = {cell.key: place for place, cell in enumerate(study.cells)}
    groups.sort(key=lambda group: [order[cell.key] for cell in group[1]])
    # The name of a group must differ from those in figures.
    rest_of_all = [rest for rest, _ in (*groups, *in_figures)]
    return Axis(name, tuple((_name_group(rest, rest_of_all), _sort_by_value(of, name)) for rest, of in groups))


def _is_in_figures(cell: StudyCell, has_methods: bool) -> bool:
    """Return whether the paper's figures, or those of a study with several methods, show a cell."""
    if not cell.plain or cell.scope not in _IN_FIGURES:
        return False
    if cell.pruning is None or (has_methods and cell.scope in MODULES):
        return True
    if cell.quantization is not None:
        return cell.pruning == UNSTRUCTURED and cell.percent in GPQ_AMOUNTS
    return cell.pruning == UNSTRUCTURED or (cell.pruning == STRUCTURED and cell.scope == "final")


def _list_parameters(name: str) -> set[str]:
    steps = {"rounding", "smooth"} if name == SCHEME else set()
    things = (METHODS if name == METHOD else SCHEMES).usable()[0].values()
    return steps | {each.name for thing in things for each in thing.parameters()}


def _is_fit(rest: Rest, other: Rest, lacking: Set[str] = _CALIBRATION) -> bool:
    """Return whether two cells differ at most in that one lacks such settings."""
    return rest <= other and {name for name, _ in other - rest} <= lacking


def _sort_by_value(cells: Sequence[StudyCell], name: str) -> dict[str, StudyCell]:
    values = {cell.key: cell.settings.get(name, 0) for cell in cells}
    if all(isinstance(value, int | float) for value in values.values()):
        cells = sorted(cells, key=lambda cell: float(values[cell.key] or 0))
    by_value = {}
    for cell in cells:
        with_parameters = {METHOD: cell.pruning, SCHEME: cell.quantization}.get(name)
        value = clean(with_parameters, 60) if with_parameters else format_setting(name, values[cell.key])
        by_value[value] = cell
    return by_value


def format_setting(name: str, value: Setting) -> str:
    """Return the value of a setting as text."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{100 * value:.6g} %" if name in (AMOUNT, "drop_neurons") else f"{value:,.6g}"
    return clean(value, 60)


def _name_group(rest: Mapping[str, Setting], of_all: Sequence[Mapping[str, Setting]]) -> str:
    def differs(name: str) -> bool:
        return len({each.get(name) for each in of_all if name in each or name in _OPTIONAL}) > 1

    differing = [name for name in rest if differs(name)]
    main = [format_setting(name, rest[name]) for name in MAIN_SETTINGS if name in differing]
    others = [name for name in differing if name not in MAIN_SETTINGS]
    name = ", ".join([*main, *(f"{clean(name, 30)} {format_setting(name, rest[name])}" for name in others)])
    if name or len(of_all) == 1:
        return name
    # This group differs from the others by what it lacks.
    return "not pruned" if AMOUNT not in rest and any(AMOUNT in each for each in of_all) else "not quantized"
