"""A report card as Markdown: what the page says, without its charts and with fewer facts."""

from __future__ import annotations

import re

from compressknow.report import view
from compressknow.report.glossary import GLOSSARY, HOLM, LEGEND, SHORT_LEGEND
from compressknow.report.records import Card
from compressknow.report.templates import render

# Facts of one comparison, and of all together.
_FACTS, _FACTS_IN_ALL = 50, 300


def render_markdown(card: Card) -> str:
    """The card as GitHub-flavoured Markdown; the same card gives the same text."""
    facts = min(_FACTS, _FACTS_IN_ALL // max(1, len(card.comparisons)))
    page = view.page(card, view.Limits(lost=facts, gained=facts, open=facts))
    text = render("report.md.j2", page=page, glossary=GLOSSARY, legend=LEGEND, short_legend=SHORT_LEGEND, holm=HOLM)
    return re.sub(r"\n{3,}", "\n\n", text)
