"""Intervals and p-values over relations, on the page and in the JSON: with enough relations and with too few."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compressknow.comparison.intervals import (
    design_of_change,
    estimate_kept_by_cluster,
    estimate_proportion,
    find_unit,
    run_mcnemar,
    run_paired_test,
)
from compressknow.comparison.power import count_facts_to_show, find_smallest_loss
from compressknow.comparison.records import Counts, EarlyStop, Estimate
from compressknow.pages.card.make import make_card
from compressknow.pages.card.pages import render_markdown
from compressknow.pages.records import Card
from tests.pages.answering import make_answer, make_runs


def make_card_of(relations: int, early: EarlyStop | None = None) -> Card:
    """Return a card of 200 facts: the first 160 are known, and every seventh of these is lost."""
    cells = [(n < 160, n < 160 and n % 7 > 0) for n in range(200)]
    sides = [
        [make_answer(n, cell[side], relation=f"r{n % relations}") for n, cell in enumerate(cells)] for side in (0, 1)
    ]
    original, compressed = make_runs(sides)
    return make_card(original, [compressed], early=early)


def get_values(card: Card) -> dict[str, Any]:
    return card.to_dict()["compressed"][0]


def test_json_has_the_figures_of_the_statistics() -> None:
    values = get_values(make_card_of(10))
    probe = values["probes"]["atlas"]
    relations = [group.counts for group in make_card_of(10).comparisons[0].probes[0].by_relation]
    kept, total = estimate_kept_by_cluster(relations), sum(relations, Counts())
    simple = estimate_proportion(total.both, total.known_before)
    for figures in (values, probe):
        assert figures["clusters"] == 10
        assert figures["kept_cluster_interval"] == [kept.low, kept.high]
        assert figures["kept_interval"] == [simple.low, simple.high]
        assert figures["smallest_detectable_loss"] == find_smallest_loss(total, design_of_change(relations))
        assert figures["known_facts_for_2_points"] == count_facts_to_show(total, design=design_of_change(relations))
        assert (figures["p"], figures["p_by"]) == (run_paired_test(relations), find_unit(relations))
        assert figures["mcnemar_p"] == run_mcnemar(total)


def test_verdict_has_the_interval_over_relations_and_the_page_has_both() -> None:
    card = make_card_of(10)
    text = render_markdown(card)
    kept = card.comparisons[0].kept
    assert kept == card.comparisons[0].certainty.kept
    assert f"interval {100 * kept.low:.1f} to {100 * kept.high:.1f} %" in card.verdict
    assert "Knowledge kept, simple interval" in text
    assert "Knowledge kept, interval over relations" in text
    assert "no clusters" not in text


def test_verdict_names_the_choice_of_relations_if_a_few_lost_everything() -> None:
    """Two of 12 relations lost all of their 10 facts, which chance among facts does not explain."""
    lost = [n % 12 < 2 for n in range(120)]
    rows = [[make_answer(n, not (side and lost[n]), relation=f"r{n % 12}") for n in range(120)] for side in (0, 1)]
    original, compressed = make_runs(rows)
    card = make_card(original, [compressed])
    assert run_mcnemar(card.comparisons[0].counts) < 0.001
    assert "forgot 20 and gained none, a net loss that the choice of relations could explain (p = 0.5)." in card.verdict


@pytest.mark.parametrize(
    ("relations", "sentence"),
    [
        (1, "All known facts belong to one relation, so there is no interval over relations."),
        (3, "The known facts belong to 3 relations: too few for an interval over these."),
        (200, "No two known facts count as related: an interval over relations would be the simple one."),
    ],
)
def test_page_says_why_there_is_no_interval_over_relations(relations: int, sentence: str) -> None:
    card = make_card_of(relations)
    assert sentence in render_markdown(card)
    assert "over relations" not in card.verdict
    assert get_values(card)["kept_cluster_interval"] is None


def test_warning_if_too_few_relations_have_known_facts() -> None:
    cells = [(n % 8 < 3, n % 8 in (1, 2)) for n in range(400)]
    sides = [[make_answer(n, cell[side], relation=f"r{n % 8}") for n, cell in enumerate(cells)] for side in (0, 1)]
    original, compressed = make_runs(sides)
    (comparison,) = make_card(original, [compressed]).comparisons
    assert comparison.certainty.unit == "relation"
    (warning,) = comparison.warnings
    assert warning.startswith("The original knew facts of only 3 relations of atlas")
    assert "the interval of what is kept treats facts as independent" in warning
    (warning,) = make_card_of(3).comparisons[0].warnings
    assert "intervals and p-values treat facts as independent" in warning
    assert not make_card_of(5).comparisons[0].warnings


def test_all_formats_show_a_gate_that_stopped_early() -> None:
    stop = EarlyStop(0.8, 0.05, facts=180, known=150, of=4021, kept=Estimate(0.86, 0.81, 0.9), met=True)
    card = make_card_of(10, stop)
    sentence = "It took 180 of 4,021 facts in random order to know that at least 80 % of the knowledge is kept"
    assert sentence in card.verdict
    assert sentence in render_markdown(card)
    assert card.verdict.endswith("of 100 runs). The figures are of 200 facts: the last batch was finished.")
    assert make_card_of(10, replace(stop, facts=200)).verdict.endswith("of 100 runs).")
    assert get_values(card)["early"] == {
        **{"gate": 0.8, "met": True, "level": 0.05, "facts": 180, "known": 150, "of": 4021},
        **{"kept": 0.86, "kept_interval": [0.81, 0.9]},
    }
    assert any("only until it was clear whether 80 %" in warning for warning in card.comparisons[0].warnings)
    assert get_values(make_card_of(10))["early"] is None
