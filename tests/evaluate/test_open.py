"""Probes by name: where their data is found, and what errors say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compressknow.base.errors import UsageError
from compressknow.evaluate.sources import Options, list_usable, normalize_name, open_all
from tests.evaluate.layouts import DATA, open_probe, real_data, write_bear, write_jsonl, write_lama
from tests.shown import ROOT

FACT = {"prompt": "The capital of France is [MASK].", "obj_label": "Paris"}


def get_message(name: str, **settings: object) -> str:
    with pytest.raises(UsageError) as caught:
        open_all([name], Options(**settings))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("inside", ["", "lama", "LAMA", "data"])
def test_lama_is_found_in_the_folder_or_in_one_of_its_name(tmp_path: Path, inside: str) -> None:
    write_lama(tmp_path / inside)
    assert len(open_probe("lama:trex", Options(data=tmp_path)).facts) == 4
    assert Options(data=str(tmp_path)) == Options(data=tmp_path)  # type: ignore[arg-type]
    assert open_probe("lama:trex", Options(data=tmp_path, protocol="paper")).protocol == "lama-paper/1"


@pytest.mark.parametrize("inside", ["", "bear", "BEAR"])
def test_bear_is_found_in_the_folder_or_in_one_of_its_name(tmp_path: Path, inside: str) -> None:
    write_bear(tmp_path / inside)
    assert open_probe("bear", Options(data=tmp_path, template=2)).facts[0].prompt == "Rhine ends in the [MASK]."


@pytest.mark.parametrize("name", ["Atlas", "ATLAS", "LAMA:SQuAD", "lama:Google_RE", "Bear", "FACTS:{}"])
def test_the_case_of_a_name_does_not_matter(tmp_path: Path, name: str) -> None:
    write_lama(tmp_path)
    write_bear(tmp_path)
    path = write_jsonl(tmp_path / "Mine.jsonl", [FACT])
    probe = open_probe(name.format(path), Options(data=tmp_path))
    assert probe.facts
    assert probe.name == ("facts:Mine.jsonl" if ":" in name and "F" in name else name.lower().replace("_", "-"))


@pytest.mark.parametrize(
    ("name", "source", "folder"),
    [
        ("lama:squad", "https://dl.fbaipublicfiles.com/LAMA/data.zip", "DIR/lama"),
        ("bear", "github.com/lm-pub-quiz/BEAR", "DIR/bear"),
    ],
)
def test_the_error_on_a_missing_set_says_where_to_get_and_put_it(
    tmp_path: Path, name: str, source: str, folder: str
) -> None:
    absent, elsewhere = get_message(name), get_message(name, data=tmp_path)
    assert f"{name} does not come with compressknow." in absent
    assert f"{tmp_path} does not contain {name}." in elsewhere
    assert all(source in text and f"{folder} and pass --data DIR" in text for text in (absent, elsewhere))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("atlass", "atlas"),
        ("lama:trek", "lama:trex"),
        ("lama", "lama:trex"),
        ("trex", "lama:trex"),
        ("beer", "bear"),
        ("facts", "facts:FILE.jsonl"),
        ("text", "text:FILE.txt"),
    ],
)
def test_the_error_on_an_unknown_name_lists_the_known_ones(name: str, near: str) -> None:
    text = get_message(name)
    assert f"Unknown probe {name!r}." in text
    assert f"Did you mean {near}?" in text
    assert "facts:FILE.jsonl, hf:DATASET, lm-eval:TASK" in text


@pytest.mark.parametrize("name", ["", "facts:", "hf:", "nothing like it"])
def test_incomplete_names_are_unknown(name: str) -> None:
    assert "Unknown probe" in get_message(name)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    assert f"There is no file {tmp_path / 'no.jsonl'}" in get_message(f"facts:{tmp_path / 'no.jsonl'}")


def test_only_some_probes_have_several_templates(tmp_path: Path) -> None:
    facts = f"facts:{write_jsonl(tmp_path / 'mine.jsonl', [FACT])}"
    write_lama(tmp_path)
    _, *others = open_all(["atlas", facts, "lama:trex"], Options(data=tmp_path, template=2))
    assert others == [open_probe(facts), open_probe("lama:trex", Options(data=tmp_path))]
    assert "No probe here takes --template." in get_message("lama:trex", data=tmp_path, template=2)
    assert "There are 3 templates" in get_message("atlas", template=4)


def test_the_error_on_an_unknown_protocol_lists_the_known_ones() -> None:
    assert "Choose lama or paper." in get_message("lama:trex", protocol="lamma")


def test_the_error_on_a_probe_without_facts_says_why_they_were_dropped(tmp_path: Path) -> None:
    write_lama(tmp_path)
    rows = [{"sub_label": "x", "obj_label": "Timbuktu", "masked_sentences": ["To [MASK]."]}] * 3
    rows += [{"sub_label": "x", "obj_label": "gold", "masked_sentences": ["No blank."]}]
    write_jsonl(tmp_path / "Squad" / "test.jsonl", rows)
    text = get_message("lama:squad", data=tmp_path)
    assert "lama:squad has no facts to evaluate." in text
    assert "3 dropped: object outside the common vocabulary" in text
    assert "1 dropped: no blank in the sentence" in text


def test_a_limit_draws_from_every_relation_and_by_seed() -> None:
    whole, few, other = (
        open_probe("atlas"),
        open_probe("atlas", Options(limit=200)),
        open_probe("atlas", Options(limit=200, seed=1)),
    )
    assert len(few.facts) == 200
    assert {fact.relation for fact in few.facts} == {fact.relation for fact in whole.facts}
    assert few.facts == open_probe("atlas", Options(limit=200)).facts
    assert few.facts != other.facts


def test_reading_facts_needs_no_torch_and_no_datasets() -> None:
    code = (
        "import sys; from compressknow.evaluate.sources import Options, open_all; open_all(['atlas'], Options()); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_the_manual_lists_every_probe_in_the_words_of_its_source() -> None:
    manual = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)`[^|]*\| ([^|]+) \|", manual.partition("\n\n## ")[0], re.MULTILINE)
    listed = [(usage, about.replace("`", "")) for usage, about in rows if usage != "-p"]
    assert listed == [(source.usage(kind), source.help) for kind, source in list_usable()]


def test_names_are_normalized(tmp_path: Path) -> None:
    names = ["ATLAS", "Lama:Google_RE", f"FACTS:{tmp_path / 'Mine.jsonl'}", "hf:Some/Set", "LM_Eval:boolq", "other:X"]
    normalized = ["atlas", "lama:google-re", "facts:Mine.jsonl", "hf:Some/Set", "lm-eval:boolq", "other:X"]
    assert [normalize_name(name) for name in names] == normalized


def test_an_option_applies_to_the_probes_that_take_it(tmp_path: Path) -> None:
    write_lama(tmp_path)
    atlas, trex = open_all(["atlas", "lama:trex"], Options(data=tmp_path, protocol="paper", template=2))
    assert atlas.source["template"] == 2
    assert trex.protocol == "lama-paper/1"


@real_data
def test_all_sets_are_found_in_one_folder() -> None:
    assert len(open_probe("lama:google-re", Options(data=DATA)).facts) == 5527
    assert len(open_probe("bear", Options(data=DATA)).facts) == 7731
