"""Scopes, layers and patterns select the right modules, and an option that matches nothing is an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.model.structure import SCOPES, LinearWeight, Structure, count_scope_parameters, list_scopes, select


def linear(module: str, group: str | None, layer: int | None = None, **options: object) -> LinearWeight:
    return LinearWeight(f"{module}.weight", module, "linear", (4, 6), group, layer, **options)  # type: ignore[arg-type]


def build(*linears: LinearWeight, opaque: dict[str, str] | None = None) -> Structure:
    return Structure("TinyModel", "tiny", "structural", linears, {}, {}, opaque or {})  # type: ignore[arg-type]


ONE_STACK = build(
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
TWO_STACKS = build(
    linear("encoder.0.attn", "attention", 0, stack="encoder"),
    linear("encoder.0.mlp", "feed-forward", 0, stack="encoder"),
    linear("decoder.project", "other", stack="decoder"),
    linear("decoder.0.attn", "attention", 0, stack="decoder"),
    linear("decoder.0.cross", "attention", 0, stack="decoder", cross=True),
    linear("decoder.1.mlp", "feed-forward", 1, stack="decoder"),
    linear("decoder.head", "final", stack="decoder"),
)
MULTIMODAL = build(
    linear("tower.0.attn", "vision", 0),
    linear("tower.5.attn", "vision", 5),
    linear("projector", "other"),
    linear("layers.0.attn", "attention", 0),
    linear("layers.0.gate", "other", 0),
    linear("layers.1.mlp", "feed-forward", 1),
    linear("head", "final"),
    opaque={"tower.0.pool": "vision"},
)
UNPLACED = build(*ONE_STACK.linears[:-1], linear("layer.1.strange.thing", None, 1), ONE_STACK.linears[-1])
OPAQUE = build(
    linear("layer.0.mlp.up", "feed-forward", 0), linear("head", "final"), opaque={"layer.0.attn.q": "attention"}
)


def list_modules(weights: tuple[LinearWeight, ...]) -> list[str]:
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
def test_a_scope_selects_its_layers_in_tree_order(scope: str, expected: str) -> None:
    for action in ("prune", "quantize"):
        assert list_modules(select(TWO_STACKS, [scope], action)) == expected.split()


def test_overall_includes_the_final_layer_only_when_quantizing() -> None:
    everything = list_modules(TWO_STACKS.linears)
    assert list_modules(select(TWO_STACKS, ["overall"], "quantize")) == everything
    assert list_modules(select(TWO_STACKS, ["overall"], "prune")) == everything[:-1]
    assert list_modules(select(TWO_STACKS, ["overall", "final"], "prune")) == everything


@pytest.mark.parametrize("action", ["prune", "quantize"])
def test_blocks_selects_every_layer_in_the_blocks_and_no_other(action: Any) -> None:
    assert list_modules(select(MULTIMODAL, ["blocks"], action)) == ["layers.0.attn", "layers.0.gate", "layers.1.mlp"]
    assert list_modules(select(TWO_STACKS, ["blocks"], action)) == [
        weight.module for weight in TWO_STACKS.linears if weight.layer is not None
    ]


@pytest.mark.parametrize("action", ["prune", "quantize"])
def test_only_the_scope_vision_selects_towers(action: Any) -> None:
    towers = ["tower.0.attn", "tower.5.attn"]
    assert list_modules(select(MULTIMODAL, ["vision"], action, exclude=["pool"])) == towers
    for scope in set(list_scopes(MULTIMODAL)) - {"vision"}:
        assert not set(list_modules(select(MULTIMODAL, [scope], action))) & set(towers)


def test_layers_number_the_language_model_and_with_vision_the_tower() -> None:
    assert list_modules(select(MULTIMODAL, ["attention"], "prune", layers="0")) == ["layers.0.attn"]
    assert list_modules(select(MULTIMODAL, ["vision"], "prune", exclude=["pool"], layers="5")) == ["tower.5.attn"]
    with pytest.raises(UsageError, match="blocks 0-1"):
        select(MULTIMODAL, ["blocks"], "prune", layers="0-5")


def test_a_block_number_may_have_no_layers_in_the_scope() -> None:
    assert list_modules(select(TWO_STACKS, ["decoder-attention"], "prune", layers="0-1")) == [
        "decoder.0.attn",
        "decoder.0.cross",
    ]
    with pytest.raises(UsageError, match="blocks 0-0"):
        select(TWO_STACKS, ["encoder"], "prune", layers="0-1")


def test_only_scopes_that_a_model_has_are_named() -> None:
    assert list_scopes(TWO_STACKS) == tuple(name for name in SCOPES if name != "vision")
    assert list_scopes(ONE_STACK) == ("blocks", "attention", "feed-forward", "final", "overall", "self-attention")
    assert list_scopes(MULTIMODAL)[-1] == "vision"


def test_parameters_count_once_per_use() -> None:
    structure = build(linear("a", "attention", uses=5), linear("head", "final"))
    assert count_scope_parameters(structure)["overall"] == {"prune": 5 * 24, "quantize": 6 * 24}


@given(st.lists(st.sampled_from(list(list_scopes(TWO_STACKS))), min_size=1), st.sampled_from(["prune", "quantize"]))
def test_several_scopes_select_their_union_in_tree_order(scopes: list[str], action: str) -> None:
    expected = {weight for scope in scopes for weight in select(TWO_STACKS, [scope], action)}  # type: ignore[arg-type]
    selected = select(TWO_STACKS, scopes, action)  # type: ignore[arg-type]
    assert set(selected) == expected
    assert list(selected) == [weight for weight in TWO_STACKS.linears if weight in expected]


@pytest.mark.parametrize("scope", ["cross-attention", "encoder", "decoder-attention"])
def test_a_scope_that_the_model_lacks_is_an_error_that_lists_its_scopes(scope: str) -> None:
    with pytest.raises(UsageError) as error:
        select(ONE_STACK, [scope], "prune")
    assert scope in error.value.what
    assert "attention (144 parameters)" in str(error.value.hint)


@pytest.mark.parametrize("scopes", [["attn"], ["attention", "everything"], []])
def test_an_unknown_scope_is_an_error_that_lists_the_scopes(scopes: list[str]) -> None:
    with pytest.raises(UsageError, match=r"Choose from blocks.* feed-forward"):
        select(ONE_STACK, scopes, "prune")


@pytest.mark.parametrize(
    ("layers", "blocks"), [("0", {0}), ("1-2", {1, 2}), ("0,2", {0, 2}), (" 0 - 1 , 2", {0, 1, 2})]
)
def test_layers_restrict_a_selection_to_blocks(layers: str, blocks: set[int]) -> None:
    selected = select(ONE_STACK, ["overall"], "quantize", layers=layers)
    assert {weight.layer for weight in selected} == blocks
    assert len(selected) == 3 * len(blocks)


@pytest.mark.parametrize("layers", ["", "x", "-1", "1-", "1,,2", "0-1-2", "1.5", "²"])
def test_an_invalid_range_is_an_error_that_shows_the_format(layers: str) -> None:
    with pytest.raises(UsageError, match="0-2,5"):
        select(ONE_STACK, ["overall"], "prune", layers=layers)


def test_a_reversed_range_is_an_error_that_suggests_the_right_one() -> None:
    with pytest.raises(UsageError, match="Write 1-2"):
        select(ONE_STACK, ["overall"], "prune", layers="2-1")


@pytest.mark.parametrize("layers", ["3", "0,7", "5-9", "1-99"])
def test_a_range_beyond_the_blocks_is_an_error_that_gives_the_range(
    layers: str,
) -> None:
    with pytest.raises(UsageError, match="blocks 0-2"):
        select(ONE_STACK, ["overall"], "prune", layers=layers)


def test_layers_with_a_scope_outside_the_blocks_is_an_error() -> None:
    with pytest.raises(UsageError, match="no blocks"):
        select(ONE_STACK, ["final"], "prune", layers="0")


def test_include_selects_only_matches() -> None:
    assert list_modules(select(ONE_STACK, ["attention"], "prune", include=["query"])) == [
        f"layer.{layer}.attn.query" for layer in range(3)
    ]
    assert len(select(ONE_STACK, ["overall"], "prune", include=["query", "mlp"])) == 6


def test_exclude_leaves_out_matches() -> None:
    assert "embed.project" not in list_modules(select(ONE_STACK, ["overall"], "prune", exclude=["^embed"]))


def test_include_exclude_and_layers_combine() -> None:
    selected = select(ONE_STACK, ["attention"], "prune", include=["attn"], exclude=["output"], layers="2")
    assert list_modules(selected) == ["layer.2.attn.query"]


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
def test_an_invalid_regular_expression_is_an_error(option: str) -> None:
    with pytest.raises(UsageError, match="not a valid regular expression"):
        select(ONE_STACK, ["attention"], "prune", **{option: ["(unclosed"]})  # type: ignore[arg-type]


def test_an_empty_selection_is_an_error() -> None:
    with pytest.raises(UsageError, match="No Linear layer is left"):
        select(ONE_STACK, ["attention"], "prune", exclude=["query", "output"])


@pytest.mark.parametrize("scope", ["attention", "feed-forward", "overall"])
def test_an_unplaced_layer_is_an_error_that_says_how_to_place_it(scope: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        select(UNPLACED, [scope], "prune")
    assert "layer.N.strange.thing" in error.value.what
    assert r"--include 'strange\.thing'" in str(error.value.hint)
    assert "--exclude" in str(error.value.hint)


def test_the_final_layer_can_be_selected_despite_unplaced_layers() -> None:
    assert list_modules(select(UNPLACED, ["final"], "prune")) == ["head"]


def test_include_of_an_unplaced_layer_adds_it_to_the_scope() -> None:
    selected = list_modules(select(UNPLACED, ["attention"], "prune", include=[r"strange\.thing"]))
    assert selected == [w.module for w in UNPLACED.linears if w.group in ("attention", None)]


def test_exclude_of_an_unplaced_layer_leaves_it_out() -> None:
    selected = select(UNPLACED, ["attention"], "prune", exclude=["strange"])
    assert selected == select(ONE_STACK, ["attention"], "prune")


def test_include_can_restrict_a_scope_and_add_an_unplaced_layer() -> None:
    selected = list_modules(select(UNPLACED, ["attention"], "prune", include=[r"layer\.1"]))
    assert selected == ["layer.1.attn.query", "layer.1.attn.output", "layer.1.strange.thing"]


def test_include_selects_all_of_a_model_of_unplaced_layers() -> None:
    structure = build(linear("one", None), linear("two", None))
    with pytest.raises(UnsupportedError, match="one"):
        select(structure, ["overall"], "prune")
    assert list_modules(select(structure, ["overall"], "prune", include=["one|two"])) == ["one", "two"]


def test_scopes_with_an_opaque_matrix_are_refused() -> None:
    for scope in ("attention", "self-attention", "overall"):
        with pytest.raises(UnsupportedError) as error:
            select(OPAQUE, [scope], "prune")
        assert error.value.what.endswith("cannot be compressed (1):\n  layer.N.attn.q")
        assert "--exclude" in str(error.value.hint)
    for scope in ("feed-forward", "final"):
        assert select(OPAQUE, [scope], "prune")


def test_excluding_an_opaque_matrix_selects_the_other_layers() -> None:
    assert list_modules(select(OPAQUE, ["overall"], "prune", exclude=["attn"])) == ["layer.0.mlp.up"]
    assert list_modules(select(OPAQUE, ["overall"], "prune", include=["mlp"])) == ["layer.0.mlp.up"]


def test_a_scope_of_excluded_opaque_matrices_is_empty() -> None:
    with pytest.raises(UsageError, match='"attention" is empty'):
        select(OPAQUE, ["attention"], "prune", exclude=["attn"])


def test_a_selection_has_tree_order_whatever_the_order_of_scopes() -> None:
    shuffled = replace(ONE_STACK, linears=tuple(reversed(ONE_STACK.linears)))
    selected = select(shuffled, ["attention", "final"], "prune")
    assert selected[0].module == "head"
