"""The Markdown of a report card: it has the content of the page, and no text can break its tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from compressknow.base.format import clean
from compressknow.evaluate.records import FactsInText
from compressknow.pages import pages
from compressknow.pages.card.pages import render_html, render_markdown
from compressknow.pages.pages import escape_markdown
from compressknow.pages.parts import Folded, Page, PageSection
from tests.pages.card.cards import make_card_of_one, make_layer_group
from tests.pages.card.test_html import CARDS
from tests.pages.card.test_make import compare_counts
from tests.pages.hostile import HOSTILE_TEXTS, number_texts
from tests.pages.pages import Element, parse_html

GOLDEN = Path(__file__).parent / "golden" / "report.md"


def parse(text: str) -> list[Token]:
    parser = MarkdownIt("gfm-like", {"linkify": False})
    return [part for token in parser.parse(text) for part in [token, *(token.children or [])]]


def render(text: str) -> Element:
    return parse_html(MarkdownIt("gfm-like", {"linkify": False, "xhtmlOut": False}).render(text))


def read_tables(root: Element) -> list[list[list[str]]]:
    return [
        [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.all("tr")]
        for table in root.all("table")
    ]


def list_token_types(text: str) -> list[tuple[str, str]]:
    # Texts, and the isolates in them, may differ in number.
    kinds = [(token.type, token.tag) for token in parse(text) if token.type not in ("text", "text_special")]
    return [kind for kind in kinds if kind[0] != "softbreak"]


@pytest.mark.parametrize("name", CARDS)
def test_same_card_gives_the_same_text(name: str) -> None:
    text = render_markdown(CARDS[name]())
    assert text == render_markdown(CARDS[name]())
    assert text.endswith("\n")
    assert "\n\n\n" not in text


def test_text_equals_the_golden_file() -> None:
    golden = GOLDEN.read_text(encoding="utf-8")
    assert render_markdown(make_card_of_one()) == golden, "run tools/golden.py if the change is intended"


@pytest.mark.parametrize("name", CARDS)
def test_rows_have_as_many_cells_as_their_header(name: str) -> None:
    text = render_markdown(CARDS[name]())
    for line, after in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if line.startswith("|") and after.startswith("|"):
            assert line.replace("\\|", "").count("|") == after.replace("\\|", "").count("|"), line
    assert read_tables(render(text))


@pytest.mark.parametrize("name", ["one", "nothing"])
def test_tables_equal_those_of_the_page(name: str) -> None:
    card = CARDS[name]()
    page = parse_html(render_html(card))
    in_page = {table.one("caption").text: table for table in page.all("table")}
    in_text = read_tables(render(render_markdown(card)))
    for caption, first_column in (("All figures of each probe", "Figure"), ("atlas by relation", "Relation")):
        rows = [
            [cell.text for cell in row.children if isinstance(cell, Element) and not cell.all("svg")]
            for row in in_page[caption].all("tr")
        ]
        table = next(table for table in in_text if table[0][0] == first_column)
        assert [[cell for cell in row if cell] for row in rows] == table


def test_changed_facts_are_counted_after_50() -> None:
    text = render_markdown(make_card_of_one(lost=60, gained=3))
    assert [len(table) - 1 for table in read_tables(render(text)) if table[0][0] == "Prompt"] == [50, 3]
    assert "10 more are in the JSON, which" in text


def test_method_and_glossary_are_separate_lists() -> None:
    text = render(render_markdown(make_card_of_one()))
    lists = [[item.text.strip() for item in each.all("li")] for each in text.all("ul")]
    assert "What the figures mean:" in [paragraph.text for paragraph in text.all("p")]
    (method,) = (each for each in lists if any("the intervals are Wilson's" in item for item in each))
    assert not any(item.startswith("Majority baseline") for item in method)


def test_empty_fold_is_left_out() -> None:
    assert pages.render_markdown(Page("Title", (PageSection("a", "A", (Folded("Fold", ()),)),))) == "# Title\n\n## A\n"


def test_one_fact_is_singular() -> None:
    card = compare_counts(1, 0)
    assert "Of 1 fact: 1 kept" in render_markdown(card)
    assert "of 1 fact evaluated" in render_html(card)


def test_unknown_sizes_are_not_compared() -> None:
    def write(before: int | None, after: int | None) -> str:
        card = make_card_of_one()
        (comparison,) = card.comparisons
        comparison = replace(comparison, model=replace(comparison.model, bytes=after))
        card = replace(card, original=replace(card.original, bytes=before), comparisons=(comparison,))
        sizes = [each.text.strip() for each in parse_html(render_html(card)).all("p") if "→" in each.text]
        return "\n".join([render(render_markdown(card)).text, *sizes])

    assert "2.0 MB before, 1.0 MB after: 50.0 % smaller." in write(2_000_000, 1_000_000)
    assert write(2_000_000, 1_000_000).endswith("1.0 MB 50.0 % smaller")
    assert write(None, 1_000_000).endswith("\n- → to  1.0 MB")
    assert "2.0 MB before, - after." in write(2_000_000, None)
    assert " before, " not in write(None, None)


def test_weights_and_facts_in_the_calibration_text_are_counted_separately() -> None:
    """More weights may be zero than were pruned, and more facts evaluated than known."""
    card = make_card_of_one()
    (comparison,) = card.comparisons
    group = make_layer_group(1_000, 200, 500, 0.1) | {"zeros_after": 300}
    model = replace(comparison.model, groups={"attention": group}, in_calibration=FactsInText(200, 60, 100, 40))
    text = render_markdown(replace(card, comparisons=(replace(comparison, model=model),)))
    assert "| attention | 1,000 | 30.0 % | 20.0 % | 50.0 % | 0.1000 |" in text
    assert "60 of 200 facts appear in this text" in text
    assert ", 40 of the 100 that the original knew." in text


def test_one_lost_fact_evaluated_with_an_example_is_singular() -> None:
    card = make_card_of_one()
    (comparison,) = card.comparisons
    first, *others = comparison.probes
    assert first.knowing is not None
    first = replace(first, knowing=replace(first.knowing, shown=1, back=0))
    card = replace(card, comparisons=(replace(comparison, probes=(first, *others)),))
    assert "brings back 0 (0 %) of 1 lost fact that was evaluated with it." in render(render_markdown(card)).text


@pytest.mark.parametrize(("written", "who"), [((False, True), "original"), ((True, False), "compressed model")])
def test_model_that_cannot_write_is_named(written: tuple[bool, bool], who: str) -> None:
    card = make_card_of_one()
    (comparison,) = card.comparisons
    first, *others = comparison.probes
    assert first.knowing is not None
    first = replace(first, knowing=replace(first.knowing, written=written))
    text = render_markdown(replace(card, comparisons=(replace(comparison, probes=(first, *others)),)))
    assert re.findall("The ([a-z ]+) cannot write", text) == [who]


def test_facts_are_left_out_on_request() -> None:
    text = render_markdown(replace(make_card_of_one(), show_facts=False))
    assert text.count("The text of the facts was left out on request.") == 2
    for fact in ("Ljubljana", "Zagreb", "Naypyidaw", "The capital of"):
        assert fact not in text


@pytest.mark.parametrize("name", ["one", "several"])
def test_hostile_text_stays_text(name: str) -> None:
    card = CARDS[name]()
    card = replace(card, comparisons=card.comparisons[:3])
    harmless = list_token_types(render_markdown(number_texts(card, "harmless")))
    for text in HOSTILE_TEXTS:
        shown = render_markdown(number_texts(card, text))
        assert list_token_types(shown) == harmless, text
        assert not {token.type for token in parse(shown)} & {"link_open", "image", "html_inline", "html_block", "hr"}
        assert clean(text, 60)[:30].strip() in re.sub("[\u2068\u2069]", "", render(shown).text)
        shown.encode("utf-8")


@pytest.mark.parametrize("text", ["@octocat", "me@example.org", "\\@octocat", "a/b#12", "#12", "gh-12"])
def test_nobody_is_mentioned_and_no_issue_is_linked(text: str) -> None:
    shown = render(escape_markdown(text)).text
    assert shown.strip().replace("\N{WORD JOINER}", "") == text
    # GitHub looks for these in rendered text.
    assert not re.search(r"@\w|#\d|GH-\d", shown, re.IGNORECASE)


def test_right_to_left_names_do_not_reorder_their_sentence() -> None:
    text = render_markdown(replace(make_card_of_one(), verdict="שלום עולם 20% still knows 5 of the 9 facts."))
    assert "\u2068שלום עולם\u2069 20% still knows" in text
