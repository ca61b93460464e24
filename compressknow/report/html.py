"""A report card as one HTML file that asks nothing of any server and is whole without JavaScript."""

from __future__ import annotations

import base64
import hashlib

from markupsafe import Markup

from compressknow.report import charts, view
from compressknow.report.glossary import GLOSSARY, HOLM, LEGEND, SHORT_LEGEND
from compressknow.report.records import Card
from compressknow.report.templates import render, source

# What the page holds of one comparison, and of all together: beyond, it would grow past a megabyte.
_LOST, _GAINED, _LOST_IN_ALL, _GAINED_IN_ALL = 500, 200, 600, 240
_FEW, _RELATIONS_OF_MANY = 5, 20


def render_html(card: Card) -> str:
    """The page: the same card gives the same bytes."""
    page = view.page(card, _limits(len(card.comparisons)))
    style, script = source("style.css").strip(), source("report.js").strip()
    return render(
        "report.html.j2",
        page=page,
        charts={place: tuple(map(Markup, drawn)) for place, drawn in _charts(card, page).items()},
        glossary=GLOSSARY,
        legend=LEGEND,
        short_legend=SHORT_LEGEND,
        holm=HOLM,
        # Both come from this package and hold no text of anyone else; the policy names their hashes.
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
    )


def _limits(models: int) -> view.Limits:
    return view.Limits(
        lost=min(_LOST, _LOST_IN_ALL // max(1, models)),
        gained=min(_GAINED, _GAINED_IN_ALL // max(1, models)),
        relations=None if models <= _FEW else _RELATIONS_OF_MANY,
    )


def _charts(card: Card, page: view.Page) -> dict[str, tuple[str, ...]]:
    """By place on the page. With several models, popularity is a table only: a chart for each would take seconds."""
    if page.overview:
        names = [section.name for section in page.sections]
        return {"overview": charts.setups(card.comparisons, names, "overview-chart")}
    section = page.sections[0]
    drawn = {p.id: charts.popularity(p.popularity_groups, f"{p.id}-chart", p.name) for p in section.probes}
    return {id: (chart,) for id, chart in drawn.items() if chart}


def policy(style: str, script: str) -> str:
    """Nothing may be loaded; only this very style sheet and this very script may be used."""
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
