"""Findings by pruning method and by quantization scheme."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from compressknow.pages.study.charts import draw_by_method, draw_charts
from compressknow.pages.study.findings import describe_changes, evaluate_findings, list_ids
from compressknow.pages.study.pages import dump_study
from compressknow.pages.study.records import FailedCell, tidy_rows
from compressknow.pages.study.summary import draw_conclusions, rank_cells, write_verdict
from tests.pages.study.studies import (
    Cell,
    gp,
    gq,
    make_cells_of_two_methods,
    make_grid_study,
    make_study,
    make_whole_grid,
    render_study_html,
    render_study_markdown,
)

ATT, FF, ALL = "attention", "feed-forward", "overall"
GOOD, BAD = range(190), range(100)
L1, WANDA = "l1-unstructured", "wanda"


def test_findings_of_each_method_use_its_own_cells() -> None:
    study = make_study(make_cells_of_two_methods())
    by_method = evaluate_findings(study)[1]
    assert list(by_method) == [("pruning", L1), ("pruning", WANDA)]
    assert list_ids(by_method.values()) == ["F2", "F4"]
    assert [findings["F2"].answer for findings in by_method.values()] == ["holds", "does not hold"]
    assert [findings["F4"].answer for findings in by_method.values()] == ["holds", "holds"]
    # The findings of the paper use its own method, with the same figures.
    (f2,) = (finding for finding in evaluate_findings(study)[0] if finding.id == "F2")
    assert f2.comparisons == by_method["pruning", L1]["F2"].comparisons
    of_wanda = by_method["pruning", WANDA].values()
    assert {pair.less for f in of_wanda for pair in f.comparisons} <= {c.key for c in study.cells}


def test_findings_that_change_with_the_method_are_named() -> None:
    assert describe_changes(evaluate_findings(make_study(make_cells_of_two_methods()))[1]) == [
        "F2 changes with the method that prunes: it holds with l1-unstructured, and does not hold with wanda.",
    ]
    alike = [gp(s, 0.5, right, m) for m in (L1, WANDA) for s, right in ((ATT, GOOD), (FF, BAD))]
    assert describe_changes(evaluate_findings(make_study(alike))[1]) == [
        "No finding holds with one method and fails with another.",
    ]


def test_findings_that_change_with_the_scheme_are_named() -> None:
    cells = [gq(ATT, GOOD, "int8"), gq(FF, BAD, "int8"), gq(ATT, BAD, "int4"), gq(FF, GOOD, "int4")]
    # Cells that are only pruned belong to no scheme.
    cells += [gp(ATT, 0.4, GOOD), gp(FF, 0.4, BAD)]
    by_scheme = evaluate_findings(make_study(cells))[1]
    assert {scheme: findings["F6"].answer for scheme, findings in by_scheme.items()} == {
        ("quantization", "int8"): "holds",
        ("quantization", "int4"): "does not hold",
    }
    assert "F6 changes with the scheme" in describe_changes(by_scheme)[0]
    assert list_ids(by_scheme.values()) == ["F6"]


def test_study_of_one_method_has_no_findings_by_method() -> None:
    study = make_whole_grid()
    assert evaluate_findings(study)[1] == {}
    assert describe_changes({}) == []
    assert "The findings by method" not in render_study_html(study)
    assert dump_study(study)["findings_by_method"] == {}


def test_all_formats_have_the_findings_by_method() -> None:
    study = make_study(make_cells_of_two_methods())
    html, text, values = render_study_html(study), render_study_markdown(study), dump_study(study)
    for page in (html, text):
        assert "F2 changes with the method that prunes" in page
        assert "The findings by method" in page
    assert "| wanda | prunes | does not hold | holds |" in text
    by_name = json.loads(json.dumps(values, allow_nan=False))["findings_by_method"]["pruning"]
    assert {name: {id: f["answer"] for id, f in findings.items()} for name, findings in by_name.items()} == {
        L1: {"F2": "holds", "F4": "holds"},
        WANDA: {"F2": "does not hold", "F4": "holds"},
    }
    assert by_name[WANDA]["F2"]["comparisons"]
    assert values["changes"] == describe_changes(evaluate_findings(study)[1])


def test_each_scope_has_a_chart_with_a_line_for_each_method() -> None:
    charts = {chart.name: chart for chart in draw_charts(make_study(make_cells_of_two_methods()))}
    for scope in (ATT, FF, ALL):
        ((_, svg),) = charts[f"methods-{scope}"].panels
        assert "L1-unstructured" in svg
        assert "wanda" in svg
    assert not any(chart.name.startswith("methods") for chart in draw_charts(make_whole_grid()))


def test_best_pruning_method_is_named_for_each_module() -> None:
    study = make_study([*make_cells_of_two_methods(), gp(FF, 0.3, BAD, L1), gp(FF, 0.6, GOOD, WANDA)])
    conclusions = draw_conclusions(study, evaluate_findings(study)[0])
    by_claim = {each.claim: each for each in conclusions if "With" in each.claim}
    # With everything pruned, Wanda keeps ten of 200 facts that L1 loses, and L1 none that Wanda loses.
    everything = by_claim["With everything pruned by 40 to 50 %, wanda hurts least"]
    assert (everything.answer, everything.chart) == ("holds", "methods-overall")
    assert everything.numbers == "kept on average: wanda 30.0 % and L1-unstructured 25.0 %"
    assert by_claim["With attention pruned by 40 to 50 %, L1-unstructured hurts least"].answer == "holds"
    assert by_claim["With feed-forward pruned by 40 to 50 %, wanda hurts least"].answer == "holds"
    assert len(by_claim) == 3
    assert write_verdict(study).endswith(
        "of the methods that prune, wanda hurts least (everything and feed-forward) and L1-unstructured hurts least "
        "(attention)."
    )
    # Modules are ranked only by the method of the paper.
    assert write_verdict(study).startswith("tiny-bert, with L1-unstructured: pruned by 30 to 50 %, attention")
    claims = [each.claim for each in conclusions]
    assert "Pruned by 30 to 50 % (L1-unstructured), attention hurts least" in claims
    assert "Pruned by 40 % (L1-unstructured), overall keeps less than 90 %" in claims
    alike = make_study([gp(ALL, 0.5, GOOD, method) for method in (L1, WANDA)])
    (line,) = draw_conclusions(alike, evaluate_findings(alike)[0])[:1]
    assert line.claim == "With everything pruned by 50 %, one method hurts least"
    assert line.answer == "cannot tell"
    assert write_verdict(alike) == "tiny-bert: of the methods that prune, none clearly hurts least."


def test_worst_method_is_named_if_the_best_two_are_alike() -> None:
    cells = {L1: range(50), WANDA: range(150), "sparsegpt": range(2, 152)}
    study = make_study([gp(ALL, 0.5, right, method) for method, right in cells.items()])
    (ranking,) = rank_cells(study)["methods"]
    assert (ranking.clear, ranking.clear_worst, list(ranking.kept)[-1]) == (False, True, "L1-unstructured")
    line = next(each for each in draw_conclusions(study, evaluate_findings(study)[0]) if "With" in each.claim)
    assert (line.answer, line.claim) == ("holds", "With everything pruned by 50 %, L1-unstructured hurts most")
    assert "of the methods that prune, L1-unstructured hurts most (everything)" in write_verdict(study)


def test_methods_that_prune_by_different_amounts_are_not_compared() -> None:
    study = make_study([gp(ATT, 0.4, GOOD, L1), gp(ATT, 0.5, BAD, WANDA)])
    assert rank_cells(study)["methods"] == ()
    assert "methods" not in write_verdict(study)


def test_one_amount_has_a_bar_for_each_method() -> None:
    study = make_study([gp(scope, 0.5, right, m) for scope in (ATT, ALL) for m, right in ((L1, BAD), (WANDA, GOOD))])
    (chart,) = (chart for chart in draw_charts(study) if chart.name.startswith("methods"))
    assert chart.name == "methods-pruned"
    for text in ("overall 50 %", "attention 50 %", "L1-unstructured", "wanda"):
        assert text in chart.panels[0][1]
    assert {each.chart for each in draw_conclusions(study, evaluate_findings(study)[0]) if "With" in each.claim} == {
        "methods-pruned"
    }


def test_pruned_and_quantized_cells_have_a_bar_for_each_method() -> None:
    cells = [Cell(ATT, right, 0.5, "int4", method) for method, right in ((L1, BAD), (WANDA, GOOD))]
    (chart,) = (chart for chart in draw_charts(make_study(cells)) if chart.name == "methods-quantized")
    assert "attention 50 %, int4" in chart.panels[0][1]


def test_refused_cells_are_listed_apart_from_failed_ones() -> None:
    refused = FailedCell("att-gq", "Att_GQ smooth 0.5", "no norm can take it")
    study = replace(make_study(make_cells_of_two_methods()), refused=(refused,))
    assert [row["error"] for row in tidy_rows(study) if row["status"] == "refused"] == ["no norm can take it"]
    for page in (render_study_html(study), render_study_markdown(study)):
        assert "Cells that this model cannot have" in page
        assert "Cells that failed" not in page


def test_each_seed_counts_as_a_method(tmp_path: Path) -> None:
    axes = 'scope = ["attention"]\nmethod = ["random-unstructured"]\nprune = [0.2, 0.4]\nseed = [0, 1]'
    study = make_grid_study(f"[axes]\n{axes}\n", tmp_path / "grid.toml", [190, 180, 120, 100])
    lines = {line.scope: [round(y.value, 2) for _, y in line.points] for line in draw_by_method(study, ATT)}
    assert lines == {"random-unstructured": [0.95, 0.6], "random-unstructured seed 1": [0.9, 0.5]}
    assert [row["pruning"] for row in tidy_rows(study)] == [*lines, *lines]
