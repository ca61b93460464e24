"""The page of a search: what it shows, and that no text can break out of it."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from compressknow.base.format import clean
from compressknow.cli.search import _describe_trial
from compressknow.comparison.records import Estimate
from compressknow.pages.search import list_warnings, render_search_html, write_headline, write_verdict
from tests.long import one_in
from tests.pages.coordinates import find_paths, read_axes, read_points
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.pages import parse_html
from tests.pages.search.searches import make_search, make_size_search


@pytest.mark.parametrize("text", one_in(8, HOSTILE_TEXTS), ids=range(len(HOSTILE_TEXTS)))
def test_hostile_text_stays_text(text: str) -> None:
    page = parse_html(render_search_html(make_search(text)))
    assert page.shape == parse_html(render_search_html(make_search("harmless"))).shape
    assert clean(text, 60)[:30] in page.one("main").text


def test_marks_have_tooltips_in_both_sizes_of_the_chart() -> None:
    search = make_search()
    page = parse_html(render_search_html(search))
    for size in ("narrow", "broad"):
        figure = next(each for each in page.all("figure") if each.attributes.get("class") == size)
        tooltips = [title.text for title in figure.all("title")]
        assert all(any(clean(trial.setup, 60) in text for text in tooltips) for trial in search.tried), tooltips
        assert any(text.startswith("the winner, ") for text in tooltips)


def test_chart_has_a_rounding_line() -> None:
    with_line, without = (render_search_html(replace(make_search(), rounding=share)) for share in (0.985, None))
    assert "The dotted line is what rounding alone keeps, 98.5 %" in parse_html(with_line).text
    assert "ounding alone" not in without
    dotted, plain_chart = (html.count("stroke-dasharray") for html in (with_line, without))
    assert dotted == plain_chart + 2  # in each size of the chart
    chart = next(chart for chart in re.findall('<svg class="chart".*?</svg>', with_line) if "broad-pareto" in chart)
    root = ElementTree.fromstring(chart)
    _, up = read_axes(root)
    (keep,), (rounding,) = (find_paths(root, "s-muted", stroke_dasharray=dashes) for dashes in ("3.6,2.7", "0.9,1.8"))
    assert [up(read_points(path)[0][1]) for path in (keep, rounding)] == pytest.approx([90, 98.5], abs=0.5)


@pytest.mark.parametrize(("keep", "warns"), [(0.9, False), (0.99, True)])
def test_warning_if_the_target_exceeds_what_rounding_keeps(keep: float, warns: bool) -> None:
    warnings = " ".join(list_warnings(replace(make_search(), keep=keep)))
    assert ("Rounding alone keeps 98.5 % of what the original knows" in warnings) == warns
    assert ("even unchanged weights do not keep 99 % there" in warnings) == warns


@pytest.mark.parametrize(("keep", "warns"), [(0.9, False), (0.95, True), (0.99, False)])
def test_warning_names_a_smaller_file_that_more_facts_might_confirm(keep: float, warns: bool) -> None:
    search = make_search()
    largest = max(search.tried, key=lambda trial: trial.bytes)
    for winner in (largest, None):
        warnings = " ".join(list_warnings(replace(search, keep=keep, winner=winner, confirmed=())))
        assert ("The file of 60.0 MB kept 96.0 % (92.0 to 100 %) of the search facts." in warnings) == warns
        # If it was evaluated on the held-out facts, what it keeps of these decided.
        warnings = " ".join(list_warnings(replace(search, keep=keep, winner=winner)))
        assert ("The file of 60.0 MB kept 95.0 % (91.0 to 99.0 %) of the held-out facts." in warnings) == warns
    assert "With more facts" not in " ".join(list_warnings(replace(search, keep=0.9)))
    # Enough of the search facts, but perhaps not of the held-out ones.
    unsure = replace(search.confirmed[0], held_out=Estimate(0.95, 0.86, 0.99))
    assert "of the held-out facts" in " ".join(list_warnings(replace(search, winner=largest, confirmed=(unsure,))))


def test_share_that_misses_the_target_does_not_read_as_if_it_reached_it() -> None:
    search = make_search()
    near = Estimate(0.97, 0.9496, 0.99)
    trial = replace(search.tried[0], kept=near, held_out=near)
    none = replace(search, keep=0.95, rounding=0.9496, winner=None, closest=trial, confirmed=(trial,))
    assert "certain to keep 95 %. The closest has 80.0 MB and keeps 97.0 % (94.96 to 99.0 %)" in write_verdict(none)
    assert "Rounding alone keeps 94.96 %" in list_warnings(none)[0]
    assert "95.0 to" not in render_search_html(none)
    assert "97.0 % (94.96 to 99.0 %)" in "".join(_describe_trial(0.95, trial))
    # Such a share is that of a winner if the grading facts are other ones.
    assert search.winner is not None
    unlucky = replace(search, keep=0.95, winner=replace(search.winner, graded=Estimate(0.9496)))
    assert write_headline(unlucky).endswith("94.96 % kept")
    assert "to keep 99.95 %." in write_verdict(replace(none, keep=0.9995))


@pytest.mark.parametrize(
    ("files", "says"),
    [(1, "The only file is not certain to keep 99 %. It has 80.0 MB"), (4, "None of 4 files is certain to keep 99 %.")],
)
def test_verdict_counts_the_files_that_were_tried(files: int, says: str) -> None:
    search = make_search()
    none = replace(search, keep=0.99, tried=search.tried[:files], winner=None, closest=search.tried[0])
    assert write_verdict(none).startswith(says)
    assert "No file tried is certain to keep 99 %." in repr(none)


@pytest.mark.parametrize(("known", "warns"), [(3, True), (99, True), (100, False)])
def test_warning_if_few_known_facts_grade_the_winner(known: int, warns: bool) -> None:
    search, warning = replace(make_search(), known_graded=known), f"a-model knew only {known} facts: with so few"
    assert any(each.startswith(warning) for each in list_warnings(search)) == warns
    assert not any(each.startswith(warning) for each in list_warnings(replace(search, winner=None)))


def test_warning_if_the_original_was_rounded_before() -> None:
    search, warning = make_search(), "The original's weights already lie on a grid: in 14 of 15 matrices"
    rounded = replace(search, original=replace(search.original, grid={"weights": 14, "of": 15, "values": 16}))
    assert [warning in parse_html(render_search_html(each)).text for each in (search, rounded)] == [False, True]


def test_search_for_a_size_has_no_chart_and_no_held_out_facts() -> None:
    page = parse_html(render_search_html(make_size_search()))
    assert "Knowledge kept against size" not in page.one("main").text
    text = page.one("main").text
    assert "(90.0 to 98.0 %) of the 94 that a-model knew of 150 facts that had no" in write_verdict(make_size_search())
    assert "On the held-out facts" not in text
    assert write_headline(make_size_search()) == "60.0 MB, and 94.0 % kept"


def test_the_frame_has_a_row_a_file_and_what_the_winner_keeps_of_the_grading_facts() -> None:
    frame = make_search().to_frame()
    assert list(frame["bytes"]) == [80_000_000, 65_000_000, 60_000_000, 30_000_000]
    assert list(frame["is_winner"]) == [False, False, True, False]
    assert list(frame["graded"].dropna()) == [0.94]
    assert list(frame["held_out"].dropna()) == [0.95]
    assert list(make_size_search().to_frame()["graded"]) == [0.94]


def test_files_of_the_same_size_are_told_apart_by_their_types() -> None:
    search = make_search()
    largest, unsure = search.tried[0], replace(search.tried[1], kept=Estimate(0.95, 0.85, 0.99))
    sure = replace(unsure, types={"blk.0.attn_q.weight": "q2_k"}, kept=Estimate(0.5, 0.4, 0.6))
    search = replace(search, tried=(largest, unsure, sure), confirmed=(), winner=largest)
    assert list(search.to_frame()["kept"]) == [0.97, 0.95, 0.5]
    assert "The file of 65.0 MB kept 95.0 % (85.0 to 99.0 %) of the search facts." in list_warnings(search)[0]


def test_search_guided_by_text_does_not_mention_guiding_facts() -> None:
    text = parse_html(render_search_html(replace(make_search(), by="text, rounded by GPTQ"))).one("main").text
    assert "Predicted KL of text, nats" in text
    assert "decided by text, rounded by GPTQ" in text
    assert "guided" not in text
    assert "are the search split (the original knew 93)" in text


def test_method_says_that_gguf_files_ran_in_another_runtime() -> None:
    for form, says in (("gguf", True), ("checkpoint", False)):
        text = parse_html(render_search_html(replace(make_search(), form=form))).one("main").text
        assert ("evaluated in llama.cpp, the original in transformers" in text) is says


def test_headline_has_the_share_of_the_grading_facts() -> None:
    search = make_search()
    lucky = replace(search.winner, graded=Estimate(0.85, 0.81, 0.89))
    assert write_headline(replace(search, keep=0.9, winner=lucky)) == "40.0 % smaller, and 85.0 % kept"


@pytest.mark.parametrize(("size", "change"), [(101_700_000, "1.7 % larger"), (100_000_000, "the same size")])
def test_headline_says_so_if_the_winner_is_no_smaller(size: int, change: str) -> None:
    search = make_search()
    assert search.winner is not None
    winner = replace(search.winner, bytes=size)
    assert write_headline(replace(search, winner=winner)) == f"{change}, and 94.0 % kept"


def test_map_shows_the_bits_of_each_weight_and_a_table_its_type() -> None:
    page = parse_html(render_search_html(make_size_search()))
    *_, broad = page.all("figure")
    labels = [text.text for text in broad.all("text")]
    # Attention comes first, though it is last in the file; the tensor outside any layer has its own row.
    assert labels[:3] == ["attn_q", "attn_a-model", "ffn_up"]
    assert labels[3:] == [*"layer 0|4|6|layer 1|8|2|a-model|16".split("|"), *"3 4 5 6 8 16".split()]
    assert "Scales take about half a bit more." in page.text
    (table,) = page.all("table")
    rows = [[cell.text for cell in row.children if not isinstance(cell, str)] for row in table.all("tr")]
    assert rows == [
        ["Layer", "attn_q", "attn_a-model", "ffn_up", "outside"],
        ["layer 0", "iq4_nl", "", "q6_k", ""],
        ["layer 1", "q8_0", "q2_k", "", ""],
        ["a-model", "", "", "", "f16"],
    ]


@pytest.mark.parametrize(("dtype", "bits"), [("F32", "32"), ("BF16", "16"), ("F32 + I64", "32"), ("unknown", "16")])
def test_map_shows_the_bits_of_the_original_where_a_weight_stays_as_it_is(dtype: str, bits: str) -> None:
    search = make_size_search()
    assert search.winner is not None
    winner = replace(search.winner, types={"model.layers.0.q": "none", "model.layers.0.k": "int4/64"})
    original = replace(search.original, dtype=dtype)
    page = parse_html(render_search_html(replace(search, form="checkpoint", winner=winner, original=original)))
    *_, broad = page.all("figure")
    assert [text.text for text in broad.all("text")][:5] == ["q", "k", "layer 0", bits, "4"]


def test_encoder_layers_come_before_decoder_layers_and_the_note_has_the_bits_of_scales() -> None:
    search = make_size_search()
    assert search.winner is not None
    types = {f"model.{stack}.layers.{n}.fc1": "int4/64" for stack in ("encoder", "decoder") for n in (0, 10, 2)}
    winner = replace(search.winner, types=types)
    page = parse_html(render_search_html(replace(search, form="checkpoint", winner=winner)))
    assert "half a bit more per weight in groups of 32, and an eighth in groups of 128" in page.text
    names = [row.children[0].text for row in page.one("table").all("tr") if not isinstance(row.children[0], str)]
    assert names == ["Layer", *(f"{stack} {n}" for stack in ("encoder", "decoder") for n in (0, 2, 10))]


def test_evaluated_files_are_listed_by_size_with_their_predicted_kl() -> None:
    text = parse_html(render_search_html(make_search())).one("main").text
    table = text[text.index("Evaluated files, smallest first") :]
    positions = [table.index(f"{size}.0 MB") for size in (30, 60, 65, 80)]
    assert positions == sorted(positions)
    assert "Predicted KL of facts and text, nats" in table
    assert "the predicted loss over all weights: the total KL of facts and text." in table
    assert "0.0167" in table


def test_each_file_has_a_bar_of_its_share_and_the_note_names_the_level() -> None:
    page = parse_html(render_search_html(make_search()))
    section = next(each for each in page.all("section") if each.attributes["aria-labelledby"] == "tried")
    bars = [each for each in section.all("svg") if each.attributes.get("class") == "bar"]
    assert [bar.one("rect").attributes["width"] for bar in bars] == ["10.0", "96.0", "96.5", "97.0"]
    assert "the line on it the 99.7 % interval" in section.text
    held_out = next(each for each in page.all("section") if each.attributes["aria-labelledby"] == "held-out")
    shares = [cell.text for cell in held_out.one("tbody").all("td")][-2:]
    assert shares == ["96.0 % (92.0 to 100 %)", "95.0 % (91.0 to 99.0 %)"]
