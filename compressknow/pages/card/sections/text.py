"""Running text: perplexity of both models, and how far the compressed one's distributions moved, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.pages.card.section import Context, Section
from compressknow.pages.parts import Part
from compressknow.pages.records import Comparison
from compressknow.pages.texts import text_parts, texts_to_json, warnings_of


class Text(Section):
    """Two tables and a chart a text; left out where there is none."""

    title = "Running text"
    order = 55

    def parts(self, context: Context) -> Iterator[Part]:
        return text_parts(context.comparison.texts, ("original", "compressed"))

    def warnings(self, context: Context) -> Iterator[str]:
        return warnings_of(context.comparison.texts)

    def to_json(self, comparison: Comparison) -> Mapping[str, Any]:
        return {"texts": texts_to_json(comparison.texts)} if comparison.texts else {}
