"""`atlas` as it is read; test_atlas_data.py tests its files."""

from __future__ import annotations

import pytest

from compressknow.base.errors import UsageError
from compressknow.evaluate.facts import BLANK, Fact
from compressknow.evaluate.sources.sets import read_atlas


def group_by_relation(facts: tuple[Fact, ...]) -> dict[str, list[Fact]]:
    relations: dict[str, list[Fact]] = {}
    for fact in facts:
        relations.setdefault(fact.relation, []).append(fact)
    return relations


def test_relations_and_the_distinct_objects_of_each_are_in_alphabetical_order() -> None:
    relations = group_by_relation(read_atlas().facts)
    assert list(relations) == sorted(relations)
    for relation, facts in relations.items():
        assert facts[0].candidates == tuple(sorted({fact.obj_label for fact in facts})), relation
        assert len({id(fact.candidates) for fact in facts}) == 1, "the facts of a relation share one tuple"


def test_ids_are_unique_and_prompts_start_with_a_capital() -> None:
    probe = read_atlas()
    assert len({fact.id for fact in probe.facts}) == len(probe.facts)
    assert not [fact.prompt for fact in probe.facts if fact.prompt[0].islower()]
    assert (probe.protocol, probe.vocabulary, probe.average) == ("atlas/1", "closed", "micro")


def test_another_template_gives_the_same_facts_other_prompts() -> None:
    first, second = read_atlas(), read_atlas(template=2)
    assert [fact.id for fact in first.facts] == [fact.id for fact in second.facts]
    assert not {fact.prompt for fact in first.facts} & {fact.prompt for fact in second.facts}
    assert first.fingerprint() != second.fingerprint()
    assert (first.source["template"], second.source["template"]) == (1, 2)
    assert first.source["sha256"] == second.source["sha256"]


def test_the_fact_of_a_capital() -> None:
    probe = read_atlas()
    fact = next(fact for fact in probe.facts if fact.id == "capital/france")
    assert fact.prompt == f"The capital of France is {BLANK}."
    assert (fact.obj_label, fact.subject) == ("Paris", "geography")
    assert fact.popularity is not None
    assert fact.popularity > 1e6
    assert probe.source["popularity"]["capital"] == "population of the country"


@pytest.mark.parametrize("number", [0, 4, -1])
def test_a_missing_template_is_an_error_that_says_how_many_there_are(number: int) -> None:
    with pytest.raises(UsageError, match=rf"no template {number}(.|\n)*There are 3 templates"):
        read_atlas(template=number)
