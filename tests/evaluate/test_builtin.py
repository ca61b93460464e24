"""`atlas`, as its reader gives it; what its data must hold is tested beside the data."""

from __future__ import annotations

import pytest

from compressknow.base.errors import UsageError
from compressknow.evaluate.facts import BLANK, Fact
from compressknow.evaluate.sources.sets import read_atlas


def by_relation(facts: tuple[Fact, ...]) -> dict[str, list[Fact]]:
    relations: dict[str, list[Fact]] = {}
    for fact in facts:
        relations.setdefault(fact.relation, []).append(fact)
    return relations


def test_candidates_are_the_distinct_objects_of_the_relation_in_order() -> None:
    for relation, facts in by_relation(read_atlas().facts).items():
        assert facts[0].candidates == tuple(sorted({fact.obj_label for fact in facts})), relation
        assert len({id(fact.candidates) for fact in facts}) == 1, "one tuple in memory for a relation"


def test_ids_are_unique_and_prompts_start_with_a_capital() -> None:
    probe = read_atlas()
    assert len({fact.id for fact in probe.facts}) == len(probe.facts)
    assert not [fact.prompt for fact in probe.facts if fact.prompt[0].islower()]
    assert (probe.protocol, probe.vocabulary, probe.average) == ("atlas/1", "closed", "micro")


def test_a_template_asks_the_same_facts_in_other_words() -> None:
    first, second = read_atlas(), read_atlas(template=2)
    assert [fact.id for fact in first.facts] == [fact.id for fact in second.facts]
    assert not {fact.prompt for fact in first.facts} & {fact.prompt for fact in second.facts}
    assert first.fingerprint() != second.fingerprint()
    assert (first.source["template"], second.source["template"]) == (1, 2)
    assert first.source["sha256"] == second.source["sha256"]


def test_a_capital_as_it_is_asked() -> None:
    fact = next(fact for fact in read_atlas().facts if fact.id == "capital/france")
    assert fact.prompt == f"The capital of France is {BLANK}."
    assert (fact.obj_label, fact.subject) == ("Paris", "geography")
    assert fact.popularity is not None
    assert fact.popularity > 1e6


@pytest.mark.parametrize("number", [0, 4, -1])
def test_a_template_that_is_not_there_is_an_error_that_says_how_many_are(number: int) -> None:
    with pytest.raises(UsageError, match=rf"no template {number}(.|\n)*There are 3 templates"):
        read_atlas(template=number)
