"""Probes: their fingerprints, samples and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressknow.base.errors import UsageError
from compressknow.evaluate.facts import Fact, Probe, compute_chance, compute_majority, find_most_frequent, join_wordings
from compressknow.evaluate.sources import Options, open_all
from tests.evaluate.layouts import DATA, open_probe, real_data
from tests.knowing import write_facts

CITIES = ("Paris", "Rome", "Oslo", "Bern")


def make_fact(number: int = 0, relation: str = "capital", **fields: Any) -> Fact:
    values: dict[str, Any] = {
        "id": f"{relation}/{number}",
        "probe": "p",
        "relation": relation,
        "subject": "geography",
        "sub_label": "France",
        "obj_label": "Paris",
        "prompt": "The capital of France is [MASK].",
        "candidates": ("Paris", "Rome"),
    }
    return Fact(**values | fields)


def make_probe(sizes: dict[str, int]) -> Probe:
    facts = tuple(make_fact(number, relation) for relation, size in sizes.items() for number in range(size))
    return Probe("p", "test/1", facts, dropped={"too long": 3})


PROBE = Probe(
    "p",
    "test/1",
    (make_fact(0), make_fact(1, candidates=None), make_fact(2, candidates=("Rome", "Paris", "Oslo")), make_fact(3)),
)
FIRST, *OTHERS = PROBE.facts
CHANGES: dict[str, Callable[[], Probe]] = {
    "name": lambda: replace(PROBE, name="q"),
    "protocol": lambda: replace(PROBE, protocol="test/2"),
    "vocabulary": lambda: replace(PROBE, vocabulary="words"),
    "words": lambda: replace(PROBE, words=("Paris",)),
    "case": lambda: replace(PROBE, fold_case=True),
    "unanswerable": lambda: replace(PROBE, keep_unanswerable=True),
    "rest": lambda: replace(PROBE, score_rest=True),
    "a fact less": lambda: replace(PROBE, facts=PROBE.facts[:2]),
    "id": lambda: replace(PROBE, facts=(replace(FIRST, id="x"), *OTHERS)),
    "relation": lambda: replace(PROBE, facts=(replace(FIRST, relation="x"), *OTHERS)),
    "prompt": lambda: replace(PROBE, facts=(replace(FIRST, prompt="[MASK] is France's."), *OTHERS)),
    "object": lambda: replace(PROBE, facts=(replace(FIRST, obj_label="Rome"), *OTHERS)),
    "a candidate more": lambda: replace(PROBE, facts=(replace(FIRST, candidates=("Paris", "Rome", "x")), *OTHERS)),
    "order of candidates": lambda: replace(PROBE, facts=(replace(FIRST, candidates=("Rome", "Paris")), *OTHERS)),
    "no candidates": lambda: replace(PROBE, facts=(replace(FIRST, candidates=None), *OTHERS)),
    "candidates split otherwise": lambda: replace(PROBE, facts=(replace(FIRST, candidates=("Paris, Rome",)), *OTHERS)),
    "another fact's candidates": lambda: replace(
        PROBE, facts=(FIRST, *OTHERS[:2], replace(OTHERS[2], candidates=OTHERS[1].candidates))
    ),
    "a fact more, with candidates of the first": lambda: replace(PROBE, facts=(*PROBE.facts, make_fact(3))),
    "a fact more, with candidates of the last": lambda: replace(
        PROBE, facts=(*PROBE.facts, make_fact(3, candidates=OTHERS[1].candidates))
    ),
    "order of facts": lambda: replace(PROBE, facts=(*OTHERS, FIRST)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_changes_with_what_is_evaluated(change: str) -> None:
    assert CHANGES[change]().fingerprint() != PROBE.fingerprint()


def test_no_two_changes_give_the_same_fingerprint() -> None:
    fingerprints = [make().fingerprint() for make in CHANGES.values()]
    assert len(set(fingerprints)) == len(fingerprints)


def test_the_fingerprint_depends_neither_on_the_folder_nor_on_popularity(tmp_path: Path) -> None:
    other = replace(PROBE, source={"from": "elsewhere"}, dropped={"why": 1}, read=99, average="macro")
    assert other.fingerprint() == PROBE.fingerprint()
    known = replace(PROBE, facts=(replace(FIRST, popularity=5.0), *OTHERS))
    assert known.fingerprint() == PROBE.fingerprint()
    probes = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        probes.append(open_probe(f"facts:{write_facts(tmp_path / folder / 'mine.jsonl')}"))
    assert probes[0].fingerprint() == probes[1].fingerprint()
    assert (
        open_probe(f"facts:{tmp_path / 'a' / 'mine.jsonl'}", Options(limit=9)).fingerprint() != probes[0].fingerprint()
    )


SIZES = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 40), min_size=1, max_size=9)


@settings(deadline=None)
@given(SIZES, st.integers(1, 200), st.integers(0, 5))
def test_a_sample_has_the_requested_size_and_proportional_relations(
    sizes: dict[str, int], limit: int, seed: int
) -> None:
    probe = make_probe(sizes)
    sample = probe.sample(limit, seed)
    total = len(probe.facts)
    assert len(sample.facts) == min(limit, total)
    counts = Counter(fact.relation for fact in sample.facts)
    for relation, size in sizes.items():
        exact = Fraction(limit * size, total)
        if limit >= total:
            assert counts[relation] == size
        elif limit >= len(sizes):
            assert counts[relation] >= 1
            # Relations that must keep one fact take it from the others, the largest first.
            assert counts[relation] <= max(exact + 1, 1)
            if all(limit * other >= total for other in sizes.values()):
                assert abs(counts[relation] - exact) < 1
    # Facts keep their order, and the numbers of those read and dropped are kept.
    positions = {fact.id: position for position, fact in enumerate(probe.facts)}
    assert [positions[fact.id] for fact in sample.facts] == sorted(positions[fact.id] for fact in sample.facts)
    assert (sample.read, sample.dropped) == (total + 3, {"too long": 3})
    assert sample.sample(limit, seed).facts == sample.facts


@settings(deadline=None)
@given(SIZES, st.integers(1, 60), st.integers(1, 60))
def test_within_a_relation_a_larger_sample_contains_a_smaller_one(sizes: dict[str, int], one: int, other: int) -> None:
    small, large = (make_probe(sizes).sample(limit) for limit in sorted((one, other)))
    for relation in sizes:
        few, many = ({fact.id for fact in sample.facts if fact.relation == relation} for sample in (small, large))
        assert few <= many or many <= few


def test_a_sample_smaller_than_the_number_of_relations_can_have_each() -> None:
    """Larger relations are in more samples."""
    probe = make_probe({"a": 90, **dict.fromkeys("bcdefghij", 10)})
    counts = Counter(fact.relation for seed in range(200) for fact in probe.sample(3, seed).facts)
    assert counts["a"] > 150
    assert all(20 < counts[relation] < 100 for relation in "bcdefghij")
    assert sum(counts.values()) == 600


def test_samples_of_a_single_relation_are_nested_and_differ_by_seed() -> None:
    probe = make_probe({"capital": 100})
    samples = [{fact.id for fact in probe.sample(limit, seed=1).facts} for limit in (1, 10, 50, 99)]
    assert all(few < many for few, many in pairwise(samples))
    assert samples[1] == {fact.id for fact in probe.sample(10, seed=1).facts}
    assert samples[1] != {fact.id for fact in probe.sample(10, seed=2).facts}
    assert (probe.sample(10, seed=2).limit, probe.sample(10, seed=2).seed) == (10, 2)


def test_a_limit_is_positive_and_changes_no_smaller_probe() -> None:
    probe = make_probe({"capital": 5})
    assert probe.sample(5) is probe
    assert probe.sample(500) is probe
    assert probe.sample(None) is probe
    for limit in (0, -1):
        with pytest.raises(UsageError, match="--limit"):
            open_all(["atlas"], Options(limit=limit))


def test_an_example_has_another_subject_and_object() -> None:
    facts = [make_fact(0), make_fact(1, obj_label="Rome"), make_fact(2, sub_label="Gaul"), make_fact(3, sub_label="x")]
    probe = Probe("p", "test/1", (*facts[:3], replace(facts[3], obj_label="Oslo", candidates=None)))
    assert probe.find_example(facts[0]) == probe.facts[3]


def test_facts_of_wordings_are_counted_by_wording() -> None:
    joined = join_wordings([make_probe({"a": 2})] * 2)
    assert (len(joined.facts), joined.read, joined.dropped) == (4, 2 * 5, {"too long": 2 * 3})


def test_a_fact_is_split_at_its_blank() -> None:
    middle, first = make_fact(prompt="In [MASK] , France."), make_fact(prompt="[MASK] is France's.")
    assert (middle.before, middle.after) == ("In", " , France.")
    assert (first.before, first.after) == ("", " is France's.")
    for prompt in ("No blank.", "[MASK] and [MASK]."):
        with pytest.raises(UsageError, match="exactly once"):
            make_fact(prompt=prompt)


def test_chance_is_the_mean_over_facts_and_missing_for_free_answers() -> None:
    assert compute_chance([2, 4, 2]) == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
    assert compute_chance([2, None]) is None
    assert compute_chance([]) is None


def test_the_majority_is_the_most_frequent_object_of_each_relation() -> None:
    facts = [make_fact(0), make_fact(1, candidates=CITIES), *(make_fact(i, "language") for i in (2, 3))]
    assert compute_majority(facts, find_most_frequent(facts), "micro") == 1
    more = [*facts, make_fact(4, obj_label="Rome")]
    assert compute_majority(more, find_most_frequent(more), "micro") == 4 / 5
    # Of two relations, the majority is right in 2 of 3 and in 2 of 2.
    assert compute_majority(more, find_most_frequent(more), "macro") == pytest.approx((2 / 3 + 1) / 2)
    assert compute_majority([], {}, "macro") is None


def test_the_majority_is_right_on_no_relation_of_one_fact() -> None:
    alone = Probe("p", "p", tuple(make_fact(i, relation) for i, relation in enumerate(CITIES)))
    # In two wordings, it is still one fact.
    for probe in (alone, join_wordings([alone] * 2), join_wordings([alone] * 2).sample(3)):
        assert compute_majority(probe.facts, probe.most_frequent, "micro") == 0
    pair = [make_fact(i, "language", obj_label=CITIES[i]) for i in (0, 1)]
    facts = [*alone.facts, *pair]
    assert compute_majority(facts, find_most_frequent(facts), "micro") == 1 / len(facts)


@real_data
def test_the_majority_of_lama_is_a_mean_over_relations_as_its_score_is() -> None:
    """Petroni et al. 2019, table 2: Freq of T-REx is 22.03 % (their vocabulary leaves a few facts fewer)."""
    (probe,) = open_all(["lama:trex"], Options(data=DATA))
    assert isinstance(probe, Probe)
    assert compute_majority(probe.facts, probe.most_frequent, probe.average) == pytest.approx(0.2203, abs=3e-3)
    assert compute_majority(probe.facts, probe.most_frequent, "micro") == pytest.approx(0.2192, abs=5e-4)


def test_the_majority_of_a_sample_is_that_of_all_facts() -> None:
    probe = Probe("p", "p", tuple(make_fact(i, obj_label=CITIES[i % 4], candidates=CITIES) for i in range(40)))
    for sample in (probe.sample(1, seed) for seed in range(8)):
        (only,) = sample.facts
        assert compute_majority(sample.facts, sample.most_frequent, sample.average) == (only.obj_label == "Paris")
    assert compute_majority(probe.facts, probe.most_frequent, probe.average) == 1 / 4
