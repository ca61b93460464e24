"""Gates: which models meet them, what pages and CI show of them, and which model is recommended."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from compressknow.base.errors import GateNotMet, GateUndecided, UsageError
from compressknow.comparison.intervals import estimate_proportion
from compressknow.evaluate.answers import Answer, Answers
from compressknow.evaluate.gather import check_names
from compressknow.pages.card.gate import (
    check_gates,
    hold_to_gates,
    parse_gates,
    render_job_summary,
    render_junit,
)
from compressknow.pages.card.make import make_card
from compressknow.pages.card.pages import render_html, render_markdown
from compressknow.pages.records import Card, Gate
from tests.pages.answering import make_answer, make_answers, make_entry, make_model, make_rows, make_runs
from tests.pages.card.test_make import compare_counts


def add_gates(card: Card, *gates: Any, strict: bool = False) -> Card:
    return replace(card, gates=parse_gates(gates, strict=strict))


def check(card: Card, *gates: Any, strict: bool = False) -> None:
    hold_to_gates(card, add_gates(card, *gates, strict=strict))


class TestGate:
    def test_share_equal_to_the_gate_meets_it(self) -> None:
        check(compare_counts(95, 5), 0.95)
        check(compare_counts(949, 51), "94.9%")

    def test_share_just_below_the_gate_misses_it(self) -> None:
        with pytest.raises(GateNotMet, match=r"Less than 95 % .*_GQ keeps 18,999 of 20,000 \(94\.99 %\)") as caught:
            check(compare_counts(18_999, 1001), 0.95)
        # No report may have been written.
        assert str(caught.value.hint).startswith("A report (-o report.html) lists the lost facts and the domains;")

    def test_every_model_must_meet_the_gate(self) -> None:
        original, good = make_runs(make_rows(95, 5))
        bad = make_answers(make_rows(20, 80)[1], make_model(sha256="c" * 64, setup="Att_GP 60%"))
        with pytest.raises(GateNotMet, match=r"is kept: Att_GP 60% keeps 20 of 100"):
            check(make_card(original, [good, bad]), 0.9)

    def test_original_that_knows_nothing_misses_the_gate(self) -> None:
        with pytest.raises(GateNotMet, match=r"^It cannot be judged whether 0 % .* knew none of 10 facts,") as caught:
            check(compare_counts(0, 0, 0, 10), 0)
        assert caught.value.exit_code == 3
        with pytest.raises(GateNotMet, match=r"knew none of 1 fact, so Overall_GQ has none to keep\.\nChoose facts"):
            check(compare_counts(0, 0, 0, 1), 0)

    def test_strict_gate_is_decided_by_the_whole_interval(self) -> None:
        check(compare_counts(950, 50), 0.9, strict=True)
        with pytest.raises(GateNotMet, match="Less than 99 %"):
            check(compare_counts(950, 50), 0.99, strict=True)

    def test_strict_gate_is_met_if_the_interval_begins_at_it(self) -> None:
        card = compare_counts(950, 50)
        check(card, card.comparisons[0].kept.low, strict=True)

    def test_strict_gate_of_all_knowledge_is_never_certain_to_be_missed_if_all_is_kept(self) -> None:
        with pytest.raises(GateUndecided):
            check(compare_counts(100, 0), 1, strict=True)

    def test_gate_of_a_relation_is_over_all_probes(self) -> None:
        (comparison,) = compare_counts(90, 10).comparisons
        (gate,) = parse_gates("relation=0.9")
        counts, _ = gate.measure_kept(replace(comparison, probes=comparison.probes * 2))
        assert (counts.both, counts.lost) == (180, 20)

    @pytest.mark.parametrize("fail_under", [0.9, 0.95])
    def test_strict_gate_within_the_interval_is_undecided(self, fail_under: float) -> None:
        with pytest.raises(GateUndecided, match=r"is undecided whether 9.* keeps 92 of 100") as caught:
            check(compare_counts(92, 8), fail_under, strict=True)
        assert caught.value.exit_code == 4
        assert re.search("about [0-9,]+ that the original knows would decide it", str(caught.value))

    def test_more_facts_are_not_suggested_if_they_would_not_decide(self) -> None:
        original, compressed = make_runs(make_rows(95, 5))
        card = make_card(original, [compressed], gates=parse_gates(0.95, strict=True))
        assert "for more facts of these probes to decide soon" in card.comparisons[0].next
        with pytest.raises(GateUndecided, match="More of these facts would not soon decide it: choose other probes"):
            hold_to_gates(card, card)

    def test_interval_just_below_a_strict_gate_is_not_rounded_to_it(self) -> None:
        # It begins at 95.056 %.
        card = compare_counts(964, 36)
        with pytest.raises(GateUndecided, match=r"\(95\.06 to 97\.4 %\)"):
            check(card, 0.951, strict=True)
        summary = render_job_summary(add_gates(card, 0.951, strict=True))
        assert "| 964 of 1,000, 96.4 % (95.06 to 97.4 %) | undecided |" in summary
        assert "(95.1 to 97.4 %) | met |" in render_job_summary(add_gates(card, 0.95, strict=True))

    def test_strict_gate_within_the_interval_over_relations_is_undecided(self) -> None:
        before, after = make_rows(950, 50)
        # All lost facts belong to two of twelve relations.
        relations = [f"relation-{number % 10 if number < 950 else 10 + number % 2}" for number in range(1000)]
        rows = [
            [replace(row, relation=relation) for row, relation in zip(side, relations, strict=True)]
            for side in (before, after)
        ]
        original, compressed = make_runs(rows)
        card = make_card(original, [compressed])
        assert estimate_proportion(950, 1000).low > 0.93 > card.comparisons[0].kept.low
        check(card, 0.93)
        with pytest.raises(GateUndecided, match="keeps 950 of 1,000"):
            check(card, 0.93, strict=True)

    def test_missed_strict_gate_takes_precedence_over_an_undecided_one(self) -> None:
        original, undecided = make_runs(make_rows(95, 5))
        bad = make_answers(make_rows(20, 80)[1], make_model(sha256="c" * 64, setup="Att_GP 60%"))
        with pytest.raises(GateNotMet):
            check(make_card(original, [undecided, bad]), 0.93, strict=True)

    def test_strict_needs_a_gate_below_100_percent(self) -> None:
        with pytest.raises(UsageError, match="--strict needs a gate"):
            check_gates((), strict=True)
        # No interval is entirely at 100 %, even for an identical model.
        with pytest.raises(UsageError, match="--strict with a gate of 100 % is never met"):
            check_gates(parse_gates(["0.9", "science=100%"]), strict=True)
        check_gates(parse_gates(1))

    def test_percent_instead_of_a_share_is_refused(self) -> None:
        with pytest.raises(UsageError, match="between 0 and 1: 95"):
            check(compare_counts(5), 95)

    def test_gate_on_a_domain(self) -> None:
        original, compressed = make_runs(add_science(make_rows(95, 5, subject="arts")))
        card = make_card(original, [compressed])
        check(card, 0.9, "arts=95%")
        with pytest.raises(GateNotMet, match=r"Less than 85 % of science is kept: Overall_GQ keeps 6 of 10 of science"):
            check(card, 0.9, "science=0.85")
        with pytest.raises(GateNotMet, match=r"Less than what --fail-under asks is kept: .*; .*science"):
            check(card, 0.99, "science=0.85")
        with pytest.raises(GateUndecided, match="whether 65 % of science is kept"):
            check(card, "science=0.65", strict=True)
        with pytest.raises(GateUndecided, match=r"keeps 101 of 110, .*; of science, Overall_GQ keeps 6 of 10, 60\.0 %"):
            check(card, 0.9, "science=0.65", strict=True)
        with pytest.raises(
            UsageError, match=r"no facts have the domain or relation sciences(.|\n)*Did you mean science"
        ):
            check_names(original.answers, ["sciences"])
        check_names(original.answers, [None, "science", original.answers[0].relation])

    def test_unknown_name_is_told_how_many_names_are_not_listed(self) -> None:
        of_all = [make_answer(number, True, relation=f"P{number}") for number in range(41)]
        for facts, end in ((of_all, r"P5, P6 and 34 more\."), (of_all[:7], r"P5, P6\.")):
            with pytest.raises(UsageError, match=rf"Choose from geography, P0, .*, {end}"):
                check_names(facts, ["nosuch"])

    @pytest.mark.parametrize("gate", ["science=", "95", "many", "science=often", -0.1])
    def test_malformed_gate_is_refused(self, gate: Any) -> None:
        with pytest.raises(UsageError, match="must be between 0 and 1"):
            parse_gates(gate)

    def test_duplicate_gate_is_refused(self) -> None:
        with pytest.raises(UsageError, match="given twice for science"):
            parse_gates(["science=0.9", "science=0.8"])

    @pytest.mark.parametrize("gates", [["science=0.9"], [0.9, "science=0.9"]])
    def test_early_needs_a_single_gate_on_all_facts(self, gates: list[Any]) -> None:
        with pytest.raises(UsageError, match="--early decides a single gate, on all facts"):
            check_gates(parse_gates(gates), early=True)


def add_science(rows: Iterable[list[Answer]]) -> list[list[Answer]]:
    """Add ten facts of science that the original knows, of which six are kept."""
    science = make_rows(6, 4, subject="science", relation="boils")
    renamed = ([replace(row, fact_id=f"science-{row.fact_id}") for row in side] for side in science)
    return [[*a, *b] for a, b in zip(rows, renamed, strict=True)]


class TestPages:
    def test_page_shows_whether_each_gate_is_met(self) -> None:
        original, compressed = make_runs(add_science(make_rows(95, 5)))
        card = make_card(original, [compressed], gates=parse_gates([0.8, "science=0.85"]))
        text = render_markdown(card)
        assert "| at least 80 % | 101 of 110, 91.8 % (85.2 to 95.6 %) | met |" in text
        assert "| at least 85 % of science | 6 of 10, 60.0 % (31.3 to 83.2 %) | not met |" in text
        page = render_html(card)
        assert "<td>met</td>" in page
        assert '<td class="unmet">not met</td>' in page
        assert "Gates" not in render_markdown(make_card(original, [compressed]))
        assert card.to_dict()["gates"] == [
            {"of": None, "least": 0.8, "strict": False, "met": [True]},
            {"of": "science", "least": 0.85, "strict": False, "met": [False]},
        ]

    def test_share_just_below_the_gate_is_nowhere_rounded_to_it(self) -> None:
        # 94.96 % and 89.96 %
        original, better = make_runs(make_rows(2374, 126))
        worse = make_answers(make_rows(2249, 251)[1], make_model(sha256="c" * 64, setup="Att_GQ"))

        def report(*compressed: Answers, least: float) -> tuple[Card, str]:
            card = make_card(original, compressed, gates=parse_gates(least))
            return card, render_html(card).replace("\N{NO-BREAK SPACE}", " ")

        card, page = report(better, least=0.95)
        assert ">94.96 % of its knowledge kept</h1>" in page
        assert "that tiny-bert knew (94.96 %, interval " in card.verdict
        card, page = report(better, worse, least=0.9)
        assert ">2 compressed models keep 89.96 to 95.0 % of the knowledge</h1>" in page
        assert "Att_GQ (2,249 of 2,500, 89.96 %)" in card.verdict
        assert "<td>89.96 % (88.7 to 91.1 %)</td>" in page
        assert "<span>89.96 % kept, 4.0 MB</span>" in page
        card, _ = report(worse, worse, least=0.9)
        assert card.verdict == "Both compressed models keep 89.96 % of what tiny-bert knew."
        assert card.decision is not None
        assert card.decision.reason.endswith(" keeps most, 89.96 % (88.7 to 91.1 %).")

    def test_interval_just_below_a_strict_gate_is_not_rounded_to_it_in_the_verdict(self) -> None:
        original, compressed = make_runs(make_rows(2279, 221))
        card = make_card(original, [compressed], gates=parse_gates(0.9, strict=True))
        assert "(91.2 %, interval 89.98 to 92.2 %)" in card.verdict

    def test_gate_is_a_column_of_the_table_of_models(self) -> None:
        gates = parse_gates([0.9, "geography=0.8"])
        text = render_markdown(make_card_of_several(195, 170, sizes=(2, 1), gates=gates))
        header, _, _, *rows = (line.split(" | ") for line in text.splitlines() if line.startswith("| "))
        columns = [header.index(f"Keeps at least {gate}") for gate in ("90 %", "80 % of geography")]
        assert [[row[column] for column in columns] for row in rows[:2]] == [["met", "met"], ["not met", "met"]]

    def test_advice_follows_gates_on_domains(self) -> None:
        original, compressed = make_runs(add_science(make_rows(995, 5)))
        assert "deploy" in make_card(original, [compressed]).comparisons[0].next
        (comparison,) = make_card(original, [compressed], gates=parse_gates(["science=0.85"])).comparisons
        assert comparison.next == "Next: compress less, or in another way: less than 85 % of science is kept."
        (comparison,) = make_card(original, [compressed], gates=parse_gates([0.995, "science=0.85"])).comparisons
        assert "less than what --fail-under asks is kept" in comparison.next
        (comparison,) = make_card(original, [compressed], gates=parse_gates(["science=0.65"], strict=True)).comparisons
        assert comparison.next == "Next: evaluate more facts: these do not show whether 65 % of science is kept."
        (comparison,) = make_card(original, [compressed], gates=parse_gates(["science=0.5"], strict=True)).comparisons
        assert "deploy" not in comparison.next
        (comparison,) = make_card(original, [compressed], gates=parse_gates(["science=0.2"], strict=True)).comparisons
        assert "deploy" in comparison.next


class TestMachineReadableOutput:
    def test_junit_has_a_test_case_per_gate(self) -> None:
        original, compressed = make_runs(add_science(make_rows(95, 5)))
        card = add_gates(make_card(original, [compressed]), 0.8, "science=0.65", strict=True)
        suites = ElementTree.fromstring(render_junit(card).encode())
        (suite,) = suites
        assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("Overall_GQ", "2", "1")
        met, undecided = suite.findall("testcase")
        assert (met.get("name"), met.find("failure")) == ("keeps at least 80 %", None)
        failure = undecided.find("failure")
        assert failure is not None
        assert failure.get("type") == "GateUndecided"
        assert str(failure.get("message")).startswith("6 of 10, 60.0 %")

    def test_job_summary_is_short_and_escapes_quoted_text(self) -> None:
        original, compressed = make_runs(make_rows(60, 40, prompt="<b>[x](http://y)|"))
        card = replace(make_card(original, [compressed]), versions={"compressknow": "<b>[x](http://y)|"})
        summary = render_job_summary(add_gates(card, 0.9))
        assert len(summary.splitlines()) <= 22
        assert "| at least 90 % | 60 of 100, 60.0 % (50.2 to 69.1 %) | not met |" in summary
        assert "| model | size (original 4.0 MB) | gate |" in summary
        assert "| 18,999 of 20,000, 94.99 % (94.7 to 95.3 %) | not met |" in render_job_summary(
            add_gates(compare_counts(18_999, 1001), 0.95)
        )
        assert "| 1,900 of 2,000, 95.0 % (" in render_job_summary(add_gates(compare_counts(1900, 100), 0.9))
        assert "<b>" not in summary
        assert "[x](http" not in summary
        silent = make_card(
            original, [replace(compressed, answers=tuple(replace(a, predicted="") for a in compressed.answers))]
        )
        assert "(Paris, now (nothing))" in render_job_summary(silent)
        hidden = render_job_summary(make_card(original, [compressed], show_facts=False))
        assert "Forgotten" not in hidden

    def test_job_summary_of_many_models_fits_into_a_comment(self) -> None:
        card = make_card_of_several(150, 50, sizes=(1, 1), gates=parse_gates(0.5))
        met, missed = card.comparisons
        card = replace(card, comparisons=(met,) * 101 + (missed,) * 49)
        summary = render_job_summary(card)
        rows = [line for line in summary.splitlines() if line.endswith("met |")]
        assert (len(rows), sum(row.endswith("| not met |") for row in rows)) == (100, 49)
        assert "The report lists 50 more." in summary
        assert len(summary) < 65_536
        few = replace(card, comparisons=card.comparisons[:100])
        assert "The report lists" not in render_job_summary(few)


def make_card_of_several(*kept: int, sizes: tuple[int, ...], **options: Any) -> Card:
    """Return a card of models of these sizes that keep these numbers of 200 facts."""
    compressed = [
        make_answers(
            make_rows(number, 200 - number)[1],
            make_model(name=f"m{number}", sha256=f"{index:064d}", setup=f"keeps {number}", bytes=size),
        )
        for index, (number, size) in enumerate(zip(kept, sizes, strict=True))
    ]
    return make_card(make_answers(make_rows(200)[0]), compressed, **options)


def make_runs_with_noise_floor(*, known: int, lost: int) -> tuple[Answers, list[Answers]]:
    """Return an original with this noise floor, and models that keep 199, 197 and 150 of its 200 facts."""
    floor = {"n": known, "changed": lost, "known": known, "lost": lost, "gained": 0}
    floor |= {"kl_mean": None, "computed_in": "bf16"}
    models = [
        make_answers(
            make_rows(kept, 200 - kept)[1], make_model(sha256=f"{kept:064d}", setup=f"keeps {kept}", bytes=1000 * kept)
        )
        for kept in (199, 197, 150)
    ]
    return make_answers(make_rows(200)[0], probes={"atlas": make_entry(noise_floor=floor)}), models


class TestDecision:
    def test_smallest_model_that_meets_the_gate_is_recommended(self) -> None:
        card = make_card_of_several(199, 195, 180, sizes=(300_000, 200_000, 100_000), gates=parse_gates(0.95))
        assert card.decision is not None
        assert card.decision.place == 1
        assert card.decision.reason == (
            "Take keeps 195 (200.0 kB): it is the smallest of 2 models that keep at least 95 %. It keeps 97.5 % "
            "(94.3 to 98.9 %). No test distinguishes it from keeps 199 (300.0 kB)."
        )
        recommended = card.to_dict()["recommended"]
        assert (recommended["model"], recommended["place"]) == ("2. keeps 195", 1)
        assert [each["beaten_by"] for each in recommended["standings"]] == [None, None, None]
        # Of equally small models, it is the one that keeps most.
        equal = make_card_of_several(195, 199, 180, sizes=(200_000,) * 3, gates=parse_gates(0.95)).decision
        assert equal is not None
        assert equal.place == 1

    def test_sizes_within_one_percent_are_equal(self) -> None:
        # int8-weights and int8 of one checkpoint: they are packed differently.
        better, worse = 220_257_648, 220_231_544
        card = make_card_of_several(199, 195, sizes=(better, worse), gates=parse_gates(0.95))
        assert card.decision is not None
        assert card.decision.reason.startswith(
            "Take keeps 199 (220.3 MB): it keeps most among the smallest (within 1 %) of 2 models that keep at least "
            "95 %. "
        )
        assert [each.beaten_by for each in card.decision.standings] == [None, 0]
        decision = make_card_of_several(199, 195, sizes=(better, worse)).decision
        assert decision is not None
        most = "keeps most, and of the models that no test distinguishes from it, none is more than 1 % smaller. "
        assert f"(220.3 MB): it {most}" in decision.reason
        # Of those that keep as much, the smaller is taken; a size more than 1 % above is larger.
        for kept, sizes, place in (
            ((199, 199), (better, worse), 1),
            ((199, 195), (101_000, 100_000), 0),
            ((199, 195), (101_001, 100_000), 1),
        ):
            decision = make_card_of_several(*kept, sizes=sizes, gates=parse_gates(0.95)).decision
            assert decision is not None
            assert decision.place == place

    def test_strict_gate_must_be_met_by_the_interval(self) -> None:
        card = make_card_of_several(199, 195, sizes=(300_000, 200_000), gates=parse_gates(0.95, strict=True))
        assert card.decision is not None
        reason = "Take keeps 199 (300.0 kB): it is the only model that surely keeps at least 95 %"
        assert card.decision.reason.startswith(reason)
        none = make_card_of_several(195, 180, sizes=(200_000, 100_000), gates=parse_gates(0.95, strict=True)).decision
        assert none is not None
        assert none.reason.startswith("No model surely keeps at least 95 %: none is recommended. keeps 195 keeps")

    def test_no_model_is_recommended_if_all_miss_the_gate(self) -> None:
        card = make_card_of_several(150, 140, sizes=(300_000, 200_000), gates=parse_gates(0.95))
        assert card.decision is not None
        assert card.decision.place is None
        assert card.decision.reason.startswith("No model keeps at least 95 %: none is recommended. keeps 150 keeps")

    def test_recommended_model_meets_every_gate(self) -> None:
        original, small = make_runs(add_science(make_rows(95, 5)))
        large = make_answers(original.answers, make_model(sha256="c" * 64, setup="Att_GQ", bytes=2_000_000))
        for gates, recommended in (([0.9], "Overall_GQ"), ([0.9, "science=0.9"], "Att_GQ")):
            decision = make_card(original, [small, large], gates=parse_gates(gates)).decision
            assert decision is not None
            assert decision.reason.startswith(f"Take {recommended} (")

    @pytest.mark.parametrize("gates", [(), parse_gates(0.5)])
    def test_no_model_is_recommended_if_the_original_is_at_chance(self, gates: tuple[Gate, ...]) -> None:
        before, after = make_rows(14, 1, 0, 85)
        others = [make_answers(side, make_model(sha256=f"{at:064d}")) for at, side in enumerate((after, before))]
        decision = make_card(make_answers(before), others, gates=gates).decision
        assert decision is not None
        assert (decision.place, decision.reason) == (
            None,
            "None is recommended. Evaluate more facts, or another probe (-p): the original itself may know little, so "
            "what is kept says little.",
        )

    @pytest.mark.parametrize("within", [200_000, 250_000])
    def test_recommended_model_fits_the_size_limit(self, within: int) -> None:
        card = make_card_of_several(199, 192, sizes=(300_000, 200_000), within=within)
        assert card.decision is not None
        assert (card.decision.place, f"of at most {within / 1000} kB" in card.decision.reason) == (1, True)
        none = make_card_of_several(199, 192, sizes=(300_000, 200_000), within=1000).decision
        assert none is not None
        assert none.reason.startswith("No model has at most 1.0 kB: none is recommended. The smallest, keeps 192, has")

    @pytest.mark.parametrize(
        ("within", "larger"),
        [
            (150_000, "m199 (300.0 kB) and m197 (200.0 kB)"),
            # The only model above the limit, and one exactly at it.
            (200_000, "m199 (300.0 kB)"),
        ],
    )
    def test_models_above_the_size_limit_are_named_in_one_warning(self, within: int, larger: str) -> None:
        models = {199: 300_000, 197: 200_000, 192: 100_000}
        (warning,) = make_card_of_several(*models, sizes=(*models.values(),), within=within).warnings
        assert warning == f"Larger than the {within / 1000:.1f} kB that a model may have: {larger}."

    def test_a_choice_among_few_facts_is_not_final_without_a_gate(self) -> None:
        original = make_answers(make_rows(8)[0])
        models = [
            make_answers(make_rows(kept, 8 - kept)[1], make_model(sha256=f"{kept:064d}", setup=f"m{kept}", bytes=kept))
            for kept in (6, 4)
        ]
        decision, gated = (make_card(original, models, gates=gates).decision for gates in ((), parse_gates(0.4)))
        assert decision is not None
        assert gated is not None
        assert decision.reason.startswith("Take m4")
        assert decision.reason.endswith("But the original knew only 8 facts: evaluate more before you decide.")
        assert "before you decide" not in gated.reason

    def test_sizes_that_read_alike_are_written_to_the_byte(self) -> None:
        card = make_card_of_several(199, 192, sizes=(31_000_000, 29_800_448), within=29_760_000)
        assert card.decision is not None
        assert card.decision.reason == (
            "No model has at most 29,760,000 bytes: none is recommended. The smallest, keeps 192, has 29,800,448 bytes."
        )
        *of_original, of_limit = card.warnings
        assert of_limit == (
            "Larger than the 29,760,000 bytes that a model may have: m199 (31.0 MB) and m192 (29,800,448 bytes)."
        )
        assert of_original[0] == "m199 is larger than tiny-bert (31.0 MB against 4.0 MB)."
        (warning,) = make_card_of_several(199, sizes=(4_041_000,)).warnings
        assert warning == "m199 is larger than tiny-bert (4,041,000 bytes against 4,000,000 bytes)."

    def test_the_only_model_may_exceed_the_size_limit(self) -> None:
        assert make_card_of_several(199, sizes=(300_000,), within=300_000).warnings == ()
        (warning,) = make_card_of_several(199, sizes=(300_000,), within=250_000).warnings
        assert warning == "Larger than the 250.0 kB that a model may have: m199 (300.0 kB)."

    def test_without_a_gate_rounding_is_the_threshold(self) -> None:
        before, models = make_runs_with_noise_floor(known=200, lost=2)
        decision = make_card(before, models).decision
        assert decision is not None
        floor = "rounding alone, which keeps 99.0 % (96.4 to 99.7 %)"
        assert f"it is the smallest of 2 models that the intervals do not distinguish from {floor}." in decision.reason
        worse = make_card(before, models[2:] + models[2:]).decision
        assert worse is not None
        assert f"none keeps as much as {floor}; it keeps most, and of the models that" in worse.reason

    @pytest.mark.parametrize(
        ("kept", "within", "reason"),
        [
            ((199, 198), None, "is the smallest of 2 models that no test distinguishes from keeps 199, which keeps"),
            ((198, 199), None, "keeps most, and of the models that no test distinguishes from it, none is smaller."),
            ((150, 199), None, "keeps most."),
            ((199, 198), 100_000, "keeps most among those of at most 100.0 kB."),
        ],
    )
    def test_without_a_threshold_the_reason_names_the_model_that_keeps_most(
        self, kept: tuple[int, ...], within: int | None, reason: str
    ) -> None:
        decision = make_card_of_several(*kept, sizes=(200_000, 100_000), within=within).decision
        assert decision is not None
        assert f"(100.0 kB): it {reason} " in decision.reason

    def test_one_lost_fact_is_accepted_if_rounding_lost_none(self) -> None:
        decision = make_card(*make_runs_with_noise_floor(known=60, lost=0)).decision
        assert decision is not None
        assert decision.place == 1
        assert "do not distinguish from rounding alone, which keeps 100 % (94.0 to 100 %)" in decision.reason

    def test_standings_say_which_model_beats_which_and_how_surely(self) -> None:
        decision = make_card_of_several(150, 199, 198, sizes=(300_000, 200_000, 250_000)).decision
        assert decision is not None
        worst, best, second = decision.standings
        assert (worst.beaten_by, worst.is_surely_beaten) == (1, True)
        assert (best.beaten_by, best.alike) == (None, (2,))
        assert (second.beaten_by, second.is_surely_beaten) == (1, False)
        # A model of the same size beats it, and a smaller one that keeps as many facts, but not one that is no better.
        for last, beaten in ((202_000, [1, None, None]), (202_001, [1, None, 1]), (198_019, [1, 2, None])):
            decision = make_card_of_several(150, 199, 199, sizes=(200_000, 200_000, last)).decision
            assert decision is not None
            assert [standing.beaten_by for standing in decision.standings] == beaten
        # Models that no test tells apart are in the order of what they keep.
        decision = make_card_of_several(197, 199, 198, sizes=(200_000, 200_000, 200_000)).decision
        assert decision is not None
        assert [standing.alike for standing in decision.standings] == [(1, 2), (2, 0), (1, 0)]

    def test_model_with_nan_is_not_recommended(self) -> None:
        known = make_answers(make_rows(200)[0])
        nan = [replace(each, logp_gold=math.nan) for each in make_rows(200)[1]]
        broken = make_answers(nan, make_model(sha256="1" * 64, setup="broken", bytes=1000))
        sound = make_answers(make_rows(199, 1)[1], make_model(sha256="2" * 64, setup="sound", bytes=2000))
        decision = make_card(known, [broken, sound]).decision
        assert decision is not None
        assert decision.place == 1

    def test_model_with_nan_is_not_named_as_the_smallest(self) -> None:
        nan = [replace(each, logp_gold=math.nan) for each in make_rows(200)[1]]
        broken = make_answers(nan, make_model(sha256="1" * 64, setup="broken", bytes=1000))
        sound = make_answers(make_rows(199, 1)[1], make_model(sha256="2" * 64, setup="sound", bytes=5000))
        decision = make_card(make_answers(make_rows(200)[0]), [broken, sound], within=2000).decision
        assert decision is not None
        assert decision.reason == (
            "No model without NaN has at most 2.0 kB: none is recommended. The smallest, sound, has 5.0 kB."
        )
