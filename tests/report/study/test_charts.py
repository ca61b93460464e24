"""The paper's figures from a study's own data: which there are, what they show, and as files of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from compressknow.report.drawing import Bar, Level, Line, bars, lines
from compressknow.report.records import Estimate
from compressknow.report.study.charts import NAMES, baselines, guessing, mean_drop, mean_kept, study_charts
from compressknow.report.svg import COLOURS, standalone
from compressknow.report.templates import source
from compressknow.report.text import plain
from tests.report.hostile import TEXTS
from tests.report.study.studies import Asked, gp, gq, study, whole_grid

TASK = {"chance": 0.5, "majority": 0.6}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_whole_grid_has_the_figures_of_its_family() -> None:
    names = {family: [chart.name for chart in study_charts(whole_grid(family))] for family in ("masked", "seq2seq")}
    common = ["pruning-drop", "pruning-kept", "quantization", "pruning-quantization", "final-layer"]
    assert names["masked"] == common
    assert names["seq2seq"] == [*common[:4], "attention-kinds", "final-layer"]
    assert set(names["seq2seq"]) <= set(NAMES)


@pytest.mark.parametrize(("family", "figure"), [("masked", "2"), ("causal", "5"), ("seq2seq", "6, 12")])
def test_title_names_the_figure_of_the_paper(family: str, figure: str) -> None:
    chart = study_charts(study([gp("attention", a, range(100)) for a in (0.2, 0.4)], family))[0]
    assert chart.title.endswith(f"(figure {figure} of the paper)")


def test_charts_without_cells_are_left_out() -> None:
    assert study_charts(study([])) == ()
    assert study_charts(study([gp("attention", 0.2, range(100))])) == ()  # one amount is no line
    assert [chart.name for chart in study_charts(study([gq("attention", range(100))]))] == ["quantization"]


def test_lines_are_told_in_words_too() -> None:
    made = study([gp("attention", a, range(k)) for a, k in ((0.2, 150), (0.4, 100))], asked=Asked(n=200, known=200))
    drop, kept = study_charts(made)
    assert "attention: 25.0 at 20 %, 50.0 at 40 %." in drop.svg
    assert "attention: 75.0 % at 20 %, 50.0 % at 40 %." in kept.svg


def test_figures_are_means_over_the_probes() -> None:
    both = study([gp("attention", 0.2, range(150))], asked=Asked(n=200, known=200, probes=("a", "b")))
    one = study([gp("attention", 0.2, range(150))], asked=Asked(n=200, known=200))
    first, second = (made.cells[0].comparison for made in (both, one))
    assert mean_drop(first).value == mean_drop(second).value == pytest.approx(0.25)
    assert mean_kept(first).value == pytest.approx(0.75)
    widths = [(fall.high or 0) - (fall.low or 0) for fall in (mean_drop(first), mean_drop(second))]
    assert widths[0] == pytest.approx(widths[1] / 2**0.5)


def test_baselines_are_where_every_probe_has_them() -> None:
    tasks = study([], asked=Asked(n=100, known=80, probes=("a", "b"), entry=TASK))
    assert [(level.name, round(level.value, 9)) for level in baselines(tasks)] == [
        ("majority baseline", 0.2),
        ("guessing", 0.3),
    ]
    assert guessing(tasks) == (Level("guessing", 0.5),)
    free = study([], asked=Asked(n=100, known=80, entry={"chance": None, "majority": 0.1}))
    assert [level.name for level in baselines(free)] == ["majority baseline"]
    assert guessing(free) == ()
    drawn = study_charts(study([gp("overall", a, range(50)) for a in (0.2, 0.4)], asked=Asked(100, 80, entry=TASK)))
    assert {"majority baseline", "guessing"} <= set(texts(drawn[0].svg))


def test_lines_differ_in_marker_and_dashes() -> None:
    svg = study_charts(whole_grid())[0].svg
    dashed = {match.group() for match in re.finditer(r'stroke-dasharray="[^"]+"', svg)}
    assert len(dashed) >= 3  # of three lines one is whole; the baseline is dashed too
    assert len(set(re.findall(r'class="[^"]*s-(c\d)', svg))) == 3


def test_lines_begin_at_the_original_however_little_is_kept() -> None:
    svg = lines([Line("x", ((40.0, Estimate(0.5)), (80.0, Estimate(0.2))))], "a", "t", start=1)
    assert "100 %" in texts(svg)


def test_bars_stand_in_groups_under_their_names() -> None:
    chart = next(chart for chart in study_charts(whole_grid()) if chart.name == "pruning-quantization")
    shown = texts(chart.svg)
    assert [text for text in shown if text.endswith("int8-paper")] == ["20 % and int8-paper", "40 % and int8-paper"]
    assert shown.count("attention") == 2


def test_gains_are_drawn_left_of_zero() -> None:
    svg = bars([Bar("x", Estimate(-0.1, -0.2, 0.0))], "b", "t", high=10, unit="")
    assert {"\N{MINUS SIGN}10.0", "\N{MINUS SIGN}20"} <= set(texts(svg))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_hostile_names_stay_text(text: str) -> None:
    def drawn(name: str) -> list[str]:
        title, points = plain(name, 60), ((20.0, Estimate(0.5)), (40.0, Estimate(0.2)))
        line = lines([Line(name, points)], "a", title, start=1, levels=[Level(name, 0.1)])
        return [line, bars([Bar(name, Estimate(0.5), 0, name)], "b", title)]

    for shown, harmless in zip(drawn(text), drawn("harmless"), strict=True):
        tags = [[element.tag for element in ElementTree.fromstring(svg).iter()] for svg in (shown, harmless)]
        assert tags[0] == tags[1]
        file = standalone(shown, plain(text, 60), source("style.css"))
        assert ElementTree.fromstring(file.encode()).tag.endswith("svg")


def test_standalone_figure_has_its_title_and_colours_of_both_schemes() -> None:
    chart = study_charts(whole_grid())[0]
    file = standalone(chart.svg, chart.title, source("style.css"))
    root = ElementTree.fromstring(file.encode())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert chart.title.startswith(" ".join(texts(file)[-2:])[:40])
    (style,) = root.iter("{http://www.w3.org/2000/svg}style")
    assert style.text is not None
    assert "var(" not in style.text
    light, dark = style.text.split("@media (prefers-color-scheme:dark)")
    for name in COLOURS:
        both = [re.search(rf"\.f-{name}{{fill:(#[0-9a-f]+)}}", half) for half in (light, dark)]
        assert both[0] is not None
        assert both[1] is not None
        assert both[0].group(1) != both[1].group(1)
    assert "href" not in re.sub(r'href="#', "", file)


def test_same_study_gives_the_same_bytes_in_another_process() -> None:
    code = "from tests.report.study.test_charts import *; print([chart.svg for chart in study_charts(whole_grid())])"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("<svg") == 5
