"""Regular expressions that would take for ever are given up after seconds, with a message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compressknow
from compressknow.base.errors import CheckpointError, UsageError
from compressknow.model.scopes import Pattern, check_targets
from tests.hostile.bounded import bounded, refused
from tests.models import save_tiny

EXPONENTIAL = [r"^(?:(?:[a-z.0-9_]+)*)*Z$", r"(.*)*(.*)*(.*)*(.*)*x{9}$", r"^((a|b|[a-z._0-9])+)+!$"]


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_options_and_recipes(tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny("bert", tmp_path / "model")
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"steps": [{"prune": 0.2, "exclude": [pattern]}]}))
    for options in (("--prune", "0.2", "--include", pattern), ("--recipe", recipe)):
        said = refused(capsys, "convert", model, tmp_path / "out", *options)
        assert "takes too long" in said or "matches no Linear layer" in said


def test_one_that_python_takes_for_ever_over() -> None:
    pattern = Pattern("--include", r"^(a|a)*$")
    with bounded(), pytest.raises(UsageError, match="takes too long to match"):
        pattern.search("a" * 60 + "!")


def test_the_time_is_for_all_names_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pattern("--exclude", "x")
    monkeypatch.setattr("compressknow.model.scopes.time.monotonic", iter(range(0, 100, 3)).__next__)
    assert not pattern.search("a")
    assert pattern._left == pytest.approx(0.0)


@pytest.mark.parametrize("wrong", ["(", "a" * 1001, "(?P<n>a)(?P<n>b)", "a{2,1}", "(?z)"])
def test_what_is_no_pattern_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="--include"):
        Pattern("--include", wrong)


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [("^lm_head$", "lm_head", True), (r"layers\.(\d|1\d)\.", "layers.12.mlp", True), ("attn|mlp", "norm", False)],
)
def test_it_matches_as_re_does(pattern: str, name: str, found: bool) -> None:
    assert Pattern("--include", pattern).search(name) is found


@pytest.mark.parametrize("pattern", [*EXPONENTIAL, r".*a.*b.*c.*d.*e", "(" * 5])
def test_a_checkpoint_whose_targets_would_take_for_ever_is_not_loaded(tmp_path: Path, pattern: str) -> None:
    compressknow.convert(save_tiny("llama", tmp_path / "llama"), tmp_path / "int8", quantize="int8")
    config = tmp_path / "int8" / "config.json"
    settings = json.loads(config.read_text())
    settings["quantization_config"]["ignore"].append(f"re:{pattern}")
    config.write_text(json.dumps(settings))
    with bounded(), pytest.raises(CheckpointError, match="by a pattern that may take for ever"):
        compressknow.load(tmp_path / "int8")


@pytest.mark.parametrize("pattern", [r".*lm_head", r"^model\.layers\.(?:0|1|12)\.mlp\.(gate|up)_proj$", r".*vision.*"])
def test_targets_as_people_write_them_are_no_reason_to_refuse(pattern: str) -> None:
    check_targets("model", {"config_groups": {"group_0": {"targets": [f"re:{pattern}"]}}, "ignore": []})
