"""The figures of the paper, drawn from a study: which there are, what they show, and standalone files."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from compressknow.base.format import clean
from compressknow.comparison.records import Estimate
from compressknow.pages.card.make import compare
from compressknow.pages.drawing import Bar, Line, draw_bars, draw_lines
from compressknow.pages.pages import read_source
from compressknow.pages.study.charts import (
    Chart,
    compute_mean_drop,
    compute_mean_kept,
    draw_charts,
    find_baselines,
    find_marks,
    is_chart,
)
from compressknow.pages.study.records import Study
from compressknow.pages.svg import COLOURS, make_standalone
from tests.pages.answering import make_answer, make_runs
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.study.studies import ENTRY, ROUNDING, TASKS, ProbeSpec, gp, gq, make_study, make_whole_grid

TASK = {"chance": 0.5, "majority": 0.6}


def get_svg(chart: Chart) -> str:
    ((_, svg),) = chart.panels
    return svg


def read_texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_whole_grid_has_the_figures_of_its_family() -> None:
    names = {family: [chart.name for chart in draw_charts(make_whole_grid(family))] for family in ("masked", "seq2seq")}
    common = ["pruning-drop", "pruning-kept", "quantization", "pruning-quantization", "final-layer"]
    assert names["masked"] == common
    assert names["seq2seq"] == [*common[:4], "attention-kinds", "final-layer"]
    assert all(map(is_chart, names["seq2seq"]))


@pytest.mark.parametrize(
    ("family", "figure"),
    [("masked", "figures 2 and 19"), ("causal", "figure 5"), ("seq2seq", "figures 6 and 12")],
)
def test_title_names_the_figure_of_the_paper(family: str, figure: str) -> None:
    chart = draw_charts(make_study([gp("attention", a, range(100)) for a in (0.2, 0.4)], family))[0]
    assert chart.title.endswith(f"({figure} of the paper)")


def test_charts_without_cells_are_left_out() -> None:
    assert draw_charts(make_study([])) == ()
    assert draw_charts(make_study([gp("attention", 0.2, range(100))])) == ()  # one amount is not a line
    assert [chart.name for chart in draw_charts(make_study([gq("attention", range(100))]))] == ["quantization"]


def test_lines_are_described_in_words() -> None:
    cells = [gp("attention", a, range(k)) for a, k in ((0.2, 150), (0.4, 100))]
    study = make_study(cells, spec=ProbeSpec(n=200, known=200))
    drop, kept = draw_charts(study)
    assert "attention: 25.0 at 20 %, 50.0 at 40 %." in get_svg(drop)
    assert "attention: 75.0 % at 20 %, 50.0 % at 40 %." in get_svg(kept)


def test_figures_are_means_over_the_probes() -> None:
    both = make_study([gp("attention", 0.2, range(150))], spec=ProbeSpec(n=200, known=200, probes=("a", "b")))
    one = make_study([gp("attention", 0.2, range(150))], spec=ProbeSpec(n=200, known=200))
    first, second = (study.cells[0].comparison for study in (both, one))
    assert compute_mean_drop(first).value == compute_mean_drop(second).value == pytest.approx(0.25)
    assert compute_mean_kept(first).value == pytest.approx(0.75)
    widths = [(drop.high or 0) - (drop.low or 0) for drop in (compute_mean_drop(first), compute_mean_drop(second))]
    assert widths[0] == pytest.approx(widths[1] / 2**0.5)


def test_interval_of_the_accuracy_drop_is_over_relations() -> None:
    # Three of ten relations are lost entirely.
    cells = [(True, n % 10 > 2) for n in range(300)]
    sides = [[make_answer(n, cell[side], relation=f"r{n % 10}") for n, cell in enumerate(cells)] for side in (0, 1)]
    comparison = compare(*make_runs(sides))
    drop, (probe,) = compute_mean_drop(comparison), comparison.probes
    expected = probe.certainty.difference
    assert (drop.value, drop.low, drop.high) == pytest.approx((0.3, -expected.high, -expected.low))
    assert expected.high - expected.low > 2 * (probe.difference.high - probe.difference.low)


def test_baselines_are_drawn_if_every_probe_has_them() -> None:
    tasks = make_study([], spec=ProbeSpec(n=100, known=80, probes=("a", "b"), entry=TASK))
    assert find_baselines(tasks) == pytest.approx({"majority baseline": 0.2, "guessing": 0.3})
    assert find_marks(tasks) == {"guessing": 0.5}
    open_answers = make_study([], spec=ProbeSpec(n=100, known=80, entry={"chance": None, "majority": 0.1}))
    assert list(find_baselines(open_answers)) == ["majority baseline"]
    assert find_marks(open_answers) == {}
    cells = [gp("overall", a, range(50)) for a in (0.2, 0.4)]
    drawn = draw_charts(make_study(cells, spec=ProbeSpec(100, 80, entry=TASK)))
    assert {"majority baseline", "guessing"} <= set(read_texts(get_svg(drawn[0])))


def test_chart_of_knowledge_kept_has_a_rounding_line() -> None:
    cells = [gp("attention", a, range(k)) for a, k in ((0.2, 90), (0.4, 80))]
    study = make_study(cells, spec=ProbeSpec(n=200, known=100, entry=ENTRY))
    drop, kept = draw_charts(study)
    assert find_marks(study) == {"rounding alone": 0.98}
    assert "rounding alone: 98.0 %." in get_svg(kept)
    assert "rounding alone" in read_texts(get_svg(kept))
    assert "rounding" not in get_svg(drop)
    first, second = (
        make_study(cells, spec=ProbeSpec(200, 100, 1, (name,), ENTRY | {"noise_floor": ROUNDING | {"lost": lost}}))
        for name, lost in (("a", 5), ("b", 0))
    )
    assert find_marks(join_probes(first, second)) == {"rounding alone": 0.95}
    without = make_study(cells, spec=ProbeSpec(n=200, known=100, probes=("c",), entry=ENTRY | {"noise_floor": None}))
    assert find_marks(join_probes(first, without)) == find_marks(without) == {}
    # A probe of which nothing is known has nothing to keep.
    unknown = make_study(cells, spec=ProbeSpec(200, 0, 1, ("d",), ENTRY | {"noise_floor": None}))
    assert find_marks(join_probes(first, unknown)) == find_marks(first)


def test_level_near_the_start_of_the_lines_is_labelled_at_their_ends() -> None:
    lines = [Line("x", ((40.0, Estimate(0.5)), (80.0, Estimate(0.2))))]
    levels = {"near": 0.97, "far": 0.3}
    root = ElementTree.fromstring(draw_lines(lines, "a", "t", start=1, levels=levels))
    anchors = {each.text: each.get("text-anchor", "start") for each in root.iter("text")}
    positions = {each.text: float(each.get("x") or 0) for each in root.iter("text")}
    assert anchors["near"] == "end", root
    assert positions["near"] > positions["far"]


def test_lines_differ_in_color_and_dashes() -> None:
    svg = get_svg(draw_charts(make_whole_grid())[0])
    dashed = {match.group() for match in re.finditer(r'stroke-dasharray="[^"]+"', svg)}
    assert len(dashed) >= 3  # two of the three lines, and the baseline
    assert len(set(re.findall(r'class="[^"]*s-(c\d)', svg))) == 3


def test_lines_begin_at_the_original() -> None:
    svg = draw_lines([Line("x", ((40.0, Estimate(0.5)), (80.0, Estimate(0.2))))], "a", "t", start=1)
    assert "100 %" in read_texts(svg)


def test_bars_are_grouped_and_labelled() -> None:
    chart = next(chart for chart in draw_charts(make_whole_grid()) if chart.name == "pruning-quantization")
    shown = read_texts(get_svg(chart))
    assert [text for text in shown if text.endswith("int8-paper")] == ["20 % and int8-paper", "40 % and int8-paper"]
    assert shown.count("attention") == 2


def test_gains_are_drawn_as_negative_losses() -> None:
    svg = draw_bars([Bar("x", Estimate(-0.1, -0.2, 0.0))], "b", "t", unit="")
    assert {"\N{MINUS SIGN}10.0", "\N{MINUS SIGN}20"} <= set(read_texts(svg))


def join_probes(first: Study, second: Study) -> Study:
    """Return a study of the same cells with the probes of both."""
    cells = (
        replace(a, comparison=replace(a.comparison, probes=a.comparison.probes + b.comparison.probes))
        for a, b in zip(first.cells, second.cells, strict=True)
    )
    return replace(first, probes=first.probes + second.probes, cells=tuple(cells))


def make_study_of_two_probes() -> Study:
    specs = [ProbeSpec(n=200, known=200, probes=(name,)) for name in ("lama:trex", "lama:squad")]
    amounts = ((0.2, 150, 180), (0.4, 100, 160))
    first, second = (
        make_study([gp("attention", amount, range(right[probe])) for amount, *right in amounts], spec=specs[probe])
        for probe in (0, 1)
    )
    return join_probes(first, second)


def test_each_probe_has_a_plot_of_its_own_figures() -> None:
    means, _, by_probe = draw_charts(make_study_of_two_probes())
    assert "attention: 17.5 at 20 %, 35.0 at 40 %." in get_svg(means)
    assert by_probe.name == "pruning-drop-by-probe"
    assert by_probe.title == "Accuracy lost by how much was pruned, in points, by probe (figures 20 to 22 of the paper)"
    assert [probe for probe, _ in by_probe.panels] == ["lama:trex", "lama:squad"]
    descriptions = ["attention: 25.0 at 20 %, 50.0 at 40 %.", "attention: 10.0 at 20 %, 20.0 at 40 %."]
    for (probe, svg), description in zip(by_probe.panels, descriptions, strict=True):
        assert description in svg
        assert f"in points, {probe}</title>" in svg


def read_ticks(svg: str) -> list[str]:
    """Return the tick labels of an axis in points."""
    return [text for text in read_texts(svg) if re.fullmatch("\N{MINUS SIGN}?[0-9]+", text)]


def test_plots_by_probe_share_one_scale() -> None:
    both = make_study_of_two_probes()
    without_levels = replace(both, probes=tuple(replace(probe, majority=None) for probe in both.probes))
    (_, first), (_, second) = draw_charts(without_levels)[-1].panels
    assert read_ticks(first) == read_ticks(second) == ["0", "10", "20", "30", "40", "50"]


def test_charts_of_the_same_quantity_share_one_scale() -> None:
    cells = [gq("attention", range(195)), gq("overall", range(190)), gp("final", 0.2, range(20))]
    charts = draw_charts(make_study(cells, spec=ProbeSpec(entry={"chance": None, "majority": None})))
    assert [chart.name for chart in charts] == ["quantization", "final-layer"]
    first, second = (read_ticks(get_svg(chart)) for chart in charts)
    assert first == second
    assert first[-1] == "60"


def test_close_amounts_have_fewer_tick_labels() -> None:
    points = tuple((amount, Estimate(0.5)) for amount in (1.0, 2.0, 4.0, 50.0))
    svg = draw_lines([Line("x", points)], "a", "t", start=0, unit="")
    assert [text for text in read_texts(svg) if text.endswith(" %")] == ["0 %", "50 %"]


@pytest.mark.parametrize(
    ("family", "figures"),
    [
        ("masked", {"pruning-drop": "figures 20 to 22", "final-layer": "figure 25"}),
        ("causal", {"pruning-drop": "figure 23", "final-layer": "figure 26"}),
        ("seq2seq", {"pruning-drop": "figure 24", "attention-kinds": "figure 18", "final-layer": "figure 27"}),
    ],
)
def test_charts_by_probe_are_those_of_the_papers_appendix(family: str, figures: dict[str, str]) -> None:
    drawn = {chart.name: chart.title for chart in draw_charts(make_whole_grid(family, TASKS)) if chart.by_probe}
    numbered = {f"{name}-by-probe": f"({number} of the paper)" for name, number in figures.items()}
    assert set(drawn) == {*numbered, "quantization-by-probe", "pruning-quantization-by-probe"}
    assert all(map(is_chart, drawn))
    for name, title in drawn.items():
        assert title.endswith(numbered.get(name, "by probe"))


def test_pruning_kinds_of_attention_is_not_a_figure_of_the_paper() -> None:
    cells = [gp(kind, a, range(60)) for kind in ("self-attention", "cross-attention") for a in (0.2, 0.4)]
    titles = [chart.title for chart in draw_charts(make_study(cells, "seq2seq", TASKS))]
    assert "Accuracy lost by kind of attention pruned, in points, by probe" in titles
    assert not any("of the paper" in title for title in titles)


def test_standalone_file_has_plots_by_probe_side_by_side() -> None:
    chart = draw_charts(make_study_of_two_probes())[-1]
    root = ElementTree.fromstring(
        make_standalone([*chart.panels, *chart.panels], chart.title, read_source("style.css"))
    )
    plots = [element for element in root if element.tag.endswith("svg")]
    assert [plot.get("y") == plots[0].get("y") for plot in plots] == [True, True, False, False]
    assert [plot.get("x") == plots[0].get("x") for plot in plots] == [True, False, True, False]
    names = [e.text for e in root if e.tag.endswith("text") and e.text in ("lama:trex", "lama:squad")]
    assert names == ["lama:trex", "lama:squad"] * 2
    left, top, width, height = map(float, root.get("viewBox", "").split())
    assert all(float(plot.get("x", "")) + float(plot.get("width", "")) <= width - left for plot in plots)
    assert all(float(plot.get("y", "")) + float(plot.get("height", "")) <= height - top for plot in plots)


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_names_stay_text(text: str) -> None:
    def draw(name: str) -> list[str]:
        title, points = clean(name, 60), ((20.0, Estimate(0.5)), (40.0, Estimate(0.2)))
        line = draw_lines([Line(name, points)], "a", title, start=1, levels={name: 0.1})
        return [line, draw_bars([Bar(name, Estimate(0.5), 0, name)], "b", title)]

    for shown, harmless in zip(draw(text), draw("harmless"), strict=True):
        tags = [[element.tag for element in ElementTree.fromstring(svg).iter()] for svg in (shown, harmless)]
        assert tags[0] == tags[1]
        file = make_standalone([(clean(text, 60), shown)], clean(text, 60), read_source("style.css"))
        assert ElementTree.fromstring(file.encode()).tag.endswith("svg")


def test_standalone_figure_has_its_title_and_colours_of_both_schemes() -> None:
    chart = draw_charts(make_whole_grid())[0]
    file = make_standalone([("", get_svg(chart))], chart.title, read_source("style.css"))
    root = ElementTree.fromstring(file.encode())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root[0].text == chart.title == " ".join(read_texts(file)[:2])
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
    code = "from tests.pages.study.test_charts import *; print(draw_charts(make_whole_grid()))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("<svg") == 5
