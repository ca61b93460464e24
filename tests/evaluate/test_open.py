"""Probes by name: where their data is looked for, and what is said where there is none."""

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


def message(name: str, **settings: object) -> str:
    with pytest.raises(UsageError) as caught:
        open_all([name], Options(**settings))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("inside", ["", "lama", "LAMA", "data"])
def test_lama_lies_in_the_folder_or_in_one_of_its_name(tmp_path: Path, inside: str) -> None:
    write_lama(tmp_path / inside)
    assert len(open_probe("lama:trex", Options(data=tmp_path)).facts) == 4
    assert open_probe("lama:trex", Options(data=tmp_path, protocol="paper")).protocol == "lama-paper/1"


@pytest.mark.parametrize("inside", ["", "bear", "BEAR"])
def test_bear_lies_in_the_folder_or_in_one_of_its_name(tmp_path: Path, inside: str) -> None:
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
def test_a_set_that_is_not_there_says_where_to_get_and_to_put_it(
    tmp_path: Path, name: str, source: str, folder: str
) -> None:
    without, elsewhere = message(name), message(name, data=tmp_path)
    assert f"{name} does not come with compressknow." in without
    assert f"{tmp_path} does not contain {name}." in elsewhere
    assert all(source in text and f"{folder} and pass --data DIR" in text for text in (without, elsewhere))


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
def test_an_unknown_name_lists_those_there_are(name: str, near: str) -> None:
    text = message(name)
    assert f"Unknown probe {name!r}." in text
    assert f"Did you mean {near}?" in text
    assert "facts:FILE.jsonl, hf:DATASET, lm-eval:TASK" in text


@pytest.mark.parametrize("name", ["", "facts:", "hf:", "nothing like it"])
def test_names_of_nothing_are_unknown(name: str) -> None:
    assert "Unknown probe" in message(name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert f"There is no file {tmp_path / 'no.jsonl'}" in message(f"facts:{tmp_path / 'no.jsonl'}")


def test_only_some_probes_have_several_templates(tmp_path: Path) -> None:
    facts = f"facts:{write_jsonl(tmp_path / 'mine.jsonl', [FACT])}"
    write_lama(tmp_path)
    _, *others = open_all(["atlas", facts, "lama:trex"], Options(data=tmp_path, template=2))
    assert others == [open_probe(facts), open_probe("lama:trex", Options(data=tmp_path))]
    assert "No probe here takes --template." in message("lama:trex", data=tmp_path, template=2)
    assert "There are 3 templates" in message("atlas", template=4)


def test_an_unknown_protocol() -> None:
    assert "Choose lama or paper." in message("lama:trex", protocol="lamma")


def test_a_probe_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    write_lama(tmp_path)
    rows = [{"sub_label": "x", "obj_label": "Timbuktu", "masked_sentences": ["To [MASK]."]}] * 3
    rows += [{"sub_label": "x", "obj_label": "gold", "masked_sentences": ["No blank."]}]
    write_jsonl(tmp_path / "Squad" / "test.jsonl", rows)
    text = message("lama:squad", data=tmp_path)
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_manual_lists_every_probe_in_the_words_of_its_source() -> None:
    manual = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)`[^|]*\| ([^|]+) \|", manual.partition("\n\n## ")[0], re.MULTILINE)
    listed = [(usage, about.replace("`", "")) for usage, about in rows if usage != "-p"]
    assert listed == [(source.usage(kind), source.help) for kind, source in list_usable()]


def test_a_name_in_answers_is_found_however_it_is_written(tmp_path: Path) -> None:
    names = ["ATLAS", "Lama:Google_RE", f"FACTS:{tmp_path / 'Mine.jsonl'}", "hf:Some/Set", "LM_Eval:boolq", "other:X"]
    found = ["atlas", "lama:google-re", "facts:Mine.jsonl", "hf:Some/Set", "lm-eval:boolq", "other:X"]
    assert [normalize_name(name) for name in names] == found


def test_options_that_a_probe_does_not_take_are_for_the_others(tmp_path: Path) -> None:
    write_lama(tmp_path)
    atlas, trex = open_all(["atlas", "lama:trex"], Options(data=tmp_path, protocol="paper", template=2))
    assert atlas.source["template"] == 2
    assert trex.protocol == "lama-paper/1"


@real_data
def test_the_folder_of_all_sets(tmp_path: Path) -> None:
    assert len(open_probe("lama:google-re", Options(data=DATA)).facts) == 5527
    assert len(open_probe("bear", Options(data=DATA)).facts) == 7731
