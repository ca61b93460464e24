"""A report card as Markdown: what the page says, without its charts and with fewer facts."""

from __future__ import annotations

import re

from compressknow.report import view
from compressknow.report.glossary import GLOSSARY, HOLM, LEGEND, SHORT_LEGEND
from compressknow.report.records import Card
from compressknow.report.templates import render

_LIMITS = view.Limits(lost=50, gained=50, open=50)


def render_markdown(card: Card) -> str:
    """The card as GitHub-flavoured Markdown; the same card gives the same text."""
    page = view.page(card, _LIMITS)
    text = render("report.md.j2", page=page, glossary=GLOSSARY, legend=LEGEND, short_legend=SHORT_LEGEND, holm=HOLM)
    return re.sub(r"\n{3,}", "\n\n", text)
