"""What `import compressknow` gives, and that it gives it at once."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compressknow
from compressknow.api.keywords import ServerKeywords, build_run_options
from compressknow.api.report import report
from compressknow.base.errors import CheckpointError, UsageError
from compressknow.cli import COMMANDS, main
from compressknow.compress.recipe import Recipe
from compressknow.model.structure import DEFAULT_SCOPES
from tests.models import save_tiny

VERBS = [name for name in compressknow.__all__ if name.islower() and not name.startswith("_")]
RECORDS = [name for name in compressknow.__all__ if not name.islower()]


@pytest.mark.parametrize("name", VERBS)
def test_verbs_are_documented_and_typed(name: str) -> None:
    # No package has the name of a verb: importing one would take the verb's place.
    assert not (Path(compressknow.__file__).parent / name).exists(), name
    assert inspect.isfunction(getattr(compressknow, name))
    function = getattr(importlib.import_module(f"compressknow.api.{name}"), name)
    assert inspect.isfunction(function)
    assert len(inspect.getdoc(function) or "") > 80
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


# What the terminal alone has, and what Python alone has.
OF_THE_TERMINAL = {"json", "push", "private", "no_facts of sweep", "model of probe", "model of report"}
OF_PYTHON = {"on_progress", "on_result", "command", "options", "settings", "parameters", "check", "model_name"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_verb_takes_the_words_of_its_command(name: str) -> None:
    command = getattr(importlib.import_module(f"compressknow.cli.{name}"), name)
    words = set()
    for each in command.params:
        option = next((option for option in each.opts if option.startswith("--")), each.name)
        words.add(option.removeprefix("--").replace("-", "_"))
    verb = getattr(importlib.import_module(f"compressknow.api.{name}"), name)
    parameters = set(inspect.signature(verb).parameters)
    assert {word for word in words - parameters if {word, f"{word} of {name}"}.isdisjoint(OF_THE_TERMINAL)} == set()
    assert parameters - words - OF_PYTHON == set()


def test_the_defaults_that_a_signature_shows_are_those_of_the_records() -> None:
    shown = {name: each.default for name, each in inspect.signature(report).parameters.items()}
    options, settings = build_run_options({name: shown[name] for name in ServerKeywords.__annotations__})
    assert (options, settings) == (compressknow.Options(), compressknow.Settings())


def test_an_unknown_word_is_told_what_was_meant() -> None:
    with pytest.raises(TypeError, match=r"report\(\) got an unexpected keyword argument 'limt'. Did you mean limit\?"):
        report("a", "b", limt=3)  # type: ignore[call-arg]


def test_a_number_of_numpy_is_taken_and_a_text_in_the_place_of_a_number_refused_before_any_work(tmp_path: Path) -> None:
    assert json.dumps(asdict(compressknow.Options(seed=np.int64(3)))["seed"]) == "3"  # type: ignore[arg-type]
    for word, value in (("seed", "x"), ("limit", "3"), ("templates", 2.5)):
        with pytest.raises(UsageError, match=f"^`{word}` must be a whole number: {value!r}"):
            compressknow.probe("a", tmp_path / "answers", **{word: value})
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_parameter_in_python_and_the_option_at_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError) as raised:
        report("a", "b", early=True)
    assert str(raised.value) == "`early` needs a gate.\nAdd `fail_under=SHARE`, or leave out `early`."
    assert raised.value.hint == "Add `fail_under=SHARE`, or leave out `early`."
    assert main(["report", "a", "b", "--early"]) == 2
    assert "--early needs a gate.\n  Add --fail-under SHARE, or leave out --early." in capsys.readouterr().err


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_documented_classes(name: str) -> None:
    record = getattr(compressknow, name)
    assert inspect.isclass(record)
    assert len(inspect.getdoc(record) or "") > 20
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"::: {record.__module__}.{name}\n" in page or (issubclass(record, Exception) and name in page)


@pytest.mark.parametrize("module", ["compressknow", "compressknow.cli", "compressknow.pages.model_card"])
def test_import_brings_in_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "compressed_tensors", "huggingface_hub", "matplotlib"}
    code = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == []


@pytest.mark.parametrize(
    "option",
    [
        *({"scope": "attention"}, {"include": ["q"]}, {"exclude": ["q"]}, {"layers": "0"}, {"prune": 0.5}),
        *({"prune_method": "ln-structured"}, {"per_layer": True}, {"norm": 2}, {"dim": 1}, {"seed": 1}),
        *({"quantize": "int8"}, {"module_map": "paper"}, {"prune": 0.0}, {"drop_blocks": 0}, {"smooth": 0.5}),
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_recipe_refuses_every_option_that_it_says_itself(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot be combined with `{next(iter(option))}`"):
        compressknow.convert(tmp_path, tmp_path / "out", recipe={"steps": [{"prune": 0.2}]}, **option)


@pytest.mark.parametrize("scope", ["blocks", ["blocks"], ("blocks",)], ids=str)
def test_a_recipe_takes_a_scope_that_says_the_default(scope: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        compressknow.convert(tmp_path / "in", tmp_path / "out", recipe={"steps": [{"prune": 0.2}]}, scope=scope)


def test_one_pattern_and_one_block_may_be_given_by_themselves(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "in")
    found = compressknow.convert(source, tmp_path / "out", prune=0.2, include="q_proj", layers=1, dry_run=True)
    assert [row["name"] for row in found["tensors"] if row["in_scope"]] == ["model.layers.1.self_attn.q_proj.weight"]


def test_a_recipe_without_a_scope_means_the_blocks_and_says_so() -> None:
    recipe = Recipe.from_dict({"steps": [{"prune": 0.2}, {"quantize": "int8"}]})
    assert recipe.setup == "Blocks_GPQ 20%"
    assert [step["scope"] for step in recipe.to_dict()["steps"]] == [["blocks"], ["blocks"]]
    assert signature_of_convert()["scope"].default == DEFAULT_SCOPES


def signature_of_convert() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(compressknow.convert).parameters
