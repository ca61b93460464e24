"""The files of atlas, the built-in probe: rules that every relation follows."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ATLAS = Path(__file__).resolve().parents[2] / "compressknow" / "evaluate" / "atlas"
FILES = sorted(ATLAS.glob("*.json"))
SUBJECTS = {"geography", "language", "science", "history and people", "arts and literature", "common sense"}
KEYS = ["relation", "subject", "definition", "templates", "source", "popularity", "facts"]

Relation = dict[str, Any]


def read_relation(path: Path) -> Relation:
    relation: Relation = json.loads(path.read_text(encoding="utf-8"))
    return relation


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def relation(request: pytest.FixtureRequest) -> Relation:
    return read_relation(request.param)


def fold(label: str) -> str:
    """Remove case, accents and punctuation: labels that fold to the same text read as one."""
    letters = unicodedata.normalize("NFKD", label.replace("ł", "l").replace("Ł", "L"))
    return "".join(c for c in letters.casefold() if c.isalnum())


def make_slug(label: str) -> str:
    letters = (
        unicodedata.normalize("NFKD", label.replace("ł", "l").replace("Ł", "L")).encode("ascii", "ignore").decode()
    )
    return re.sub(r"[^a-z0-9]+", "-", letters.lower()).strip("-")


def list_labels(relation: Relation, key: str) -> list[str]:
    return [fact[key] for fact in relation["facts"]]


def find_repeated(values: list[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def test_atlas_covers_six_subjects_with_2500_facts_of_25_relations() -> None:
    relations = [read_relation(path) for path in FILES]
    assert {relation["subject"] for relation in relations} == SUBJECTS
    assert len(relations) >= 25
    assert sum(len(relation["facts"]) for relation in relations) >= 2500


def test_ids_are_unique_over_all_relations() -> None:
    assert not find_repeated([id_ for path in FILES for id_ in list_labels(read_relation(path), "id")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_fact_has_its_own_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    relation = json.loads(text)
    head = [f" {json.dumps(key)}: {json.dumps(relation[key], ensure_ascii=False)}," for key in KEYS[:-1]]
    facts = ",\n".join("  " + json.dumps(fact, ensure_ascii=False) for fact in relation["facts"])
    assert text == "{\n" + "\n".join(head) + '\n "facts": [\n' + facts + "\n ]\n}\n"
    assert relation["relation"] == path.stem
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", path.stem)


def test_a_relation_is_described(relation: Relation) -> None:
    assert list(relation) == KEYS
    assert relation["subject"] in SUBJECTS
    assert relation["definition"].endswith(".")
    assert relation["source"].strip()
    assert relation["popularity"] is None or relation["popularity"].strip()


def test_facts_have_exactly_their_fields(relation: Relation) -> None:
    fields = ["id", "sub_label", "obj_label"] + ["popularity"] * (relation["popularity"] is not None)
    assert [fact for fact in relation["facts"] if list(fact) != fields] == []
    popularity = [fact["popularity"] for fact in relation["facts"] if "popularity" in fact]
    assert all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in popularity)


def test_an_id_consists_of_relation_and_subject(relation: Relation) -> None:
    wrong = [f for f in relation["facts"] if f["id"] != f"{relation['relation']}/{make_slug(f['sub_label'])}"]
    assert wrong == []
    assert all(re.fullmatch(r"[a-z_]+/[a-z0-9]+(-[a-z0-9]+)*", id_) for id_ in list_labels(relation, "id"))


def test_labels_are_trimmed_and_printable(relation: Relation) -> None:
    for label in list_labels(relation, "sub_label") + list_labels(relation, "obj_label"):
        assert label == label.strip()
        assert label.isprintable()
        assert fold(label)
        assert unicodedata.is_normalized("NFC", label)
        assert not re.search(r"\[[XY]\]|  ", label)
        assert not re.match(r"(The|A|An) ", label), "an article within a sentence is in lower case"


def test_subjects_are_unique(relation: Relation) -> None:
    assert not find_repeated([fold(label) for label in list_labels(relation, "sub_label")])


def test_an_object_is_not_part_of_its_subject(relation: Relation) -> None:
    # Otherwise a model could copy the answer from the prompt.
    copied = [f for f in relation["facts"] if f["obj_label"].casefold() in f["sub_label"].casefold()]
    assert copied == []


def test_there_are_enough_candidates_and_all_read_differently(relation: Relation) -> None:
    candidates = sorted(set(list_labels(relation, "obj_label")))
    assert 5 <= len(candidates) <= 200
    # "the Netherlands" and "Netherlands" are one country.
    assert not find_repeated([fold(re.sub(r"^(the|a|an) ", "", candidate)) for candidate in candidates])


def simplify(label: str) -> str:
    """Fold a label without what only some relations write: articles and the word "museum"."""
    return fold(re.sub(r"(?i)\b(the|an?|museum)\b", "", label))


# The same words, but different facts: a Chinese person speaks Chinese.
DIFFERENT = {"nationality", "official_language"}


def test_no_two_relations_hold_the_same_fact() -> None:
    """Neither as a fact of both, nor as a candidate of one that is right by the other."""
    relations = [read_relation(path) for path in FILES]
    objects = {
        relation["relation"]: {simplify(label) for label in list_labels(relation, "obj_label")}
        for relation in relations
    }
    by_subject: dict[str, list[tuple[str, str]]] = {}
    for relation in relations:
        for fact in relation["facts"]:
            pair = relation["relation"], simplify(fact["obj_label"])
            by_subject.setdefault(simplify(fact["sub_label"]), []).append(pair)
    duplicates = [
        (subject, first, second)
        for subject, facts in by_subject.items()
        for first, _ in facts
        for second, answer in facts
        if first != second and {first, second} != DIFFERENT and answer in objects[first]
    ]
    assert duplicates == []


def test_no_two_facts_give_the_same_sentence() -> None:
    sentences = [
        fold(template.replace("[X]", fact["sub_label"]).replace("[Y]", fact["obj_label"]))
        for path in FILES
        for template in read_relation(path)["templates"]
        for fact in read_relation(path)["facts"]
    ]
    assert not find_repeated(sentences)


@pytest.mark.parametrize(
    "fact", ["animal_sound/geese", "leader_country/recep-tayyip-erdogan"], ids=["honk and hiss", "in office, not once"]
)
def test_facts_without_a_single_answer_are_left_out(fact: str) -> None:
    assert fact not in list_labels(read_relation(ATLAS / f"{fact.partition('/')[0]}.json"), "id")


def test_templates_end_with_the_object(relation: Relation) -> None:
    templates = relation["templates"]
    assert len(templates) >= 3
    assert not find_repeated([fold(template) for template in templates])
    for template in templates:
        assert template.count("[X]") == template.count("[Y]") == 1
        assert template.endswith(" [Y].")
        assert template == " ".join(template.split())
        assert template[0].isupper() or template.startswith("[X]")


def test_filled_templates_have_correct_articles_and_capitals(relation: Relation) -> None:
    subjects, objects = list_labels(relation, "sub_label"), list_labels(relation, "obj_label")
    for template in relation["templates"]:
        if template.startswith("[X]"):
            assert all(not subject[0].islower() for subject in subjects), "a sentence starts with a capital"
        for slot, labels in (("[X]", subjects), ("[Y]", objects)):
            before = template[: template.index(slot)].split()[-1:]
            if before and before[0].lower() in {"a", "an", "the"}:
                doubled = [label for label in labels if re.match(r"(the|an?) ", label)]
                assert doubled == [], "one article is enough"
            if before and before[0].lower() in {"a", "an"}:
                wrong = [label for label in labels if takes_an(label) != (before[0].lower() == "an")]
                assert wrong == []


def takes_an(label: str) -> bool:
    """Return whether the label takes "an": whether it begins with a vowel sound, as far as its spelling shows."""
    first = label.split()[0].split("-")[0]
    if re.match(r"(?i)(uni(?!n)|use|usu|eu|ewe|one|once|u[bkt]i|ura)", first):
        return False
    if re.match(r"(?i)(hour|honest|honou?r|heir)", first):
        return True
    if first.isupper() and len(first) <= 3:  # spelled out letter by letter
        return first[0] in "AEFHILMNORSX"
    return first[0].lower() in "aeiou" or first.startswith(("8", "11", "18"))
