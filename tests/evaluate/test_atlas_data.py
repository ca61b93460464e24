"""The files of atlas, the built-in probe of facts: what every relation has to keep to, whoever wrote it."""

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
HEAD = ["relation", "subject", "definition", "templates", "source", "popularity", "facts"]

Relation = dict[str, Any]


def read(path: Path) -> Relation:
    relation: Relation = json.loads(path.read_text(encoding="utf-8"))
    return relation


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def relation(request: pytest.FixtureRequest) -> Relation:
    return read(request.param)


def fold(label: str) -> str:
    """The label without case, accents and punctuation: two labels that fold to the same text read as one."""
    letters = unicodedata.normalize("NFKD", label.replace("ł", "l").replace("Ł", "L"))
    return "".join(c for c in letters.casefold() if c.isalnum())


def slug(label: str) -> str:
    letters = (
        unicodedata.normalize("NFKD", label.replace("ł", "l").replace("Ł", "L")).encode("ascii", "ignore").decode()
    )
    return re.sub(r"[^a-z0-9]+", "-", letters.lower()).strip("-")


def labels(relation: Relation, key: str) -> list[str]:
    return [fact[key] for fact in relation["facts"]]


def repeated(values: list[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def test_atlas_covers_six_subjects_with_2500_facts_of_25_relations() -> None:
    relations = [read(path) for path in FILES]
    assert {relation["subject"] for relation in relations} == SUBJECTS
    assert len(relations) >= 25
    assert sum(len(relation["facts"]) for relation in relations) >= 2500


def test_ids_are_unique_over_all_relations() -> None:
    assert not repeated([id_ for path in FILES for id_ in labels(read(path), "id")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_puts_each_fact_on_a_line_of_its_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    relation = json.loads(text)
    head = [f" {json.dumps(key)}: {json.dumps(relation[key], ensure_ascii=False)}," for key in HEAD[:-1]]
    facts = ",\n".join("  " + json.dumps(fact, ensure_ascii=False) for fact in relation["facts"])
    assert text == "{\n" + "\n".join(head) + '\n "facts": [\n' + facts + "\n ]\n}\n"
    assert relation["relation"] == path.stem
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", path.stem)


def test_the_head_says_what_the_relation_is(relation: Relation) -> None:
    assert list(relation) == HEAD
    assert relation["subject"] in SUBJECTS
    assert relation["definition"].endswith(".")
    assert relation["source"].strip()
    assert relation["popularity"] is None or relation["popularity"].strip()


def test_facts_have_their_fields_and_no_other(relation: Relation) -> None:
    fields = ["id", "sub_label", "obj_label"] + ["popularity"] * (relation["popularity"] is not None)
    assert [fact for fact in relation["facts"] if list(fact) != fields] == []
    popularity = [fact["popularity"] for fact in relation["facts"] if "popularity" in fact]
    assert all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in popularity)


def test_an_id_is_made_of_the_relation_and_the_subject(relation: Relation) -> None:
    wrong = [f for f in relation["facts"] if f["id"] != f"{relation['relation']}/{slug(f['sub_label'])}"]
    assert wrong == []
    assert all(re.fullmatch(r"[a-z_]+/[a-z0-9]+(-[a-z0-9]+)*", id_) for id_ in labels(relation, "id"))


def test_labels_are_trimmed_and_printable(relation: Relation) -> None:
    for label in labels(relation, "sub_label") + labels(relation, "obj_label"):
        assert label == label.strip()
        assert label.isprintable()
        assert fold(label)
        assert unicodedata.is_normalized("NFC", label)
        assert not re.search(r"\[[XY]\]|  ", label)
        assert not re.match(r"(The|A|An) ", label), "an article stands mid-sentence, so in lower case"


def test_a_subject_comes_once(relation: Relation) -> None:
    assert not repeated([fold(label) for label in labels(relation, "sub_label")])


def test_an_object_is_no_part_of_its_subject(relation: Relation) -> None:
    # Copying from the text before it would answer such a fact.
    copied = [f for f in relation["facts"] if f["obj_label"].casefold() in f["sub_label"].casefold()]
    assert copied == []


def test_there_are_enough_candidates_and_no_two_read_the_same(relation: Relation) -> None:
    candidates = sorted(set(labels(relation, "obj_label")))
    assert 5 <= len(candidates) <= 200
    # "the Netherlands" and "Netherlands" are one country.
    assert not repeated([fold(re.sub(r"^(the|a|an) ", "", candidate)) for candidate in candidates])


def plain(label: str) -> str:
    """The label folded, without what one relation writes and another leaves out: articles, the word "museum"."""
    return fold(re.sub(r"(?i)\b(the|an?|museum)\b", "", label))


# Of one subject these say two things, though of one word: who is Chinese speaks Chinese.
TWO_THINGS = {"nationality", "official_language"}


def test_no_two_relations_hold_the_same_fact() -> None:
    """Neither as it stands, nor as a further candidate that is right by the other relation."""
    relations = [read(path) for path in FILES]
    objects = {each["relation"]: {plain(label) for label in labels(each, "obj_label")} for each in relations}
    by_subject: dict[str, list[tuple[str, str]]] = {}
    for each in relations:
        for fact in each["facts"]:
            by_subject.setdefault(plain(fact["sub_label"]), []).append((each["relation"], plain(fact["obj_label"])))
    doubled = [
        (subject, one, other)
        for subject, facts in by_subject.items()
        for one, _ in facts
        for other, right in facts
        if one != other and {one, other} != TWO_THINGS and right in objects[one]
    ]
    assert doubled == []


def test_no_two_facts_give_the_same_sentence() -> None:
    sentences = [
        fold(template.replace("[X]", fact["sub_label"]).replace("[Y]", fact["obj_label"]))
        for path in FILES
        for template in read(path)["templates"]
        for fact in read(path)["facts"]
    ]
    assert not repeated(sentences)


@pytest.mark.parametrize(
    "fact", ["animal_sound/geese", "leader_country/recep-tayyip-erdogan"], ids=["honk and hiss", "in office, not once"]
)
def test_what_has_no_one_answer_is_left_out(fact: str) -> None:
    assert fact not in labels(read(ATLAS / f"{fact.partition('/')[0]}.json"), "id")


def test_templates_lead_up_to_the_object(relation: Relation) -> None:
    templates = relation["templates"]
    assert len(templates) >= 3
    assert not repeated([fold(template) for template in templates])
    for template in templates:
        assert template.count("[X]") == template.count("[Y]") == 1
        assert template.endswith(" [Y].")
        assert template == " ".join(template.split())
        assert template[0].isupper() or template.startswith("[X]")


def test_filled_templates_are_sentences(relation: Relation) -> None:
    subjects, objects = labels(relation, "sub_label"), labels(relation, "obj_label")
    for template in relation["templates"]:
        if template.startswith("[X]"):
            assert all(not subject[0].islower() for subject in subjects), "a sentence starts with a capital"
        for slot, filled in (("[X]", subjects), ("[Y]", objects)):
            before = template[: template.index(slot)].split()[-1:]
            if before and before[0].lower() in {"a", "an", "the"}:
                doubled = [label for label in filled if re.match(r"(the|an?) ", label)]
                assert doubled == [], "one article is enough"
            if before and before[0].lower() in {"a", "an"}:
                wrong = [label for label in filled if takes_an(label) != (before[0].lower() == "an")]
                assert wrong == []


def takes_an(label: str) -> bool:
    """Whether the indefinite article before the label is "an": by its first sound, as far as spelling shows it."""
    first = label.split()[0].split("-")[0]
    if re.match(r"(?i)(uni(?!n)|use|usu|eu|ewe|one|once|u[bkt]i|ura)", first):
        return False
    if re.match(r"(?i)(hour|honest|honou?r|heir)", first):
        return True
    if first.isupper() and len(first) <= 3:  # spelled out letter by letter
        return first[0] in "AEFHILMNORSX"
    return first[0].lower() in "aeiou" or first.startswith(("8", "11", "18"))
