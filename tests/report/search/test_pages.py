"""The page of a search: no text can break out of it."""

from __future__ import annotations

import pytest

from compressknow.format import plain
from compressknow.report.search import render_search_html
from tests.report.hostile import TEXTS
from tests.report.pages import read
from tests.report.search.searches import found


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_hostile_text_stays_text(text: str) -> None:
    page = read(render_search_html(found(text)))
    assert page.shape == read(render_search_html(found("harmless"))).shape
    assert plain(text, 60)[:30] in page.one("main").text
