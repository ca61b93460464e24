"""Answers on disk: they are read as they were written, and other folders are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressknow.base.errors import CompressknowError
from compressknow.base.reading import compute_sha256
from compressknow.evaluate.answers import (
    RECORD,
    TABLE,
    Answer,
    Answers,
    is_answers_folder,
    make_schema,
    read_answers,
    read_record,
    read_table,
    write_record,
    write_table,
)
from compressknow.evaluate.facts import Fact, Probe
from compressknow.evaluate.records import ModelRecord, ProbeEntry, Record
from compressknow.evaluate.run import make_facts_entry
from compressknow.model.manifest import seal_manifest


def make_answer(**changes: Any) -> Answer:
    values: dict[str, Any] = {
        "probe": "atlas",
        "fact_id": "capital/1",
        "relation": "capital",
        "subject": "geography",
        "sub_label": "Côte d’Ivoire",
        "prompt": "The capital of Côte d’Ivoire is [MASK].",
        "gold": "Yamoussoukro",
        "predicted": "東京",
        "correct": False,
        "rank": 7,
        "logp_gold": -12.25,
        "top5": ("東京", "", "Rome\n", "\u0000", "🦙"),
        "top5_logp": (-1.0, -2.5, -3.0, -1e30, -4.0),
        "choices": 60,
        "popularity": 1e12,
        "first_ids": (3, 0, 2**31 - 1),
        "first_logp": (-0.5, -1.25, -30.0),
    }
    return Answer(**values | changes)


EMPTY = make_answer(
    rank=None, logp_gold=None, choices=None, popularity=None, top5=(), top5_logp=(), first_ids=(), first_logp=()
)
ENTRY = {"protocol": "atlas/1", "fingerprint": "0", "facts": 2, "asked": 2, "dropped": {}, "average": "micro"}
RECORD_VALUES = {"schema": 1, "model": {"name": "möbel"}, "probes": {"atlas": ENTRY}, "versions": {}}


def to_plain(answer: Answer) -> dict[str, Any]:
    """Turn the distribution into tuples: a table returns views of arrays."""
    distribution = {name: tuple(np.asarray(getattr(answer, name)).tolist()) for name in ("first_ids", "first_logp")}
    return asdict(answer) | distribution


def are_same(left: list[Answer], right: list[Answer]) -> bool:
    return list(map(to_plain, left)) == list(map(to_plain, right))


@pytest.mark.parametrize(
    "answers", [[], [EMPTY], [make_answer()], [EMPTY, make_answer(), EMPTY, make_answer(fact_id="x"), EMPTY]]
)
def test_a_table_is_read_as_it_was_written(answers: list[Answer], tmp_path: Path) -> None:
    write_table(tmp_path / TABLE, answers)
    assert are_same(read_table(tmp_path / TABLE), answers)
    assert [path.name for path in tmp_path.iterdir()] == [TABLE]


def test_wrong_answers_that_an_older_version_graded_produced_are_demoted(tmp_path: Path) -> None:
    grades = [("produced", False), ("produced", True), ("gone", False), (None, False)]
    rows = [make_answer(grade=grade, correct=correct) for grade, correct in grades]
    write_table(tmp_path / TABLE, rows)
    assert [row.grade for row in read_table(tmp_path / TABLE)] == ["demoted", "produced", "gone", None]


NUMBER = st.none() | st.floats(allow_nan=False, width=64)
LISTS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-99, 0, width=32)), max_size=4)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.text(), NUMBER, st.none() | st.integers(1, 99), LISTS), max_size=5))
def test_any_text_and_number_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    answers = [
        make_answer(
            gold=text,
            logp_gold=number,
            popularity=number,
            rank=rank,
            top5=(text,),
            first_ids=tuple(token for token, _ in distribution),
            first_logp=tuple(value for _, value in distribution),
        )
        for text, number, rank, distribution in rows
    ]
    path = tmp_path_factory.mktemp("answers") / TABLE
    write_table(path, answers)
    assert are_same(read_table(path), answers)


def test_distributions_are_written_as_arrays_and_nan_stays_nan(tmp_path: Path) -> None:
    ids, values = np.arange(256, dtype=np.int32), np.full(256, np.nan, dtype=np.float32)
    write_table(tmp_path / TABLE, [make_answer(first_ids=ids, first_logp=values, logp_gold=float("nan"))] * 3)
    for stored in read_table(tmp_path / TABLE):
        assert np.array_equal(stored.first_ids, ids)
        assert np.isnan(stored.first_logp).all()
        assert stored.logp_gold is not None
        assert np.isnan(stored.logp_gold)


def test_a_table_of_several_row_groups_is_read_whole(tmp_path: Path) -> None:
    answers = [make_answer(fact_id=str(number), first_ids=(number,), first_logp=(-1.0,)) for number in range(50)]
    columns = {name: [getattr(answer, name) for answer in answers] for name in make_schema().names}
    pq.write_table(pa.table(columns, schema=make_schema()), tmp_path / TABLE, row_group_size=7)
    assert are_same(read_table(tmp_path / TABLE), answers)


def test_the_columns_are_the_fields_of_an_answer() -> None:
    assert make_schema().names == [field.name for field in fields(Answer)]


def _write_without(column: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_table(path, [make_answer()])
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([column]), path)

    return write


def _write_numbers(path: Path) -> None:
    columns = {name: [1] for name in make_schema().names}
    pq.write_table(pa.table(columns), path)


def _write_truncated(path: Path) -> None:
    write_table(path, [make_answer()] * 9)
    path.write_bytes(path.read_bytes()[:-20])


def _write_garbled(path: Path) -> None:
    write_table(path, [make_answer(prompt="x" * 999 + str(number)) for number in range(99)])
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(missing_ok=True),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("probe,fact_id\n"),
    "a folder": lambda path: path.mkdir(),
    "cut short": _write_truncated,
    "garbled": _write_garbled,
    "without the rank": _write_without("rank"),
    "without distributions": _write_without("first_logp"),
    "columns of other types": _write_numbers,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_an_error_that_names_it(damage: str, tmp_path: Path) -> None:
    DAMAGE[damage](tmp_path / TABLE)
    with pytest.raises(CompressknowError, match="cannot be read as answers") as caught:
        read_table(tmp_path / TABLE)
    assert TABLE in caught.value.what
    assert caught.value.hint


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path, Record.from_dict(RECORD_VALUES))
    assert read_record(tmp_path).to_dict() == RECORD_VALUES
    assert "möbel" in (tmp_path / RECORD).read_text(encoding="utf-8")
    write_record(tmp_path, Record.from_dict(RECORD_VALUES | {"versions": {"torch": "2"}}))
    assert read_record(tmp_path).versions == {"torch": "2"}
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "1", "{}", '"schema"', "\udcff"])
def test_a_damaged_record_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CompressknowError, match="not an answers folder"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"model": None},
        {"model": {}},
        {"probes": [1]},
        {"probes": {"atlas": {}}},
        {"probes": {"atlas": ENTRY | {"noise_floor": {"n": 1}}}},
    ],
)
def test_a_damaged_record_without_a_seal_is_an_error(damage: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(RECORD_VALUES | damage), encoding="utf-8")
    with pytest.raises(CompressknowError, match=r"probe\.json is damaged"):
        read_record(tmp_path)


def test_a_record_of_another_version_says_which(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(RECORD_VALUES | {"schema": 2}))
    with pytest.raises(CompressknowError, match="schema 2, but this version reads schema 1"):
        read_answers(tmp_path)


def test_a_folder_without_a_record_is_not_an_answers_folder(tmp_path: Path) -> None:
    with pytest.raises(CompressknowError, match="not an answers folder"):
        read_answers(tmp_path)
    assert not is_answers_folder(tmp_path)
    write_record(tmp_path, Record.from_dict(RECORD_VALUES))
    assert is_answers_folder(tmp_path)
    # A checkpoint may contain a file of that name.
    (tmp_path / "config.json").write_text("{}")
    assert not is_answers_folder(tmp_path)


def test_answers_of_a_probe_are_in_order(tmp_path: Path) -> None:
    answers = [make_answer(probe=probe, fact_id=str(number)) for number, probe in enumerate(["b", "a", "b", "a"])]
    write_table(tmp_path / TABLE, answers)
    sha256 = compute_sha256(tmp_path / TABLE)
    values = RECORD_VALUES | {"probes": {"b": ENTRY, "a": ENTRY}, "answers_sha256": sha256}
    write_record(tmp_path, Record.from_dict(values))
    stored = read_answers(tmp_path)
    assert isinstance(stored, Answers)
    assert stored.probes == ("b", "a")
    assert [answer.fact_id for answer in stored.of("a")] == ["1", "3"]
    assert [answer.fact_id for answer in stored.of("b")] == ["0", "2"]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_table(tmp_path / TABLE, [make_answer()])
    with pytest.raises((pa.ArrowException, TypeError)):
        write_table(tmp_path / TABLE, [make_answer(rank="first")])
    assert are_same(read_table(tmp_path / TABLE), [make_answer()])
    assert [path.name for path in tmp_path.iterdir()] == [TABLE]


def test_unknown_and_missing_keys_of_a_record_stay_as_they_are(tmp_path: Path) -> None:
    entry = {"new": [1], **ENTRY, "limit": None, "other": {"a": None}}
    model = {"size": "large", "name": "m", "zeros": None}
    written = {**RECORD_VALUES, "model": model, "probes": {"atlas": entry}, "tool": "other"}
    (tmp_path / RECORD).write_text(json.dumps(seal_manifest(written)), encoding="utf-8")
    record = read_record(tmp_path)
    assert json.dumps(record.to_dict()) == json.dumps(written)
    changed = replace(record, probes={"atlas": replace(record.probes["atlas"], key="k", asked=1)})
    changed_entry = {**entry, "asked": 1, "key": "k"}
    assert json.dumps(changed.to_dict()) == json.dumps({**written, "probes": {"atlas": changed_entry}})


def test_an_entry_has_the_majority_of_the_evaluated_facts() -> None:
    facts = tuple(
        Fact(f"capital/{number}", "atlas", "capital", "geography", "", label, "It is [MASK].")
        for number, label in enumerate(("Paris", "Paris", "Rome"))
    )
    answers = [make_answer(fact_id=fact.id) for fact in facts[1:]]
    entry = make_facts_entry(Probe("atlas", "atlas/1", facts), answers, {"too long": 1})
    assert (entry.facts, entry.asked, entry.majority) == (3, 2, 1 / 2)


def test_a_new_entry_writes_a_missing_chance_and_limit_as_null() -> None:
    entry = ProbeEntry(protocol="p/1", fingerprint="f", facts=1, asked=1, seed=0, source={})
    assert list(entry.to_dict().items()) == [
        *(("protocol", "p/1"), ("fingerprint", "f"), ("facts", 1), ("asked", 1), ("dropped", {}), ("average", "micro")),
        *(("chance", None), ("majority", None), ("limit", None), ("seed", 0), ("source", {})),
    ]
    assert ModelRecord(name="m").to_dict() == {"name": "m"}
