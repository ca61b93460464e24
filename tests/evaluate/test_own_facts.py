"""Custom facts: what the file may contain, and what errors say."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressknow.base.errors import UsageError
from compressknow.evaluate.facts import BLANK, Fact
from tests.evaluate.layouts import read_facts_file, write_jsonl
from tests.knowing import KNOWN_FACTS, write_facts

PROMPT = {"prompt": "The capital of France is [MASK].", "obj_label": "Paris"}
TEMPLATE = {"template": "[X] was born in [Y].", "sub_label": "Ada Lovelace", "obj_label": "London"}


def get_message(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_facts_file(path)
    assert "--help" in (caught.value.hint or "")
    return "\n".join(part for part in (caught.value.what, caught.value.why) if part)


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    return write_jsonl(folder / "mine.jsonl", rows)


def test_a_prompt_or_a_template_is_enough(tmp_path: Path) -> None:
    probe = read_facts_file(write_rows(tmp_path, PROMPT, TEMPLATE))
    assert probe.facts == (
        Fact("mine/1", "facts:mine.jsonl", "mine", "general", "", "Paris", "The capital of France is [MASK]."),
        Fact(
            "mine/2",
            "facts:mine.jsonl",
            "mine",
            "general",
            "Ada Lovelace",
            "London",
            "Ada Lovelace was born in [MASK].",
        ),
    )
    assert (probe.name, probe.protocol, probe.vocabulary) == ("facts:mine.jsonl", "facts/1", "open")
    assert list(probe.source["files"]) == ["mine.jsonl"]


def test_a_csv_file_is_read_like_json_lines(tmp_path: Path) -> None:
    rows = [
        {**PROMPT, "id": "fr", "candidates": ["Paris", "Rome"], "popularity": 68000000, "subject": "geography"},
        {**TEMPLATE, "relation": "birth, place", "popularity": 0.5},
        {"prompt": 'He said "no" to\ttea in [MASK].', "obj_label": "Łódź"},
    ]
    with (tmp_path / "mine.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["id", *PROMPT, "template", "sub_label", *OTHERS])
        table.writeheader()
        for row in rows:
            table.writerow({**row, "candidates": "|".join(row.get("candidates", []))})
    csv_probe, jsonl_probe = read_facts_file(tmp_path / "mine.csv"), read_facts_file(write_rows(tmp_path, *rows))
    # The header is the first line.
    expected = [replace(fact, probe="facts:mine.csv", id=increment_id(fact.id)) for fact in jsonl_probe.facts]
    assert list(csv_probe.facts) == expected
    assert (csv_probe.name, csv_probe.vocabulary) == ("facts:mine.csv", jsonl_probe.vocabulary)


def test_null_is_like_a_missing_key(tmp_path: Path) -> None:
    """As pandas writes the empty cells of a table."""
    keys = ("id", "prompt", "template", "sub_label", *OTHERS)
    rows = [{**dict.fromkeys(keys), **row} for row in (PROMPT, TEMPLATE)]
    assert (
        read_facts_file(write_rows(tmp_path, *rows)).facts
        == read_facts_file(write_rows(tmp_path, PROMPT, TEMPLATE)).facts
    )
    assert "line 1, obj_label: missing" in get_message(write_rows(tmp_path, {**PROMPT, "obj_label": None}))


def test_spaces_around_labels_are_removed(tmp_path: Path) -> None:
    """Otherwise no answer of a model would equal the object."""
    clean = {**PROMPT, "sub_label": "France", "relation": "capital", "candidates": ["Paris", "Rome"]}
    spaced = {
        key: value if key == "prompt" else [f" {each}" for each in value] if key == "candidates" else f" {value} "
        for key, value in clean.items()
    }
    expected = read_facts_file(write_rows(tmp_path, clean)).facts
    assert read_facts_file(write_rows(tmp_path, spaced)).facts == expected
    # In prompts they may be intended.
    rows = ({"prompt": " Paris:\n[MASK] "}, {"template": " [X]:\n[Y] ", "sub_label": "Paris"})
    facts = read_facts_file(write_rows(tmp_path, *({**row, "obj_label": "France"} for row in rows))).facts
    assert [fact.prompt for fact in facts] == [" Paris:\n[MASK] "] * 2
    (tmp_path / "mine.csv").write_text(
        "prompt, obj_label, sub_label, relation, candidates, popularity,,\n"
        '"The capital of France is [MASK].", "Paris ", France , capital, Paris | Rome, " ",,\n'
    )
    (fact,) = read_facts_file(tmp_path / "mine.csv").facts
    assert replace(fact, id=expected[0].id, probe=expected[0].probe) == expected[0]


OTHERS = ("relation", "subject", "candidates", "popularity")


def increment_id(name: str) -> str:
    relation, slash, number = name.partition("/")
    return f"{relation}/{int(number) + 1}" if slash else name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,obj_label\nParis lies in [MASK].,France,what\n", "line 2, more cells than the header"),
        (b"prompt,obj_label\nParis lies in [MASK].,\n", "line 2, obj_label: missing"),
        (b"prompt,obj_label,popularity\nParis lies in [MASK].,France,many\n", "popularity: must be a number above 0"),
        (b"prompt,objlabel\nParis lies in [MASK].,France\n", "objlabel: unknown; did you mean obj_label?"),
        (b"prompt,obj_label,ID\nParis lies in [MASK].,France,1\n", "ID: unknown; did you mean id?"),
        (b"Prompt,Obj_Label\nParis lies in [MASK].,France\n", "Obj_Label: unknown; did you mean obj_label?"),
        (b"prompt,obj_label\nCaf\xe9 [MASK].,France\n", "it is not UTF-8"),
        (b'prompt,obj_label\n"Paris" lies in [MASK].,France\n', "line 2: "),
        (b"prompt;obj_label\nParis lies in [MASK].;France\n", "its first line has no comma"),
        (b"prompt,obj_label,prompt\nParis lies in [MASK].,France,Rome lies in [MASK].\n", "two columns 'prompt'"),
        (b"", "has no facts"),
    ],
)
def test_an_error_in_a_csv_file_names_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_facts_file(tmp_path / "mine.csv")


def test_a_repeated_line_counts_once(tmp_path: Path) -> None:
    """Its answer would count twice, as if it were two observations."""
    others = {**PROMPT, "relation": "P36"}, {**PROMPT, "obj_label": "Lyon"}
    probe = read_facts_file(write_rows(tmp_path, PROMPT, {**PROMPT, "id": "again"}, *others))
    assert [fact.id for fact in probe.facts] == ["mine/1", "P36/3", "mine/4"]
    assert probe.dropped == {"repeats a line": 1}


def test_every_key_is_read(tmp_path: Path) -> None:
    row = {
        **PROMPT,
        "id": "fr",
        "relation": "capital",
        "subject": "geography",
        "sub_label": "France",
        "candidates": ["Paris", "Rome"],
        "popularity": 67.5,
        "note": "ignored",
    }
    other = {**PROMPT, "id": 0, "relation": "P36", "candidates": row["candidates"]}
    probe = read_facts_file(write_rows(tmp_path, row, other))
    assert [(fact.id, fact.subject) for fact in probe.facts[1:]] == [("0", "general")]
    assert probe.facts[0] == Fact(
        "fr", probe.name, "capital", "geography", "France", "Paris", PROMPT["prompt"], ("Paris", "Rome"), 67.5
    )
    assert probe.vocabulary == "closed"


def test_some_facts_may_have_candidates_and_others_none(tmp_path: Path) -> None:
    closed = {**PROMPT, "candidates": ["Paris", "Rome"]}
    probe = read_facts_file(write_rows(tmp_path, closed, PROMPT, {**closed, "obj_label": "Rome"}))
    assert probe.vocabulary == "open"
    assert [fact.candidates is None for fact in probe.facts] == [False, True, False]
    assert probe.facts[0].candidates is probe.facts[2].candidates


def test_the_facts_of_the_tiny_models_are_read(tmp_path: Path) -> None:
    probe = read_facts_file(write_facts(tmp_path / "known.jsonl"))
    expected = [(known.sentence(BLANK), known.obj_label) for known in KNOWN_FACTS]
    assert [(fact.prompt, fact.obj_label) for fact in probe.facts] == expected
    assert probe.vocabulary == "closed"


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(PROMPT).encode(), b"  ", json.dumps(TEMPLATE).encode(), b""])
    )
    assert [fact.id for fact in read_facts_file(path).facts] == ["mine/1", "mine/3"]


def test_a_line_may_contain_unicode_line_separators(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {**PROMPT, "sub_label": "a\u2028b\x85c"})
    assert read_facts_file(path).facts[0].sub_label == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "A [MASK]."}, "obj_label: missing"),
        ({"obj_label": "Paris"}, "prompt: missing, and no template either"),
        ({"template": "[X] is [Y].", "obj_label": "a"}, "sub_label: missing; the template needs it"),
        ({**PROMPT, "prompt": "No blank."}, "prompt: has [MASK] 0 times, not once"),
        ({**PROMPT, "prompt": "[MASK] and [MASK]."}, "prompt: has [MASK] 2 times, not once"),
        ({**TEMPLATE, "template": "[X] is."}, "template: must contain [X], and [Y] once"),
        ({**TEMPLATE, "template": "He is [Y]."}, "template: must contain [X], and [Y] once"),
        ({**TEMPLATE, "template": "[X] is [Y] or [Y]."}, "template: must contain [X], and [Y] once"),
        ({**TEMPLATE, "template": "[X] [MASK] in [Y]."}, "template: must contain [X], and [Y] once"),
        ({**TEMPLATE, "sub_label": "the [MASK]"}, "sub_label: contains [MASK]"),
        ({**PROMPT, "obj_label": 7}, "obj_label: must be a non-empty string"),
        ({**PROMPT, "obj_label": " "}, "obj_label: must be a non-empty string"),
        ({**PROMPT, "relation": 36}, "relation: must be a non-empty string"),
        ({**PROMPT, "id": 1.5}, "id: must be a non-empty string"),
        ({**PROMPT, "id": True}, "id: must be a non-empty string"),
        ({**PROMPT, "candidates": "Paris"}, "candidates: must be a list of non-empty strings"),
        ({**PROMPT, "candidates": ["Paris", 1]}, "candidates: must be a list of non-empty strings"),
        ({**PROMPT, "candidates": ["Paris"]}, "candidates: must be at least 2"),
        ({**PROMPT, "candidates": ["Paris", "Rome", "Rome"]}, "candidates: one of them is repeated"),
        ({**PROMPT, "candidates": ["Paris", "Málaga", "Ma\u0301laga"]}, "candidates: one of them is repeated"),
        ({**PROMPT, "candidates": ["Rome", "Bonn"]}, "candidates: the object 'Paris' is not among them"),
        ({**PROMPT, "popularity": 0}, "popularity: must be a number above 0, and at most 2^53"),
        ({**PROMPT, "popularity": True}, "popularity: must be a number above 0, and at most 2^53"),
        ({**PROMPT, "popularity": 2**53 + 1}, "popularity: must be a number above 0, and at most 2^53"),
        ({**PROMPT, "popularity": float("nan")}, "popularity: must be a number above 0, and at most 2^53"),
        ({**PROMPT, "candidate": ["Paris", "Rome"]}, "candidate: unknown; did you mean candidates?"),
    ],
)
def test_an_error_names_the_line_and_the_key(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = write_rows(tmp_path, PROMPT, row)
    assert get_message(path) == f"{path} cannot be read as facts:\n  line 2, {problem}"


def test_an_error_in_json_names_the_line_and_the_column(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"prompt": }\n[1]\n{"prompt": "\xff"}\n' + b"[" * 100_000 + b"\n")
    lines = get_message(path).split("\n")[1:]
    assert lines[:3] == [
        "  line 1, column 12: not JSON: Expecting value",
        "  line 2, column 1: not a JSON object {...}",
        "  line 3, column 13: not UTF-8",
    ]
    assert lines[3].startswith("  line 4, column 1: JSON that is nested too deeply")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [("mine.parquet", b"PAR1\x15\x04\xff", "a Parquet file"), ("mine.json", b'\n [{"prompt": "', "a JSON list")],
)
def test_a_table_that_only_hf_reads_is_an_error_that_says_so(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_facts_file(path)
    assert error.value.what == f"{path} is {kind}, not JSON Lines or CSV."
    assert error.value.hint == f"Pass hf:{path}, which reads it."


def test_two_facts_with_the_same_id_are_an_error_that_names_both_lines(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {**PROMPT, "id": "x"}, TEMPLATE, {**PROMPT, "id": "x"})
    assert "line 3, id: 'x' is also the id of line 1" in get_message(path)


def test_the_first_five_errors_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    text = get_message(write_rows(tmp_path, *[{"obj_label": "a"}] * 8))
    assert text.count("prompt: missing") == 5
    assert "and 3 more" in text


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    assert "has no facts" in get_message(path)


words = st.text(st.characters(codec="utf-8")).map(str.strip).filter(lambda text: bool(text) and BLANK not in text)
rows = st.fixed_dictionaries(
    {"obj_label": words, "prompt": words.map(lambda text: text + BLANK)},
    optional={
        "relation": words,
        "subject": words,
        "sub_label": words,
        "popularity": st.floats(0, 2**53, exclude_min=True),
    },
)


@given(st.lists(st.tuples(rows, st.lists(words, unique=True, max_size=3)), min_size=1, max_size=5))
def test_any_line_is_read_as_it_is_written(examples: list[tuple[dict[str, Any], list[str]]]) -> None:
    lines, different = [], {}
    for number, (row, others) in enumerate(examples):
        extra = [other for other in others if other != row["obj_label"]]
        candidates = {"candidates": [*extra, row["obj_label"]]} if extra else {}
        lines.append({**row, "id": f"f{number}", **candidates})
        different.setdefault(json.dumps({**row, **candidates}, sort_keys=True), lines[-1])
    with tempfile.TemporaryDirectory() as folder:
        facts = read_facts_file(write_rows(Path(folder), *lines)).facts
    for line, fact in zip(different.values(), facts, strict=True):
        assert (fact.id, fact.prompt, fact.obj_label) == (line["id"], line["prompt"], line["obj_label"])
        assert fact.relation == line.get("relation", "mine")
        assert fact.sub_label == line.get("sub_label", "")
        assert fact.popularity == line.get("popularity")
        assert list(fact.candidates or ()) == line.get("candidates", [])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The capital of France is", "The capital of France is [MASK]"),
        ("The capital of France is ", "The capital of France is [MASK]"),
        ('They said: "', 'They said: "[MASK]'),
        ("Question: Where is Paris?\nAnswer:", "Question: Where is Paris?\nAnswer: [MASK]"),
    ],
)
def test_a_prompt_without_a_blank_gets_one_at_its_end(prompt: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "obj_label": "Paris"}) + "\n", encoding="utf-8")
    assert read_facts_file(file).facts[0].prompt == expected


@pytest.mark.parametrize("prompt", ["It is [Y] in France", "It is <mask> here", "It is ___ of all", "It is {} of all"])
def test_a_prompt_with_another_form_of_blank_is_refused(prompt: str, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "obj_label": "Paris"}) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="0 times"):
        read_facts_file(file)


def test_half_of_a_character_is_an_error_that_names_its_column(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    for half in ("uD83D", "ude00"):
        line = f'{{"prompt": "\\ud83d\\ude00 is [MASK].", "obj_label": "a \\{half}"}}'
        file.write_text(f"{line}\n", encoding="utf-8")
        column = line.rindex("\\") + 1
        with pytest.raises(UsageError, match=rf"line 1, column {column}: .{half.lower()} is half of a character"):
            read_facts_file(file)
    file.write_text('{"prompt": "\\ud83d\\ude00 is [MASK].", "obj_label": "a \\u00e4"}\n', encoding="utf-8")
    assert read_facts_file(file).facts[0].prompt == "😀 is [MASK]."
