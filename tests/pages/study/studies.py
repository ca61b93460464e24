"""Studies study by hand: each cell says which facts it answers right, and the real code computes the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from compressknow.compress.recipe import Recipe, build_recipe
from compressknow.compress.steps import Quantize, Where
from compressknow.evaluate.answers import Answers
from compressknow.pages.card.make import compare, describe_method, read_model_facts
from compressknow.pages.pages import render_html, render_markdown
from compressknow.pages.study.charts import draw_charts
from compressknow.pages.study.pages import make_study_page
from compressknow.pages.study.records import FailedCell, Study, StudyCell, StudyProbe
from compressknow.study import grid
from tests.pages.answering import COMPRESSED_HASH, make_answer, make_answers, make_entry, make_model

# Parameters of the modules of BERT-base, in millions (table 2 of the paper).
MILLIONS = {"attention": 21, "feed-forward": 64, "overall": 86, "final": 23}
WHOLE = 109_000_000
# Rounding loses one of 50 known facts.
ROUNDING = {"n": 100, "changed": 4, "known": 50, "lost": 1, "gained": 1, "kl_mean": 0.001, "computed_in": "float32"}
ENTRY = {"chance": None, "majority": 0.05, "noise_floor": ROUNDING}


@dataclass(frozen=True)
class Cell:
    """A cell that answers the facts of these numbers right, in every probe."""

    scope: str
    right: Collection[int]
    amount: float | None = None
    scheme: str | None = None
    method: str | None = None
    plain: bool = True
    recipe: Recipe | None = None  # built from the other fields if None


@dataclass(frozen=True)
class ProbeSpec:
    """Probes of `n` facts, which belong to each of the relations in turn; the original knows the first `known`."""

    n: int = 300
    known: int = 200
    relations: int = 1
    probes: Sequence[str] = ("lama:trex",)
    entry: Mapping[str, object] = field(default_factory=lambda: ENTRY)


TASKS = ProbeSpec(
    n=100, known=80, probes=("lm-eval:boolq", "lm-eval:piqa"), entry={**ENTRY, "chance": 0.5, "majority": 0.621}
)


def make_study(
    cells: Sequence[Cell], family: str = "masked", spec: ProbeSpec | None = None, failed: Sequence[FailedCell] = ()
) -> Study:
    spec = spec or ProbeSpec()
    original = _make_answers(spec, range(spec.known), make_model(family=family))
    study_cells = tuple(_make_cell(cell, spec, original, family) for cell in cells)
    return Study(
        original=read_model_facts(original.record.model),
        probes=tuple(_make_probe(name, spec) for name in spec.probes),
        cells=study_cells,
        failed=tuple(failed),
        versions=dict(original.record.versions),
        command="compressknow sweep tiny-bert -o study",
        method=describe_method(original, [cell.comparison for cell in study_cells]),
    )


def gp(scope: str, amount: float, right: Collection[int], method: str = "l1-unstructured") -> Cell:
    """Return a pruned cell."""
    return Cell(scope, right, amount, None, method)


def gq(scope: str, right: Collection[int], scheme: str = "int8-paper") -> Cell:
    """Return a quantized cell."""
    return Cell(scope, right, None, scheme)


def gpq(scope: str, amount: float, right: Collection[int], scheme: str = "int8-paper") -> Cell:
    """Return a pruned and quantized cell."""
    return Cell(scope, right, amount, scheme, "l1-unstructured")


def make_cells_of_two_methods() -> list[Cell]:
    """Return cells in which pruning attention hurts less than feed-forward by L1, and more by Wanda."""
    right = {
        "l1-unstructured": {"attention": 190, "feed-forward": 100, "overall": 50},
        "wanda": {"attention": 100, "feed-forward": 190, "overall": 60},
    }
    return [gp(s, a, range(k), m) for m, scopes in right.items() for a in (0.4, 0.5) for s, k in scopes.items()]


def make_whole_grid(family: str = "masked", spec: ProbeSpec | None = None) -> Study:
    """Return a study of the paper's grid: feed-forward loses twice as much as attention, overall four times."""
    spec = spec or ProbeSpec()
    losses = {"attention": 1, "feed-forward": 2, "overall": 4}

    def right(loss: float) -> range:
        return range(max(0, round(spec.known * (1 - loss))))

    cells = [gp(s, a / 10, right(k * (a / 10) ** 3)) for s, k in losses.items() for a in range(1, 10)]
    cells += [gq(s, right(0.05 * k)) for s, k in losses.items()]
    cells += [gpq(s, a / 10, right(k * (0.05 + (a / 10) ** 3))) for s, k in losses.items() for a in (2, 4)]
    if family == "seq2seq":
        kinds = ("self-attention", "cross-attention", "encoder-attention", "decoder-attention")
        cells += [gpq(s, a / 10, right(0.1 * a * k / 4)) for k, s in enumerate(kinds, 1) for a in (2, 4)]
    for method, k in (("l1-unstructured", 1), ("ln-structured", 3)):
        cells += [gp("final", a / 10, right(k * a / 20), method) for a in (2, 4)]
    return make_study(cells, family, spec, [FailedCell("att-95", "Att_GP 95%", "RuntimeError: out of memory")])


