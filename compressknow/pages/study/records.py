"""Records of a study: one original, its compressed forms, and a row for each of these and each probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressknow.base.format import count, plain, size
from compressknow.base.notebook import Summary, Tabular
from compressknow.comparison.intervals import mcnemar
from compressknow.comparison.records import ProbeFigures, TextFigures
from compressknow.evaluate.grades import RECOGNIZED
from compressknow.pages.as_json import finite
from compressknow.pages.parts import get_headline_accuracy
from compressknow.pages.records import Comparison, ModelFacts, write_estimate

Setting = str | int | float | bool | None
# Settings that columns of their own have, in the order in which a reader asks for them.
METHOD, SCHEME, AMOUNT, SCOPE = "method", "quantize", "prune", "scope"
MAIN_SETTINGS = (SCOPE, METHOD, AMOUNT, SCHEME)
# Among so few answers a model that always says the same scores as a majority does; among more it scores as guessing.
_FEW_ANSWERS = 5


@dataclass(frozen=True, slots=True)
class StudyProbe:
    """Probe of a study, and what the original knows of it.

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

    @property
    def floor(self) -> float:
        """Accuracy of a model that has forgotten everything: the paper's "zero or the majority baseline".

        That of always the same answer where there are few to choose from (BoolQ, PIQA, WinoGrande), else that of
        guessing, or 0 where any text may be answered.
        """
        if self.chance is None:
            return 0.0
        return max(self.chance, self.majority or 0.0) if self.chance >= 1 / _FEW_ANSWERS else self.chance


@dataclass(frozen=True, slots=True)
class StudyCell:
    """Compressed form of the original.

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

    @property
    def percent(self) -> float:
        """Amount pruned in percent, rounded where floats hold no more: 30, not 30.000000000000004."""
        return round(100 * (self.amount or 0.0), 6)

    @property
    def changed(self) -> int:
        """Parameters that the recipe changed: quantized, or pruned where nothing was quantized."""
        return self.quantized or self.pruned


@dataclass(frozen=True, slots=True)
class FailedCell:
    """Cell that could not be made or evaluated, or that was refused, and why."""

    key: str
    setup: str
    why: str


@dataclass(frozen=True, slots=True, repr=False)
class Study(Tabular):
    """Whole study, in the order of its grid. Its rows are those of ``cells.csv``."""

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
        return tidy_rows(self)

    def _summary(self) -> Summary:
        failed = f", {count(len(self.failed))} failed" if self.failed else ""
        failed += f", {count(len(self.refused))} refused" if self.refused else ""
        probes = ", ".join(plain(probe.name, 40) for probe in self.probes)
        kept = [cell.comparison.kept for cell in self.cells]
        return Summary(
            f"Study: {plain(self.original.name, 60)}",
            f"{count(len(self.cells))} cells{failed}; evaluated on {probes or 'nothing'}.",
            ("Setup", "Kept (95 % interval)", "On disk", "Sparse"),
            tuple(
                (cell.setup, write_estimate(k), size(cell.bytes), size(cell.sparse_bytes))
                for cell, k in zip(self.cells, kept, strict=True)
            ),
        )


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
    """Return one row per cell and probe, in the order of the grid; failed cells come last, with None for what is not
    known. A running text has a row per cell too, without counts of facts. Beside `COLUMNS` there is a column for each
    setting that any cell has (``layers``, ``rounding``, ``group_size``, ...).

    Accuracies are averaged as the probe's protocol does (over facts, or over relations); `status` is ``ok``,
    ``failed`` or ``refused``; the text of an error is on one line.
    """
    rows = []
    for cell in study.cells:
        rows += [_row_of_probe(cell, probe, study.known) for probe in cell.comparison.probes]
        rows += [_row_of_text(cell, figures) for figures in cell.comparison.texts]
    probes: list[str | None] = [probe.name for probe in study.probes]
    missing = [("failed", cell) for cell in study.failed] + [("refused", cell) for cell in study.refused]
    rows += [
        {"key": plain(cell.key), "setup": plain(cell.setup), "probe": plain(probe) if probe else None}
        | {"status": status, "error": plain(cell.why, _LONGEST)}
        for status, cell in missing
        for probe in probes or [None]
    ]
    # Settings that any cell has and no other column shows.
    further = dict.fromkeys(name for cell in study.cells for name in cell.settings if name not in _SHOWN)
    settings = {name: infer_type([cell.settings.get(name) for cell in study.cells]) for name in further}
    columns = [name for column in COLUMNS for name in (column, *(settings if column == "quantization" else ()))]
    # A column has one type: numbers beside texts become texts.
    texts = [name for name, kind in settings.items() if kind == _TEXT]
    typed = (row | {name: plain(row[name]) for name in texts if row.get(name) is not None} for row in rows)
    return [{name: row.get(name) for name in columns} for row in typed]


def infer_type(values: Sequence[Setting]) -> str:
    """Return the narrowest type of a column that all values fit, by pyarrow's name."""
    kinds = {type(value) for value in values if value is not None}
    candidates = ((_FLAG, {bool}), (_COUNT, {int}), (_SHARE, {int, float}))
    return next((name for name, fitting in candidates if kinds and kinds <= fitting), _TEXT)


def _row_of_probe(cell: StudyCell, probe: ProbeFigures, known: str) -> dict[str, Any]:
    before, after = get_headline_accuracy(probe)
    return _columns_of_cell(cell) | {
        "probe": plain(probe.probe),
        "known": known,
        "n": probe.counts.n,
        **asdict(probe.counts),
        "accuracy_original": before.value,
        "accuracy_compressed": after.value,
        "drop_absolute": probe.drop_absolute,
        "drop_relative": probe.drop_relative,
        "kept": probe.kept.value,
        "kept_low": probe.kept.low,
        "kept_high": probe.kept.high,
        "mcnemar_p": mcnemar(probe.counts),
        "p": probe.certainty.test.p,
        "answer_changed": probe.answer_changed,
        "kl_mean": probe.movement.kl_mean if probe.movement else None,
        "kl_is_lower_bound": probe.movement.is_lower_bound if probe.movement else None,
    }


def _row_of_text(cell: StudyCell, figures: TextFigures) -> dict[str, Any]:
    kl = figures.moved.kl if figures.moved else None
    values = {
        "perplexity_original": figures.original.value.value,
        "perplexity_compressed": figures.compressed.value.value,
        "kl_mean": kl.value if kl else None,
        "kl_is_lower_bound": False if kl else None,
    }
    return _columns_of_cell(cell) | {"probe": plain(figures.text)} | finite(values)


def _columns_of_cell(cell: StudyCell) -> dict[str, Any]:
    texts = ("key", "setup", "scope", "method", "scheme", "pruning", "quantization")
    numbers = ("amount", "in_scope", "pruned", "quantized", "nonzero", "bytes", "sparse_bytes")
    return {
        **cell.settings,
        **{name: None if (text := getattr(cell, name)) is None else plain(text) for name in texts},
        **{name: getattr(cell, name) for name in numbers},
        "status": "ok",
    }
