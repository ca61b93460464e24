"""The chart of knowledge kept against cost: its frontier, its labels and its axes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree

import pytest

from compressknow.comparison.records import Estimate
from compressknow.pages.drawing import SERIES, Mark, Tradeoff, draw_tradeoff, find_unbeaten

POINTS = [("a", 3, 0.9), ("b", 1, 0.5), ("c", 2, 0.4), ("d", 4, 0.9), ("e", 5, 1.0)]


def make_marks(points: Iterable[tuple[str, float, float]]) -> list[Mark]:
    return [Mark(cost, Estimate(kept), "made", "tooltip", label) for label, cost, kept in points]


@pytest.mark.parametrize(("more_is_better", "best"), [(False, ["b", "a", "e"]), (True, ["e"])])
def test_frontier_has_the_marks_that_nothing_beats(more_is_better: bool, best: list[str]) -> None:
    unbeaten = find_unbeaten(make_marks(POINTS), more_is_better=more_is_better)
    assert [mark.label for mark in unbeaten] == best


def test_fastest_model_of_those_that_keep_as_much_is_unbeaten() -> None:
    points = [("slow", 10.0, 1.0), ("slower", 8.0, 1.0), ("fast", 40.0, 0.8), ("lossy", 30.0, 0.7)]
    assert [mark.label for mark in find_unbeaten(make_marks(points), more_is_better=True)] == ["fast", "slow"]


@pytest.mark.parametrize("broad", [False, True])
def test_marks_have_tooltips_and_labels_if_there_is_room(broad: bool) -> None:
    distant = [Mark(100.0 + 10 * i, Estimate(0.5 + 0.04 * i), "made", f"model {i}", str(i)) for i in range(10)]
    # Forty models at one point: labels for all would hide them.
    close = [Mark(150.0, Estimate(0.99), "made", f"twin {i}", f"t{i}") for i in range(40)]
    chart = Tradeoff("Kept", "MB", [*distant, *close], {"made": ("o", SERIES[0], 5.0)}, ("made",))
    drawn = ElementTree.fromstring(draw_tradeoff(chart, "x", broad=broad))
    labels = [text.text for text in drawn.iter("text")]
    assert {str(i) for i in range(10)} <= set(labels)
    assert 0 < sum(str(label).startswith("t") for label in labels) < 40
    tooltips = {title.text for title in drawn.iter("title")}
    assert {mark.tooltip for mark in (*distant, *close)} <= tooltips


def draw(*kept: Estimate, costs: tuple[float, ...], keep: float | None = None) -> ElementTree.Element:
    marks = [Mark(cost, each, "made", str(each)) for cost, each in zip(costs, kept, strict=True)]
    chart = Tradeoff("Kept", "MB", marks, {"made": ("o", SERIES[0], 5.0)}, (), keep=keep)
    return ElementTree.fromstring(draw_tradeoff(chart, "x"))


def measure_strokes(drawn: ElementTree.Element, width: str) -> list[float]:
    """Return the heights of the strokes of the path of this width."""
    (path,) = [path.get("d", "") for path in drawn.iter("path") if path.get("stroke-width") == width]
    strokes = [[float(number) for number in re.findall(r"[\d.]+", stroke)] for stroke in path.split("M")[1:]]
    return [abs(y1 - y0) for _, y0, _, y1 in strokes]


def test_mark_shows_its_interval() -> None:
    wide, narrow = Estimate(0.9, 0.8, 1.0), Estimate(0.9, 0.85, 0.95)
    drawn = draw(wide, narrow, Estimate(0.9), costs=(100, 200, 300))
    first, second = measure_strokes(drawn, "1.1")
    assert first == pytest.approx(2 * second, rel=0.02)


def test_axis_that_does_not_start_at_zero_says_so() -> None:
    texts = [text.text for text in draw(Estimate(0.99), Estimate(0.97), costs=(242.6, 243.1)).iter("text")]
    assert "80 %" in texts
    assert "(horizontal axis from 230, vertical axis from 80 %)" in texts
    gigabytes = [text.text for text in draw(Estimate(0.99), Estimate(0.97), costs=(2426, 2431)).iter("text")]
    assert "(horizontal axis from 2,305, vertical axis from 80 %)" in gigabytes
    far = [text.text for text in draw(Estimate(0.99), Estimate(0.02), costs=(20, 200)).iter("text")]
    assert not [text for text in far if "axis from" in str(text)]


def test_axis_includes_intervals_below_all_marks() -> None:
    texts = [text.text for text in draw(Estimate(0.9, 0.62, 0.98), costs=(200,)).iter("text")]
    assert any("vertical axis from 60 %" in str(text) for text in texts)


def test_axis_includes_the_share_to_keep() -> None:
    texts = [text.text for text in draw(Estimate(0.93, 0.9, 0.95), costs=(200,), keep=0.6).iter("text")]
    assert any("vertical axis from 60 %" in str(text) for text in texts)
