"""The advice of a report card: what to do next, and the commands for milder recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compressknow.base.errors import GateNotMet
from compressknow.cli.convert import convert
from compressknow.comparison.power import count_facts_to_decide
from compressknow.comparison.records import EarlyStop, Estimate
from compressknow.compress.recipe import Recipe, build_recipe, format_options
from compressknow.compress.steps import Calibration, DropBlocks, DropNeurons, Prune, Quantize, Where
from compressknow.evaluate.answers import Answer
from compressknow.pages.card.gate import hold_to_gates, parse_gates
from compressknow.pages.card.make import make_card
from compressknow.pages.card.pages import render_markdown
from compressknow.pages.card.verdict import ENOUGH, find_milder, write_advice
from compressknow.pages.records import Comparison
from tests.pages.answering import make_answer, make_answers, make_entry, make_model, make_rows, make_runs

ATTENTION, BOTH = Where(("attention",)), Where(("attention", "feed-forward"))
GROUPS = {
    "attention": {"relative_error": 0.02},
    "feed-forward": {"relative_error": 0.11},
    "final": {"relative_error": 0},
}


def compare(*cells: int, recipe: Recipe | None = None, **changes: Any) -> Comparison:
    return compare_rows(*make_rows(*cells, **changes), recipe=recipe and recipe.to_dict())


def compare_rows(before: list[Answer], after: list[Answer], recipe: dict[str, Any] | None = None) -> Comparison:
    original, compressed = make_runs((before, after), recipe=recipe, source={"name": "org/tiny-bert"})
    return make_card(original, [compressed]).comparisons[0]


def find_change(recipe: Recipe, groups: Any = GROUPS) -> str | None:
    milder = find_milder(recipe, groups)
    return milder and milder[0]


class TestAdvice:
    def test_deploy_if_the_whole_interval_is_above_the_threshold(self) -> None:
        assert compare(990, 10).next == "Next: deploy it, if 95 % is enough: the interval lies above."

    def test_more_facts_if_the_interval_spans_the_threshold(self) -> None:
        comparison = compare(92, 8)
        needed = count_facts_to_decide(comparison.counts, ENOUGH)
        assert needed > 100
        assert f"evaluate more facts: about {needed // 10 * 10 + 10} that the original knows" in comparison.next
        assert "it knew 100 of these." in comparison.next

    def test_more_facts_names_the_limit_or_asks_for_more_probes(self) -> None:
        rows = make_rows(92, 8, 0, 100)
        # It knows half of the facts, and 478 known ones are needed; a tenth more, in case it knows fewer of the others.
        for facts, advice in ((10_000, "(--limit 1100)"), (300, "(without --limit, and with more probes)")):
            probes = {"atlas": make_entry(limit=200, facts=facts)}
            card = make_card(
                make_answers(rows[0], probes=probes), [make_answers(rows[1], make_model(sha256="b" * 64), probes)]
            )
            assert advice in card.comparisons[0].next

    def test_no_number_of_facts_if_the_share_is_at_the_threshold(self) -> None:
        assert "too close to 95 % for more facts of these probes to decide soon" in compare(95, 5).next
        # It would take 41,000 facts.
        assert "too close to 95 % for more facts of these probes to decide soon" in compare(953, 47).next

    def test_more_relations_if_only_the_interval_over_relations_spans_the_threshold(self) -> None:
        # 20 lost facts: one of each of 20 relations, or ten of each of two.
        known = [make_answer(n, True, relation=f"r{n % 20}") for n in range(1000)]
        spread, concentrated = (
            [replace(answer, correct=n not in lost) for n, answer in enumerate(known)]
            for lost in (range(20), [n for n in range(1000) if n % 20 < 2][:20])
        )
        of_all, of_two = (compare_rows(known, rows) for rows in (spread, concentrated))
        assert of_all.counts == of_two.counts
        assert of_all.next.startswith("Next: deploy it")
        # More facts of these relations would not decide it: a further relation may lose all of its facts.
        assert of_two.next.startswith("Next: evaluate facts of more relations")
        assert "near 95 %" not in of_two.next

    def test_compress_less_if_the_whole_interval_is_below_the_threshold(self) -> None:
        recipe = Recipe((Prune(0.4, where=ATTENTION), Quantize("int8", ATTENTION)))
        assert compare(500, 500, recipe=recipe).next == (
            "Next: less than 95 % is kept; prune 20 % of the weights instead of 40 %: compressknow convert "
            "org/tiny-bert OUTPUT --scope attention --prune 0.2 --quantize int8"
        )

    def test_compress_less_without_a_recipe_suggests_no_command(self) -> None:
        assert compare(500, 500).next == "Next: compress less, or in another way: less than 95 % is kept."

    def test_final_layer_that_makes_a_file_larger_is_warned_of_and_left_out(self) -> None:
        overall = Where(("overall",))
        recipe = Recipe((Prune(0.5, where=overall), Quantize("int8", overall))).to_dict()
        sizes = {"attention": (4_000_000, 2_000_000), "final": (0, 2_500_000)}
        groups = {name: dict(zip(("bytes_before", "bytes_after"), each, strict=True)) for name, each in sizes.items()}
        tied = groups | {"final": {"bytes_before": 5_000_000, "bytes_after": 2_500_000}}
        original, compressed = make_runs(make_rows(500, 500), recipe=recipe, source={"name": "org/tiny-bert"})
        for of_model, is_larger in ((groups, True), (tied, False)):
            model = replace(compressed.record.model, groups=of_model, bytes=4_500_000 if is_larger else 4_001_000)
            card = make_card(original, [replace(compressed, record=replace(compressed.record, model=model))])
            advice = card.comparisons[0].next.partition("; ")[2]
            if is_larger:
                assert card.warnings == (
                    "tiny-bert-int8 is larger than tiny-bert (4.5 MB against 4.0 MB): its final layer no longer shares "
                    "its weight with the embedding. --scope blocks leaves it out.",
                )
                assert advice == (
                    "prune 25 % of the weights instead of 50 %, and leave the final layer as it is: compressknow "
                    "convert org/tiny-bert OUTPUT --prune 0.25 --quantize int8"
                )
            else:
                assert card.warnings == ()
                assert advice.endswith("OUTPUT --scope overall --prune 0.25 --quantize int8")

    def test_unreadable_recipe_suggests_no_command(self) -> None:
        comparison = compare(500, 500)
        unreadable = replace(comparison.model, recipe={"steps": [{"quantize": "int3-of-tomorrow"}]})
        assert write_advice(replace(comparison, model=unreadable)).startswith("Next: compress less, or in another way")

    def test_other_facts_if_the_original_knew_none(self) -> None:
        assert "choose facts that the original knows" in compare(0, 0, 0, 50).next

    def test_other_facts_if_the_original_is_no_better_than_guessing(self) -> None:
        rows = make_rows(4, 4, 5, 3)
        recipe = Recipe((Prune(0.5, where=ATTENTION),)).to_dict()
        for chance, advice in (
            (0.5, "evaluate more facts, or another probe (-p)"),
            (0.1, "less than 90 % is kept; prune"),
        ):
            probes = {"atlas": make_entry(chance=chance, majority=None)}
            model = make_model(sha256="b" * 64, recipe=recipe, source={"name": "tiny-bert"})
            card = make_card(
                make_answers(rows[0], probes=probes), [make_answers(rows[1], model, probes)], gates=parse_gates(0.9)
            )
            assert card.comparisons[0].next.startswith(f"Next: {advice}")
            with pytest.raises(GateNotMet) as error:
                hold_to_gates(None, card)
            assert ("says little" in str(error.value)) == ("says little" in card.comparisons[0].next) == (chance == 0.5)

    def test_no_advice_without_facts(self) -> None:
        assert compare().next == ""

    def test_interval_just_below_the_threshold_is_not_rounded_to_it(self) -> None:
        original, compressed = make_runs(make_rows(100, 10))
        card = make_card(original, [compressed])
        assert "less than 95 % is kept" in card.comparisons[0].next
        assert "(90.9 %, interval 84.1 to 94.99 %)" in card.verdict
        assert "| 90.9 % (84.1 to 94.99 %) |" in render_markdown(card)

    def test_gate_on_all_facts_is_the_threshold(self) -> None:
        original, compressed = make_runs(make_rows(960, 40))

        def advise(*gates: float | str) -> str:
            return make_card(original, [compressed], gates=parse_gates(gates)).comparisons[0].next

        assert advise("science=0.9") == advise()
        assert "would tell whether 95 % is kept" in advise()
        # A run that fails its gate must not advise to deploy the model.
        assert advise(0.99) == "Next: compress less, or in another way: less than 99 % is kept."
        assert advise("science=0.9", 0.9) == "Next: deploy it, if 90 % is enough: the interval lies above."

    def test_gate_that_was_decided_early_is_the_threshold(self) -> None:
        comparison = compare(29, 3)
        stop = EarlyStop(0.8, 0.05, 32, 32, 4000, Estimate(0.91, 0.81, 0.99), met=True)
        # The gate was decided on its own facts, whatever the interval over all facts.
        assert comparison.kept.low < 0.8
        assert write_advice(replace(comparison, early=stop)) == "Next: deploy it, if 80 % is enough."
        missed = replace(stop, gate=0.99, met=False)
        assert "less than 99 % is kept" in write_advice(replace(comparison, early=missed))


class TestMilderRecipe:
    def test_pruning_is_halved_and_then_dropped(self) -> None:
        recipe = Recipe((Prune(0.2, where=ATTENTION), Quantize("int8-weights", ATTENTION)))
        assert find_change(recipe) == "prune 10 % of the weights instead of 20 %"
        recipe = Recipe((Prune(0.08, where=ATTENTION), Quantize("int8-weights", ATTENTION)))
        assert find_change(recipe) == "do not prune"

    def test_pattern_is_dropped_instead_of_halved(self) -> None:
        pruned = Prune(0.5, "wanda", ATTENTION, parameters={"pattern": "2:4"})
        assert find_change(Recipe((pruned, Quantize("int8-weights", ATTENTION)))) == "do not prune"

    def test_calibration_is_dropped_with_its_step(self) -> None:
        recipe = Recipe((Prune(0.08, "wanda", ATTENTION), Quantize("int8", ATTENTION)))
        assert recipe.calibration == Calibration()
        milder = find_milder(recipe, {})
        assert milder
        assert milder[1].calibration is None

    def test_int4_is_rounded_by_gptq_then_becomes_8_bits(self) -> None:
        nearest, gptq = (Recipe((Quantize("int4", ATTENTION, rounding=name),)) for name in ("nearest", "gptq"))
        assert find_change(nearest) == "round by GPTQ instead of to nearest"
        assert find_change(gptq) == "quantize to int8-weights instead of int4"

    @pytest.mark.parametrize("scheme", ["int8", "int8-paper"])
    def test_only_weights_are_quantized_instead_of_activations_too(self, scheme: str) -> None:
        assert find_change(Recipe((Quantize(scheme, ATTENTION),))) == f"quantize to int8-weights instead of {scheme}"

    def test_the_group_that_changed_most_is_left_out(self) -> None:
        recipe = Recipe((Quantize("int8-weights", BOTH),))
        assert find_milder(recipe, GROUPS) == (
            "leave feed-forward as it is: its weights changed most",
            Recipe((Quantize("int8-weights", ATTENTION),)),
        )

    @pytest.mark.parametrize("groups", [{}, {"attention": {"relative_error": 0.1}}, {"attention": {}, "other": {}}])
    def test_no_group_is_left_out_without_its_relative_error(self, groups: dict[str, Any]) -> None:
        assert find_change(Recipe((Quantize("int8-weights", BOTH),)), groups) is None

    def test_fewer_blocks_and_neurons_are_dropped(self) -> None:
        assert find_change(Recipe((DropBlocks(5),))) == "drop 2 instead of 5 blocks"
        assert find_change(Recipe((DropBlocks("3-5"), Quantize("int8-weights", ATTENTION)))) == "drop no blocks"
        named = Recipe((DropBlocks("3-5"), Prune(0.3), Quantize("int4")))
        assert find_change(named) == "drop no blocks"  # which lose more than pruning
        assert find_change(Recipe((DropNeurons(0.3),))) == "drop 15 % of the neurons instead of 30 %"


RECIPES = [
    Recipe((Prune(1 / 3),)),
    Recipe((Prune(0.3, "ln-structured", BOTH, norm=2, dim=1), Quantize("int8", BOTH, smooth=0.5))),
    Recipe(
        (Quantize("int4", ATTENTION, {"group_size": 64}, rounding="gptq"),), calibration=Calibration("a b.txt", 100)
    ),
    Recipe((Prune(0.5, "sparsegpt", Where(layers="0-5"), parameters={"pattern": "2:4"}),)),
    Recipe((DropBlocks(3), DropNeurons(0.25), Quantize("int8-weights")), module_map="paper"),
    Recipe((Prune(0.1, "random-unstructured", Where(("overall",), exclude=("up_proj", "q")), seed=7),)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.setup)
def test_options_of_convert_make_the_same_recipe(recipe: Recipe) -> None:
    words = format_options(recipe)
    assert words is not None
    options = convert.make_context("convert", ["MODEL", "OUTPUT", *words], resilient_parsing=False).params
    values = {name: value for name, value in options.items() if value is not None}
    where = Where(tuple(options["scope"]) or Where().scope, options["include"], options["exclude"], options["layers"])
    of_steps = ("per_layer", "norm", "dim", "seed", "rounding", "smooth", "drop_blocks", "drop_neurons")
    others = (*of_steps, "calibration", "calibration_tokens")
    rebuilt = build_recipe(
        where,
        prune=options["prune"],
        prune_method=options["prune_method"],
        quantize=options["quantize"],
        module_map=options["module_map"],
        parameters={name: values[name] for name in ("group_size", "pattern") if name in values},
        **{name: values[name] for name in others if name in values},
    )
    assert rebuilt == recipe


def test_steps_of_different_scopes_have_no_options() -> None:
    recipe = Recipe((Prune(0.2, where=ATTENTION), Quantize("int8", BOTH)))
    assert format_options(recipe) is None
    advice = compare(500, 500, recipe=recipe).next
    assert advice.endswith("prune 10 % of the weights instead of 20 %")
