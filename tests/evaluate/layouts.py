"""Small sets of facts in the folders and files of LAMA and BEAR, and the folder of the real ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compressknow.base.files import escape_name
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.sources import Options, open_all
from compressknow.evaluate.sources.custom import Hub, OwnFacts
from compressknow.evaluate.sources.sets import Bear, Lama
from compressknow.evaluate.sources.tasks import LmEval, LmEvalTask

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="there is no folder of shared data")

RELATIONS = [
    {"relation": "P36", "template": "The capital of [X] is [Y] .", "type": "1-1"},
    {"relation": "P19", "template": "[X] was born in [Y] . ", "type": "N-1"},
    {"relation": "P166", "template": "[X] was awarded the [Y] .", "type": "N-M"},
]
WORDS = "Paris Rome New York London gold blue fly 1941 1953".split()


def open_probe(name: str, options: Options | None = None) -> Probe:
    (probe,) = open_all([name], options or Options())
    assert isinstance(probe, Probe)
    return probe


def read_lama(folder: Path, part: str, protocol: str = "lama") -> Probe:
    return Lama().open(f"lama:{part}", part, Options(data=folder, protocol=protocol))


def read_bear(folder: Path, template: int = 1) -> Probe:
    return Bear().open("bear", "", Options(data=folder, template=template))


def read_facts_file(path: Path) -> Probe:
    return OwnFacts().open(f"facts:{escape_name(path.name)}", str(path), Options())


def read_hub_facts(dataset: str, columns: Mapping[str, str] | None = None, split: str | None = None) -> Probe:
    return Hub().open(f"hf:{dataset}", dataset, Options(columns=columns or {}, split=split))


def open_task(
    name: str, *, data: Path | None = None, include: Path | None = None, limit: int | None = None, seed: int = 0
) -> LmEvalTask:
    options = Options(data=data, tasks=include, limit=limit, seed=seed)
    return LmEval().open(name, name.removeprefix("lm-eval:"), options)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_trex(relation: str, sub_label: str, obj_label: str, uuid: str, evidence: str | None = None) -> dict[str, Any]:
    """Make a row of T-REx, with a sentence as evidence, or without as in some copies."""
    row: dict[str, Any] = {"uuid": uuid, "sub_label": sub_label, "obj_label": obj_label, "predicate_id": relation}
    if evidence:
        row["evidences"] = [{"sub_surface": sub_label, "obj_surface": obj_label, "masked_sentence": evidence}]
    return row


def make_google_re(sub_label: str, obj_label: str, uuid: str, judgments: str = "yes yes yes") -> dict[str, Any]:
    return {
        "pred": "/people/person/place_of_birth",
        "sub": f"/m/{uuid}",
        "sub_label": sub_label,
        "obj_label": obj_label,
        "uuid": uuid,
        "judgments": [{"rater": "1", "judgment": judgment} for judgment in judgments.split()],
        "masked_sentences": [f"{sub_label} lives .", "He is from [MASK] ."],
    }


def write_lama(folder: Path) -> Path:
    """Write all four sets of LAMA, with a few rows each."""
    write_jsonl(folder / "relations.jsonl", RELATIONS)
    (folder / "common_vocab_cased.txt").write_text("\n".join([*WORDS, "Paris", ""]), encoding="utf-8")
    capitals = [
        make_trex("P36", "France", "Paris", "a"),
        make_trex("P36", "Italy ", "Rome", "b"),
        make_trex("P36", "Burkina Faso", "Ouagadougou", "c"),
        make_trex("P36", "France", "Paris", "d"),
        make_trex("P36", "France", "London", "e"),
    ]
    births = [make_trex("P19", "Ada Lovelace", "London", "a", "Ada Lovelace came into the world in [MASK] in 1815.")]
    write_jsonl(folder / "TREx" / "P36.jsonl", capitals)
    write_jsonl(folder / "TREx" / "P19.jsonl", births)
    birthplaces = [
        make_google_re("Ann", "Paris", "1"),
        make_google_re("Bob", "New York", "2", "yes no yes no"),
        make_google_re("Cid", "Rome", "3", "yes skip no"),
        make_google_re("Dan", "Timbuktu", "4"),
    ]
    write_jsonl(folder / "Google_RE" / "place_of_birth_test.jsonl", birthplaces)
    dates = [make_google_re("Ann", "1941", "1")]
    write_jsonl(folder / "Google_RE" / "date_of_birth_test.jsonl", dates)
    sentences = ["The [MASK] color was used.", "It was [MASK]."]
    squad = [
        {"id": "s1", "sub_label": "Squad", "obj_label": "gold", "masked_sentences": sentences},
        {"id": "s2", "sub_label": "Squad", "obj_label": "blue", "masked_sentences": ["[MASK] is [MASK]."]},
        {"id": "s3", "sub_label": "Squad", "obj_label": "blue", "masked_sentences": ["The sky is blue."]},
        {"id": "s4", "sub_label": "Squad", "obj_label": "gold", "masked_sentences": ["The [MASK] color was used."]},
        {"id": "s5", "sub_label": "Squad", "obj_label": "gold", "masked_sentences": ["so " * 100 + "[MASK]."]},
    ]
    write_jsonl(folder / "Squad" / "test.jsonl", squad)
    conceptnet = [
        {
            "sub": "bird",
            "sub_label": "bird",
            "pred": "CapableOf",
            "obj": "fly",
            "obj_label": "fly",
            "masked_sentences": ["Birds can [MASK]."],
            "negated": ["Birds cannot [MASK]."],
            "uuid": "d4f1",
        },
        {"sub": "sky", "pred": "HasProperty", "obj_label": "blue", "masked_sentences": ["The sky is [MASK]."]},
        {"pred": "HasProperty", "obj_label": "blue", "masked_sentences": ["The sea is [MASK]."]},
    ]
    write_jsonl(folder / "ConceptNet" / "test.jsonl", conceptnet)
    return folder


def write_bear(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "P403": {
            "templates": ["The [X] flows into the [Y].", "[X] ends in the [Y].", "[Y] is where the [X] ends."],
            "answer_space_labels": ["north Sea", "Black Sea"],
            "answer_space_ids": ["Q1", "Q2"],
        },
        "P30": {
            "templates": ["[X] is located in [Y].", "[X] is a part of [Y].", "[X] is situated in [Y]."],
            "answer_space_labels": ["Europe", "Asia", "Africa"],
        },
    }
    (folder / "metadata_relations.json").write_text(json.dumps(metadata), encoding="utf-8")
    rivers = [
        {"sub_label": "Rhine", "sub_aliases": [], "obj_label": "north Sea", "answer_idx": 0},
        {"sub_label": "Danube", "sub_aliases": [], "obj_label": "Black Sea", "answer_idx": 1},
    ]
    write_jsonl(folder / "P403.jsonl", rivers)
    write_jsonl(folder / "P30.jsonl", [{"sub_label": "the Gambia", "obj_label": "Africa", "answer_idx": 2}])
    return folder
