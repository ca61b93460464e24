"""Tables of facts on disk, read by the real `datasets` library; the Hub itself is never reached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.evaluate.sources import Options
from compressknow.evaluate.sources.columns import KEYS, Columns, parse_columns
from tests.evaluate.layouts import open_probe, read_facts_file, read_hub_facts, write_jsonl

PEOPLE = [
    {"person": "Ada Lovelace", "city": "London", "about": "birthplace"},
    {"person": "Galileo", "city": "Pisa", "about": "birthplace"},
]
MAPPING = {"subject": "person", "object": "city", "template": "[X] was born in [Y]."}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def make_popqa(prop: str, obj: str, number: int, popularity: int | None = 10) -> dict[str, Any]:
    """Make a row of akariasai/PopQA, without the columns that are not read."""
    return {
        "id": number,
        "subj": "George Rankin",
        "prop": prop,
        "obj": obj,
        "s_pop": popularity,
        "o_pop": 25_692,
        "question": f"What is George Rankin's {prop}?",
        "possible_answers": json.dumps([obj, obj.title()]),
    }


def test_popqa_is_recognized_and_its_questions_become_sentences(tmp_path: Path) -> None:
    values = [("occupation", "politician", 1), ("place of birth", "Sydney", 2, None), ("spouse", "Ann", 3)]
    write_parquet(tmp_path / "set" / "test.parquet", [make_popqa(*row) for row in values])
    probe = read_hub_facts(str(tmp_path / "set"))
    assert [(fact.id, fact.prompt, fact.obj_label, fact.popularity) for fact in probe.facts] == [
        ("occupation/1", "The occupation of George Rankin is [MASK].", "politician", 10),
        ("place of birth/2", "The place where George Rankin was born is [MASK].", "Sydney", None),
    ]
    assert {fact.subject for fact in probe.facts} == {"history and people"}
    assert probe.dropped == {"no subject, or no template for its relation": 1}
    assert (probe.protocol, probe.vocabulary, probe.source["known as"]) == ("hf/1", "open", "PopQA")


def test_copies_of_lama_have_one_prompt_per_fact_by_its_template(tmp_path: Path) -> None:
    row = {
        "uuid": "u",
        "predicate_id": "P19",
        "sub_label": "Ada",
        "obj_label": "London",
        "template": "[X] was born in [Y] .",
    }
    sentences = ["Ada came from [MASK].", "Ada saw the light of day in [MASK]."]
    path = write_parquet(tmp_path / "trex.parquet", [{**row, "masked_sentence": sentence} for sentence in sentences])
    probe = read_hub_facts(str(path))
    assert [(fact.id, fact.prompt) for fact in probe.facts] == [("P19/u", "Ada was born in [MASK] .")]
    assert probe.dropped == {"same sentence and object": 1}


def test_copies_of_lama_without_templates_use_their_sentences(tmp_path: Path) -> None:
    row = {"uuid": "u", "pred": "CapableOf", "sub": "bird", "obj_label": "fly", "negated": "N/A"}
    path = write_parquet(
        tmp_path / "c.parquet", [{**row, "masked_sentence": s} for s in ("Birds can [MASK].", "Birds can fly.")]
    )
    probe = read_hub_facts(str(path))
    assert [(fact.sub_label, fact.prompt, fact.subject) for fact in probe.facts] == [
        ("bird", "Birds can [MASK].", "common sense")
    ]
    assert probe.dropped == {"no blank in the sentence": 1}


def test_a_mapping_with_a_template_reads_any_table(tmp_path: Path) -> None:
    probe = read_hub_facts(str(write_jsonl(tmp_path / "people.jsonl", PEOPLE)), {**MAPPING, "relation": "about"})
    assert [(fact.id, fact.relation, fact.prompt, fact.obj_label) for fact in probe.facts] == [
        ("birthplace/0", "birthplace", "Ada Lovelace was born in [MASK].", "London"),
        ("birthplace/1", "birthplace", "Galileo was born in [MASK].", "Pisa"),
    ]


def test_prompts_that_end_before_the_object_need_no_blank(tmp_path: Path) -> None:
    """As in CounterFact and in the known facts of ROME."""
    rows = [
        {"prompt": "Danielle Darrieux's mother tongue is", "attribute": " French"},
        {"prompt": "Is Danielle Darrieux French?", "attribute": "yes"},
    ]
    probe = read_hub_facts(
        str(write_jsonl(tmp_path / "known.jsonl", rows)), {"prompt": "prompt", "object": "attribute"}
    )
    assert [(fact.prompt, fact.obj_label) for fact in probe.facts] == [
        ("Danielle Darrieux's mother tongue is [MASK]", "French")
    ]
    assert probe.dropped == {"no blank in the sentence": 1}


def test_the_columns_of_a_facts_file_are_recognized_in_every_format(tmp_path: Path) -> None:
    row = {
        "prompt": "The capital of France is [MASK].",
        "obj_label": "Paris",
        "subject": "geography",
        "candidates": ["Rome", "Paris"],
        "popularity": 67.0,
    }
    flat = {**row, "candidates": json.dumps(row["candidates"])}
    (tmp_path / "f.csv").write_text(
        "prompt,obj_label,subject,candidates,popularity\n"
        'The capital of France is [MASK].,Paris,geography,"[""Rome"", ""Paris""]",67.0\n'
    )
    (tmp_path / "bars.csv").write_text(
        "prompt,obj_label,subject,candidates,popularity\n"
        "The capital of France is [MASK].,Paris,geography,Rome|Paris,67.0\n"
    )
    (tmp_path / "f.json").write_text(json.dumps([row]))
    paths = [
        write_jsonl(tmp_path / "f.jsonl", [flat]),
        write_parquet(tmp_path / "f.parquet", [row]),
        tmp_path / "f.csv",
        tmp_path / "bars.csv",
        tmp_path / "f.json",
    ]
    for path in paths:
        probe = read_hub_facts(str(path))
        [fact] = probe.facts
        assert (fact.candidates, fact.popularity, fact.subject) == (("Rome", "Paris"), 67.0, "geography"), path
        assert probe.vocabulary == "closed"


def test_a_single_number_as_candidates_does_not_make_the_facts_open(tmp_path: Path) -> None:
    cells = ("1998|1999", "1999", "null")
    rows = "".join(f"Event {cell} was in [MASK].,1999,{cell}\n" for cell in cells)
    (tmp_path / "f.csv").write_text(f"prompt,obj_label,candidates\n{rows}")
    probe = read_hub_facts(str(tmp_path / "f.csv"))
    assert [fact.candidates for fact in probe.facts] == [("1998", "1999"), None]
    assert probe.dropped == {"object not among two candidates or more": 1}


def test_a_table_gives_the_facts_of_a_facts_file_with_the_same_rows(tmp_path: Path) -> None:
    fact = {"obj_label": "Paris", "sub_label": "France", "relation": "capital"}
    rows = [
        {**fact, "prompt": "The capital of France is"},
        {**fact, "prompt": "The capital of France, [MASK].", "template": "[X]: [Y]."},
        {**fact, "template": "The capital of [X] is [Y]."},
    ]
    empty = {"prompt": None, "template": None}
    facts = read_facts_file(write_jsonl(tmp_path / "f.jsonl", rows)).facts
    (tmp_path / "f.json").write_text(json.dumps(rows))
    for path in (write_parquet(tmp_path / "f.parquet", [empty | row for row in rows]), tmp_path / "f.json"):
        probe = read_hub_facts(str(path))
        assert [fact.prompt for fact in probe.facts] == [fact.prompt for fact in facts]
        assert not probe.dropped


def test_rows_that_cannot_be_evaluated_are_counted(tmp_path: Path) -> None:
    good = {"prompt": "A [MASK].", "obj_label": "b", "candidates": ["a", "b"]}
    rows = [
        good,
        good,
        {**good, "obj_label": "a", "candidates": ["a", "b", "a"]},
        {**good, "obj_label": None},
        {**good, "obj_label": "c"},
        {**good, "candidates": ["b"], "prompt": "B [MASK]."},
        {**good, "prompt": "[MASK] [MASK]."},
        {**good, "prompt": None},
        {**good, "candidates": None, "prompt": "C [MASK]."},
    ]
    probe = read_hub_facts(str(write_parquet(tmp_path / "f.parquet", rows)))
    facts = [(fact.prompt, fact.obj_label) for fact in probe.facts]
    assert facts == [("A [MASK].", "b"), ("A [MASK].", "a"), ("C [MASK].", "b")]
    assert probe.vocabulary == "open"
    assert [fact.candidates for fact in probe.facts[:2]] == [("a", "b")] * 2
    assert probe.dropped == {
        "same sentence and object": 1,
        "no object": 1,
        "object not among two candidates or more": 2,
        "several blanks in the sentence": 1,
        "no blank in the sentence": 1,
    }


def test_the_object_may_be_a_number_or_the_first_of_a_list(tmp_path: Path) -> None:
    rows = [{"prompt": "A [MASK].", "year": 1941, "answers": ["b", "c"]}]
    path = str(write_parquet(tmp_path / "f.parquet", rows))
    objects = [
        read_hub_facts(path, {"object": name, "prompt": "prompt"}).facts[0].obj_label for name in ("year", "answers")
    ]
    assert objects == ["1941", "b"]


def test_a_year_stays_whole_if_another_cell_of_its_column_is_empty(tmp_path: Path) -> None:
    rows = "year,text\n1815,Ada was born in [MASK].\n,Hypatia was born in [MASK].\n1564,Galileo was born in [MASK].\n"
    (tmp_path / "born.csv").write_text(rows)
    probe = read_hub_facts(str(tmp_path / "born.csv"), {"object": "year", "prompt": "text"})
    assert [fact.obj_label for fact in probe.facts] == ["1815", "1564"]
    assert probe.dropped == {"no object": 1}
    # Tools that write Parquet make floats of such a column.
    values = [
        {"year": 1815.0, "text": "Ada was born in [MASK]."},
        {"year": None, "text": "Hypatia was born in [MASK]."},
    ]
    table = str(write_parquet(tmp_path / "born.parquet", values))
    assert [fact.obj_label for fact in read_hub_facts(table, {"object": "year", "prompt": "text"}).facts] == ["1815"]


def test_cells_of_a_csv_file_are_read_as_they_are_written(tmp_path: Path) -> None:
    rows = "agent,text,popularity\n007,Bond is [MASK].,12\nNA,Namibia has the code [MASK].,\n1.50,It is [MASK].,1e3\n"
    (tmp_path / "agents.csv").write_text("agent,text\n007,Bond is [MASK].\n")
    (tmp_path / "codes.CSV").write_text(rows)
    columns = {"object": "agent", "prompt": "text", "popularity": "popularity"}
    probe = read_hub_facts(str(tmp_path / "codes.CSV"), columns)
    assert [(fact.obj_label, fact.popularity) for fact in probe.facts] == [("007", 12), ("NA", None), ("1.50", 1000)]
    assert read_hub_facts(str(tmp_path / "agents.csv"), columns | {"popularity": "text"}).facts[0].obj_label == "007"


def test_the_split_for_evaluation_is_read_unless_another_is_named(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"In {split}: [MASK].", "obj_label": "a"}]
        write_jsonl(tmp_path / "set" / f"{split}.jsonl", rows)
    folder = str(tmp_path / "set")
    assert (read_hub_facts(folder).source["split"], read_hub_facts(folder).facts[0].prompt) == (
        "test",
        "In test: [MASK].",
    )
    assert read_hub_facts(folder, split="train").facts[0].prompt == "In train: [MASK]."
    with pytest.raises(UsageError, match=r"no split 'dev'(.|\n)*Choose from train, validation, test"):
        read_hub_facts(folder, split="dev")
    (tmp_path / "set" / "test.jsonl").unlink()
    assert read_hub_facts(folder).source["split"] == "validation"


@pytest.mark.parametrize("splits", [True, False])
def test_a_dataset_of_save_to_disk_is_read(tmp_path: Path, splits: bool) -> None:
    table = datasets.Dataset.from_list([{"prompt": "A [MASK].", "obj_label": "b"}], split="validation")
    (datasets.DatasetDict({"only": table}) if splits else table).save_to_disk(str(tmp_path / "saved"))
    probe = read_hub_facts(str(tmp_path / "saved"))
    assert (probe.facts[0].obj_label, probe.source["split"]) == ("b", "only" if splits else "validation")


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    write_jsonl(tmp_path / "sets" / "facts.jsonl", [{"prompt": "A [MASK].", "obj_label": "b"}])
    for name in ("~/sets/facts.jsonl", "~/sets"):
        assert read_hub_facts(name).facts[0].obj_label == "b"


def test_open_probe_passes_columns_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "Set" / "dev.jsonl", PEOPLE)
    probe = open_probe(f"HF:{path.parent}", Options(columns=MAPPING, split="validation", limit=1))
    # The folder above is the machine's.
    assert (probe.name, len(probe.facts), probe.source["dataset"]) == ("hf:Set", 1, "Set")
    monkeypatch.chdir(path.parent)
    assert open_probe("hf:.", Options(columns=MAPPING, split="validation")).name == "hf:."


def test_the_error_on_an_unknown_table_lists_its_columns(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "people.jsonl", PEOPLE))
    with pytest.raises(
        UsageError, match=r"which column is the object(.|\n)*about, city, person(.|\n)*--map object=COLUMN"
    ):
        read_hub_facts(path)
    with pytest.raises(UsageError, match="which column is the prompt"):
        read_hub_facts(path, {"object": "city"})
    with pytest.raises(UsageError, match="which column is the subject"):
        read_hub_facts(path, {"object": "city", "template": "[X] was born in [Y]."})
    with pytest.raises(UsageError, match=r"no column 'town'(.|\n)*about, city, person"):
        read_hub_facts(path, {**MAPPING, "object": "town"})


def test_without_the_hub_the_error_says_what_to_download() -> None:
    with pytest.raises(CompressknowError) as caught:
        read_hub_facts("akariasai/PopQA")
    assert "not on this machine, and the Hub cannot be reached" in str(caught.value)
    assert "huggingface.co/datasets/akariasai/PopQA" in str(caught.value)
    assert "hf:FOLDER" in str(caught.value)


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "no/such/folder", "facts.parquet", "~/no-such-folder"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(UsageError, match=r"There is no folder or file .*(no|facts)"):
        read_hub_facts(name)


def test_a_configuration_follows_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompressknowError, match=r"huggingface\.co/datasets/some/set where"):
        read_hub_facts("some/set:config")
    table = datasets.Dataset.from_list([{"prompt": "A [MASK].", "obj_label": "b"}])
    load = Mock(return_value=table)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_hub_facts("some/set:config").facts[0].obj_label == "b"
    load.assert_called_once_with("some/set", "config")


def test_a_configuration_follows_the_name_of_a_folder(tmp_path: Path) -> None:
    settings = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("english", "french"))
    for name in ("english", "french"):
        write_jsonl(tmp_path / "set" / name / "facts.jsonl", [{"prompt": "It is [MASK].", "obj_label": name}])
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{settings}---\n")
    assert read_hub_facts(f"{tmp_path / 'set'}:french").facts[0].obj_label == "french"
    for end, message in {"": "Config name is missing", ":german": "'german' not found"}.items():
        with pytest.raises(UsageError, match=rf"{message}(.|\n)*hf:NAME:CONFIG"):
            read_hub_facts(f"{tmp_path / 'set'}{end}")


def test_a_loading_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lama").mkdir()
    (tmp_path / "lama" / "lama.py").write_text("raise SystemExit('never run')")
    with pytest.raises(UsageError, match=r"its own loading script, which the datasets library has not run since"):
        read_hub_facts(str(tmp_path / "lama"))


def test_folders_without_data_and_files_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="doesn't contain any data files"):
        read_hub_facts(str(tmp_path / "empty"))
    (tmp_path / "facts.xml").write_text("<a/>")
    with pytest.raises(UsageError, match=r"facts\.xml is not a table(.|\n)*\.parquet, \.json"):
        read_hub_facts(str(tmp_path / "facts.xml"))


def test_damaged_files_are_an_error_with_the_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CompressknowError, match=r"bad\.parquet cannot be read\.\n.*Parquet"):
        read_hub_facts(str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.jsonl").write_text('{"a')
    with pytest.raises(CompressknowError, match="JSON parse error"):
        read_hub_facts(str(tmp_path / "bad.jsonl"))
    assert capfd.readouterr().err == "", "the library's own message is not printed"


@pytest.mark.parametrize("switch", [datasets.enable_progress_bars, datasets.disable_progress_bars])
def test_settings_of_the_library_are_as_before(
    tmp_path: Path, switch: Callable[[], None], request: pytest.FixtureRequest
) -> None:
    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    request.addfinalizer(datasets.enable_progress_bars if bars else datasets.disable_progress_bars)
    request.addfinalizer(lambda: datasets.logging.set_verbosity(verbosity))
    switch()
    datasets.logging.set_verbosity_error()
    read_hub_facts(str(write_parquet(tmp_path / "f.parquet", [{"prompt": "A [MASK].", "obj_label": "b"}])))
    assert datasets.is_progress_bar_enabled() == (switch is datasets.enable_progress_bars)
    assert datasets.logging.get_verbosity() == datasets.logging.ERROR


def test_map_options_are_parsed() -> None:
    assert parse_columns(["object=obj", "template=[X] = [Y]."]) == {"object": "obj", "template": "[X] = [Y]."}
    with pytest.raises(UsageError, match="KEY=COLUMN: 'object'"):
        parse_columns(["object"])
    with pytest.raises(UsageError, match=r"unknown key 'objects'(.|\n)*Did you mean object\?"):
        parse_columns(["objects=obj"])
    with pytest.raises(UsageError, match="object twice"):
        parse_columns(["object=a", "object=b"])


def test_mapped_columns_come_before_recognized_ones() -> None:
    columns = ["prompt", "obj_label", "sub_label", "other"]
    assert Columns(columns, {}, "t").of == {"prompt": "prompt", "object": "obj_label", "subject": "sub_label"}
    assert Columns(columns, {"object": "other"}, "t").of["object"] == "other"
    by_template = Columns(columns, {"template": "[X] is [Y]."}, "t")
    assert "prompt" not in by_template.of
    assert by_template.names == ["sub_label", "obj_label"]
    # A template replaces those of PopQA, and LAMA's own names come before general ones.
    popqa = Columns(["subj", "prop", "obj", "s_pop"], {"template": "[X] is [Y]."}, "t")
    assert (popqa.known_as, popqa.templates) == ("PopQA", {})
    lama = "masked_sentence obj_label sub sub_label pred predicate_id relation id uuid"
    of = Columns(lama.split(), {}, "t").of
    assert (of["subject"], of["relation"], of["id"]) == ("sub_label", "predicate_id", "uuid")
    with pytest.raises(UsageError, match="unknown key 'objects'"):
        Columns(columns, {"objects": "other"}, "t")
    assert set(by_template.of) <= set(KEYS)
