"""Studies of custom grids: each axis has a column, a chart and a conclusion."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from compressknow.pages.study.charts import draw_charts
from compressknow.pages.study.findings import evaluate_findings
from compressknow.pages.study.pages import build_cells_table, dump_study, to_csv, to_parquet, write_study
from compressknow.pages.study.records import Study, tidy_rows
from compressknow.pages.study.summary import draw_conclusions
from tests.pages.pages import parse_html
from tests.pages.study.studies import (
    make_cells_of_two_methods,
    make_grid_study,
    make_study,
    make_whole_grid,
    render_study_html,
    render_study_markdown,
)
from tests.shown import ROOT

LAYERS = '[axes]\nprune = [0.2, 0.5]\nlayers = ["0-5", "6-11"]\n'
# For each axis: a grid, the facts that its cells answer right, and the values to compare.
GRIDS = {
    "layers": (LAYERS, [190, 120, 150, 40], ["0-5", "6-11"]),
    "scope": ('[axes]\nscope = ["attention", "blocks"]\nquantize = ["int8"]\n', [190, 120], ["attention", "blocks"]),
    "module_map": (
        '[axes]\nscope = ["attention"]\nquantize = ["int8"]\nmodule_map = ["paper", "structural"]\n',
        [190, 120],
        ["paper", "structural"],
    ),
    "quantize": (
        '[axes]\nquantize = ["int8", "int4"]\ngroup_size = [64]\n',
        [190, 120],
        ["int8", "int4 group_size 64"],
    ),
    "group_size": ('[axes]\nquantize = ["int4"]\ngroup_size = [128, 32]\n', [120, 190], ["32", "128"]),
    "rounding": ('[axes]\nquantize = ["int4"]\nrounding = ["nearest", "gptq"]\n', [120, 190], ["nearest", "gptq"]),
    "smooth": ('[axes]\nquantize = ["int8"]\nsmooth = [0, 0.5]\n', [120, 190], ["none", "0.5"]),
    "calibration": (
        '[axes]\nquantize = ["int4"]\nrounding = ["gptq"]\ncalibration = ["self", "hf:some/set"]\n',
        [190, 120],
        ["self", "hf:some/set"],
    ),
    "calibration_tokens": (
        '[axes]\nquantize = ["int4"]\nrounding = ["gptq"]\ncalibration_tokens = [8192, 512]\n',
        [190, 120],
        ["512", "8,192"],
    ),
    "method": (
        '[axes]\nprune = [0.5]\nmethod = ["l1-unstructured", "wanda"]\n',
        [120, 190],
        ["l1-unstructured", "wanda"],
    ),
    "pattern": (
        '[axes]\nprune = [0.5]\nmethod = ["wanda"]\npattern = ["none", "2:4"]\n',
        [190, 120],
        ["none", "2:4"],
    ),
    "seed": ('[axes]\nprune = [0.5]\nmethod = ["random-unstructured"]\nseed = [0, 1]\n', [190, 120], ["0", "1"]),
    "per_layer": ("[axes]\nprune = [0.5]\nper_layer = [false, true]\n", [190, 120], ["no", "yes"]),
    "drop_blocks": (
        "[[cells]]\n[[cells.steps]]\ndrop_blocks = 2\n[[cells]]\n[[cells.steps]]\ndrop_blocks = 8\n",
        [190, 60],
        ["2", "8"],
    ),
    "exclude": (
        '[[cells]]\n[[cells.steps]]\nprune = 0.5\nexclude = ["q_proj"]\n[[cells]]\n[[cells.steps]]\nprune = 0.5\n',
        [190, 60],
        ["q_proj", "none"],
    ),
}


def make_study_of(name: str, folder: Path) -> Study:
    text, right, _ = GRIDS[name]
    return make_grid_study(text, folder / "grid.toml", right)


@pytest.mark.parametrize("name", GRIDS)
def test_each_axis_has_a_column_a_chart_and_a_conclusion(name: str, tmp_path: Path) -> None:
    study, values = make_study_of(name, tmp_path), GRIDS[name][2]
    axis = next(each for each in study.find_axes() if each.name == name)
    assert [list(cells) for _, cells in axis.groups] == [values] * len(axis.groups)
    (chart,) = [chart for chart in draw_charts(study) if chart.name == axis.chart]
    assert all(value in chart.panels[0][1] for value in values)
    (conclusion,) = [each for each in draw_conclusions(study, evaluate_findings(study)[0]) if each.chart == axis.chart]
    best = max(values, key=lambda value: sum(cells[value].comparison.kept.value or 0 for _, cells in axis.groups))
    assert conclusion.answer == "holds"
    assert f"{best} hurts least" in conclusion.claim
    column = {"scope": "scope", "method": "method", "quantize": "scheme"}.get(name, name)
    rows = list(csv.DictReader(io.StringIO(to_csv(tidy_rows(study)).decode())))
    assert len({row[column] for row in rows}) == len(values)
    columns = build_cells_table(study).columns
    assert name in ("scope", "method", "quantize") or name.replace("_", " ").capitalize() in columns


def test_groups_have_cells_that_differ_only_on_the_axis(tmp_path: Path) -> None:
    study = make_study_of("layers", tmp_path)
    by_layers, by_amount = {axis.name: axis for axis in study.find_axes()}["layers"], study.find_axes()[-1]
    assert [name for name, _ in by_layers.groups] == ["20 %", "50 %"]
    assert (by_amount.name, [name for name, _ in by_amount.groups]) == ("prune", ["layers 0-5", "layers 6-11"])
    by_claim = {each.claim: each for each in draw_conclusions(study, evaluate_findings(study)[0])}
    assert by_claim["All else equal, layers 0-5 hurts least"].numbers == "kept on average: 0-5 85.0 % and 6-11 40.0 %"
    assert by_claim["Pruned by 50 %, layers 0-5 keeps less than 90 %"].answer == "holds"
    assert by_claim["Pruned by 20 %, layers 6-11 keeps less than 90 %"].answer == "holds"


def test_group_names_omit_settings_that_only_some_methods_have(tmp_path: Path) -> None:
    grid = '[axes]\nmethod = ["l1-unstructured", "ln-structured"]\nprune = [0, 0.5]\nquantize = ["int8", "fp8"]\n'
    axes = make_grid_study(grid, tmp_path / "grid.toml", [190, 180, 150, 140, 130, 120]).find_axes()
    (axis,) = (axis for axis in axes if axis.name == "quantize")
    assert [name for name, _ in axis.groups] == ["not pruned", "l1-unstructured, 50 %", "ln-structured, 50 %"]


def test_group_without_a_setting_of_the_others_has_a_name(tmp_path: Path) -> None:
    grid = '[axes]\nlayers = ["0-5"]\nprune = [0.2, 0.5]\nquantize = ["none", "int8"]\n'
    study = make_grid_study(grid, tmp_path / "grid.toml", [190, 180, 100, 90])
    claims = [each.claim for each in draw_conclusions(study, evaluate_findings(study)[0])]
    assert claims == [f"Pruned by 50 %, {name} keeps less than 90 %" for name in ("not quantized", "int8")]


def test_uncalibrated_cells_are_compared_with_those_of_each_text(tmp_path: Path) -> None:
    grid = '[axes]\nquantize = ["int4"]\nrounding = ["nearest", "gptq"]\ncalibration = ["self", "hf:some/set"]\n'
    study = make_grid_study(grid, tmp_path / "grid.toml", [120, 190, 180])
    axis = next(each for each in study.find_axes() if each.name == "rounding")
    assert [name for name, _ in axis.groups] == ["calibration self", "calibration hf:some/set"]
    assert [list(cells) for _, cells in axis.groups] == [["nearest", "gptq"]] * 2


def test_cells_with_different_steps_are_not_compared(tmp_path: Path) -> None:
    grid = (ROOT / "examples" / "grid.toml").read_text(encoding="utf-8")
    assert make_grid_study(grid, tmp_path / "grid.toml", [190, 150, 180, 140, 130, 100]).find_axes() == ()


def make_steps(name: str, *steps: str) -> str:
    """Return a cell of a grid, with a step for attention and one for feed-forward."""
    scopes = zip(("attention", "feed-forward"), steps, strict=True)
    return f'[[cells]]\nname = "{name}"\n' + "".join(
        f'[[cells.steps]]\nscope = ["{s}"]\n{step}\n' for s, step in scopes
    )


def test_steps_that_prune_by_different_amounts_are_on_no_axis_of_amounts(tmp_path: Path) -> None:
    amounts = {"both-10": (0.1, 0.1), "both-50": (0.5, 0.5), "mixed": (0.1, 0.9)}
    grid = "".join(make_steps(name, *(f"prune = {amount}" for amount in each)) for name, each in amounts.items())
    study = make_grid_study(grid, tmp_path / "grid.toml", [200, 190, 60])
    (axis,) = (axis for axis in study.find_axes() if axis.name == "prune")
    assert [[cell.key for cell in cells.values()] for _, cells in axis.groups] == [["both-10", "both-50"]]
    claims = [each.claim for each in draw_conclusions(study, [])]
    assert claims == ["Pruned by up to 50 %, each form keeps at least 90 %"]
    assert [(row["key"], row["amount"]) for row in tidy_rows(study)] == [
        ("both-10", 0.1),
        ("both-50", 0.5),
        ("mixed", None),
    ]


def test_steps_of_different_methods_or_schemes_are_a_value_of_their_own(tmp_path: Path) -> None:
    l1, random = "prune = 0.6", 'prune = 0.6\nmethod = "random-unstructured"'
    grid = make_steps("pure", l1, l1) + make_steps("mixed", l1, random) + make_steps("random", random, random)
    study = make_grid_study(grid, tmp_path / "grid.toml", [190, 90, 20])
    (row,) = (row for row in tidy_rows(study) if row["key"] == "mixed")
    assert row["method"] == row["pruning"] == "l1-unstructured + random-unstructured"
    int8, int4 = 'quantize = "int8"', 'quantize = "int4"\ngroup_size = 64'
    grid = make_steps("pure", int8, int8) + make_steps("mixed", int8, int4) + make_steps("four", int4, int4)
    study = make_grid_study(grid, tmp_path / "grid.toml", [190, 90, 20])
    (axis,) = (axis for axis in study.find_axes() if axis.name == "quantize")
    ((_, cells),) = axis.groups
    keys = {value: cell.key for value, cell in cells.items()}
    assert keys == {"int8": "pure", "int8 + int4 group_size 64": "mixed", "int4 group_size 64": "four"}


def test_curve_of_quantized_cells_starts_at_what_is_quantized_alone(tmp_path: Path) -> None:
    grid = '[axes]\nscope = ["feed-forward"]\nlayers = ["0-5"]\nprune = {}\nquantize = ["int8"]\n'
    study = make_grid_study(grid.format("[0, 0.1, 0.3]"), tmp_path / "grid.toml", [188, 190, 60])
    (axis,) = study.find_axes()
    ((_, cells),) = axis.groups
    assert list(cells) == ["0 %", "10 %", "30 %"]
    (conclusion,) = draw_conclusions(study, [])
    assert conclusion.claim == "Pruned by 30 %, each form keeps less than 90 %"
    assert conclusion.numbers == "30.0 % kept; falls fastest from 10 to 30 %, by 65.0 points"
    # Where quantization alone takes most, pruning is not blamed.
    (conclusion,) = draw_conclusions(
        make_grid_study(grid.format("[0, 0.1, 0.3]"), tmp_path / "grid.toml", [90, 80, 60]), []
    )
    assert conclusion.claim == "Not pruned at all, each form keeps less than 90 %"
    # Without such a cell, nothing is known below the first amount.
    (conclusion,) = draw_conclusions(make_grid_study(grid.format("[0.1, 0.3]"), tmp_path / "grid.toml", [90, 60]), [])
    assert conclusion.numbers == "45.0 % kept; falls fastest from 10 to 30 %, by 15.0 points"


def test_conclusions_of_an_axis_name_the_cells_that_they_compare(tmp_path: Path) -> None:
    cells = [(0.6, "int8"), (0.6, "int4"), (0.6, "fp8"), (0.7, "int8"), (0.7, "int4")]
    grid = "".join(f'[[cells]]\nlayers = "0-5"\nprune = {prune}\nquantize = "{scheme}"\n' for prune, scheme in cells)
    study = make_grid_study(grid, tmp_path / "grid.toml", [180, 100, 50, 90, 20])
    found = {each.claim: each.numbers for each in draw_conclusions(study, []) if each.chart == "axis-quantize"}
    (first, three), (second, two) = found.items()
    assert first == "All else equal (60 %), quantize int8 hurts least"
    assert second == "All else equal (70 %), quantize int8 hurts least"
    assert three.startswith("kept: int8 90.0 %, ")
    assert two.startswith("kept: int8 45.0 % and ")


def test_axes_of_the_papers_figures_are_not_drawn_again() -> None:
    assert make_whole_grid().find_axes() == ()
    assert make_study(make_cells_of_two_methods()).find_axes() == ()


@pytest.mark.parametrize("form", ['method = ["wanda"]', "per_layer = [true]", 'quantize = ["int8"]'])
def test_axes_outside_the_papers_figures_are_drawn(form: str, tmp_path: Path) -> None:
    """With all their cells, though a figure shows those in int8 that are pruned by 20 %."""
    grid = f'[axes]\nscope = ["attention", "feed-forward"]\nprune = [0.2, 0.5]\n{form}\n'
    axes = make_grid_study(grid, tmp_path / "grid.toml", [190, 150, 150, 60]).find_axes()
    groups = {axis.name: [name for name, _ in axis.groups] for axis in axes}
    assert groups == {"scope": ["20 %", "50 %"], "prune": ["attention", "feed-forward"]}


def test_group_names_differ_from_those_of_the_papers_figures(tmp_path: Path) -> None:
    grid = '[axes]\nscope = ["attention", "feed-forward"]\nprune = [0.5, 0.9]\nquantize = ["none", "int8"]\n'
    study = make_grid_study(grid, tmp_path / "grid.toml", [190, 188, 60, 55, 150, 148, 30, 28])
    groups = {axis.name: [name for name, _ in axis.groups] for axis in study.find_axes()}
    assert groups["prune"] == ["attention, int8", "feed-forward, int8"]
    claims = [conclusion.claim for conclusion in draw_conclusions(study, [])]
    assert len(set(claims)) == len(claims)


def test_columns_of_settings_have_one_type(tmp_path: Path) -> None:
    grid = "".join(f"[[cells]]\n[[cells.steps]]\ndrop_blocks = {blocks}\n" for blocks in (2, '"20-23"'))
    rows = tidy_rows(make_grid_study(grid, tmp_path / "grid.toml", [190, 60]))
    assert [row["drop_blocks"] for row in rows] == ["2", "20-23"]
    numbers = tidy_rows(make_study_of("calibration_tokens", tmp_path))
    for table in (rows, numbers):
        with pq.ParquetFile(io.BytesIO(to_parquet(table))) as file:
            assert file.read().to_pylist() == table
    assert [row["calibration_tokens"] for row in numbers] == [8192, 512]


def test_infinite_norm_is_written_as_text(tmp_path: Path) -> None:
    grid = '[axes]\nprune = [0.5]\nmethod = ["ln-structured"]\nnorm = [1, "inf"]\n'
    values = json.dumps(dump_study(make_grid_study(grid, tmp_path / "grid.toml", [190, 60])), allow_nan=False)
    assert [cell["norm"] for cell in json.loads(values)["cells"]] == ["1", "inf"]


def test_findings_without_cells_are_listed_on_one_line(tmp_path: Path) -> None:
    study = make_study_of("layers", tmp_path)
    page, text = parse_html(render_study_html(study)), render_study_markdown(study)
    (section,) = [each for each in page.all("section") if each.attributes.get("aria-labelledby") == "findings"]
    assert [line.text for line in section.all("p")] == ["The study has no cells for the paper's findings."]
    assert not section.all("table")
    assert text.count("no cells for") == 1
    page = parse_html(render_study_html(make_study(make_cells_of_two_methods())))
    (section,) = [each for each in page.all("section") if each.attributes.get("aria-labelledby") == "findings"]
    assert [part.attributes.get("id") for part in section.all("table")[0].all("tbody")] == ["F2", "F3", "F4", "F10"]
    assert [line.text for line in section.all("p")] == ["The study has no cells for F1, F5, F6, F7, F8 and F9."]


def test_charts_of_a_removed_axis_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    write_study(make_study_of("layers", tmp_path), tmp_path / "study")
    assert list_figures(tmp_path) == ["axis-layers.svg", "axis-prune.svg"]
    write_study(make_study_of("smooth", tmp_path), tmp_path / "study")
    assert list_figures(tmp_path) == ["axis-smooth.svg"]


def list_figures(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in (folder / "study" / "figures").iterdir())
