"""The conclusions of a study: their figures are those of the cells, and a claim holds only if these show it."""

from __future__ import annotations

import pytest

from compressknow.pages.study.charts import draw_charts
from compressknow.pages.study.findings import evaluate_findings
from compressknow.pages.study.records import Study
from compressknow.pages.study.summary import Conclusion, draw_conclusions
from tests.pages.pages import parse_html
from tests.pages.study.studies import (
    STUDIES,
    TASKS,
    ProbeSpec,
    gp,
    gq,
    make_study,
    make_whole_grid,
    render_study_html,
    render_study_markdown,
)


def conclude(study: Study) -> dict[str, Conclusion]:
    return {each.id or each.claim: each for each in draw_conclusions(study, evaluate_findings(study)[0])}


def test_conclusions_quote_the_figures_of_the_cells() -> None:
    conclusions = conclude(make_whole_grid())
    level = conclusions["Pruned by 30 to 50 %, attention hurts least"]
    assert (level.answer, level.chart) == ("holds", "pruning-kept")
    # Attention keeps 187 and 175 of 200 facts at 40 and 50 %, feed-forward 174 and 150, overall 149 and 100.
    assert level.numbers == "kept on average: attention 90.5 %, feed-forward 81.0 % and overall 62.3 %"
    scheme = conclusions["Quantized by int8-paper, attention hurts least"]
    assert scheme.numbers == "kept: attention 95.0 %, feed-forward 90.0 % and overall 80.0 %"
    assert scheme.answer == "holds"
    assert conclusions["F6"].numbers == "Att_GQ 63.3 % right, FF_GQ 60.0 %, p = 0.012"
    # Fewer than 5 facts differ below 30 %; at 80 and 90 %, feed-forward has nothing left either.
    assert conclusions["F4"].numbers.startswith("12 of 18 comparisons as claimed, 0 against it; ")


def test_no_module_is_named_if_all_keep_the_same() -> None:
    study = make_study([gp(scope, 0.1, range(200)) for scope in ("attention", "feed-forward", "overall")])
    line = conclude(study)["Pruned by 10 to 30 %, one module hurts least"]
    assert (line.answer, line.numbers[:20]) == ("cannot tell", "kept: overall 100 %,")


@pytest.mark.parametrize(("right", "answer"), [(150, "holds"), (178, "cannot tell")])
def test_cliff_holds_if_the_whole_interval_is_below(right: int, answer: str) -> None:
    study = make_study([gp("attention", 0.1, range(200)), gp("attention", 0.3, range(right))])
    line = conclude(study)["Pruned by 30 %, attention keeps less than 90 %"]
    assert line.answer == answer
    assert line.numbers.startswith(f"{right / 2:.1f} % kept; falls fastest from 10 to 30 %, by ")


def test_share_just_below_the_cliff_does_not_read_as_the_cliff() -> None:
    cells = [gp("attention", 0.1, range(2515)), gp("attention", 0.3, range(2263))]
    line = conclude(make_study(cells, spec=ProbeSpec(n=2600, known=2515)))[
        "Pruned by 30 %, attention keeps less than 90 %"
    ]
    assert line.numbers.startswith("89.98 % kept; ")


@pytest.mark.parametrize(("right", "answer"), [(199, "holds"), (182, "cannot tell")])
def test_absence_of_a_cliff_holds_if_every_interval_is_above(right: int, answer: str) -> None:
    study = make_study([gp("attention", 0.1, range(right)), gp("attention", 0.3, range(200))])
    assert conclude(study)["Pruned by up to 30 %, attention keeps at least 90 %"].answer == answer


def test_quantized_modules_that_keep_the_same_leave_the_conclusion_open() -> None:
    study = make_study([gq("attention", range(190)), gq("overall", range(190))])
    (line,) = (each for each in conclude(study).values() if not each.id)
    assert (line.answer, line.numbers) == ("cannot tell", "kept: overall 95.0 % and attention 95.0 %")


def test_claims_without_cells_are_left_out() -> None:
    study = make_study([gp("attention", 0.2, range(150))])
    assert list(conclude(study)) == ["F1"]
    assert conclude(make_study([])) == {}
    assert "F2" not in conclude(make_whole_grid("causal", TASKS))  # the paper claims it only of another family


@pytest.mark.parametrize("name", STUDIES)
def test_each_conclusion_is_next_to_its_chart(name: str) -> None:
    study = STUDIES[name]()
    page = parse_html(render_study_html(study))
    drawn = {chart.name for chart in draw_charts(study)}
    blocks = [each for each in page.all("div") if each.attributes.get("class") == "found"]
    charts = [svg.attributes["id"] for block in blocks for svg in block.all("svg")]
    lines = draw_conclusions(study, evaluate_findings(study)[0])
    assert charts == [each for each in dict.fromkeys(line.chart for line in lines) if each in drawn]
    texts = [each.text for block in blocks for each in block.all("li")]
    for line, text in zip(lines, texts, strict=True):
        assert text.startswith(line.answer)
        assert line.claim in text
        assert text.endswith(line.numbers)


def test_markdown_and_terminal_have_the_same_conclusions() -> None:
    study = make_whole_grid(spec=ProbeSpec(n=200, known=100))
    markdown = render_study_markdown(study)
    for line in draw_conclusions(study, evaluate_findings(study)[0]):
        assert f"- **{line.answer}**: {f'{line.id} '.lstrip()}{line.claim} (" in markdown
        assert str(line).startswith(f"{line.answer}: {f'{line.id} '.lstrip()}{line.claim} (")
