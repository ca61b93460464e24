"""Every page is valid: its links resolve, its headings and tables are in order, and it needs no server."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from compressknow.pages.card.pages import render_html
from compressknow.pages.diff.pages import render_comparison_html
from compressknow.pages.search import render_search_html
from compressknow.study.map import Map
from tests.long import long
from tests.pages.card.test_html import CARDS
from tests.pages.diff.test_pages import COMPARISONS
from tests.pages.maps import make_sensitivity, render_map_html
from tests.pages.pages import Element, parse_html
from tests.pages.search.searches import make_search, make_size_search
from tests.pages.study.studies import STUDIES, render_study_html

PAGES: dict[str, Callable[[], str]] = {
    **{f"card, {name}": lambda make=make: render_html(make()) for name, make in CARDS.items()},
    **{f"diff, {name}": lambda make=make: render_comparison_html(make()) for name, make in COMPARISONS.items()},
    **{f"study, {name}": lambda make=make: render_study_html(make()) for name, make in STUDIES.items()},
    "search, found": lambda: render_search_html(make_search()),
    "search, sized": lambda: render_search_html(make_size_search()),
    "map": lambda: render_map_html(Map("tiny", make_sensitivity(), "both")),
}


# Drawing a study's charts takes seconds.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=[long] * name.startswith("study")) for name in PAGES])
def page(request: pytest.FixtureRequest) -> Element:
    return parse_html(PAGES[request.param]())


def test_every_link_leads_to_an_id_and_ids_are_unique(page: Element) -> None:
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert [id for id, times in Counter(ids).items() if times > 1] == []
    for element in page.all():
        for name in ("href", "xlink:href"):
            link = element.attributes.get(name)
            assert link is None or link == "data:," or (link.startswith("#") and link[1:] in ids), link
        labels = element.attributes.get("aria-labelledby", "").split()
        assert set(labels) <= set(ids)
        for reference in re.findall(r"url\(#(.*?)\)", " ".join(element.attributes.values())):
            assert reference in ids


def test_policy_allows_only_this_style_sheet_and_this_script(page: Element) -> None:
    policy = next(meta for meta in page.all("meta") if "http-equiv" in meta.attributes).attributes["content"]
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(page.one(tag).text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_nothing_on_the_page_needs_what_the_policy_forbids(page: Element) -> None:
    for element in page.all():
        assert not {"style", "src", "srcset", "action"} & set(element.attributes)
        assert not [name for name in element.attributes if name.startswith("on")]
    assert not re.search(r"@import|url\(", page.one("style").text)


def test_headings_go_down_in_order_from_one_h1(page: Element) -> None:
    levels = [int(element.tag[1]) for element in page.all() if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


def test_tables_have_captions_headers_and_rows_of_equal_width(page: Element) -> None:
    for table in page.all("table"):
        assert table.one("caption").text
        rows = [[cell for cell in row.children if isinstance(cell, Element)] for row in table.all("tr")]
        widths = {sum(int(cell.attributes.get("colspan", "1")) for cell in row) for row in rows}
        assert len(widths) == 1, table.one("caption").text
        scopes = {header.attributes.get("scope") for header in table.all("th")}
        assert scopes in ({"col", "row"}, {"col", "rowgroup"})
    regions = [element.attributes for element in page.all() if element.attributes.get("role") == "region"]
    assert all(region["tabindex"] == "0" for region in regions)
    assert set(Counter(region["aria-label"] for region in regions).values()) <= {1}


def test_no_line_breaks_between_a_number_and_its_unit(page: Element) -> None:
    # Charts have no line breaks, and code to copy stays as it is.
    excluded = ("script", "pre", "title", "desc", "text")
    elements = [element for element in page.one("body").all() if element.tag not in excluded]
    texts = [child for element in elements for child in element.children if isinstance(child, str)]
    assert [text for text in texts if re.search(r"\d (%|([kMG]B|dB|points)\b)", text)] == []
