"""A study as a page, Markdown and JSON: what they show, and that no text can break out of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from compressknow.base.format import clean
from compressknow.pages.study.charts import is_chart
from compressknow.pages.study.findings import evaluate_findings
from compressknow.pages.study.pages import dump_study, write_study
from tests.long import one_in
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.pages import Element, parse_html
from tests.pages.study.studies import (
    STUDIES,
    TASKS,
    ProbeSpec,
    gp,
    make_empty_study,
    make_study,
    make_whole_grid,
    render_study_html,
    render_study_markdown,
    replace_texts,
)

FILES = {"study.html", "study.md", "study.json", "cells.csv", "cells.parquet"}


def find_by_class(page: Element, name: str) -> list[Element]:
    return [element for element in page.all() if name in element.attributes.get("class", "").split()]


@pytest.mark.parametrize("name", one_in(2, STUDIES))
def test_same_study_gives_the_same_bytes(name: str) -> None:
    study = STUDIES[name]()
    assert render_study_html(study) == render_study_html(STUDIES[name]())
    assert render_study_markdown(study) == render_study_markdown(STUDIES[name]())
    assert json.dumps(dump_study(study)) == json.dumps(dump_study(STUDIES[name]()))


def test_str_of_a_study_counts_its_cells() -> None:
    assert "1 cell; evaluated on lama:trex." in str(STUDIES["one"]())
    assert "40 cells, 1 failed; evaluated on lama:trex." in str(make_whole_grid())


def test_page_starts_with_the_knowledge_kept_and_the_verdict() -> None:
    page = parse_html(render_study_html(make_whole_grid()))
    assert page.one("h1").text == "40 compressed forms keep 0 to 100 % of the knowledge"
    (verdict,) = find_by_class(page, "verdict")
    assert verdict.text.startswith("tiny-bert: pruned by 10 to 30 %, no module clearly hurts least; ")


def test_findings_table_has_ten_findings_with_their_answers() -> None:
    study = make_whole_grid()
    (table,) = find_by_class(parse_html(render_study_html(study)), "findings")
    rows = [body.all("tr") for body in table.all("tbody")]
    assert [first.one("td").text for first, _ in rows] == [finding.answer for finding in evaluate_findings(study)[0]]
    assert rows[1][0].one("th").text.startswith("F2 Pruned by 30 to 50 %, attention hurts less than feed-forward")
    compared = "Att_GP 40% answers 187 of 300 right, FF_GP 40% 174: 13 only the first, 0 only the second (p = 0.0022)."
    assert compared in rows[1][1].text


def test_page_has_no_urls() -> None:
    html = re.sub(r'xmlns[^"]*"[^"]+"', "", render_study_html(make_whole_grid()))
    assert re.findall(r"https?://[^\"'< ]+", html) == []


def list_token_types(markdown: str) -> list[tuple[str, str]]:
    return [(token.type, token.tag) for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)]


@cache
def read_harmless_shapes() -> tuple[list[tuple[str, tuple[str, ...]]], list[tuple[str, str]]]:
    """Return the structures of the page and the Markdown of a study with harmless texts."""
    page = parse_html(render_study_html(replace_texts(make_whole_grid(spec=TASKS), "harmless")))
    return page.shape, list_token_types(render_study_markdown(replace_texts(make_whole_grid(), "harmless")))


@pytest.mark.parametrize("text", one_in(4, HOSTILE_TEXTS))
def test_hostile_text_stays_text(text: str) -> None:
    html = render_study_html(replace_texts(make_whole_grid(spec=TASKS), text))
    page = parse_html(html)
    assert page.shape == read_harmless_shapes()[0]
    assert clean(text, 60)[:30] in page.one("main").text
    html.encode("utf-8")


@pytest.mark.parametrize("text", one_in(4, HOSTILE_TEXTS))
def test_hostile_text_stays_text_in_markdown_and_json(text: str, tmp_path: Path) -> None:
    study = replace_texts(make_whole_grid(), text)
    assert list_token_types(render_study_markdown(study)) == read_harmless_shapes()[1]
    write_study(study, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))["original"]["name"] == text


def test_markdown_has_the_content_of_the_page() -> None:
    study = make_whole_grid("causal", TASKS)
    parser = MarkdownIt("gfm-like", {"linkify": False, "xhtmlOut": False})
    root = parse_html(parser.render(render_study_markdown(study)))
    page = parse_html(render_study_html(study))
    assert root.one("h1").text == page.one("h1").text
    answers = [[cell.text for cell in row.all("td")][2] for row in root.all("table")[0].all("tr")[1:]]
    assert answers == [finding.answer for finding in evaluate_findings(study)[0]]
    cells = root.all("table")[-1]
    assert len(cells.all("tr")) == 2 + len(study.cells)
    assert find_by_class(page, "verdict")[0].text in root.text


def test_json_has_findings_cells_probes_and_cliffs() -> None:
    study = make_whole_grid("seq2seq", TASKS)
    values = json.loads(json.dumps(dump_study(study), allow_nan=False))
    assert values["schema"] == 1
    assert list(values["findings"]) == [f"F{i}" for i in range(1, 11)]
    assert len(values["cells"]) == 2 * (len(study.cells) + len(study.failed))
    assert values["probes"]["lm-eval:boolq"] == {
        "n": 100,
        "average": "micro",
        "accuracy": 0.8,
        "majority": 0.621,
        "chance": 0.5,
        "templates": 1,
        "protocol": "",
        "limit": None,
        "seed": 0,
    }
    assert [cliff["module"] for cliff in values["cliffs"]] == ["overall", "attention", "feed-forward"]
    # With 90 % pruned, attention has 22 of 80 facts left in each of two probes, and overall none.
    comparison = values["findings"]["F4"]["comparisons"][8]
    names = ("n", "both", "only_less", "only_more", "neither")
    assert [comparison[name] for name in names] == [200, 0, 44, 0, 156]


@pytest.mark.parametrize("name", STUDIES)
def test_no_file_has_the_text_of_a_fact(name: str, tmp_path: Path) -> None:
    write_study(STUDIES[name](), tmp_path)
    for path in tmp_path.rglob("*.*"):
        content = path.read_bytes()
        assert b"The capital of country" not in content, path
        assert b"Paris" not in content, path


def test_folder_has_every_file_and_no_other(tmp_path: Path) -> None:
    write_study(make_whole_grid(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"figures"}
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"pruning-drop", "pruning-kept", "quantization", "pruning-quantization", "final-layer"}
    assert (tmp_path / "study.html").stat().st_size < 300_000


def test_charts_by_probe_are_folded() -> None:
    page = parse_html(render_study_html(make_whole_grid("seq2seq", TASKS)))
    (section,) = [each for each in page.all("section") if each.attributes.get("aria-labelledby") == "charts"]
    figures = find_by_class(section.one("details"), "panels")
    assert len(figures) == 5
    for figure in figures:
        first, *names = [caption.text for caption in figure.all("figcaption")]
        assert first.split(" (")[0].endswith(", by probe")
        assert names == ["lm-eval:boolq", "lm-eval:piqa"]
    assert not [each for each in parse_html(render_study_html(make_whole_grid())).all("details") if each.all("svg")]


def test_writing_again_replaces_the_files(tmp_path: Path) -> None:
    write_study(make_whole_grid(spec=TASKS), tmp_path)
    (tmp_path / "figures" / "other.svg").write_text("other", encoding="utf-8")
    smaller = make_study([gp("attention", 0.2, range(150))])
    write_study(smaller, tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["other.svg"]
    assert not is_chart("other")
    assert (tmp_path / "study.html").read_text(encoding="utf-8") == render_study_html(smaller)


def test_common_warnings_are_shown_once_and_failures_first() -> None:
    page = parse_html(render_study_html(make_whole_grid(spec=ProbeSpec(n=60, known=20))))
    (note,) = find_by_class(page, "warnings")
    warnings = [item.text for item in note.all("li")]
    assert warnings[0] == "1 of 41 cells failed; the reasons are below."
    assert len(warnings) == len(set(warnings)) > 1
    assert "RuntimeError: out of memory" in page.one("main").text


def test_warnings_of_single_cells_name_the_cells() -> None:
    study = make_whole_grid()
    cells = list(study.cells)
    for i in (0, 3):
        cells[i] = replace(cells[i], comparison=replace(cells[i].comparison, warnings=("It broke.",)))
    page = parse_html(render_study_html(replace(study, cells=tuple(cells))))
    (entry,) = [each for each in page.all("div") if "It broke." in each.text and not each.all("div")]
    assert (entry.one("dt").text, entry.one("dd").text) == ("Att_GP 10%, Att_GP 40%", "It broke.")
    assert "It broke." not in "".join(note.text for note in find_by_class(page, "warnings"))


def test_study_does_not_warn_of_grades() -> None:
    study = make_study([gp("attention", 0.2, range(10))], spec=ProbeSpec(n=30, known=15))
    assert any("Grades that rest" in warning for warning in study.cells[0].comparison.warnings)
    text = render_study_markdown(study)
    assert "The original knew only 15 facts" in text
    assert "Grades that rest" not in text


def test_study_of_several_probes_explains_how_charts_and_findings_count() -> None:
    note = "They count the facts of all probes together; charts show means over the probes."
    assert note in render_study_markdown(STUDIES["seq2seq"]())
    assert note not in render_study_markdown(STUDIES["one"]())


def test_empty_study_is_rendered() -> None:
    page = parse_html(render_study_html(make_empty_study()))
    assert page.one("h1").text == "No cell could be evaluated"
    nothing_known = make_study([gp("attention", 0.2, ())], spec=ProbeSpec(known=0))
    assert parse_html(render_study_html(nothing_known)).one("h1").text == "There was no knowledge to keep"
    assert "None" not in page.one("main").text
    assert "nan" not in page.one("main").text
    assert not find_by_class(page, "chart")
