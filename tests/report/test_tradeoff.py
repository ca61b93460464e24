"""The chart of what is kept against what it costs: the edge that nothing beats, and labels beside their marks."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from compressknow.report.drawing import SERIES
from compressknow.report.tradeoff import Look, Mark, Tradeoff, tradeoff, unbeaten

POINTS = [("a", 3, 0.9), ("b", 1, 0.5), ("c", 2, 0.4), ("d", 4, 0.9), ("e", 5, 1.0)]


@pytest.mark.parametrize(("more_is_better", "best"), [(False, ["b", "a", "e"]), (True, ["e"])])
def test_the_edge_holds_what_nothing_beats(more_is_better: bool, best: list[str]) -> None:
    found = unbeaten(POINTS, lambda point: point[1:], more_is_better=more_is_better)
    assert [name for name, *_ in found] == best


def test_of_speeds_the_fastest_that_keeps_as_much_is_unbeaten() -> None:
    points = [("slow", 10.0, 1.0), ("slower", 8.0, 1.0), ("fast", 40.0, 0.8), ("lossy", 30.0, 0.7)]
    found = unbeaten(points, lambda point: point[1:], more_is_better=True)
    assert [name for name, *_ in found] == ["fast", "slow"]


@pytest.mark.parametrize("broad", [False, True])
def test_each_mark_has_its_label_or_no_room_and_tells_a_pointer(broad: bool) -> None:
    apart = [Mark(100.0 + 10 * i, 0.5 + 0.04 * i, "made", f"model {i}", str(i)) for i in range(10)]
    # Forty models in one place: a label for each would hide them all.
    heap = [Mark(150.0, 0.99, "made", f"twin {i}", f"t{i}") for i in range(40)]
    chart = Tradeoff("Kept", "MB", [*apart, *heap], {"made": Look("o", SERIES[0])}, ("made",), "Told.")
    drawn = ElementTree.fromstring(tradeoff(chart, "x", broad=broad))
    written = [text.text for text in drawn.iter("text")]
    assert {str(i) for i in range(10)} <= set(written)
    assert 0 < sum(str(text).startswith("t") for text in written) < 40
    told = {title.text for title in drawn.iter("title")}
    assert {mark.told for mark in (*apart, *heap)} <= told
