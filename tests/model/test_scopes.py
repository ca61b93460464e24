"""What each scope takes, what narrows it, and that nothing which matches nothing passes in silence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.model.structure import SCOPES, LinearWeight, Structure, count_scope_parameters, list_scopes, select


def linear(module: str, group: str | None, layer: int | None = None, **more: object) -> LinearWeight:
    return LinearWeight(f"{module}.weight", module, "linear", (4, 6), group, layer, **more)  # type: ignore[arg-type]


def of(*linears: LinearWeight, opaque: dict[str, str] | None = None) -> Structure:
    return Structure("TinyModel", "tiny", "structural", linears, {}, {}, opaque or {})  # type: ignore[arg-type]


ONE_STACK = of(
    linear("embed.project", "other"),
    *(
        weight
        for layer in range(3)
        for weight in (
            linear(f"layer.{layer}.attn.query", "attention", layer),
            linear(f"layer.{layer}.attn.output", "attention", layer),
            linear(f"layer.{layer}.mlp.up", "feed-forward", layer),
        )
    ),
    linear("head", "final"),
)
TWO_STACKS = of(
    linear("encoder.0.attn", "attention", 0, stack="encoder"),
    linear("encoder.0.mlp", "feed-forward", 0, stack="encoder"),
    linear("decoder.project", "other", stack="decoder"),
    linear("decoder.0.attn", "attention", 0, stack="decoder"),
    linear("decoder.0.cross", "attention", 0, stack="decoder", cross=True),
    linear("decoder.1.mlp", "feed-forward", 1, stack="decoder"),
    linear("decoder.head", "final", stack="decoder"),
)
MULTIMODAL = of(
    linear("tower.0.attn", "vision", 0),
    linear("tower.5.attn", "vision", 5),
    linear("projector", "other"),
    linear("layers.0.attn", "attention", 0),
    linear("layers.0.gate", "other", 0),
    linear("layers.1.mlp", "feed-forward", 1),
    linear("head", "final"),
    opaque={"tower.0.pool": "vision"},
)
STRANGER = of(*ONE_STACK.linears[:-1], linear("layer.1.strange.thing", None, 1), ONE_STACK.linears[-1])
RAW = of(linear("layer.0.mlp.up", "feed-forward", 0), linear("head", "final"), opaque={"layer.0.attn.q": "attention"})


def modules(weights: tuple[LinearWeight, ...]) -> list[str]:
    return [weight.module for weight in weights]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("attention", "encoder.0.attn decoder.0.attn decoder.0.cross"),
        ("feed-forward", "encoder.0.mlp decoder.1.mlp"),
        ("final", "decoder.head"),
        ("self-attention", "encoder.0.attn decoder.0.attn"),
        ("cross-attention", "decoder.0.cross"),
        ("encoder-attention", "encoder.0.attn"),
        ("decoder-attention", "decoder.0.attn decoder.0.cross"),
        ("encoder", "encoder.0.attn encoder.0.mlp"),
        ("decoder", "decoder.project decoder.0.attn decoder.0.cross decoder.1.mlp"),
    ],
)
def test_a_scope_takes_its_layers_in_tree_order(scope: str, expected: str) -> None:
    for action in ("prune", "quantize"):
        assert modules(select(TWO_STACKS, [scope], action)) == expected.split()


def test_overall_spares_the_final_layer_when_pruning_and_takes_it_when_quantizing() -> None:
    everything = modules(TWO_STACKS.linears)
    assert modules(select(TWO_STACKS, ["overall"], "quantize")) == everything
    assert modules(select(TWO_STACKS, ["overall"], "prune")) == everything[:-1]
    assert modules(select(TWO_STACKS, ["overall", "final"], "prune")) == everything


@pytest.mark.parametrize("action", ["prune", "quantize"])
def test_blocks_take_all_in_the_blocks_and_nothing_beside_them(action: Any) -> None:
    assert modules(select(MULTIMODAL, ["blocks"], action)) == ["layers.0.attn", "layers.0.gate", "layers.1.mlp"]
    assert modules(select(TWO_STACKS, ["blocks"], action)) == [
        weight.module for weight in TWO_STACKS.linears if weight.layer is not None
    ]


@pytest.mark.parametrize("action", ["prune", "quantize"])
def test_towers_are_in_the_scope_vision_alone(action: Any) -> None:
    towers = ["tower.0.attn", "tower.5.attn"]
    assert modules(select(MULTIMODAL, ["vision"], action, exclude=["pool"])) == towers
    for scope in set(list_scopes(MULTIMODAL)) - {"vision"}:
        assert not set(modules(select(MULTIMODAL, [scope], action))) & set(towers)


def test_layers_of_a_multimodal_model_are_the_language_models_and_of_vision_the_towers() -> None:
    assert modules(select(MULTIMODAL, ["attention"], "prune", layers="0")) == ["layers.0.attn"]
    assert modules(select(MULTIMODAL, ["vision"], "prune", exclude=["pool"], layers="5")) == ["tower.5.attn"]
    with pytest.raises(UsageError, match="blocks 0-1"):
        select(MULTIMODAL, ["blocks"], "prune", layers="0-5")


def test_a_number_within_the_stack_may_lack_layers_of_the_scope() -> None:
    assert modules(select(TWO_STACKS, ["decoder-attention"], "prune", layers="0-1")) == [
        "decoder.0.attn",
        "decoder.0.cross",
    ]
    with pytest.raises(UsageError, match="blocks 0-0"):
        select(TWO_STACKS, ["encoder"], "prune", layers="0-1")


def test_scopes_unite_without_doubles() -> None:
    chosen = select(ONE_STACK, ["final", "attention", "self-attention"], "prune")
    assert modules(chosen) == [w.module for w in ONE_STACK.linears if w.group in ("attention", "final")]


def test_only_scopes_that_a_model_has_are_named() -> None:
    assert list_scopes(TWO_STACKS) == tuple(name for name in SCOPES if name != "vision")
    assert list_scopes(ONE_STACK) == ("blocks", "attention", "feed-forward", "final", "overall", "self-attention")
    assert list_scopes(MULTIMODAL)[-1] == "vision"


def test_parameters_count_once_a_use() -> None:
    structure = of(linear("a", "attention", uses=5), linear("head", "final"))
    assert count_scope_parameters(structure)["overall"] == {"prune": 5 * 24, "quantize": 6 * 24}


@given(st.lists(st.sampled_from(list(list_scopes(TWO_STACKS))), min_size=1), st.sampled_from(["prune", "quantize"]))
def test_a_union_is_the_sum_of_its_parts(scopes: list[str], action: str) -> None:
    parts = {weight for scope in scopes for weight in select(TWO_STACKS, [scope], action)}  # type: ignore[arg-type]
    together = select(TWO_STACKS, scopes, action)  # type: ignore[arg-type]
    assert set(together) == parts
    assert list(together) == [weight for weight in TWO_STACKS.linears if weight in parts]


@pytest.mark.parametrize("scope", ["cross-attention", "encoder", "decoder-attention"])
def test_a_scope_that_the_model_lacks_is_an_error_that_lists_those_it_has(scope: str) -> None:
    with pytest.raises(UsageError) as error:
        select(ONE_STACK, [scope], "prune")
    assert scope in error.value.what
    assert "attention (144 parameters)" in str(error.value.hint)


@pytest.mark.parametrize("scopes", [["attn"], ["attention", "everything"], []])
def test_an_unknown_scope_is_an_error_that_lists_those_there_are(scopes: list[str]) -> None:
    with pytest.raises(UsageError, match=r"Choose from blocks.* feed-forward"):
        select(ONE_STACK, scopes, "prune")


@pytest.mark.parametrize(
    ("layers", "blocks"), [("0", {0}), ("1-2", {1, 2}), ("0,2", {0, 2}), (" 0 - 1 , 2", {0, 1, 2})]
)
def test_layers_narrow_to_blocks_and_drop_what_lies_outside(layers: str, blocks: set[int]) -> None:
    chosen = select(ONE_STACK, ["overall"], "quantize", layers=layers)
    assert {weight.layer for weight in chosen} == blocks
    assert len(chosen) == 3 * len(blocks)


@pytest.mark.parametrize("layers", ["", "x", "-1", "1-", "1,,2", "0-1-2", "1.5", "²"])
def test_a_range_that_cannot_be_read_is_an_error_that_shows_how(layers: str) -> None:
    with pytest.raises(UsageError, match="0-2,5"):
        select(ONE_STACK, ["overall"], "prune", layers=layers)


def test_a_range_from_the_wrong_end_is_an_error_that_turns_it_round() -> None:
    with pytest.raises(UsageError, match="Write 1-2"):
        select(ONE_STACK, ["overall"], "prune", layers="2-1")


@pytest.mark.parametrize("layers", ["3", "0,7", "5-9", "1-99"])
def test_a_range_that_matches_nothing_or_reaches_beyond_the_blocks_is_an_error_that_gives_the_range(
    layers: str,
) -> None:
    with pytest.raises(UsageError, match="blocks 0-2"):
        select(ONE_STACK, ["overall"], "prune", layers=layers)


def test_layers_of_a_scope_outside_the_blocks_are_an_error() -> None:
    with pytest.raises(UsageError, match="no blocks"):
        select(ONE_STACK, ["final"], "prune", layers="0")


def test_include_narrows_a_scope_to_what_it_matches() -> None:
    assert modules(select(ONE_STACK, ["attention"], "prune", include=["query"])) == [
        f"layer.{layer}.attn.query" for layer in range(3)
    ]
    assert len(select(ONE_STACK, ["overall"], "prune", include=["query", "mlp"])) == 6


def test_exclude_leaves_out_what_it_matches() -> None:
    assert "embed.project" not in modules(select(ONE_STACK, ["overall"], "prune", exclude=["^embed"]))


def test_include_exclude_and_layers_combine() -> None:
    chosen = select(ONE_STACK, ["attention"], "prune", include=["attn"], exclude=["output"], layers="2")
    assert modules(chosen) == ["layer.2.attn.query"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_that_shows_close_names(option: str) -> None:
    with pytest.raises(UsageError) as error:
        select(ONE_STACK, ["attention"], "prune", **{option: ["query", "attn.querry"]})  # type: ignore[arg-type]
    assert f"--{option} 'attn.querry'" in error.value.what
    assert "layer.N.attn.query" in str(error.value.hint)


def test_a_pattern_that_matches_outside_the_scope_says_where() -> None:
    with pytest.raises(UsageError, match=r"layer\.0\.mlp\.up, which is feed-forward"):
        select(ONE_STACK, ["attention"], "prune", include=["mlp"])


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_is_no_regular_expression_is_an_error(option: str) -> None:
    with pytest.raises(UsageError, match="not a valid regular expression"):
        select(ONE_STACK, ["attention"], "prune", **{option: ["(unclosed"]})  # type: ignore[arg-type]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(UsageError, match="No Linear layer is left"):
        select(ONE_STACK, ["attention"], "prune", exclude=["query", "output"])


@pytest.mark.parametrize("scope", ["attention", "feed-forward", "overall"])
def test_an_unplaced_layer_is_an_error_that_says_how_to_place_it(scope: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        select(STRANGER, [scope], "prune")
    assert "layer.N.strange.thing" in error.value.what
    assert r"--include 'strange\.thing'" in str(error.value.hint)
    assert "--exclude" in str(error.value.hint)


def test_the_final_layer_is_known_whatever_is_unplaced() -> None:
    assert modules(select(STRANGER, ["final"], "prune")) == ["head"]


def test_include_of_an_unplaced_layer_adds_it_to_the_scope() -> None:
    chosen = modules(select(STRANGER, ["attention"], "prune", include=[r"strange\.thing"]))
    assert chosen == [w.module for w in STRANGER.linears if w.group in ("attention", None)]


def test_exclude_of_an_unplaced_layer_leaves_it_out() -> None:
    chosen = select(STRANGER, ["attention"], "prune", exclude=["strange"])
    assert chosen == select(ONE_STACK, ["attention"], "prune")


def test_an_include_that_matches_both_narrows_and_adds() -> None:
    chosen = modules(select(STRANGER, ["attention"], "prune", include=[r"layer\.1"]))
    assert chosen == ["layer.1.attn.query", "layer.1.attn.output", "layer.1.strange.thing"]


def test_a_model_of_unplaced_layers_alone_can_be_named_in_full() -> None:
    structure = of(linear("one", None), linear("two", None))
    with pytest.raises(UnsupportedError, match="one"):
        select(structure, ["overall"], "prune")
    assert modules(select(structure, ["overall"], "prune", include=["one|two"])) == ["one", "two"]


def test_a_matrix_that_is_no_linear_layer_refuses_the_scopes_that_ought_to_take_it() -> None:
    for scope in ("attention", "self-attention", "overall"):
        with pytest.raises(UnsupportedError) as error:
            select(RAW, [scope], "prune")
        assert error.value.what.endswith("cannot be compressed (1):\n  layer.N.attn.q")
        assert "--exclude" in str(error.value.hint)
    for scope in ("feed-forward", "final"):
        assert select(RAW, [scope], "prune")


def test_excluding_such_a_matrix_takes_the_rest() -> None:
    assert modules(select(RAW, ["overall"], "prune", exclude=["attn"])) == ["layer.0.mlp.up"]
    assert modules(select(RAW, ["overall"], "prune", include=["mlp"])) == ["layer.0.mlp.up"]


def test_a_scope_is_empty_where_all_of_it_is_excluded_matrices() -> None:
    with pytest.raises(UsageError, match='"attention" is empty'):
        select(RAW, ["attention"], "prune", exclude=["attn"])


def test_the_order_is_that_of_the_tree_whatever_the_order_of_scopes() -> None:
    shuffled = replace(ONE_STACK, linears=tuple(reversed(ONE_STACK.linears)))
    chosen = select(shuffled, ["attention", "final"], "prune")
    assert chosen[0].module == "head"
