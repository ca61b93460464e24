"""Report cards made from answers: verdicts, figures, warnings, and models that are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compressknow.base.errors import CompressknowError
from compressknow.comparison.paired import rank_models
from compressknow.comparison.records import Counts
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.records import ProbeEntry, Speed
from compressknow.pages.card.make import complete_warnings, make_card, read_model_facts
from compressknow.pages.records import Card
from tests.pages.answering import (
    COMPRESSED_HASH,
    ORIGINAL_HASH,
    make_answer,
    make_answers,
    make_entry,
    make_model,
    make_rows,
    make_runs,
)


def compare_counts(*counts: int, compressed_model: dict[str, Any] | None = None, **changes: Any) -> Card:
    original, compressed = make_runs(make_rows(*counts, **changes), **(compressed_model or {}))
    return make_card(original, [compressed])


def compare_rows(rows: Sequence[list[Answer]], probes: dict[str, ProbeEntry]) -> Card:
    compressed = make_answers(rows[1], make_model(sha256=COMPRESSED_HASH), probes)
    return make_card(make_answers(rows[0], probes=probes), [compressed])


def join_warnings(card: Card) -> str:
    return "\n".join((*card.warnings, *card.comparisons[0].warnings))


class TestVerdict:
    def test_loss_that_chance_does_not_explain(self) -> None:
        assert compare_counts(1523, 78, 12, 400).verdict == (
            "Keeps 1,523 of 1,601 facts that tiny-bert knew (95.1 %, interval 94.0 to 96.1 %): it forgot 78 and gained "
            "12, a net loss that chance does not explain (p < 0.001). A net loss under 1.2 % of these 1,601 may "
            "go unseen."
        )

    def test_loss_that_chance_could_explain(self) -> None:
        assert compare_counts(195, 5, 3, 100).verdict.endswith(
            "it forgot 5 and gained 3, a net loss that chance could explain (p = 0.73). A net loss under 6.1 % of "
            "these 200 may go unseen; 1,100 known facts would show 2 %."
        )

    def test_gain(self) -> None:
        verdict = compare_counts(100, 1, 12, 100).verdict
        assert "it forgot 1 and gained 12, a net gain that chance does not explain" in verdict

    def test_equal_gain_and_loss(self) -> None:
        verdict = compare_counts(100, 50, 50, 100).verdict
        assert "it forgot 50 and gained 50, which evens out. A net loss under 22 % of" in verdict

    def test_nothing_lost(self) -> None:
        assert compare_counts(200).verdict == (
            "Keeps 200 of 200 facts that tiny-bert knew (100 %, interval 98.1 to 100 %): it forgot none and gained "
            "none. 400 known facts would show a net loss of 2 %."
        )

    def test_everything_lost(self) -> None:
        assert compare_counts(0, 200).verdict == (
            "Keeps 0 of 200 facts that tiny-bert knew (0 %, interval 0 to 1.9 %): it forgot 200 and gained none, a net "
            "loss that chance does not explain (p < 0.001). A net loss under 3.9 % of these 200 may go unseen; 400 "
            "known facts would show 2 %."
        )

    def test_almost_everything_is_not_rounded_to_100_percent(self) -> None:
        assert "(> 99.9 %, interval 99.7 to > 99.9 %)" in compare_counts(1999, 1).verdict

    def test_original_that_knew_nothing(self) -> None:
        assert compare_counts(0, 0, 3, 97).verdict == (
            "tiny-bert knew none of 100 facts, so there is nothing to keep; the compressed model answers 3 right."
        )

    def test_no_facts(self) -> None:
        assert compare_counts().verdict.startswith("The models were not evaluated on any common fact")

    def test_too_few_facts_to_show_a_loss(self) -> None:
        assert compare_counts(3, 1).verdict.endswith(
            "(p = 1). So few facts cannot show a net loss; 400 known ones would show 2 %."
        )

    def test_one_fact_is_singular(self) -> None:
        assert compare_counts(1).verdict.startswith("Keeps 1 of 1 fact that tiny-bert knew (100 %")
        assert compare_counts(0, 0, 0, 1).verdict == "tiny-bert knew none of 1 fact, so there is nothing to keep."
        probes = {"atlas": make_entry(facts=1, asked=1)}
        card = compare_rows(make_rows(1), probes)
        assert "; 1 fact read, " in " ".join(card.method)

    def test_two_models_whose_difference_chance_does_not_explain(self) -> None:
        original, good = make_runs(make_rows(95, 5))
        _, bad = make_runs(make_rows(20, 80))
        bad = make_answers(bad.answers, make_model(sha256="c" * 64, setup="FLP L1-unstructured 40%"))
        assert make_card(original, [bad, good]).verdict == (
            "Overall_GQ keeps more of what tiny-bert knew (95 of 100, 95.0 %) than FLP L1-unstructured 40% (20 of 100, "
            "20.0 %), a difference that chance does not explain."
        )

    def test_two_models_whose_difference_chance_could_explain(self) -> None:
        original, good = make_runs(make_rows(95, 5))
        near = make_answers(make_rows(94, 6)[1], make_model(sha256="c" * 64, setup="Att_GP 94%"))
        assert make_card(original, [near, good]).verdict == (
            "Overall_GQ keeps more of what tiny-bert knew (95 of 100, 95.0 %) than Att_GP 94% (94 of 100, 94.0 %), a "
            "difference that chance could explain."
        )

    def test_best_of_several_models_is_tested_against_all_others(self) -> None:
        original, good = make_runs(make_rows(95, 5))
        near, bad = (
            make_answers(make_rows(kept, 100 - kept)[1], make_model(sha256=hash * 64, setup=f"Att_GP {kept}%"))
            for kept, hash in ((94, "c"), (20, "d"))
        )
        verdict = make_card(original, [near, bad, good]).verdict
        assert "Of 3 compressed models, Overall_GQ keeps most" in verdict
        assert verdict.endswith("1 cannot be told apart from the best: Att_GP 94%.")

    def test_equally_good_models_are_told_apart_in_one_of_twenty_cards(self) -> None:
        random, wrong, relations = np.random.default_rng(4), 0, [f"r{n % 20}" for n in range(300)]
        known = [make_answer(n, True, relation=relation) for n, relation in enumerate(relations)]
        for _ in range(200):
            shares = random.beta(0.9 * 4, 0.1 * 4, (5, 20))
            right = random.random((5, 300)) < np.tile(shares, (1, 15))
            models = [[replace(a, correct=bool(r)) for a, r in zip(known, row, strict=True)] for row in right]
            ranks = rank_models(known, models, [None] * 5)
            wrong += len(max(ranks, key=lambda rank: rank.keeps).alike) < 4
        assert wrong / 200 <= 0.06

    def test_models_are_told_apart_by_relation_and_over_all_pairs(self) -> None:
        known = [make_answer(n, True, relation=f"r{n // 12}") for n in range(240)]

        def rank(*lost: Sequence[int]) -> list[tuple[int | None, bool, tuple[int, ...]]]:
            models = [[replace(a, correct=n not in each) for n, a in enumerate(known)] for each in lost]
            ranks = rank_models(known, models, [1] * len(models))
            return [(each.beaten_by, each.is_surely_beaten, each.alike) for each in ranks]

        # Twelve facts of one relation tell less than one fact of each of twelve.
        ranks = rank(range(12), range(0, 144, 12), ())
        assert ranks == [(2, False, (2, 1)), (2, True, (0,)), (None, False, (0,))]
        # p = 0.03 is significant for one pair, but not for one of three.
        few = range(0, 72, 12)
        assert rank(few, ()) == [(1, True, ()), (None, False, ())]
        assert rank(few, (), ())[0] == (1, False, (1, 2))
        # The model that keeps most loses seven facts of one relation, so only the second surely keeps more.
        assert rank(range(0, 240, 12), range(1, 8), range(144, 240, 12))[0] == (2, True, (1,))

    def test_models_evaluated_on_different_facts_are_not_ranked(self) -> None:
        more, probes = make_rows(50, 50, probe="bear"), {"atlas": make_entry(), "bear": make_entry()}
        (known, kept), model = make_rows(95, 5), make_model(sha256="c" * 64, setup="Att_GQ")
        _, of_one_probe = make_runs((known, kept))
        original = make_answers([*known, *more[0]], probes=probes)
        card = make_card(original, [of_one_probe, make_answers([*kept, *more[1]], model, probes)])
        assert card.verdict == "The 2 compressed models answered different facts: what each keeps cannot be compared."
        assert card.decision is None

    def test_several_models_that_keep_the_same(self) -> None:
        original, same = make_runs(make_rows(95, 5))
        assert make_card(original, [same, same]).verdict == (
            "Both compressed models keep 95.0 % of what tiny-bert knew."
        )
        original, same = make_runs(make_rows(neither=5))
        assert make_card(original, [same, same, same]).verdict.startswith("tiny-bert knew none of the facts")


class TestCard:
    def test_counts_of_all_probes_add_up(self) -> None:
        rows = [[*side, *(replace(row, probe="bear") for row in side)] for side in make_rows(8, 2, 1, 9)]
        probes = {"atlas": make_entry(), "bear": make_entry()}
        original = make_answers(rows[0], probes=probes)
        compressed = make_answers(rows[1], make_model(sha256=COMPRESSED_HASH), probes)
        (comparison,) = make_card(original, [compressed]).comparisons
        assert comparison.counts == Counts(16, 4, 2, 18)
        assert [probe.probe for probe in comparison.probes] == ["atlas", "bear"]
        assert len(comparison.lost) == 4
        assert comparison.grades[0].counts == comparison.counts

    def test_hidden_facts_are_not_in_the_card(self) -> None:
        original, compressed = make_runs(make_rows(5, 3, 2))
        (comparison,) = make_card(original, [compressed], show_facts=False).comparisons
        assert comparison.lost == comparison.gained == ()
        assert comparison.counts == Counts(5, 3, 2)

    def test_method_describes_probes_and_sampling(self) -> None:
        rows = make_rows(50, 10)
        probes = {"atlas": make_entry(facts=70, dropped={"no single word": 10}, limit=60, seed=3)}
        card = compare_rows(rows, probes)
        text = "\n".join(card.method)
        for phrase in (
            "mask",
            "protocol closed/1, one of 8 answers; 70 facts read, 10 left out (no single word: 10), 60 evaluated",
            "a sample of 60 with seed 3",
            "Wilson",
            "10,000 resamples, seed 0",
            "A+ from 99 %",
        ):
            assert phrase in text

    def test_tasks_are_scored_by_the_harness(self) -> None:
        rows = make_rows(
            5, probe="lm-eval:boolq", relation="boolq", subject="boolq", choices=2, first_ids=(), first_logp=()
        )
        probes = {"lm-eval:boolq": make_entry(reference=None, chance=0.5, majority=0.621)}
        card = compare_rows(rows, probes)
        assert card.comparisons[0].grades[0].subject == "boolq"
        assert card.comparisons[0].probes[0].movement is None
        assert "run by lm-eval" in card.method[0]


class TestWarnings:
    def test_no_warning_if_all_is_well(self) -> None:
        assert join_warnings(compare_counts(500, 20, 10, 100)) == ""

    def test_few_facts(self) -> None:
        assert "knew only 60 facts" in join_warnings(compare_counts(50, 10))

    def test_domains_of_few_facts(self) -> None:
        rows = [[*side, make_answer(999, True, subject="language")] for side in make_rows(200)]
        original, compressed = make_runs(rows)
        assert "fewer than 20 known facts say little: language (1)." in join_warnings(make_card(original, [compressed]))

    def test_original_no_better_than_guessing(self) -> None:
        warning = r"may know little of atlas: its accuracy \(15.0 %\) is not clearly above that of guessing \(12.5 %\)"
        assert re.search(warning, join_warnings(compare_counts(15, 0, 0, 85)))

    def test_original_no_better_than_the_most_frequent_answer(self) -> None:
        assert "always giving the most frequent answer (20.0 %)" in join_warnings(compare_counts(200, 0, 0, 800))

    def test_macro_average_is_compared_with_the_baseline(self) -> None:
        known = make_rows(80, 0, 0, 10)
        unknown = ([make_answer(number, False, relation="other") for number in range(90, 100)],) * 2
        rows = [first + second for first, second in zip(known, unknown, strict=True)]
        card = compare_rows(rows, {"atlas": make_entry(average="macro", majority=0.5)})
        text = r"its accuracy \(44.4 %\) is not clearly above that of always giving the most frequent answer \(50.0 %\)"
        assert re.search(text, join_warnings(card))

    def test_the_same_model_twice(self) -> None:
        original, _ = make_runs(make_rows(200))
        assert "same checkpoint" in join_warnings(make_card(original, [original]))

    def test_original_whose_weights_lie_on_a_grid(self) -> None:
        rows = make_rows(500, 20, 10, 100)
        grid = {"weights": 210, "of": 211, "values": 16}
        rounded = make_model(sha256="b" * 64, quantization="q4_1")
        card = make_card(make_answers(rows[0], make_model(grid=grid)), [make_answers(rows[1], rounded)])
        assert "in 210 of 211 matrices, 32 neighbours have at most 16 different values" in join_warnings(card)

    def test_models_in_the_wrong_order(self) -> None:
        original, compressed = make_runs(make_rows(60, 20, 10, 20), source={"name": "tiny-bert", "revision": None})
        assert "swapped" not in join_warnings(make_card(original, [compressed]))
        swapped = join_warnings(make_card(compressed, [original]))
        assert "look swapped: tiny-bert-int8, given as the original, was made from tiny-bert" in swapped

    def test_models_in_the_wrong_order_are_recognized_by_hash(self) -> None:
        made_from = {"name": "before", "revision": None, "sha256": ORIGINAL_HASH}
        original, compressed = make_runs(make_rows(60, 20, 10, 20), source=made_from)
        assert "swapped" not in join_warnings(make_card(original, [compressed]))
        assert "look swapped: tiny-bert-int8" in join_warnings(make_card(compressed, [original]))

    def test_nothing_in_scope(self) -> None:
        groups = {"attention": {"parameters": 5, "pruned": 0, "quantized": 0}}
        card = compare_counts(200, compressed_model={"groups": groups})
        assert "Nothing in this model was in scope" in join_warnings(card)
        groups["attention"]["quantized"] = 5
        assert join_warnings(compare_counts(200, compressed_model={"groups": groups})) == ""

    def test_int8_paper_depends_on_batches(self) -> None:
        recipe = {"module_map": "structural", "steps": [{"quantize": "int8-paper"}]}
        assert "int8-paper" in join_warnings(compare_counts(200, compressed_model={"recipe": recipe}))

    def test_different_dtypes_without_quantization(self) -> None:
        assert "float32 and bfloat16" in join_warnings(compare_counts(200, compressed_model={"dtype": "bfloat16"}))
        quantized = {"dtype": "I8", "quantization": "compressed-tensors"}
        assert join_warnings(compare_counts(200, compressed_model=quantized)) == ""

    def test_different_devices_and_versions(self) -> None:
        rows = make_rows(200)
        speed = Speed("cpu", facts_per_second=10.0, peak_bytes=None)
        original = make_answers(rows[0], make_model(speed=speed))
        faster = make_model(sha256="b" * 64, speed=replace(speed, device="cuda"))
        compressed = make_answers(rows[1], faster, versions={"compressknow": "0.1.0", "torch": "2.8.0"})
        text = join_warnings(make_card(original, [compressed]))
        assert "different devices (cpu and cuda)" in text
        assert "torch 2.9.0 and 2.8.0" in text

    def test_distributions_over_different_tokens(self) -> None:
        rows = make_rows(200)
        compressed = make_answers(rows[1], make_model(sha256="b" * 64), {"atlas": make_entry(reference="b" * 64)})
        card = make_card(make_answers(rows[0]), [compressed])
        assert "How far distributions moved on atlas was not measured" in join_warnings(card)

    def test_probe_that_only_the_original_has(self) -> None:
        rows = make_rows(200)
        original = make_answers(rows[0], probes={"atlas": make_entry(), "bear": make_entry()})
        card = make_card(original, [make_answers(rows[1], make_model(sha256="b" * 64))])
        assert "only the original was evaluated on them: bear" in join_warnings(card)

    def test_most_facts_dropped(self) -> None:
        rows = make_rows(200)
        probes = {"atlas": make_entry(facts=1000, dropped={"several tokens": 700, "no template": 100})}
        text = join_warnings(compare_rows(rows, probes))
        assert "80.0 % of the facts of atlas were dropped, mostly for this reason: several tokens." in text

    def test_model_with_nan(self) -> None:
        before, after = make_rows(200)
        after[:3] = [replace(row, logp_gold=math.nan) for row in after[:3]]
        original, compressed = make_runs((before, after))
        card = make_card(original, [compressed])
        assert "The compressed model produces NaN for 3 facts of atlas" in join_warnings(card)

    def test_warning_common_to_all_models_is_shown_once(self) -> None:
        original, first = make_runs(make_rows(50, 5))
        second = make_answers(first.answers, make_model(sha256="c" * 64, dtype="bfloat16"))
        card = make_card(original, [first, second])
        assert len(card.warnings) == 1
        assert card.comparisons[0].warnings == ()
        assert len(card.comparisons[1].warnings) == 1

    def test_one_prompt_read_otherwise_is_singular(self) -> None:
        floor = {
            "n": 100,
            "changed": 0,
            "known": 50,
            "lost": 0,
            "gained": 0,
            "kl_mean": None,
            "computed_in": "llama.cpp b1",
        }
        rows = make_rows(200)
        runtime = {"name": "llama.cpp", "build": "b1", "types": {}}
        compressed = make_answers(rows[1], make_model(sha256=COMPRESSED_HASH, runtime=runtime))
        for split, said in ((1, "Of these prompts, 1 is split into"), (2, "Of these prompts, 2 are split into")):
            floors = {"llama.cpp b1": {**floor, "read_otherwise": split}}
            original = make_answers(rows[0], probes={"atlas": make_entry(runtime_noise_floors=floors)})
            assert said in join_warnings(make_card(original, [compressed]))

    def test_warning_on_the_size_of_a_model_is_not_given_to_the_others(self) -> None:
        original, small = make_runs(make_rows(190, 10))
        large = make_answers(small.answers, make_model(name="large", sha256="c" * 64, bytes=9_000_000))
        card = make_card(original, [small, large], within=5_000_000)
        assert [len(each.warnings) for each in card.comparisons] == [0, 0]
        assert [len(each.warnings) for each in complete_warnings(card).comparisons] == [0, 2]


class TestRefused:
    def test_different_families_and_vocabularies(self) -> None:
        rows = make_rows(5)
        for key, value in (("family", "causal"), ("vocabulary", 50257)):
            original = make_answers(rows[0], make_model(vocabulary=30522))
            compressed = {"sha256": "b" * 64, "vocabulary": 30522, key: value}
            with pytest.raises(CompressknowError, match=f"they differ in {key}"):
                make_card(original, [make_answers(rows[1], make_model(**compressed))])

    def test_no_probe_in_common(self) -> None:
        rows = make_rows(5)
        with pytest.raises(CompressknowError, match="not evaluated on any common probe"):
            make_card(make_answers(rows[0]), [make_answers(rows[1], probes={"bear": make_entry()})])

    def test_record_without_required_keys(self) -> None:
        with pytest.raises(CompressknowError, match=r"sha256, bytes"):
            read_model_facts(make_model(sha256=None, bytes=None))

    def test_optional_keys_may_be_missing(self) -> None:
        facts = read_model_facts(make_model())
        assert (facts.groups, facts.speed, facts.recipe) == ({}, None, None)
