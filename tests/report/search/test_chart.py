"""The front of a search: what nothing beats."""

from __future__ import annotations

from compressknow.report.search import Trial, front
from compressknow.stats.records import Estimate


def test_the_front_holds_what_nothing_beats() -> None:
    points = [
        Trial(name, "search", {}, Estimate(kept, kept, kept), 9, {"bytes": size})
        for name, size, kept in (("a", 3, 0.9), ("b", 1, 0.5), ("c", 2, 0.4), ("d", 4, 0.9), ("e", 5, 1.0))
    ]
    assert [t.setup for t in front(points, "bytes")] == ["b", "a", "e"]
