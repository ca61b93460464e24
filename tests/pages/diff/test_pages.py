"""The page of a comparison: what it shows of the records, and that no text can break out of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from markdown_it import MarkdownIt

from compressknow.base.format import clean
from compressknow.comparison.diff import CheckpointDiff, StructureChange
from compressknow.comparison.records import KlFigures
from compressknow.comparison.text import compare_text
from compressknow.evaluate.records import MEASURED, ModelRecord
from compressknow.pages.diff.make import (
    CheckpointComparison,
    list_warnings,
    make_behaviour,
    name_knower,
    write_verdict,
)
from compressknow.pages.diff.pages import (
    build_figures_table,
    diff_json,
    make_grid,
    pair_probes,
    render_comparison_html,
    render_comparison_markdown,
)
from compressknow.pages.svg import Grid, draw_heat_map
from compressknow.pages.texts import write_measurement
from tests.long import one_in
from tests.pages.answering import make_rows, make_runs
from tests.pages.diff.contrasts import make_comparison, make_diff, make_identical_comparison
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.pages import Element, parse_html
from tests.pages.test_texts import make_chunks

COMPARISONS: dict[str, Callable[[], CheckpointComparison]] = {
    "weights": lambda: make_comparison(facts=False),
    "facts": make_comparison,
    "no facts shown": lambda: make_comparison(show_facts=False),
    "identical": make_identical_comparison,
    "unread": lambda: replace(make_comparison(facts=False), difference=None),
}


def read_rows(page: Element, caption: str) -> list[list[str]]:
    (table,) = [table for table in page.all("table") if table.one("caption").text == caption]
    return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.all("tr")]


def test_tables_have_figures_by_group_layer_and_module() -> None:
    page = parse_html(render_comparison_html(make_comparison()))
    assert read_rows(page, "What differs by group of layers")[1] == [
        *("attention", "18,000", "0 %", "20.0 %", "0.1232", "0.99339", "18.2 dB", "0.3200"),
    ]
    cells = read_rows(page, "Relative error by layer and module")
    assert cells[0] == ["Layer", "q", "v", "wi"]
    assert cells[1] == ["encoder 0", "0.0100", "0.0800", "0"]
    assert [row[0] for row in cells[1:]] == [f"{side} {i}" for side in ("encoder", "decoder") for i in range(3)]
    assert len(read_rows(page, "Linear weights by layer")) == 1 + 6


def test_changed_tensors_are_sorted_by_error() -> None:
    rows = read_rows(parse_html(render_comparison_html(make_comparison())), "Tensors that differ")
    assert len(rows) == 1 + 12
    errors = [float(row[5]) for row in rows[1:]]
    assert errors == sorted(errors, reverse=True)
    assert rows[1][1] == "F32 → I8"


def test_differences_in_structure_and_settings_are_listed() -> None:
    page = parse_html(render_comparison_html(make_comparison(facts=False)))
    assert read_rows(page, "Tensors that are stored differently")[1:] == [
        ["another type", "2", "F32", "I8", "a.weight, b.weight"],
        ["only in B", "1", "-", "F32 [7]", "c.weight"],
        ["packed: not compared", "1", "F32 [7]", "qweight I32", "d.weight"],
    ]
    assert read_rows(page, "Settings that differ")[1:] == [
        ["d_ff", "48", "-"],
        ["rope.theta", '"x"', "5"],
        ["chat_template.jinja", "exists", "-"],
        ["tokenizer.json", "differs", "differs"],
    ]


def test_json_tells_which_side_has_a_file() -> None:
    values = diff_json(make_comparison(facts=False))
    assert values["files"] == ["chat_template.jinja", "tokenizer.json"]
    assert values["files_in"] == {"chat_template.jinja": ["a"], "tokenizer.json": ["a", "b"]}


def test_verdict_counts_the_weights_of_the_tensors_that_differ() -> None:
    difference = make_diff()
    *others, last = difference.tensors
    assert last.same_bytes
    tensors = (*others, replace(last, sums=replace(last.sums, numel=7_000)))
    verdict = write_verdict(("a", "b"), False, replace(difference, tensors=tensors), None)
    assert "in 12 of 19 tensors (48.0 % of the weights)" in verdict


def test_warning_of_broken_answers_names_their_model() -> None:
    before, after = make_rows(140, 30, 2, 60)
    a, b = make_runs((before, [replace(row, logp_gold=math.nan) for row in after]))
    warnings = make_behaviour((a, b), (b, a), show_facts=True).warnings
    assert [text.partition(" ")[0] for text in warnings if "produces NaN" in text] == ["B"]


def test_tie_is_that_of_the_model_that_has_it() -> None:
    comparison = make_comparison(facts=False)
    assert comparison.difference is not None
    forms = "tied to e.weight", "F32 [2, 3]"
    structure = (StructureChange("h.weight", "untied", *forms), StructureChange("i.weight", "tied", *reversed(forms)))
    difference = replace(comparison.difference, structure=structure)
    page = parse_html(render_comparison_html(replace(comparison, difference=difference)))
    assert read_rows(page, "Tensors that are stored differently")[1:] == [
        ["tied in A, untied in B", "1", *forms, "h.weight"],
        ["untied in A, tied in B", "1", *reversed(forms), "i.weight"],
    ]


def test_source_is_shown_with_its_revision() -> None:
    comparison = make_comparison(facts=False)
    b = replace(comparison.b, source={"name": "me/tiny-t5", "revision": "v2"})
    page = parse_html(render_comparison_html(replace(comparison, b=b)))
    assert "Made fromme/tiny-t5@v2" in page.text.replace("\n", "")


def test_knowledge_is_compared_in_both_directions() -> None:
    comparison = make_comparison()
    assert comparison.behaviour is not None
    backward = comparison.behaviour.a_against_b
    (way,) = backward.comparisons
    moved = replace(way.probes[0], movement=KlFigures(232, 0.25, 0.125, 0.75, 2.0, (0.1, 0.2)))
    backward = replace(backward, comparisons=(replace(way, probes=(moved,)),))
    comparison = replace(comparison, behaviour=replace(comparison.behaviour, a_against_b=backward))
    page = parse_html(render_comparison_html(comparison))
    figures = dict(read_rows(page, "What each model knows, and how much their answers differ"))
    kinds = ("nats, mean", "median", "99th percentile", "rest's probability, B and A")
    assert [figures[f"KL(B‖A){':' if 'rest' in kind else ','} {kind}"] for kind in kinds] == [
        *("at least 0.2500", "at least 0.1250", "at least 0.7500", "10.0 %, 20.0 %"),
    ]
    assert figures["KL(A‖B), nats, mean"] == "at least 0"
    by_relation = read_rows(page, "atlas by relation")
    assert by_relation[0][1:6] == ["Facts", "A knows", "of these B", "B knows", "of these A"]
    assert by_relation[1][1:6] == ["232", "170", "82.4 %", "142", "98.6 %"]
    sizes = next(svg for svg in page.all("svg") if svg.attributes.get("class") == "sizes")
    assert [rect.attributes["width"] for rect in sizes.all("rect")] == ["100.0", "27.5"]
    assert figures["Of what A knows, B keeps"].startswith("82.4 %")
    assert figures["Of what B knows, A keeps"].startswith("98.6 %")
    assert (figures["Only A knows"], figures["Only B knows"]) == ("30", "2")
    assert page.one("h1").text == "B knows 82.4 % of what A knows"
    assert "A answers" in [header.text for header in page.all("th")]


def test_figure_measured_for_no_probe_has_no_row() -> None:
    behaviour = make_comparison().behaviour
    assert behaviour is not None
    ((forward, backward),) = pair_probes(behaviour)
    both = forward, replace(backward, movement=None)
    one, two = ([name for name, *_ in build_figures_table(probes).rows] for probes in ((both,), (both, both[::-1])))
    assert [name for name in two if name not in one] == [name for name in two if name.startswith("KL(B‖A)")] != []


def test_answers_are_those_of_the_model_in_their_column() -> None:
    comparison = make_comparison()
    text = render_comparison_markdown(comparison)
    assert "| Paris | Paris, Rome, Oslo | Rome, Paris, Oslo | only A |" in text
    assert "| Paris | Rome, Paris, Oslo | Paris, Rome, Oslo | only B |" in text
    for answered in diff_json(comparison)["behaviour"]["answers"]:
        first = {"only A": ["Paris", "Rome"], "only B": ["Rome", "Paris"]}[answered["known_by"]]
        assert [answered["top_a"][0], answered["top_b"][0]] == first
        assert [answered["rank_a"], answered["rank_b"]] == [1 if word == "Paris" else 2 for word in first]


@pytest.mark.parametrize(("rank", "likely", "shown"), [(3, "Bern", 0), (4, "Bern", 1), (4, "Paris", 0)])
def test_rank_of_the_right_answer_is_shown_if_it_is_not_among_the_likeliest(rank: int, likely: str, shown: int) -> None:
    rows = make_rows(20, 1, 0, 5, rank=rank)
    # Of equal texts, such as T5's with and without a sentinel, the likeliest is shown: the fourth may be the third.
    shift = [[row if row.correct else replace(row, top5=("Rome", "Lima", likely)) for row in side] for side in rows]
    a, b = make_runs(shift)
    behaviour = make_behaviour((a, b), (b, a), show_facts=True)
    text = render_comparison_markdown(replace(make_comparison(), behaviour=behaviour))
    assert text.count("(the right one is 4th)") == shown
    assert text.count("the right one is") == shown


def test_divergence_of_a_text_is_measured_in_both_directions() -> None:
    comparison = make_comparison()
    assert comparison.behaviour is not None
    there, back = (compare_text("text:a.txt", 32, MEASURED, make_chunks(n), make_chunks(n + 1)) for n in (1, 3))
    forward, backward = comparison.behaviour.b_against_a, comparison.behaviour.a_against_b
    ways = [
        replace(card, comparisons=(replace(card.comparisons[0], texts=(text,)),))
        for card, text in ((forward, there), (backward, back))
    ]
    behaviour = replace(comparison.behaviour, b_against_a=ways[0], a_against_b=ways[1])
    page = parse_html(render_comparison_html(replace(comparison, behaviour=behaviour)))
    assert there.moved is not None
    assert back.moved is not None
    (row,) = read_rows(page, "KL(B‖A) per token, nats")[1:]
    assert row[:2] == ["text:a.txt", write_measurement(back.moved.kl, 4)]
    rows = dict(read_rows(page, "text:a.txt, token by token: B against A"))
    assert rows["KL, mean"] == write_measurement(there.moved.kl, 4) != row[1]


def test_verdict_on_many_texts_is_whole_on_the_page() -> None:
    comparison = make_comparison()
    assert comparison.behaviour is not None
    text = compare_text("text:a.txt", 32, MEASURED, make_chunks(1), make_chunks(2))
    card = comparison.behaviour.b_against_a
    texts = tuple(replace(text, text=f"text:chapter-{number}.txt") for number in range(12))
    card = replace(card, comparisons=(replace(card.comparisons[0], texts=texts),))
    behaviour = replace(comparison.behaviour, b_against_a=card)
    verdict = write_verdict(("tiny-t5", "tiny-t5-int8"), False, comparison.difference, behaviour)
    assert len(verdict) > 1000
    page = parse_html(render_comparison_html(replace(comparison, behaviour=behaviour, verdict=verdict)))
    assert verdict in page.text


def test_fact_answered_in_different_words_is_known_by_both() -> None:
    """More than one text may be a right answer to a task."""
    a, b = make_runs(make_rows(20, 3, 2, 5))
    index = next(i for i, answer in enumerate(b.answers) if answer.correct)
    reworded = replace(b.answers[index], predicted="Lutetia")
    b = replace(b, answers=(*b.answers[:index], reworded, *b.answers[index + 1 :]))
    behaviour = make_behaviour((a, b), (b, a), show_facts=True)
    knowers = [name_knower(*pair) for pair in behaviour.answers]
    assert knowers.count("both") == 1
    assert knowers[-1] == "both"
    assert behaviour.answers[-1][1].predicted == "Lutetia"


@pytest.mark.parametrize("broad", [True, False])
def test_heat_map_shortens_the_names_of_rows_to_their_room(broad: bool) -> None:
    grid = Grid(("layer 31", "model.embed_tokens_per_layer"), ("q",), ((1.0,), (2.0,)))
    drawn = parse_html(draw_heat_map(grid, "Errors", "map", broad) or "")
    names = [each for each in drawn.all("text") if each.attributes["text-anchor"] == "end"]
    assert [name.text for name in names] == ["layer 31", "…s_per_layer" if broad else "…per_layer"]
    # A letter is at most 5.6 wide, and the right edge of the name is at x.
    assert all(5.6 * len(name.text) <= float(name.attributes["x"]) for name in names)
    assert "model.embed_tokens_per_layer" in drawn.one("desc").text


@pytest.mark.parametrize("columns", [3, 12])
def test_heat_map_has_a_mark_per_cell_that_darkens_with_the_error(columns: int) -> None:
    cells = tuple(tuple(0.001 * 1.3 ** (i + j) for j in range(columns)) for i in range(4))
    drawn = parse_html(
        draw_heat_map(Grid(("a", "b", "c", "d"), tuple(f"m{j}" for j in range(columns)), cells), "Errors", "map") or ""
    )
    marks = [mark for mark in drawn.all("rect") if mark.attributes["height"] == "18"]
    assert len(marks) == 4 * columns
    shades = [float(mark.attributes["opacity"]) for mark in marks[:columns]]
    assert shades == sorted(shades)
    assert shades[0] < shades[-1]
    assert drawn.one("svg").attributes["role"] == "img"
    assert "0.0010" in drawn.one("desc").text


def test_heat_map_marks_unchanged_cells_and_omits_missing_ones() -> None:
    drawn = parse_html(draw_heat_map(Grid(("a", "b"), ("m", "n"), ((0.0, 0.5), (None, 0.5))), "Errors", "map") or "")
    marks = [mark for mark in drawn.all("rect") if mark.attributes["height"] == "18"]
    assert [mark.attributes["class"] for mark in marks] == ["f-rule", "f-c1", "f-c1"]
    assert draw_heat_map(Grid(("a",), ("m",), ((0.0,),)), "Errors", "map") is None


def test_heat_map_shows_tiny_errors_alike() -> None:
    drawn = parse_html(draw_heat_map(Grid(("a",), ("m", "n", "o"), ((1e-12, 1e-9, 0.5),)), "Errors", "map") or "")
    marks = [mark.attributes["opacity"] for mark in drawn.all("rect") if mark.attributes["height"] == "18"]
    assert marks[0] == marks[1] != marks[2]


def test_grid_has_no_figure_for_a_missing_module() -> None:
    difference = make_diff()
    grid = make_grid(replace(difference, tensors=difference.tensors[1:]))
    assert grid is not None
    assert grid.cells[0].count(None) == 1


def make_hostile(text: str) -> CheckpointComparison:
    """Return a comparison in which every name, setting and fact is `text`."""
    comparison = make_comparison()
    assert comparison.difference is not None
    assert comparison.behaviour is not None
    difference, behaviour = comparison.difference, comparison.behaviour
    numbered = (f"{i} {text}" for i in range(10_000))
    return replace(
        comparison,
        a=replace(comparison.a, name=next(numbered), revision=text, dtype=text, setup=text, quantization=text),
        b=replace(comparison.b, name=next(numbered), revision=text, dtype=text, setup=text, source={"name": text}),
        files={text: (True, True)},
        verdict=text,
        warnings=(text,),
        command=text,
        versions={"x": text},
        difference=CheckpointDiff(
            text,
            tuple(replace(change, key=next(numbered), a=text, b=text) for change in difference.config),
            tuple(replace(change, name=next(numbered), a=text, b=text) for change in difference.structure),
            tuple(
                replace(t, name=next(numbered), module=t.module and f"{t.module[-1]} {text}", stack=t.stack)
                for t in difference.tensors
            ),
        ),
        behaviour=replace(
            behaviour,
            answers=tuple(
                tuple(
                    replace(answer, prompt=text, gold=text, relation=text, top5=top)
                    for answer, top in zip(pair, ((text,), (text, text)), strict=True)
                )
                for pair in behaviour.answers
            ),
        ),
    )


@pytest.mark.parametrize("text", one_in(8, HOSTILE_TEXTS), ids=range(len(HOSTILE_TEXTS)))
def test_hostile_text_stays_text(text: str) -> None:
    harmless = parse_html(render_comparison_html(make_hostile("harmless"))).shape
    html = render_comparison_html(make_hostile(text))
    page = parse_html(html)
    assert page.shape == harmless
    assert clean(text, 60)[:30] in page.one("main").text
    assert [c for c in html if not c.isprintable() and c not in "\n\N{NO-BREAK SPACE}"] == []


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_text_stays_text_in_markdown(text: str) -> None:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(render_comparison_markdown(make_hostile(text)))
    inner = [child for token in tokens for child in (token.children or ())]
    assert not {token.type for token in (*tokens, *inner)} & {"html_block", "html_inline", "link_open", "image"}
    headings = [inline.content for token, inline in pairwise(tokens) if token.type == "heading_open"]
    assert len(headings) == 12


@pytest.mark.parametrize("name", COMPARISONS)
def test_markdown_and_json_have_the_verdict_and_json_has_no_nan(name: str) -> None:
    comparison = COMPARISONS[name]()
    values: dict[str, Any] = diff_json(comparison)
    assert json.loads(json.dumps(values, allow_nan=False)).keys() == values.keys()
    assert values["verdict"] == comparison.verdict
    assert " ".join(comparison.verdict.split()[:3]) in render_comparison_markdown(comparison).replace("\\", "")


def test_verdicts() -> None:
    difference = make_diff()
    unchanged = replace(difference, tensors=tuple(t for t in difference.tensors if t.same_bytes), structure=())
    names = ("one", "two")
    assert write_verdict(names, True, None, None).startswith("one and two are identical")
    assert write_verdict(names, False, unchanged, None) == (
        "The weights of one and two are identical to the byte; only other files differ."
    )
    assert write_verdict(names, False, difference, None) == (
        "two differs from one in 12 of 19 tensors (63.2 % of the weights): relative error 0.1199, most in attention "
        "(0.1232); 1 tensor only in B, 1 tensor packed in a form that cannot be compared."
    )
    *others, last = difference.tensors
    retyped = replace(difference, tensors=(*others, replace(last, same_bytes=False)))
    verdict = write_verdict(names, False, retyped, None)
    assert "in 12 of 19 tensors (63.2 % of the weights)" in verdict
    assert "(0.1232); 1 more is stored differently, but with the same values; 1 tensor only in B" in verdict
    assert write_verdict(names, False, None, None) == "The weights of one and two could not be compared."
    one_fact = make_behaviour(*[make_runs(make_rows(1))] * 2, show_facts=False)
    assert write_verdict(names, False, None, one_fact).startswith("two knows 1 of the 1 fact (100 %) that one knows")


def test_warning_if_only_one_side_was_smoothed() -> None:
    plain = make_comparison().a
    smoothed, rounded = (replace(plain, calibration={"smoothed": norms}) for norms in (4, 0))

    def warn(a: ModelRecord, b: ModelRecord) -> list[str]:
        return list(list_warnings(a, b, False, make_diff(), None))

    assert sum("B was smoothed" in warning for warning in warn(plain, smoothed)) == 1
    assert sum("A was smoothed" in warning for warning in warn(smoothed, rounded)) == 1
    assert not any("was smoothed" in warning for warning in warn(plain, rounded))


def test_long_list_of_tensors_is_cut_and_counted() -> None:
    page = parse_html(render_comparison_html(make_comparison(facts=False, layers=200)))
    assert len(read_rows(page, "Tensors that differ")) == 1 + 500
    assert "300 more are in the JSON, which" in page.text


def test_one_tensor_that_differs_is_singular() -> None:
    comparison = make_comparison(facts=False)
    assert comparison.difference is not None
    first, *others = sorted(comparison.difference.tensors, key=lambda tensor: tensor.same_bytes)
    tensors = (first, *(replace(tensor, same_bytes=True) for tensor in others))
    difference = replace(comparison.difference, tensors=tensors)
    page = parse_html(render_comparison_html(replace(comparison, difference=difference)))
    assert "1 tensor that differs" in [summary.text for summary in page.all("summary")]
