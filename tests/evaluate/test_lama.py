"""LAMA by its official protocol and by the paper's, on small files in the official layout and on the real ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from compressknow import Options, Settings, probe, report
from compressknow.base.errors import UsageError
from compressknow.cli import main
from compressknow.evaluate.answers import read_answers
from tests.evaluate.layouts import DATA, RELATIONS, make_trex, read_lama, real_data, write_jsonl, write_lama
from tests.knowing import save_trained

MINILM = DATA.parent / "models" / "minilm-facts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lama(tmp_path)


def test_trex_has_one_prompt_per_pair_by_the_template_of_its_relation(folder: Path) -> None:
    probe = read_lama(folder, "trex")
    assert [(fact.id, fact.prompt, fact.obj_label) for fact in probe.facts] == [
        ("P36/a", "The capital of France is [MASK] .", "Paris"),
        ("P36/b", "The capital of Italy is [MASK] .", "Rome"),
        ("P36/e", "The capital of France is [MASK] .", "London"),
        ("P19/a", "Ada Lovelace was born in [MASK] .", "London"),
    ]
    assert probe.dropped == {"object outside the common vocabulary": 1, "same subject and object": 1}
    assert [fact.subject for fact in probe.facts] == ["geography"] * 3 + ["history and people"]


def test_a_pair_of_two_relations_is_a_fact_of_each(folder: Path) -> None:
    write_jsonl(folder / "TREx" / "P19.jsonl", [make_trex("P19", "France", "Paris", "a")])
    facts = [fact.id for fact in read_lama(folder, "trex").facts if fact.obj_label == "Paris"]
    assert facts == ["P36/a", "P19/a"]


def test_the_paper_has_each_sentence_once_and_keeps_every_object(folder: Path) -> None:
    probe = read_lama(folder, "trex", "paper")
    assert [fact.obj_label for fact in probe.facts] == ["Paris", "Rome", "Ouagadougou", "London"]
    assert probe.facts[0].prompt == "The capital of France is [MASK] ."
    assert probe.dropped == {"same sentence": 2}


def test_the_paper_drops_equal_sentences_of_different_relations(folder: Path) -> None:
    write_jsonl(folder / "relations.jsonl", [{"relation": r, "template": "[X] lies in [Y] ."} for r in ("P17", "P30")])
    for relation, obj_label in (("P17", "France"), ("P30", "Europe")):
        write_jsonl(folder / "TREx" / f"{relation}.jsonl", [{"sub_label": "Lyon", "obj_label": obj_label, "uuid": "x"}])
    assert [fact.id for fact in read_lama(folder, "trex", "paper").facts] == ["P17/x"]


def test_the_settings_of_the_two_protocols(folder: Path) -> None:
    official, paper = read_lama(folder, "google-re"), read_lama(folder, "google-re", "paper")
    assert (official.name, official.protocol, paper.protocol) == ("lama:google-re", "lama/1", "lama-paper/1")
    assert (official.vocabulary, official.fold_case, official.keep_unanswerable) == ("words", False, False)
    assert (paper.vocabulary, paper.fold_case, paper.keep_unanswerable, paper.words) == ("full", True, True, ())
    assert official.words == tuple("Paris Rome New York London gold blue fly 1941 1953".split())
    averages = [read_lama(folder, name).average for name in ("trex", "google-re", "squad", "conceptnet")]
    assert averages == ["macro", "macro", "micro", "micro"]
    assert {read_lama(folder, name, "paper").average for name in ("trex", "squad")} == {"micro"}


def test_answers_by_one_protocol_are_not_reported_as_those_by_the_other(folder: Path, tmp_path: Path) -> None:
    model, settings = save_trained("bert", tmp_path / "model"), Settings(noise_floor=False)
    # One object that the model has as a token.
    with (folder / "common_vocab_cased.txt").open("a", encoding="utf-8") as words:
        words.write("Velin\n")
    write_jsonl(folder / "TREx" / "P36.jsonl", [make_trex("P36", "Avaland", "Velin", "a")])
    stored = {name: tmp_path / name for name in ("lama", "paper")}
    for name, output in stored.items():
        probe(model, output, "lama:trex", options=Options(data=folder, protocol=name), settings=settings)
    options = Options(protocol="paper")
    assert report(stored["paper"], stored["paper"], options=options).comparisons
    with pytest.raises(UsageError, match="`protocol` paper decides what is evaluated"):
        report(stored["lama"], stored["lama"], options=options)


def test_google_re_drops_what_more_raters_reject_than_accept(folder: Path) -> None:
    probe = read_lama(folder, "google-re")
    assert [(fact.relation, fact.prompt, fact.obj_label) for fact in probe.facts] == [
        ("place_of_birth", "Ann was born in [MASK] .", "Paris"),
        ("place_of_birth", "Bob was born in [MASK] .", "New York"),
        ("date_of_birth", "Ann (born [MASK]).", "1941"),
    ]
    assert probe.dropped == {"rejected by its raters": 1, "object outside the common vocabulary": 1}
    assert len(read_lama(folder, "google-re", "paper").facts) == 5


def test_squad_has_its_own_sentences_and_keeps_duplicates_as_the_official_code_does(folder: Path) -> None:
    probe = read_lama(folder, "squad")
    assert [fact.id for fact in probe.facts] == ["squad/s1", "squad/s4"]
    assert {fact.sub_label for fact in probe.facts} == {""}
    assert probe.dropped == {
        "several blanks in the sentence": 1,
        "no blank in the sentence": 1,
        "sentence of more than 100 words": 1,
    }
    paper = read_lama(folder, "squad", "paper")
    assert [(fact.id, fact.prompt) for fact in paper.facts[:1]] == [("squad/s1", "The [MASK] color was used.")]
    assert [fact.id for fact in paper.facts[1:]] == ["squad/s5"]
    assert paper.dropped["same sentence"] == 1
    row = {"id": "s6", "sub_label": "Squad", "obj_label": "gold", "masked_sentences": ["so " * 99 + "[MASK]."]}
    write_jsonl(folder / "Squad" / "test.jsonl", [row])
    assert len(read_lama(folder, "squad").facts) == 1


def test_conceptnet_has_relations_and_is_common_sense(folder: Path) -> None:
    probe = read_lama(folder, "conceptnet")
    assert [(fact.id, fact.relation, fact.sub_label, fact.prompt) for fact in probe.facts] == [
        ("CapableOf/d4f1", "CapableOf", "bird", "Birds can [MASK]."),
        ("HasProperty/1", "HasProperty", "sky", "The sky is [MASK]."),
    ]
    assert {fact.subject for fact in probe.facts} == {"common sense"}
    assert probe.dropped == {"no label of subject or object": 1}


def test_facts_of_a_relation_without_a_template_are_dropped_and_counted(folder: Path) -> None:
    write_jsonl(folder / "relations.jsonl", [*RELATIONS, {"relation": "P17"}])
    for relation in ("P50", "P17"):
        write_jsonl(folder / "TREx" / f"{relation}.jsonl", [{"sub_label": "x", "obj_label": "London", "uuid": "x"}])
    for protocol in ("lama", "paper"):
        probe = read_lama(folder, "trex", protocol)
        assert probe.dropped["no template for its relation in relations.jsonl"] == 2


def test_the_source_names_every_file_that_was_read(folder: Path) -> None:
    source = read_lama(folder, "trex").source
    assert source["from"].startswith("a local folder in the layout of LAMA, https://")
    files = source["files"]
    assert sorted(files) == ["TREx/P19.jsonl", "TREx/P36.jsonl", "common_vocab_cased.txt", "relations.jsonl"]
    assert all(len(sha256) == 64 for sha256 in files.values())
    assert sorted(read_lama(folder, "squad", "paper").source["files"]) == ["Squad/test.jsonl"]


def test_repeated_ids_are_numbered(folder: Path) -> None:
    rows = [{"sub_label": name, "obj_label": "Paris", "uuid": "same"} for name in ("A", "B", "C")]
    write_jsonl(folder / "TREx" / "P36.jsonl", rows)
    ids = [fact.id for fact in read_lama(folder, "trex").facts if fact.relation == "P36"]
    assert ids == ["P36/same", "P36/same#2", "P36/same#3"]


def test_without_the_common_vocabulary_the_error_names_the_other_protocol(folder: Path) -> None:
    (folder / "common_vocab_cased.txt").unlink()
    with pytest.raises(UsageError, match=r"common_vocab_cased\.txt(.|\n)*--protocol paper"):
        read_lama(folder, "squad")
    assert read_lama(folder, "squad", "paper").facts


def test_a_damaged_line_is_an_error_with_file_line_and_column(folder: Path) -> None:
    with (folder / "TREx" / "P19.jsonl").open("a") as file:
        file.write('{"sub_label": "Ada",, }\n')
    with pytest.raises(UsageError, match=r"P19\.jsonl, line 2, column 21: not JSON"):
        read_lama(folder, "trex")


@pytest.mark.parametrize(
    ("part", "file", "row", "wrong"),
    [
        ("trex", "relations.jsonl", {"relation": "P36", "template": 5}, r"\[0\]\.template is not text"),
        ("google-re", "Google_RE/date_of_birth_test.jsonl", {"judgments": None}, r"\[0\]\.judgments is not a list"),
        ("squad", "Squad/test.jsonl", {"masked_sentences": {"a": 1}}, r"\[0\]\.masked_sentences is not a list"),
    ],
)
def test_a_value_of_another_kind_is_an_error_with_file_and_key(
    folder: Path, part: str, file: str, row: dict[str, object], wrong: str
) -> None:
    write_jsonl(folder / file, [{"sub_label": "Ada", "obj_label": "London", **row}])
    with pytest.raises(UsageError, match=rf"{file} cannot be read as LAMA's: {Path(file).name}{wrong}"):
        read_lama(folder, part)


@pytest.mark.parametrize("inside", ["TREx", "elsewhere"])
def test_a_folder_within_the_set_or_next_to_it_is_an_error_that_names_the_right_one(folder: Path, inside: str) -> None:
    (folder / inside).mkdir(exist_ok=True)
    with pytest.raises(UsageError, match=r"does not contain lama:trex; the folder above it does") as error:
        read_lama(folder / inside, "trex")
    assert error.value.hint == f"Pass --data {folder}."


def test_the_error_on_an_empty_folder_says_where_to_get_the_set(tmp_path: Path) -> None:
    (tmp_path / "Squad").mkdir()
    with pytest.raises(
        UsageError, match=r"no facts of lama:squad(.|\n)*https://dl\.fbaipublicfiles\.com/LAMA/data\.zip"
    ):
        read_lama(tmp_path, "squad", "paper")


# Counted in T-REx's files, which contain 19 pairs twice; 41 relations are published.
TREX = {
    "P19": 944,
    "P20": 953,
    "P36": 470,
    "P1376": 178,
    "P138": 642,
    "P176": 973,
    "P178": 591,
    "P463": 225,
    "P530": 950,
}


@real_data
def test_real_trex_has_its_41_relations() -> None:
    probe = read_lama(DATA / "lama", "trex")
    sizes = Counter(fact.relation for fact in probe.facts)
    assert (len(sizes), len(probe.facts), probe.dropped) == (41, 32_402, {"same subject and object": 19})
    assert {relation: sizes[relation] for relation in TREX} == TREX
    assert len({fact.id for fact in probe.facts}) == len(probe.facts)
    assert not [fact for fact in probe.facts if not fact.prompt.endswith(" .")]


@real_data
def test_real_google_re_has_the_numbers_of_facts_that_its_authors_publish() -> None:
    probe = read_lama(DATA / "lama", "google-re")
    sizes = Counter(fact.relation for fact in probe.facts)
    assert sizes == {"place_of_birth": 2937, "date_of_birth": 1825, "place_of_death": 765}
    assert len(probe.facts) == 5527
    assert len(probe.words) == 21_018


@real_data
def test_real_google_re_has_as_many_facts_as_the_scores_of_the_paper_imply() -> None:
    # BERT-base's percentages in table 3, by setup: each is a whole number of 5,510 facts.
    percentages = (10.29, 4.374, 10.109, 5.662, 2.377, 1.96, 9.873, 9.673, 4.628, 5.753)
    count = len(read_lama(DATA / "lama", "google-re", "paper").facts)
    assert count == 5510
    assert all(round(100 * round(count * p / 100) / count, 3) == p for p in percentages)


@real_data
@pytest.mark.parametrize("protocol", ["lama", "paper"])
def test_real_squad_drops_its_three_sentences_with_two_blanks(protocol: str) -> None:
    probe = read_lama(DATA / "lama", "squad", protocol)
    assert (len(probe.facts), probe.dropped) == (302, {"several blanks in the sentence": 3})


@real_data
def test_real_trex_by_the_paper_drops_equal_sentences() -> None:
    probe = read_lama(DATA / "lama", "trex", "paper")
    assert (len(probe.facts), probe.dropped) == (30_298, {"same sentence": 2_123})


@real_data
@pytest.mark.skipif(not MINILM.is_dir(), reason="there is no folder of shared models")
def test_probe_prints_the_mean_over_relations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-p", "lama:google-re", "--data", str(DATA), "--limit", "60", "--no-noise-floor"]
    assert main(["probe", str(MINILM), *options, "-o", str(tmp_path / "out")]) == 0
    relations: dict[str, list[bool]] = {}
    for answer in read_answers(tmp_path / "out").answers:
        relations.setdefault(answer.relation, []).append(answer.correct)
    mean = sum(sum(right) / len(right) for right in relations.values()) / 3
    assert f"{100 * mean:.1f} % as the mean over relations" in capsys.readouterr().out
