"""How fast each model was, and how much memory it took, where that was measured."""

from __future__ import annotations

from collections.abc import Iterator

from compressknow.format import NONE, plain, size
from compressknow.report.card.section import Context, Section
from compressknow.report.parts import Part
from compressknow.report.tables import Table

_COLUMNS = ("Model", "Device", "Facts a second", "Peak memory")


class Speed(Section):
    """Facts a second and peak memory, of both models or of the one that was measured."""

    title = "Speed and memory"
    order = 70

    def parts(self, context: Context) -> Iterator[Part]:
        rows = tuple(
            (
                who,
                plain(model.speed.device, 60),
                f"{model.speed.facts_per_second:,.1f}",
                size(model.speed.peak_bytes) if model.speed.peak_bytes is not None else NONE,
            )
            for who, model in (("original", context.original), ("compressed", context.comparison.model))
            if model.speed
        )
        if rows:
            yield Table("Speed and memory, measured on this machine", _COLUMNS, rows)