def _make_answers(spec: ProbeSpec, right: Collection[int], record: Mapping[str, object]) -> Answers:
    choices = None if spec.entry["chance"] is None else round(1 / float(str(spec.entry["chance"])))
    rows = [
        make_answer(i, i in right, probe=probe, choices=choices, relation=f"relation-{i % spec.relations}")
        for probe in spec.probes
        for i in range(spec.n)
    ]
    return make_answers(rows, record, {probe: make_entry(facts=spec.n, **spec.entry) for probe in spec.probes})


def _make_probe(name: str, spec: ProbeSpec) -> StudyProbe:
    known = tuple(i < spec.known for i in range(spec.n))
    majority, chance = (spec.entry[key] for key in ("majority", "chance"))
    relations = tuple(f"relation-{i % spec.relations}" for i in range(spec.n))
    average = spec.entry.get("average", "micro")
    return StudyProbe(name, spec.n, average, spec.known / spec.n, majority, chance, known, relations)  # type: ignore[arg-type]


def _make_cell(cell: Cell, spec: ProbeSpec, original: Answers, family: str) -> StudyCell:
    recipe = cell.recipe or build_recipe(
        Where((cell.scope,)),
        prune=cell.amount,
        prune_method=cell.method or "l1-unstructured",  # type: ignore[arg-type]
        quantize=cell.scheme,  # type: ignore[arg-type]
    )
    setup, grid_cell = recipe.setup, grid.Cell("", recipe)
    key = grid.name_recipe(recipe)
    in_scope = 1_000_000 * MILLIONS.get(cell.scope, 7)
    pruned, quantized = round(in_scope * (cell.amount or 0)), in_scope if cell.scheme else 0
    totals = {
        **{"in_scope": in_scope, "pruned": pruned, "quantized": quantized, "nonzero": WHOLE - pruned},
        "sparse_bytes": 4 * (WHOLE - pruned) + WHOLE // 8,
    }
    nbytes = 4 * WHOLE - 3 * quantized
    record = make_model(name=key, family=family, sha256=COMPRESSED_HASH, bytes=nbytes, setup=setup, totals=totals)
    return StudyCell(
        key=key,
        setup=setup,
        scope=cell.scope,
        method=grid_cell.settings.get("method"),
        amount=grid_cell.amount,
        scheme=grid_cell.settings.get("quantize"),
        pruning=grid_cell.pruning,
        quantization=grid_cell.quantization,
        settings=grid_cell.settings,
        plain=cell.plain and grid_cell.plain,
        comparison=compare(original, _make_answers(spec, cell.right, record), show_facts=False),
        correct={probe: tuple(i in cell.right for i in range(spec.n)) for probe in spec.probes},
    )


def make_grid_study(text: str, path: Path, right: Sequence[int]) -> Study:
    """Return a study of a grid, written to `path`, whose cells answer these numbers of facts right."""
    path.write_text(text, encoding="utf-8")
    cells = []
    for cell, known in zip(grid.read_grid(path), right, strict=True):
        scheme = next((step.scheme for step in cell.recipe.steps if isinstance(step, Quantize)), None)
        scope = "+".join(dict.fromkeys(scope for step in cell.recipe.steps for scope in step.where.scope))
        cells.append(Cell(scope, range(known), cell.amount, scheme, recipe=cell.recipe))
    study = make_study(cells)
    keys = [cell.key for cell in grid.read_grid(path)]
    return replace(study, cells=tuple(replace(c, key=key) for c, key in zip(study.cells, keys, strict=True)))


def make_empty_study() -> Study:
    return replace(make_study([]), command=None, versions={}, method=())


def make_failed_study() -> Study:
    return make_study([], "seq2seq", failed=[FailedCell("x", "Att_GP 95%", "no memory")])


STUDIES = {
    "masked": make_whole_grid,
    "seq2seq": lambda: make_whole_grid("seq2seq", TASKS),
    "one": lambda: make_study([gp("attention", 0.2, range(150))]),
    "methods": lambda: make_study(make_cells_of_two_methods()),
    "empty": make_empty_study,
    "failed": make_failed_study,
}


def replace_texts(study: Study, text: str) -> Study:
    """Return the study with each of its texts replaced by `text`, numbered if they must differ."""
    names = {probe.name: f"{i} {text}" for i, probe in enumerate(study.probes)}
    return replace(
        study,
        original=replace(study.original, name=text, architecture=text, dtype=text),
        probes=tuple(replace(probe, name=names[probe.name]) for probe in study.probes),
        cells=tuple(_hostile_cell(cell, f"{i} {text}", names) for i, cell in enumerate(study.cells)),
        failed=tuple(FailedCell(text, text, text) for _ in study.failed),
        versions=dict.fromkeys(study.versions, text),
        command=text,
        method=tuple(text for _ in study.method),
    )


def _hostile_cell(cell: StudyCell, text: str, names: dict[str, str]) -> StudyCell:
    comparison = cell.comparison
    probes = tuple(replace(probe, probe=names[probe.probe]) for probe in comparison.probes)
    return replace(
        cell,
        setup=text,
        comparison=replace(comparison, probes=probes, warnings=(text[text.index(" ") :],)),
        correct={names[probe]: right for probe, right in cell.correct.items()},
    )


def render_study_html(study: Study) -> str:
    return render_html(make_study_page(study, draw_charts(study)))


def render_study_markdown(study: Study) -> str:
    return render_markdown(make_study_page(study))
