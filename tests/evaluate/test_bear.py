"""BEAR, read as its own library reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressknow.base.errors import UsageError
from tests.evaluate.layouts import DATA, read_bear, real_data, write_bear, write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bear(tmp_path)


def test_candidates_are_the_labels_of_the_relation_in_their_order(folder: Path) -> None:
    probe = read_bear(folder)
    assert [(fact.id, fact.prompt, fact.sub_label, fact.obj_label) for fact in probe.facts] == [
        ("P403/0", "The Rhine flows into the [MASK].", "Rhine", "north Sea"),
        ("P403/1", "The Danube flows into the [MASK].", "Danube", "Black Sea"),
        ("P30/0", "The Gambia is located in [MASK].", "the Gambia", "Africa"),
    ]
    assert {fact.subject for fact in probe.facts} == {"geography"}
    assert [fact.candidates for fact in probe.facts[1:]] == [("north Sea", "Black Sea"), ("Europe", "Asia", "Africa")]
    assert probe.facts[0].candidates is probe.facts[1].candidates
    assert (probe.protocol, probe.vocabulary, probe.average) == ("bear/1", "closed", "micro")
    assert probe.score_rest
    assert probe.source["from"].startswith("a local folder in the layout of BEAR, github.com/")
    assert list(probe.source["files"]) == ["metadata_relations.json", "P403.jsonl", "P30.jsonl"]


def test_an_answer_that_begins_the_sentence_begins_with_a_capital(folder: Path) -> None:
    fact = read_bear(folder, template=3).facts[0]
    assert (fact.prompt, fact.obj_label) == ("[MASK] is where the Rhine ends.", "North Sea")
    assert fact.candidates == ("North Sea", "Black Sea")


def test_a_missing_template_is_an_error_that_says_how_many_there_are(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"P403 of bear has no template 4(.|\n)*There are 3 templates"):
        read_bear(folder, template=4)


def test_a_relation_without_its_file_is_an_error(folder: Path) -> None:
    (folder / "P30.jsonl").unlink()
    with pytest.raises(UsageError, match=r"P30\.jsonl cannot be read: No such file"):
        read_bear(folder)


@pytest.mark.parametrize(
    "row",
    [
        {"sub_label": "Rhine", "answer_idx": 2},
        {"sub_label": "Rhine", "answer_idx": -1},
        {"answer_idx": 0},
        {"sub_label": "Rhine"},
    ],
)
def test_a_fact_without_subject_or_answer_is_an_error(folder: Path, row: dict[str, object]) -> None:
    write_jsonl(folder / "P403.jsonl", [row])
    with pytest.raises(UsageError, match=r"P403\.jsonl, fact 1: .* outside 0 to 1"):
        read_bear(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"P1": {"templates": []}}',
        '{"P1": {"templates": ["[X] [Y]"]}}',
        '{"P1": {"templates": [], "answer_space_labels": ["a", "b"]}}',
        '{"P1": {"templates": [null], "answer_space_labels": ["a", "b"]}}',
        '{"P1": {"templates": "[X] is [Y].", "answer_space_labels": ["a", "b"]}}',
    ],
)
def test_invalid_metadata_is_an_error(folder: Path, text: str) -> None:
    (folder / "metadata_relations.json").write_text(text)
    with pytest.raises(UsageError, match=r"metadata_relations\.json cannot be read as BEAR's"):
        read_bear(folder)


@real_data
@pytest.mark.parametrize("template", [1, 2, 3])
def test_the_real_set_has_all_its_facts(template: int) -> None:
    probe = read_bear(DATA / "bear", template)
    assert (len(probe.facts), len({fact.relation for fact in probe.facts})) == (7731, 60)
    assert {len(fact.candidates or ()) for fact in probe.facts} <= set(range(5, 61))
    assert all(fact.obj_label in (fact.candidates or ()) for fact in probe.facts)
    assert len(probe.source["files"]) == 61
