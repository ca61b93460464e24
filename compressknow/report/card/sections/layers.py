"""What was done to which layers, as the manifest of a converted checkpoint tells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.compress.schemes import schemes_of, word_of
from compressknow.format import NONE, count, number, percent, plain
from compressknow.report.card.section import Context, Section
from compressknow.report.parts import Part
from compressknow.report.tables import Table


class Layers(Section):
    """Parameters, zeros and error of each group of layers; left out for a checkpoint without a manifest."""

    title = "By group of layers"
    order = 50

    def parts(self, context: Context) -> Iterator[Part]:
        model = context.comparison.model
        if rows := tuple(_row(name, group) for name, group in model.groups.items() if group.get("parameters")):
            scheme = word_of(schemes_of(model.recipe))
            columns = ("Group of layers", "Parameters", "Zeros", "Pruned", scheme, "Relative error")
            yield Table("What was done to which layers", columns, rows, captioned=False)


def _row(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    parameters = int(group["parameters"])

    def part(key: str) -> str:
        return percent(int(group[key]), parameters) if group.get(key) is not None else NONE

    error = group.get("relative_error")
    return (
        plain(name, 60),
        count(parameters),
        part("zeros_after"),
        part("pruned"),
        part("quantized"),
        number(float(error), 4) if error is not None else NONE,
    )
