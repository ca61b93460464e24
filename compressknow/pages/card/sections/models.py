"""The models themselves: what was done to which layers, how fast each is, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.compress.calibrate.words import calibrated_in_words
from compressknow.compress.removal.words import removed_in_words
from compressknow.compress.schemes import schemes_of, word_of
from compressknow.evaluate.records import FactsInText
from compressknow.format import NONE, count, number, percent, plain, size
from compressknow.pages.card.costs import deployed_in
from compressknow.pages.card.section import Context, Section
from compressknow.pages.parts import Note, Part
from compressknow.pages.tables import Table

_COLUMNS = ("Model", "Timed in", "Device", "Facts a second", "Tokens a second", "Peak memory")


class Layers(Section):
    """Parameters, zeros and error of each group of layers, what was dropped, and the calibration text; left out for a
    checkpoint without a manifest."""

    title = "By group of layers"
    order = 50

    def parts(self, context: Context) -> Iterator[Part]:
        model = context.comparison.model
        if rows := tuple(_group_row(name, group) for name, group in model.groups.items() if group.get("parameters")):
            scheme = word_of(schemes_of(model.recipe))
            columns = ("Group of layers", "Parameters", "Zeros", "Pruned", scheme, "Relative error")
            yield Table("What was done to which layers", columns, rows, captioned=False)
        if removed := " ".join(removed_in_words(model.removed)):
            yield Note(plain(removed, 1000))
        if told := " ".join((*calibrated_in_words(model.calibration), *_found(model.in_calibration))):
            yield Note(plain(told, 1000))


def _found(facts: FactsInText | None) -> Iterator[str]:
    if facts:
        stand = "stands" if facts.found == 1 else "stand"
        yield (
            f"{count(facts.found) if facts.found else 'None'} of {count(facts.facts)} facts {stand} in this text "
            f"(subject and object in one sentence), {count(facts.known_found)} of the {count(facts.known)} that the "
            "original knew."
        )


def _group_row(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
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


class Speed(Section):
    """Facts and tokens a second and peak memory, of both models or of the one that was measured."""

    title = "Speed and memory"
    order = 70

    def parts(self, context: Context) -> Iterator[Part]:
        rows = tuple(
            (
                who,
                plain(deployed_in(model), 60),
                plain(model.speed.device, 60),
                f"{model.speed.facts_per_second:,.1f}",
                f"{model.speed.tokens_per_second:,.1f}" if model.speed.tokens_per_second is not None else NONE,
                size(model.speed.peak_bytes) if model.speed.peak_bytes is not None else NONE,
            )
            for who, model in (("original", context.original), ("compressed", context.comparison.model))
            if model.speed
        )
        if rows:
            yield Table("Speed and memory, measured on this machine", _COLUMNS, rows)
