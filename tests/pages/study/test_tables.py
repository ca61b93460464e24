"""The tables of the paper in its layout, the table of cells, and the tidy table."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from compressknow.pages.study.charts import compute_mean_drop
from compressknow.pages.study.findings import evaluate_findings
from compressknow.pages.study.pages import (
    build_bounds_table,
    build_cells_table,
    build_comparisons_table,
    build_paper_tables,
    to_csv,
    to_parquet,
)
from compressknow.pages.study.records import COLUMNS, FailedCell, tidy_rows
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.study.studies import (
    ENTRY,
    ProbeSpec,
    gp,
    gpq,
    gq,
    make_grid_study,
    make_study,
    make_whole_grid,
    render_study_markdown,
)

TASKS = ProbeSpec(n=100, known=80, probes=("lm-eval:boolq", "lm-eval:piqa"), entry={"chance": 0.5, "majority": 0.621})


def test_paper_table_has_the_columns_of_the_paper() -> None:
    (table,) = build_paper_tables(make_whole_grid())
    both = [f"{scope}_GPQ {amount}%" for scope in ("Overall", "Att", "FF") for amount in (20, 40)]
    assert table.columns == ("Model", "Dataset", "Baseline", "Overall_GQ", "Att_GQ", "FF_GQ", *both)


def test_table_3_gives_encoder_only_models_in_percent() -> None:
    cells = [gq("attention", range(60)), gpq("feed-forward", 0.4, range(31))]
    study = make_study(cells, spec=ProbeSpec(n=90, known=70))
    (table,) = build_paper_tables(study)
    assert table.caption == "Table 3 (encoder-only), int8-paper, accuracy in %"
    dashes = ("-",) * 5
    assert table.rows == (("tiny-bert", "lama:trex", "77.778", "-", "66.667", "-", *dashes, "34.444"),)
    assert "Majority baselines in %: lama:trex 5.000." in render_study_markdown(study)


def test_tables_say_if_attention_is_not_that_of_the_paper() -> None:
    study, differs = make_study([gq("attention", range(60))]), "the paper's map differs from it for BERT"
    assert differs in render_study_markdown(study)
    (cell,) = study.cells
    of_paper = replace(cell, settings={**cell.settings, "module_map": "paper"})
    assert differs not in render_study_markdown(replace(study, cells=(of_paper,)))


@pytest.mark.parametrize(("family", "number"), [("causal", 4), ("seq2seq", 5)])
def test_tables_of_other_models_give_shares_per_data_set(family: str, number: int) -> None:
    study = make_study([gq("overall", range(53)), gpq("attention", 0.2, range(75))], family, TASKS)
    (table,) = build_paper_tables(study)
    assert f"Table {number} " in table.caption
    assert [row[:4] for row in table.rows] == [
        ("tiny-bert", "lm-eval:boolq", "0.8000", "0.5300"),
        ("tiny-bert", "lm-eval:piqa", "0.8000", "0.5300"),
    ]
    assert [row[8] for row in table.rows] == ["0.7500", "0.7500"]
    assert "Majority baselines: lm-eval:boolq 0.6210, lm-eval:piqa 0.6210." in render_study_markdown(study)


def test_each_scheme_has_its_own_table() -> None:
    study = make_study([gq("attention", range(150), "int8"), gq("attention", range(120), "int8-paper")])
    assert [table.rows[0][4] for table in build_paper_tables(study)] == ["50.000", "40.000"]
    assert build_paper_tables(make_study([gp("attention", 0.2, range(9))])) == ()


def test_cells_table_has_the_original_on_top_and_every_cell() -> None:
    study = make_whole_grid()
    table = build_cells_table(study)
    assert table.rows[0][:3] == ("original", "", "66.7 %")
    assert [row[0] for row in table.rows[1:]] == [cell.setup for cell in study.cells]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    row = next(row for row in table.rows if row[0] == "Att_GP 40%")
    assert row[1].startswith("93.5 % (")
    assert row[4:] == ("8.4", "-", "436.0 MB", "416.0 MB")
    cells = [gp("attention", amount, range(150)) for amount in (0.002, 0.0028)]
    assert [row[4] for row in build_cells_table(make_study(cells)).rows[1:]] == ["0.042", "0.059"]


def test_cells_of_the_same_setup_have_different_names() -> None:
    cells = [gq("attention", range(150), "int8"), gq("attention", range(120), "int8-paper")]
    assert list(make_study(cells).name_cells().values()) == ["Att_GQ (int8)", "Att_GQ (int8-paper)"]
    assert list(make_study(cells[:1]).name_cells().values()) == ["Att_GQ"]
    assert [row.split("  ")[1] for row in str(make_study(cells)).splitlines()[-2:]] == [
        "Att_GQ (int8)",
        "Att_GQ (int8-paper)",
    ]


def test_cell_is_shown_with_its_name_in_the_grid(tmp_path: Path) -> None:
    grid = """
        [[cells]]
        name = "My favourite"
        scope = "attention"
        prune = 0.5
        [[cells]]
        scope = "feed-forward"
        prune = 0.5
    """
    rows = build_cells_table(make_grid_study(grid, tmp_path / "grid.toml", [150, 120])).rows
    assert [row[0] for row in rows] == ["original", "Att_GP 50% [my-favourite]", "FF_GP 50%"]


def test_tables_have_every_comparison_and_bound_of_the_findings() -> None:
    study = make_whole_grid()
    findings = evaluate_findings(study)[0]
    comparisons, bounds = build_comparisons_table(study, findings), build_bounds_table(study, findings)
    assert comparisons is not None
    assert bounds is not None
    assert len(comparisons.rows) == sum(len(finding.comparisons) for finding in findings)
    # 20 % of 21 M lose 2 of 300 facts, 20 % of 86 M lose 6.
    row = ("F4 Att_GP 20% / Overall_GP 20%", "300", "4", "0", "0.12", "0.62", "−0.042 (−0.227 to 0.142)", "1")
    assert row in comparisons.rows
    assert len(bounds.rows) == sum(len(finding.bounds) for finding in findings)
    assert bounds.rows[0] == ("F1 Overall_GP 10%", "0.5 % (−1.0 to 2.0 %)", "10.0 %", "< 0.001", "1")
    empty = make_study([])
    assert build_comparisons_table(empty, evaluate_findings(empty)[0]) is None


def test_failed_cells_are_listed_with_their_errors() -> None:
    study = make_study([], failed=[FailedCell("att-95", "Att_GP 95%", "RuntimeError:\nout of memory")])
    page = render_study_markdown(study)
    assert all(text in page for text in ("Att\\_GP 95%", "att-95", "RuntimeError: out of memory"))
    assert "Cells that failed" not in render_study_markdown(make_study([]))


def test_tidy_table_has_one_row_per_cell_and_probe() -> None:
    study = make_study([gp("attention", 0.4, {*range(70), 90}), gq("overall", range(40))], "causal", TASKS)
    rows = tidy_rows(study)
    assert [(row["key"], row["probe"]) for row in rows] == [
        ("att-gp-40", "lm-eval:boolq"),
        ("att-gp-40", "lm-eval:piqa"),
        ("overall-gq-int8-paper", "lm-eval:boolq"),
        ("overall-gq-int8-paper", "lm-eval:piqa"),
    ]
    # Rows also have columns of the settings of recipes.
    assert all([name for name in row if name in COLUMNS] == list(COLUMNS) for row in rows)
    first = rows[0]
    assert [first[name] for name in ("n", "both", "lost", "gained", "neither")] == [100, 70, 10, 1, 19]
    assert (first["scope"], first["method"], first["amount"]) == ("attention", "l1-unstructured", 0.4)
    assert (first["scheme"], first["status"], first["error"]) == (None, "ok", None)
    assert (first["accuracy_original"], first["accuracy_compressed"]) == (0.8, 0.71)
    assert first["drop_absolute"] == pytest.approx(0.09)
    assert first["drop_relative"] == pytest.approx(0.09 / 0.8)
    assert (first["kept"], first["pruned"], first["quantized"]) == (0.875, 8_400_000, 0)
    assert first["kept_low"] < 0.875 < first["kept_high"]
    assert first["mcnemar_p"] == pytest.approx(24 / 2**11)


def test_accuracies_are_averaged_as_the_protocol_says() -> None:
    # The cell answers all facts of the first relation right, and one of the two of the second.
    spec = ProbeSpec(n=5, known=5, relations=2, entry={**ENTRY, "average": "macro"})
    study = make_study([gq("attention", {0, 1, 2, 4})], spec=spec)
    assert [row["accuracy_compressed"] for row in tidy_rows(study)] == [0.75]
    assert [table.rows[0][4] for table in build_paper_tables(study)] == ["75.000"]
    assert compute_mean_drop(study.cells[0].comparison).value == 0.25
    # The share of all facts is 80 %.
    cells = build_cells_table(study)
    assert cells.rows[1][cells.columns.index("Accuracy, lama:trex, mean over relations")] == "75.0 %"
    assert "The accuracy on lama:trex is the mean over relations." in render_study_markdown(study)


def test_p_values_are_by_relation() -> None:
    # All 30 known facts of three relations of 20 are lost: two of eight signs are as far from 0.
    kept = {*range(200)} - {number for number in range(200) if number % 20 < 3}
    study = make_study([gp("attention", 0.4, kept)], spec=ProbeSpec(relations=20))
    (row,) = tidy_rows(study)
    assert (row["p"], row["mcnemar_p"]) == (0.25, 2 / 2**30)
    table = build_cells_table(study)
    assert table.rows[1][table.columns.index("p")] == "0.25"


def test_failed_cells_have_rows_without_figures() -> None:
    study = make_study([gq("overall", range(40))], "causal", TASKS, [FailedCell("x", "Att_GP 95%", "no\nmemory")])
    rows = tidy_rows(study)[-2:]
    assert [row["probe"] for row in rows] == ["lm-eval:boolq", "lm-eval:piqa"]
    for row in rows:
        known = {name: value for name, value in row.items() if value is not None and name != "probe"}
        assert known == {"key": "x", "setup": "Att_GP 95%", "status": "failed", "error": "no memory"}


def test_parameter_named_like_a_figure_does_not_set_it() -> None:
    failed = FailedCell("x", "Att ours 50%", "no memory", settings={"n": 8, "p": 2.0, "width": 3})
    (row,) = tidy_rows(make_study([], failed=[failed]))
    assert (row["n"], row["p"], row["width"]) == (None, None, 3)


def test_csv_and_parquet_have_the_same_rows_and_are_reproducible() -> None:
    rows = tidy_rows(make_whole_grid())
    as_csv, as_parquet = to_csv(rows), to_parquet(rows)
    assert (as_csv, as_parquet) == (to_csv(tidy_rows(make_whole_grid())), to_parquet(tidy_rows(make_whole_grid())))
    with pq.ParquetFile(io.BytesIO(as_parquet)) as file:
        table = file.read()
    assert {name: str(table.schema.field(name).type) for name in COLUMNS} == dict(COLUMNS)
    assert table.to_pylist() == rows
    read = list(csv.DictReader(io.StringIO(as_csv.decode())))
    assert [list(row) for row in read] == [list(rows[0])] * len(rows)
    assert [row["kept"] for row in read] == ["" if row["kept"] is None else repr(row["kept"]) for row in rows]
    assert b"\r" not in as_csv


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_errors_stay_in_one_field(text: str) -> None:
    rows = tidy_rows(make_study([], failed=[FailedCell("x", text, text)]))
    read = list(csv.DictReader(io.StringIO(to_csv(rows).decode())))
    assert [row["key"] for row in read] == ["x"]
    assert read[0]["error"] == rows[0]["error"]
    assert len(to_parquet(rows)) > 0


def test_empty_tidy_table_has_a_header() -> None:
    assert to_csv([]).decode() == ",".join(COLUMNS) + "\n"
    with pq.ParquetFile(io.BytesIO(to_parquet([]))) as file:
        assert file.metadata.num_rows == 0
