"""A search on disk: its page, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compressknow.files import write_whole
from compressknow.report.pages import html_page
from compressknow.report.search.chart import pareto
from compressknow.report.search.records import Search
from compressknow.report.search.view import gets, search_page, verdict
from compressknow.report.text import json_text

SCHEMA = 1


def write_search(search: Search, folder: Path) -> None:
    """Write ``search.html`` and ``search.json`` into `folder`; each appears only when it is whole."""
    write_whole(folder / "search.html", render_search_html(search).encode())
    write_whole(folder / "search.json", json_text(search_to_json(search)).encode())


def render_search_html(search: Search) -> str:
    """The page: the same search gives the same bytes."""
    return html_page("search.html.j2", page=search_page(search), chart=Markup(pareto(search)))


def search_to_json(search: Search) -> dict[str, Any]:
    """Plain values: all that the page says. Shares lie between 0 and 1, sizes are bytes or numbers of weights."""
    return {"schema": SCHEMA, "verdict": verdict(search), "gets": gets(search), **asdict(search)}
