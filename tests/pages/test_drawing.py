"""What charts say by their coordinates: figures read back from lines, bars, intervals, marks and cells."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from math import log10
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from compressknow.base.format import share
from compressknow.comparison.records import Counts, Estimate, Group
from compressknow.comparison.text import compare_text
from compressknow.evaluate.records import MEASURED
from compressknow.pages.card.pages import render_html
from compressknow.pages.card.sections.facts import chart_popularity
from compressknow.pages.drawing import SERIES, Bar, Line, Mark, Tradeoff, draw_bars, draw_lines, draw_tradeoff
from compressknow.pages.parts import Beside, Chart
from compressknow.pages.svg import Grid, draw_heat_map
from compressknow.pages.texts import make_text_parts
from tests.pages.card.cards import make_card_of_one
from tests.pages.coordinates import find_paths, find_text, interpolate, read_axes, read_points
from tests.pages.test_texts import make_chunks


def check_nothing_is_cut(root: Element) -> None:
    frame = read_points(root[2])
    for drawn in (read_points(path) for path in root.iter("path") if path.get("clip-path")):
        for side in (0, 1):
            places, limits = ([point[side] for point in each] for each in (drawn, frame))
            assert min(limits) <= min(places) <= max(places) <= max(limits)


def near(figure: float, tolerance: float = 0.6) -> object:
    """Coordinates have one decimal."""
    return pytest.approx(figure, abs=tolerance)


def test_bars_intervals_and_levels_are_at_their_figures() -> None:
    estimates = {"a": Estimate(0.5, 0.4, 0.7), "b": Estimate(-0.1, -0.2, 0.05), "c": Estimate(1.2, 1.1, 1.3)}
    bars = [Bar(name, value, place, "last" * (name == "c")) for place, (name, value) in enumerate(estimates.items())]
    root = ElementTree.fromstring(draw_bars(bars, "x", "t", levels={"near": 0.25, "far": 1.5}))
    across, _ = read_axes(root)
    check_nothing_is_cut(root)
    for i, (name, estimate) in enumerate(estimates.items()):
        (bar,), interval = find_paths(root, f"f-c{i + 1}"), find_paths(root, "s-ink", stroke_width="1.4")[i]
        corners, ends = read_points(bar), read_points(interval)
        assert [across(x) for x, _ in corners[:2]] == [near(0), near(100 * (estimate.value or 0))]
        assert [across(x) for x, _ in ends] == [near(100 * (estimate.low or 0)), near(100 * (estimate.high or 0))]
        middle = (corners[0][1] + corners[2][1]) / 2
        assert [y for _, y in ends] == [near(middle)] * 2
        # Its name and its figure are on the same line, the figure to the right of the bar and its interval.
        figure = find_text(root, f"{100 * (estimate.value or 0):.1f} %".replace("-", "\N{MINUS SIGN}"))
        assert [float(text.get("y", "")) for text in (find_text(root, name), figure)] == [near(middle, 6)] * 2
        assert float(figure.get("x", "")) > max(x for x, _ in (*corners, *ends))
    for (name, level), path in zip({"near": 25, "far": 150}.items(), find_paths(root, "s-muted"), strict=True):
        assert [across(x) for x, _ in read_points(path)] == [near(level)] * 2
        assert across(float(find_text(root, name).get("x", ""))) == near(level)
    # The heading of a group has a line of its own, above its first bar.
    above, heading, below = (float(find_text(root, name).get("y", "")) for name in ("b", "last", "c"))
    assert above + 15 < heading < below - 15


def test_lines_and_levels_are_at_their_figures() -> None:
    figures = {
        "steep": [(20.0, 0.7), (40.0, 0.45)],
        "flat": [(10.0, 0.75), (60.0, 0.65)],
        "quantized": [(10.0, 0.6), (60.0, 0.55)],
    }
    lines = [
        Line(name, tuple((x, Estimate(y)) for x, y in points), is_from_original=name != "quantized")
        for name, points in figures.items()
    ]
    levels = {"level": 0.95, "next": 0.93, "low": -0.15}
    root = ElementTree.fromstring(draw_lines(lines, "x", "t", start=0.8, levels=levels))
    check_nothing_is_cut(root)
    across, up = read_axes(root)
    marks = list(root.iter("use"))
    for i, (name, points) in enumerate(figures.items()):
        (path,) = find_paths(root, f"s-c{i + 1}", stroke_width="1.8")
        read = [(across(x), up(y)) for x, y in read_points(path)]
        first = [(0.0, 0.8)] * (name != "quantized")
        assert read == [(near(x), near(100 * y)) for x, y in first + points]
        drawn = [mark for mark in marks if f"f-c{i + 1}" in mark.get("class", "")]
        assert [(across(float(m.get("x", ""))), up(float(m.get("y", "")))) for m in drawn] == read[len(first) :]
        # Its name is next to its end.
        label = find_text(root, name)
        assert label.get("class") == f"f-c{i + 1}"
        assert up(float(label.get("y", ""))) == near(read[-1][1], 4)
    shapes = {path.get("id"): path.get("d") for path in root.iter("path")}
    assert len({shapes[mark.get("href", "").removeprefix("#")] for mark in marks}) == len(figures)
    for level, path in zip(levels.values(), find_paths(root, "s-muted"), strict=True):
        assert [up(y) for _, y in read_points(path)] == [near(100 * level)] * 2


@pytest.mark.parametrize("more_is_better", [False, True])
def test_marks_best_models_and_shares_are_at_their_figures(more_is_better: bool) -> None:
    figures = [(100.0, 0.7, "made"), (200.0, 0.9, "made"), (300.0, 0.8, "made"), (400.0, 1.0, "original")]
    marks = [Mark(x, Estimate(y, y - 0.05, y), kind, f"{x:g}: {y:g}") for x, y, kind in figures]
    looks = {"original": ("D", SERIES[1], 6.0), "made": ("o", SERIES[0], 5.0)}
    chart = Tradeoff("t", "cost", marks, looks, ("made",), more_is_better, keep=0.85, rounding=0.97)
    root = ElementTree.fromstring(draw_tradeoff(chart, "x", broad=True))
    across, up = read_axes(root)
    drawn = {use.findtext("title"): use for use in root.iter("use") if use.find("title") is not None}
    assert len(drawn) == len(marks)
    for mark in marks:
        use = drawn[mark.tooltip]
        assert across(float(use.get("x", ""))) == near(mark.cost, 1)
        assert up(float(use.get("y", ""))) == near(100 * mark.share)
        assert ("f-c2" in use.get("class", "")) == (mark.kind == "original")
    # A share is available at every higher cost, or at every lower speed.
    (best,) = find_paths(root, "s-c1", stroke_width="1.2")
    steps = [(200, 90), (200, 80), (300, 80)] if more_is_better else [(100, 70), (200, 70), (200, 90)]
    read = [(across(x), up(y)) for x, y in read_points(best)]
    assert [point for point, after in zip(read, [*read[1:], None], strict=True) if point != after] == [
        (near(x, 1), near(y)) for x, y in steps
    ]
    (keep,), (rounding,) = (find_paths(root, "s-muted", stroke_dasharray=dashes) for dashes in ("3.6,2.7", "0.9,1.8"))
    assert [[up(y) for _, y in read_points(path)] for path in (keep, rounding)] == [[near(85)] * 2, [near(97)] * 2]


@pytest.mark.parametrize("broad", [False, True])
def test_cells_of_a_heat_map_are_at_their_names_in_the_shade_that_the_legend_explains(broad: bool) -> None:
    cells = {
        ("first", "k"): 2.0,
        ("first", "q"): 8.0,
        ("second", "k"): 16.0,
        ("second", "v"): 4.0,
        ("second", "q"): 3.5,
    }
    grid = Grid(("first", "second", "whole"), ("k", "v", "q"), ((2.0, None, 8.0), (16.0, 4.0, 3.5), (5.0,)))
    drawn = draw_heat_map(grid, "t", "x", broad, bounds=(3, 4, 5, 6, 8, 16), write=lambda figure: f"{figure:g}")
    root = ElementTree.fromstring(drawn or "")
    assert str(root.findtext("desc")).startswith("From 2 (k, first) to 16 (k, second).")
    (*boxes, whole), legend = list(root.iter("rect"))[:-7], list(root.iter("rect"))[-7:]
    texts = list(root.iter("text"))
    edges = {text.get("x"): float(text.text or "") for text in texts[-6:]}
    ends = [edges.get(each.get("x"), 0.0) for each in legend]
    shades = {each.get("opacity"): pair for each, pair in zip(legend, pairwise([*ends, float("inf")]), strict=True)}
    for ((row, column), figure), box in zip(cells.items(), boxes, strict=True):
        low, high = shades[box.get("opacity")]
        assert low <= figure < high
        x, y, width, height = (float(box.get(name, "")) for name in ("x", "y", "width", "height"))
        assert x < float(find_text(root, column).get("x", "")) < x + width
        assert y < float(find_text(root, row).get("y", "")) < y + height
        shown = [box.findtext("title")] if not broad else [t.text for t in texts if is_in(t, (x, y, width, height))]
        assert shown == [f"{figure:g}"]
    assert [whole.get("x"), float(whole.get("width", ""))] == [boxes[0].get("x"), near(3 * (width + 1) - 1)]


def is_in(text: Element, box: tuple[float, float, float, float]) -> bool:
    (x, y, width, height), left, bottom = box, float(text.get("x", "")), float(text.get("y", ""))
    return x < left < x + width and y < bottom < y + height


def test_knowledge_kept_by_popularity_is_above_the_name_of_its_bin() -> None:
    estimates = {"top": Estimate(0.9, 0.8, 0.95), "middle": Estimate(0.75, 0.63, 0.85), "bottom": Estimate(0.8)}
    bins = [Group(name, Counts(), (), kept, None, None, None) for name, kept in estimates.items()]
    chart = chart_popularity(bins, "atlas")
    assert chart is not None
    root = ElementTree.fromstring(chart.draw_svg("x").svg)
    check_nothing_is_cut(root)
    _, up = read_axes(root)
    strokes = [read_points(path) for path in find_paths(root, "s-c1", stroke_width="2")]
    for (name, kept), dot, stroke in zip(estimates.items(), root.iter("use"), strokes, strict=True):
        x, y, value = float(dot.get("x", "")), float(dot.get("y", "")), 100 * (kept.value or 0)
        ends = [value if end is None else 100 * end for end in (kept.low, kept.high)]
        assert [float(find_text(root, name).get("x", ""))] + [x for x, _ in stroke] == [near(x)] * 3
        assert [up(y), *(up(y) for _, y in stroke)] == [near(value), *map(near, ends)]
        label = find_text(root, share(kept.value))
        assert (float(label.get("x", "")), float(label.get("y", ""))) == (near(x + 8, 2), near(y, 6))


def test_dots_of_calibration_are_at_their_confidence_and_share_of_right_answers() -> None:
    card = make_card_of_one()
    confidence = card.comparisons[0].probes[0].confidence
    assert confidence is not None
    sides = {"original": confidence.reliability_original, "compressed": confidence.reliability_compressed}
    charts = re.findall(r'<svg class="chart".*?</svg>', render_html(card), re.DOTALL)
    for side, bins in sides.items():
        (root,) = (
            ElementTree.fromstring(chart) for chart in charts if f">Calibration of the {side} model, atlas" in chart
        )
        across, up = read_axes(root)
        dots = [(float(dot.get("x", "")), float(dot.get("y", "")), dot.get("class", "")) for dot in root.iter("use")]
        filled = [each for each in bins if each.facts]
        for (x, y, look), each in zip(dots, filled, strict=True):
            assert (across(x), up(y)) == (near(100 * (each.confidence or 0)), near(100 * each.right / each.facts))
            assert ("f-paper" in look) == (each.facts < 10)
        (diagonal,) = find_paths(root, "s-muted")
        assert [(across(x), up(y)) for x, y in read_points(diagonal)] == [(near(0), near(0)), (near(100), near(100))]


@pytest.mark.parametrize("median", [2e-4, 3e-9, 0.0])
def test_bars_of_divergence_end_at_their_percentile_on_a_logarithmic_axis(median: float) -> None:
    names = {"median": median, "90th": 3e-3, "95th": 0.02, "99th": 0.4, "99.9th": 1.5, "largest": 12.0}
    percentiles = dict(zip(("p50", "p90", "p95", "p99", "p99_9", "max"), names.values(), strict=True))
    figures = compare_text("text:a.txt", 32, MEASURED, make_chunks(1), make_chunks(2))
    assert figures.moved is not None
    figures = replace(figures, moved=replace(figures.moved, kl_percentiles=percentiles))
    (beside,) = (part for part in make_text_parts(figures, ("original", "compressed")) if isinstance(part, Beside))
    assert isinstance(beside.chart, Chart)
    root = ElementTree.fromstring(beside.chart.draw_svg("x").svg)
    ticks = [(float(t.get("x", "")), log10(float(t.text or ""))) for t in root.iter("text") if is_power(t.text or "")]
    across = interpolate(ticks)
    # Rounding errors have no length, but the figures are those of the table.
    start = -4 if median > 1e-7 else -7
    written = dict(beside.table.rows)["KL, median"]
    assert {"2e-04": "0.0002", "3e-09": "3e-09", "0e+00": "0"}[f"{median:.0e}"] == written
    for (name, figure), bar in zip(names.items(), find_paths(root, "f-c1"), strict=True):
        left, right = ((pick(x for x, _ in read_points(bar))) for pick in (min, max))
        assert (across(left), across(right)) == (near(start, 0.05), near(log10(max(figure, 1e-7)), 0.05))
        middle = read_points(bar)[0][1] / 2 + read_points(bar)[2][1] / 2
        assert float(find_text(root, name).get("y", "")) == near(middle, 6)
    assert float(find_text(root, written).get("y", "")) == near(float(find_text(root, "median").get("y", "")), 2)


def is_power(text: str) -> bool:
    return re.fullmatch(r"1(e-\d+|0*)|0\.0*1", text) is not None
