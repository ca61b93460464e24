"""The HTML of a report card: what it shows of the card, and that no text can break out of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compressknow.base.format import clean, share
from compressknow.comparison.records import Estimate
from compressknow.pages import pages
from compressknow.pages.card.make import make_card
from compressknow.pages.card.pages import make_page, render_html, render_markdown
from compressknow.pages.card.sections import Limits
from compressknow.pages.pages import isolate
from compressknow.pages.parts import Page, PageSection, Table
from compressknow.pages.records import Card, label_models, name_models
from tests.pages.answering import make_rows, make_runs
from tests.pages.card.cards import make_card_of_nothing, make_card_of_one, make_card_of_several
from tests.pages.hostile import HOSTILE_TEXTS, number_texts, replace_texts
from tests.pages.pages import Element, parse_html

GOLDEN = Path(__file__).parent / "golden" / "report.html"
CARDS: dict[str, Callable[[], Card]] = {
    "one": make_card_of_one,
    "several": lambda: make_card_of_several((20, 40)),
    "nothing": make_card_of_nothing,
}


@pytest.fixture(params=sorted(CARDS), scope="module")
def html(request: pytest.FixtureRequest) -> str:
    return render_html(CARDS[request.param]())


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    return parse_html(html)


def remove_charts(html: str) -> str:
    # Charts depend on the version of matplotlib.
    return re.sub(r'<svg class="chart".*?</svg>', "<svg></svg>", html, flags=re.DOTALL)


def find_by_class(page: Element, tag: str, name: str) -> list[Element]:
    return [element for element in page.all(tag) if name in element.attributes.get("class", "").split()]


def test_page_equals_the_golden_file() -> None:
    golden = GOLDEN.read_text(encoding="utf-8")
    assert remove_charts(render_html(make_card_of_one())) == remove_charts(golden), (
        "run tools/golden.py if the change is intended"
    )


def test_first_screen_says_what_was_kept() -> None:
    page = parse_html(render_html(make_card_of_one()))
    assert page.one("h1").text == "89.4 % of its knowledge kept"
    grades = find_by_class(page, "table", "grades")[0]
    rows = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in grades.all("tr")]
    assert rows[0] == ["Domain", "Known before", "Kept", "Grade"]
    assert rows[1] == ["geography", "413 of 563", "92.3 % (89.3 to 94.5 %)", "C B to C"]
    assert rows[-1] == ["All domains", "947 of 1,895", "89.4 % (87.3 to 91.2 %)", ""]


def test_bar_of_all_domains_marks_what_rounding_keeps() -> None:
    card = make_card_of_one()
    page = parse_html(render_html(card))
    (mark,) = find_by_class(page, "path", "rounding")
    assert mark in find_by_class(page, "table", "grades")[0].one("tfoot").all("path")
    assert mark.attributes["d"] == "M98.6 -4V12"
    note = "The long line on the bar of all domains shows what rounding alone keeps: 98.6 %, measured on 424 facts"
    assert note in page.one("main").text
    (comparison,) = card.comparisons
    probes = (replace(comparison.probes[0], noise_floor=None), *comparison.probes[1:])
    without = render_html(replace(card, comparisons=(replace(comparison, probes=probes),)))
    assert 'class="rounding"' not in without
    assert "what rounding alone keeps" not in without


def test_card_made_from_answers_is_rendered() -> None:
    original, compressed = make_runs(make_rows(140, 15, 2, 60))
    page = parse_html(render_html(make_card(original, [compressed], command="compressknow report a b")))
    assert page.one("h1").text == "90.3 % of its knowledge kept"
    assert [len(table.all("tr")) - 1 for table in find_by_class(page, "table", "facts")] == [15, 2]


def test_long_command_is_shown_in_full() -> None:
    models = " ".join(f"models/smollm2-attention-and-feed-forward-{number}" for number in range(60))
    command = f"compressknow report original {models} -p 'facts:two  spaces.jsonl' --limit 300"
    card = replace(make_card_of_one(), command=command)
    assert command in [code.text for code in parse_html(render_html(card)).all("code")]
    assert f"\n{command}\n" in render_markdown(card)


def test_overview_has_the_accuracy_that_each_probe_reports() -> None:
    page = parse_html(render_html(make_card_of_several((20,))))
    original = page.all("table")[0].all("tbody")[0].all("td")
    # That of atlas is over facts, that of ConceptNet the mean over relations.
    assert [cell.text for cell in original][7:9] == ["65.5 %", "58.7 %"]


def test_several_models_are_summarized_by_their_range_and_a_table() -> None:
    page = parse_html(render_html(make_card_of_several()))
    kept = sorted(comparison.kept.value or 0 for comparison in make_card_of_several().comparisons)
    ends = f"{100 * kept[0]:.1f} to {100 * kept[-1]:.1f} %"
    assert page.one("h1").text == f"27 compressed models keep {ends} of the knowledge"
    overview = next(table for table in page.all("table") if table.one("caption").text.startswith("Every"))
    rows = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in overview.all("tr")]
    assert rows[1][:3] == ["original", "269.0 MB", ""]
    assert rows[2][:2] == ["1. Att_GP 10%", "269.0 MB"]
    assert len(rows) == 2 + 27
    assert [len(row) for row in rows] == [len(rows[0])] * len(rows)
    accuracy, geography = (rows[0].index(name) for name in ("Accuracy, atlas", "geography"))
    for row, comparison in zip(rows[2:], make_card_of_several().comparisons, strict=True):
        assert row[accuracy] == share(comparison.probes[0].accuracy_compressed.value)
        assert row[geography] == next(grade.mark for grade in comparison.grades if grade.subject == "geography")
    # Each bar, and the stroke on it, is that of the figure in its row; each name links to its model.
    for number, row in enumerate(overview.all("tr")[2:], start=1):
        (bar,) = find_by_class(row, "svg", "bar")
        stroke = re.findall(r"[\d.]+", bar.one("path").attributes["d"])
        drawn = [bar.one("rect").attributes["width"], stroke[0], stroke[5]]
        written = [float(figure) for figure in re.findall(r"[\d.]+", rows[1 + number][2])]
        # A figure close to 95 % is written with more digits.
        assert written == pytest.approx([float(figure) for figure in drawn], abs=0.051)
        assert row.one("a").attributes["href"] == f"#m{number}-top"
    # Of many models, each has the relations that lost most.
    *_, table = (each for each in page.all("table") if each.one("caption").text.startswith("atlas by relation"))
    lost = [int(row.all("td")[2].text) for row in table.one("tbody").all("tr")]
    by_relation = make_card_of_several().comparisons[-1].probes[0].by_relation
    assert lost == sorted((group.counts.lost for group in by_relation), reverse=True)[: len(lost)]


@pytest.mark.parametrize("column", range(3))
def test_bars_are_after_their_column_in_every_row(column: int) -> None:
    bars = (Estimate(0.5), Estimate(0.7))
    table = Table("Caption", ("a", "b", "c"), (("x", "1", "2"), ("y", "3", "4")), bars, column)
    page = parse_html(pages.render_html(Page("Title", (PageSection("id", "Section", (table,)),))))
    rows = [[cell for cell in row.children if isinstance(cell, Element)] for row in page.one("table").all("tr")]
    assert [len(row) for row in rows] == [4, 4, 4]
    assert rows[0][column + 1].text == ""
    assert all(row[column + 1].all("svg") for row in rows[1:])


def test_models_of_the_same_name_are_numbered_once() -> None:
    card = make_card_of_several((20, 40))
    unnamed = tuple(replace(c, model=replace(c.model, name="model.gguf", setup=None)) for c in card.comparisons[:2])
    assert name_models(replace(card, comparisons=unnamed)) == ("1. model.gguf", "2. model.gguf")
    assert label_models(unnamed) == ["1. model.gguf", "2. model.gguf"]
    of_one_setup = tuple(
        replace(c, model=replace(c.model, name=name, setup="Q4")) for c, name in zip(unnamed, "ab", strict=True)
    )
    assert label_models(of_one_setup) == ["Q4 (a)", "Q4 (b)"]


def test_charts_have_a_name_and_a_description(page: Element) -> None:
    charts = find_by_class(page, "svg", "chart")
    for chart in charts:
        assert chart.attributes["role"] == "img"
        assert chart.all("title")[0].text
        assert "%" in chart.one("desc").text
    others = [svg for svg in page.all("svg") if svg not in charts]
    assert all(svg.attributes.get("aria-hidden") == "true" for svg in others)


def test_page_hides_nothing_without_javascript(page: Element) -> None:
    assert not page.all("noscript")
    assert not page.all("button")
    assert not [element for element in page.all() if "hidden" in element.attributes]
    assert find_by_class(page, "table", "grades")


def test_changed_facts_are_folded_after_20_and_counted_after_500() -> None:
    page = parse_html(render_html(make_card_of_one(lost=612, gained=3)))
    tables = find_by_class(page, "table", "facts")
    assert [len(table.all("tr")) - 1 for table in tables] == [20, 480, 3]
    assert "480 more" in [summary.text for summary in page.all("summary")]
    assert "112 more are in the JSON, which" in page.text
    assert "1 more is in the JSON, which" in parse_html(render_html(make_card_of_one(lost=501, gained=0))).text


def test_page_with_no_room_for_facts_says_where_they_are() -> None:
    # As each of 101 models.
    card, limits = make_card_of_one(lost=100, gained=35), Limits(lost=0, gained=0)
    text = parse_html(pages.render_html(make_page(card, limits, charts=False))).text
    assert "100 more are in the JSON, which" in text
    assert "35 more are in the JSON, which" in text
    assert "None." not in text


def test_facts_are_left_out_on_request() -> None:
    card = make_card_of_one()
    html = render_html(replace(card, show_facts=False))
    assert html.count("The text of the facts was left out on request.") == 2
    for fact in (*card.comparisons[0].lost, *card.comparisons[0].gained):
        assert clean(fact.prompt.replace("[MASK]", "___")) not in html
    for text in ("Ljubljana", "Zagreb", "Naypyidaw"):
        assert text not in html


def test_missing_figures_have_a_reason() -> None:
    page = parse_html(render_html(make_card_of_nothing()))
    assert page.one("h1").text == "There was no knowledge to keep"
    assert "Knowledge kept: the original knew none of the facts." in page.text
    assert "None" not in re.sub(r"None\.", "", page.one("main").text)
    assert "nan" not in page.one("main").text


def test_figures_that_three_candidates_cannot_give_have_a_reason() -> None:
    before, after = make_runs(make_rows(1, 1, choices=3))
    text = parse_html(render_html(make_card(before, [after]))).text
    assert "Right answer among the top 5: there are at most five answers to choose from, or" in text
    assert "Calibration error (ECE): it needs the probability of each answer among all candidates, for 20 facts" in text


def test_pages_are_smaller_than_their_limits() -> None:
    assert len(render_html(make_card_of_one(lost=100)).encode()) < 300_000
    many = make_card_of_several(amounts=(10, 20, 30, 40, 50, 60))
    assert len(many.comparisons) == 39
    assert len(render_html(many).encode()) < 1_000_000
    twenty = [replace(each, probes=each.probes[:1]) for each in many.comparisons[:20]]
    assert len(render_html(replace(many, comparisons=tuple(twenty))).encode()) < 405_000


def make_card_of_three() -> Card:
    several = make_card_of_several((20, 40))
    return replace(several, comparisons=several.comparisons[:3])


@pytest.mark.parametrize("make", [make_card_of_one, make_card_of_three], ids=["one", "several"])
def test_hostile_text_stays_text(make: Callable[[], Card]) -> None:
    harmless = parse_html(render_html(number_texts(make(), "harmless"))).shape
    for text in HOSTILE_TEXTS:
        html = render_html(number_texts(make(), text))
        page = parse_html(html)
        assert page.shape == harmless, text
        assert clean(text, 60)[:30] in page.one("main").text
        assert clean(text, 60)[:30] in page.one("head").one("title").text
        html.encode("utf-8")


def test_invisible_characters_are_shown_as_code_points() -> None:
    html = render_html(replace_texts(make_card_of_one(), HOSTILE_TEXTS[6]))
    assert [c for c in html if not c.isprintable() and c not in "\n\N{NO-BREAK SPACE}"] == []
    assert "⟨U+202E⟩gnikcattA⟨U+2066⟩" in html


def test_right_to_left_names_do_not_reorder_their_sentence() -> None:
    card = replace(make_card_of_one(), verdict="שלום עולם 20% still knows 5 of the 9 facts.")
    verdict = find_by_class(parse_html(render_html(card)), "p", "verdict")[0]
    assert verdict.one("bdi").text == "שלום עולם"
    assert str(isolate("a & b")) == "a &amp; b"
