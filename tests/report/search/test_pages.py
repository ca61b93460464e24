"""The page of a search: no text can break out of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compressknow.format import plain
from compressknow.pages.search import render_search_html, said
from tests.report.hostile import TEXTS
from tests.report.pages import read
from tests.report.search.searches import found


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_hostile_text_stays_text(text: str) -> None:
    page = read(render_search_html(found(text)))
    assert page.shape == read(render_search_html(found("harmless"))).shape
    assert plain(text, 60)[:30] in page.one("main").text


def test_a_pointer_over_a_recipe_is_told_which_it_is_in_both_sizes_of_the_chart() -> None:
    search = found()
    page = read(render_search_html(search))
    drawn = [trial for trial in search.tried if trial.kind != "layers"]
    for look in ("narrow", "broad"):
        (figure,) = [each for each in page.all("figure") if each.attributes.get("class") == look]
        told = [title.text for title in figure.all("title")]
        assert all(any(plain(trial.setup, 60) in text for text in told) for trial in drawn), told
        assert any(text.startswith("the winner, ") for text in told)


def test_what_rounding_alone_keeps_is_a_line_of_the_chart() -> None:
    with_line, without = (render_search_html(replace(found(), rounding=share)) for share in (0.985, None))
    assert "The dotted line is what rounding alone keeps, 98.5 %" in with_line
    assert "ounding alone" not in without
    dotted, plain_chart = (html.count("stroke-dasharray") for html in (with_line, without))
    assert dotted == plain_chart + 2  # in each size of the chart


@pytest.mark.parametrize(("keep", "told"), [(0.9, False), (0.99, True)])
def test_to_keep_more_than_rounding_keeps_is_told(keep: float, told: bool) -> None:
    warnings = " ".join(said(replace(found(), keep=keep)))
    assert ("Rounding alone keeps 98.5 % of what the original knows" in warnings) == told
    assert ("99 % is more than the same weights keep there" in warnings) == told


@pytest.mark.parametrize(("recipes", "folded"), [(10, 0), (11, 1), (45, 35)])
def test_ten_recipes_are_shown_and_the_others_folded(recipes: int, folded: int) -> None:
    one = found().tried[0]
    tried = tuple(
        replace(one, setup=f"recipe {i:02}", sizes={name: size + i for name, size in one.sizes.items()})
        for i in range(recipes)
    )
    html = render_search_html(replace(found(), tried=tried))
    shown, _, rest = html.partition("larger ones</summary>")
    assert bool(rest) == bool(folded)
    assert (f"<summary>{folded} larger ones" in html) == bool(folded)
    rows = [f">recipe {i:02}<" for i in range(recipes)]
    assert [row in shown for row in rows] == [True] * min(10, recipes) + [False] * folded
    assert all(row in rest for row in rows[10:])


@pytest.mark.parametrize("bound", [False, True])
def test_a_divergence_over_a_part_of_the_vocabulary_is_said_to_be_at_least_that(bound: bool) -> None:
    tried = tuple(replace(trial, harm_is_lower_bound=bound) for trial in found().tried)
    page = read(render_search_html(replace(found(), tried=tried))).one("main").text
    assert ("at least 0.2500" in page) == bound
    assert "0.2500" in page
